#!/usr/bin/env bash
# transformers 5.23.0, accelerate 1.15.0: with `dispatch_batches=False`, an evaluation of a stream on several processes
# counts some rows twice.
#
# If each process reads its own rows of a stream, accelerate fills up the last batches with the rows of the first ones,
# so that all processes have equally many. Of a data set the Trainer knows the length, and drops what was filled up. Of a
# stream it does not, and the rows stay in the predictions and in the loss. With the default, where the main process
# reads all and sends the others theirs, each row counts once. TRL's GRPOTrainer sets `dispatch_batches=False` itself.
#
# Seen: on two processes, batches of two and rows 0 to 4, the predictions are of 0 1 2 3 4 for the data set and of
# 0 1 2 3 4 0 1 2 for the stream.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0
"$folder/venv/bin/pip" install -q transformers==5.23.0 accelerate==1.15.0 datasets==5.2.0
cd "$folder"
cat > evaluation.py <<'PYTHON'
import accelerate
import transformers
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

config = LlamaConfig(
    vocab_size=16, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
    max_position_embeddings=8,
)
rows = Dataset.from_list([{"input_ids": [row, row], "labels": [row, row]} for row in range(5)])
args = TrainingArguments(
    "out", use_cpu=True, report_to="none", disable_tqdm=True, per_device_eval_batch_size=2,
    accelerator_config={"dispatch_batches": False},
)
found = []
trainer = Trainer(
    LlamaForCausalLM(config), args,
    compute_metrics=lambda predictions: found.append(predictions.label_ids[:, 0].tolist()) or {},
)
trainer.evaluate(rows)
trainer.evaluate(rows.to_iterable_dataset())
if trainer.is_world_process_zero():
    print(f"transformers {transformers.__version__}, accelerate {accelerate.__version__}")
    print(f"data set: {found[0]}; stream: {found[1]}")
assert found == [[0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 0, 1, 2]]
PYTHON
"$folder/venv/bin/torchrun" --nproc_per_node 2 evaluation.py 2>/dev/null
