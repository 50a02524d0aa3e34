#!/usr/bin/env bash
# transformers 5.23.0: a resumed run saves, evaluates and logs as often as the checkpoint's run did, whatever its own
# `save_steps`, `eval_steps` and `logging_steps` say.
#
# The Trainer computes these numbers from its arguments and then takes the whole `trainer_state.json` of the checkpoint in
# their place. It warns that the arguments "do not match", not which of the two holds; the arguments that it prints and
# saves are the new ones.
#
# Seen: a run that saved every 4 updates, resumed with `save_steps=1`, writes no checkpoint but those of every 4 updates
# and of its end.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0
"$folder/venv/bin/pip" install -q transformers==5.23.0 accelerate==1.15.0
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
from pathlib import Path

import transformers
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

ROWS = [{"input_ids": [1, 2, 3, 4], "labels": [1, 2, 3, 4]}] * 8


def train(save_steps, max_steps, resume=None):
    config = LlamaConfig(
        vocab_size=16, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=8,
    )
    args = TrainingArguments("out", max_steps=max_steps, save_steps=save_steps, report_to="none", use_cpu=True,
                             disable_tqdm=True, per_device_train_batch_size=1)
    trainer = Trainer(LlamaForCausalLM(config), args, train_dataset=ROWS)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


train(save_steps=4, max_steps=4)
trainer = train(save_steps=1, max_steps=10, resume="out/checkpoint-4")
steps = sorted(int(one.name.split("-")[1]) for one in Path("out").glob("checkpoint-*"))
print(f"transformers {transformers.__version__}: asked for every {trainer.args.save_steps}, written {steps}")
assert trainer.args.save_steps == 1 and steps == [4, 8, 10]
PYTHON
