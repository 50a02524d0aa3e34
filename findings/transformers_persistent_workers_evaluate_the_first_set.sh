#!/usr/bin/env bash
# transformers 5.23.0: with `dataloader_persistent_workers=True`, `trainer.evaluate(another_set)` evaluates the set of the
# first evaluation.
#
# The loader of an evaluation is kept for later ones, so that its workers live on. Sets that are given by the name of an
# entry of `eval_dataset` each have a loader. All others share one: any set that is passed to `evaluate`, and
# `eval_dataset` itself. Whatever is passed later, the rows are those of the first one. Nothing is said.
#
# Seen: of a set of 2 rows and then one of 6, the evaluations have 2 and 6 rows; with persistent workers 2 and 2.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0
"$folder/venv/bin/pip" install -q transformers==5.23.0 accelerate==1.15.0
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON' 2>/dev/null
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

SETS = {rows: [{"input_ids": [2, 3], "labels": [2, 3]}] * rows for rows in (2, 6)}


def evaluated(persistent):
    """The numbers of rows in two evaluations, the first of 2 rows and the second of 6."""
    config = LlamaConfig(
        vocab_size=16, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=8,
    )
    args = TrainingArguments(
        "out", use_cpu=True, report_to="none", disable_tqdm=True, per_device_eval_batch_size=1,
        dataloader_num_workers=1, dataloader_persistent_workers=persistent,
    )
    rows = []
    trainer = Trainer(
        LlamaForCausalLM(config), args, eval_dataset=SETS[2],
        compute_metrics=lambda predictions: rows.append(len(predictions.label_ids)) or {},
    )
    trainer.evaluate()
    trainer.evaluate(SETS[6])
    return rows


found = {persistent: evaluated(persistent) for persistent in (False, True)}
print(f"transformers {transformers.__version__}")
for persistent, rows in found.items():
    print(f"persistent workers: {persistent}; rows evaluated: {rows}")
assert found == {False: [2, 6], True: [2, 2]}
PYTHON
