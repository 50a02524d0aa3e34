#!/usr/bin/env bash
# transformers 5.23.0: two callbacks of one class, resumed with `restore_callback_states_from_checkpoint=True`, go on
# from what they were when training began.
#
# Each checkpoint updates the state of a callback that is the only one of its class. Of several it keeps a list, to which
# every checkpoint adds their present states behind the older ones. Resuming takes the states from the front of the
# list. So two `EarlyStoppingCallback`s, with a patience each, lose their counts in every resume, and
# `trainer_state.json` grows with each checkpoint. One alone keeps its count.
#
# Seen: after three evaluations, of which each was worse than the one before, one callback goes on with a count of 2, two
# with a count of 0; the list of two has 8 states after three checkpoints.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0
"$folder/venv/bin/pip" install -q transformers==5.23.0 accelerate==1.15.0
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON' 2>/dev/null
import json

import transformers
from transformers import EarlyStoppingCallback, LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback
from transformers import TrainingArguments

ROWS = [{"input_ids": [1, 2, 3, 4], "labels": [1, 2, 3, 4]}] * 4


class Worse(TrainerCallback):
    """Makes each evaluation worse than the one before."""

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        metrics["eval_loss"] = float(state.global_step)


class Begin(TrainerCallback):
    """Notes the counts when training begins, and ends it at once."""

    def on_step_begin(self, args, state, control, **kwargs):
        callbacks = trainer.callback_handler.callbacks
        counts.extend(c.early_stopping_patience_counter for c in callbacks if isinstance(c, EarlyStoppingCallback))
        raise KeyboardInterrupt


def made(folder, number, *others):
    config = LlamaConfig(
        vocab_size=16, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=8,
    )
    args = TrainingArguments(
        folder, max_steps=3, report_to="none", use_cpu=True, disable_tqdm=True, eval_strategy="steps", eval_steps=1,
        save_strategy="steps", save_steps=1, load_best_model_at_end=True, logging_strategy="no",
        restore_callback_states_from_checkpoint=True,
    )
    callbacks = [Worse(), *(EarlyStoppingCallback(50 + i) for i in range(number)), *others]
    return Trainer(LlamaForCausalLM(config), args, train_dataset=ROWS, eval_dataset=ROWS, callbacks=callbacks)


found = {}
for number in (1, 2):
    made(f"out{number}", number).train()
    states = json.load(open(f"out{number}/checkpoint-3/trainer_state.json"))["stateful_callbacks"]["EarlyStoppingCallback"]
    counts = []
    trainer = made(f"out{number}", number, Begin())
    trainer.args.max_steps = 4
    try:
        trainer.train(resume_from_checkpoint=f"out{number}/checkpoint-3")
    except KeyboardInterrupt:
        pass
    found[number] = (len(states) if isinstance(states, list) else 1, counts)
print(f"transformers {transformers.__version__}")
for number, (saved, counts) in found.items():
    print(f"callbacks: {number}; states in the last checkpoint: {saved}; counts after the resume: {counts}")
assert found == {1: (1, [2]), 2: (8, [0, 0])}
PYTHON
