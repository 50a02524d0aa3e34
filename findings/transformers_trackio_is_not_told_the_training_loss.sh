#!/usr/bin/env bash
# transformers 5.23.0 with trackio 0.43.0: the summary of a run (`train_loss`, `train_runtime`, ...) never reaches trackio.
#
# The Trainer logs its last line like every other, and it stands in `log_history`. The callback for trackio leaves out the
# five names of that line. The one for W&B leaves them out too, but puts them into the run's summary; for trackio there is
# no such place. `report_to="trackio"` therefore keeps every line but the last one. No error, no warning.
#
# Seen: of 4 logged steps all losses are stored, and of `train_loss` and `train_runtime` neither.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0
"$folder/venv/bin/pip" install -q transformers==5.23.0 accelerate==1.15.0 datasets==5.2.0 trackio==0.43.0
cd "$folder"
TRACKIO_DIR="$folder/tracked" "$folder/venv/bin/python" - <<'PYTHON'
import json
import sqlite3
from importlib.metadata import version
from pathlib import Path

from datasets import Dataset
from transformers import AutoModelForCausalLM, LlamaConfig, Trainer, TrainingArguments

config = LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=32)
rows = Dataset.from_list([{"input_ids": [i, i + 1, i + 2], "labels": [i, i + 1, i + 2]} for i in range(8)])
args = TrainingArguments(
    "out", max_steps=4, per_device_train_batch_size=2, logging_steps=1, report_to="trackio", project="tried",
    use_cpu=True, save_strategy="no", disable_tqdm=True,
)
trainer = Trainer(AutoModelForCausalLM.from_config(config), args, train_dataset=rows)
trainer.train()
logged = {name for entry in trainer.state.log_history for name in entry}

(file,) = Path("tracked").glob("tried*.db")
stored = [json.loads(row[0]) for row in sqlite3.connect(file).execute("SELECT metrics FROM metrics")]
losses = sum("train/loss" in one for one in stored)
summary = {name for one in stored for name in one} & {"train_loss", "train_runtime", "train/train_loss", "train/train_runtime"}
print(f"transformers {version('transformers')}, trackio {version('trackio')}: {losses} losses stored, of the summary {summary}")
assert {"train_loss", "train_runtime"} <= logged
assert losses == 4 and not summary
PYTHON
