#!/usr/bin/env bash
# transformers 5.23.0: calling `trainer.evaluate()` in the callback `on_step_end` ends the log of training.
#
# The callback that decides by `logging_steps` sets `control.should_log` at the end of a step. `evaluate` logs its own
# metrics, and the handler of callbacks clears `should_log` after any log. A callback of the user that comes after the
# default ones and evaluates therefore cancels the log that was due. No error, no warning: loss and learning rate never
# appear.
#
# Seen: with logging_steps=1 and 4 steps, 4 entries with a loss without the callback, and none with it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0
"$folder/venv/bin/pip" install -q transformers==5.23.0 accelerate==1.15.0 datasets==5.2.0
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import torch
import transformers
from datasets import Dataset
from transformers import AutoModelForCausalLM, LlamaConfig, Trainer, TrainerCallback, TrainingArguments

config = LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=32)
rows = Dataset.from_list([{"input_ids": [i, i + 1, i + 2], "labels": [i, i + 1, i + 2]} for i in range(8)])


class Evaluate(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        self.trainer.evaluate()


def losses(evaluates: bool) -> int:
    torch.manual_seed(0)
    args = TrainingArguments(
        "out", max_steps=4, per_device_train_batch_size=2, logging_steps=1, report_to="none", use_cpu=True,
        save_strategy="no", disable_tqdm=True,
    )
    trainer = Trainer(AutoModelForCausalLM.from_config(config), args, train_dataset=rows, eval_dataset=rows)
    if evaluates:
        callback = Evaluate()
        callback.trainer = trainer
        trainer.add_callback(callback)
    trainer.train()
    return sum("loss" in entry for entry in trainer.state.log_history)


plain, inside = losses(False), losses(True)
print(f"transformers {transformers.__version__}: entries with a loss {plain} without the callback, {inside} with it")
assert (plain, inside) == (4, 0)
PYTHON
