"""Tiny runs of TBRM and of TRL's GRPO in processes that can be killed from outside, and how they ended."""

import hashlib
import json
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint
from trl import GRPOConfig, GRPOTrainer

from common.launch import PROCESSES, become, flat, free_port
from common.tiny import letters
from tbrm_trl import TBRMConfig, TBRMTrainer

PROMPTS = [{"prompt": word} for word in ("1+1=", "Say: ab", "c", "What is it? ", "longer than the others", "x y", "0:")]
LOGS = [
    {**row, "completion": f"{i}abc"[: i % 4 + 1], "reward": i / 7, "half": i % 2} for i, row in enumerate(PROMPTS * 2)
]
SAVED_EVERY, UPDATES = 4, 16
SHARED: dict[str, Any] = dict(
    beta=0.1, learning_rate=0.01, max_steps=UPDATES, max_completion_length=6, num_generations=2,
    per_device_train_batch_size=2, gradient_accumulation_steps=2, steps_per_generation=4, num_iterations=2,
    save_strategy="steps", save_steps=SAVED_EVERY, gradient_checkpointing=False, bf16=False, use_cpu=True,
    logging_steps=1, report_to="none", disable_tqdm=True,
)  # fmt: skip
# TBRM's options in each kind of run. GRPO has only the kinds of `OF_GRPO`.
KINDS: dict[str, dict[str, Any]] = {
    "fresh": dict(save_rollouts=True),
    "replay": dict(replay_buffer_size=12, replay_sampling="prioritized"),
    "logs": {},
    "LoRA": {},
    "two processes": dict(per_device_train_batch_size=1),
    "pool": dict(rollout_pool=6, max_completion_length=16),
    "pool, two processes": dict(rollout_pool=8, max_completion_length=16, per_device_train_batch_size=1),
}
OF_GRPO = ("fresh", "LoRA", "two processes")


class Begin(TrainerCallback):
    """Writes a file when training begins, and at its end one with the seconds that it took."""

    def __init__(self, folder: Path):
        self.folder = folder

    def on_train_begin(self, args, state, control, **kwargs):
        self.begun = time.monotonic()
        (self.folder / "begun").touch()

    def on_train_end(self, args, state, control, **kwargs):
        (self.folder / "seconds").write_text(str(time.monotonic() - self.begun))


def build(method: str, kind: str, model: str, folder: Path, **changes: Any) -> Any:
    own = KINDS[kind] if method == "TBRM" else {n: v for n, v in KINDS[kind].items() if n in SHARED}
    options = {**SHARED, "output_dir": str(folder / "out"), "save_total_limit": 2, **own, **changes}
    lora = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.0) if kind == "LoRA" else None
    rows = Dataset.from_list(LOGS if kind == "logs" else PROMPTS)
    trainer_class, config_class = (TBRMTrainer, TBRMConfig) if method == "TBRM" else (GRPOTrainer, GRPOConfig)
    trainer = trainer_class(model, letters, config_class(**options), rows, peft_config=lora)
    trainer.add_callback(Begin(folder))
    for callback in trainer.callback_handler.callbacks:  # transformers' own waits 3 s, longer than these runs last
        if getattr(callback, "jit_manager", None) is not None:
            callback.jit_manager.kill_wait = 0
    return trainer


def end_of(trainer: Any) -> str:
    """Digest of weights, optimizer, schedule and random states."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    made = [
        model.state_dict(), trainer.optimizer.state_dict(), trainer.lr_scheduler.state_dict(),
        torch.get_rng_state(), random.getstate(), np.random.get_state(),
    ]  # fmt: skip
    return hashlib.sha256(repr(list(flat(made))).encode()).hexdigest()


def child(job: dict[str, Any], process: int, processes: int, port: int) -> None:
    """One process of a run. If the run makes all updates, it writes a file with the digest of its end."""
    method, kind, folder = job["method"], job["kind"], Path(job["folder"])
    become(folder / f"log-{process}", process, processes, port)
    trainer = build(method, kind, job["model"], folder, **job["changes"])
    if method == "TBRM":
        trainer.train(resume_from_checkpoint="auto")
    else:  # what a script around TRL does for the same
        out = folder / "out"
        trainer.train(resume_from_checkpoint=bool(out.exists() and get_last_checkpoint(str(out))) or None)
    if trainer.state.global_step == UPDATES:
        (folder / f"end-{process}.json").write_text(json.dumps(end_of(trainer)))
    PartialState().destroy_process_group()


def run(
    method: str,
    kind: str,
    model: str,
    folder: Path,
    disturb: Callable[[list[Any]], None] | None = None,
    **changes: Any,
) -> list[int | None]:
    """One start of a run. Returns the exit codes of its processes.

    Args:
        method: "TBRM" or "GRPO".
        kind: a key of `KINDS`.
        model: folder of the policy.
        folder: holds the output directory, the logs and the files about the run.
        disturb: called with the processes when training begins.
        changes: changed options.
    """
    for name in ("begun", "seconds", "end-0.json", "end-1.json"):
        (folder / name).unlink(missing_ok=True)
    number, port = (2 if "two processes" in kind else 1), free_port()
    job = dict(method=method, kind=kind, model=model, folder=str(folder), changes=changes)
    processes = [PROCESSES.Process(target=child, args=(job, one, number, port)) for one in range(number)]
    for process in processes:
        process.start()
    while not (folder / "begun").exists() and all(process.is_alive() for process in processes):
        time.sleep(0.005)
    if disturb is not None:
        disturb(processes)
    deadline = time.monotonic() + 120
    while any(process.is_alive() for process in processes) and time.monotonic() < deadline:
        if any(process.exitcode for process in processes):  # a launcher would end the others
            deadline = min(deadline, time.monotonic() + 20)
        time.sleep(0.01)
    for process in processes:
        process.kill()
        process.join()
    return [process.exitcode for process in processes]


def ends(folder: Path) -> list[str]:
    """The digests of the processes that reached the end of a run; none if none did."""
    return [json.loads(file.read_text()) for file in sorted(folder.glob("end-*.json"))]


def send(signum: signal.Signals, after: float, which: int) -> Callable[[list[Any]], None]:
    """Send a signal some seconds after the first update began: SIGKILL to one process, SIGTERM to all."""

    def disturb(processes: list[Any]) -> None:
        time.sleep(after)
        told = processes if signum == signal.SIGTERM else [processes[which % len(processes)]]
        for process in told:
            if process.is_alive() and process.pid is not None:
                os.kill(process.pid, signum)

    return disturb
