"""Run by test_microbatches.py on two processes whose rows differ in length: how often each ran and reduced."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from common.launch import allow_fsdp_on_cpu
from scripted import Row, scripted_trainer
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerCallback


class CountReductions(TrainerCallback):
    """Counts the buckets that DDP reduces, in each update."""

    def __init__(self, trainer):
        self.trainer = trainer
        self.counts: list[int] = []

    def on_step_begin(self, args, state, control, **kwargs):
        if not self.counts and isinstance(self.trainer.model_wrapped, DistributedDataParallel):
            self.trainer.model_wrapped.register_comm_hook(None, self.reduce)
        self.counts.append(0)

    def reduce(self, group, bucket):
        self.counts[-1] += 1
        return allreduce_hook(group, bucket)


def main(folder: str, rows_file: str, out: str, options: str) -> None:
    allow_fsdp_on_cpu()
    rows = [Row(**row) for row in json.loads(Path(rows_file).read_text())]
    trainer = scripted_trainer(folder, rows, out, per_device_train_batch_size=len(rows) // 2, **json.loads(options))
    assert trainer.accelerator.num_processes == 2
    reductions, forwards, backwards, microbatches = CountReductions(trainer), [], [], []
    trainer.add_callback(reductions)

    def count(module, args, kwargs):
        if torch.is_grad_enabled() and "action_mask" in kwargs:
            forwards.append(tuple(kwargs["input_ids"].shape))

    trainer.model.register_forward_pre_hook(count, with_kwargs=True)
    backward, divide = trainer.accelerator.backward, trainer._microbatches_of
    trainer.accelerator.backward = lambda loss, **kwargs: backwards.append(1) or backward(loss, **kwargs)
    trainer._microbatches_of = lambda uses: microbatches.append(len(divided := divide(uses))) or divided
    trainer.train()
    seen = gather_object([(forwards, len(backwards), microbatches, reductions.counts)])
    loss = gather_object([trainer.losses])
    gradients = trainer.recorder.gradients[0] if trainer.recorder.gradients else {}
    if trainer.accelerator.is_main_process:
        torch.save({"processes": seen, "losses": loss, "gradients": gradients, "log": trainer.state.log_history,
                    "strategy": trainer.accelerator.distributed_type.value}, Path(out) / "seen.pt")  # fmt: skip


if __name__ == "__main__":
    main(*sys.argv[1:])
    PartialState().destroy_process_group()  # or its threads may outlive the process, which then aborts
