#!/usr/bin/env bash
# transformers 5.23.0, peft 0.21.2: with `load_best_model_at_end=True`, an adapter that is not named "default" ends with
# its last weights, not with its best.
#
# PEFT saves the adapter "default" at the root of a checkpoint and one of any other name in a folder of that name.
# Resuming looks into such folders, choosing the best model looks at the root alone. It then writes to the log that the
# model cannot be found and that several nodes may want `save_on_each_node`, and `train` returns as if all were well:
# the state names the best step, and the weights are those of the last.
#
# Seen: with the evaluation loss best at step 1, the adapter "default" ends with the weights of step 1, the adapter
# "math" with those of step 3. Both runs say that step 1 was the best.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0
"$folder/venv/bin/pip" install -q transformers==5.23.0 peft==0.21.2 accelerate==1.15.0
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON' 2>/dev/null
import peft
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

ROWS = [{"input_ids": [1, 2, 3, 4], "labels": [1, 2, 3, 4]}] * 4


class Weights(TrainerCallback):
    """Keeps the weights of each step, of which the first counts as the best."""

    def __init__(self):
        self.after = {}

    def on_evaluate(self, args, state, control, model, metrics, **kwargs):
        self.after[state.global_step] = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
        metrics["eval_loss"] = float(state.global_step)


def trained(name):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=16, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=8,
    )
    adapter = LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.0)
    model = get_peft_model(LlamaForCausalLM(config), adapter, adapter_name=name)
    args = TrainingArguments(
        name, max_steps=3, learning_rate=0.1, report_to="none", use_cpu=True, disable_tqdm=True, eval_strategy="steps",
        eval_steps=1, save_strategy="steps", save_steps=1, load_best_model_at_end=True, logging_strategy="no",
    )
    weights = Weights()
    trainer = Trainer(model, args, train_dataset=ROWS, eval_dataset=ROWS, callbacks=[weights])
    trainer.train()
    now = dict(model.named_parameters())
    ended = [step for step, of in weights.after.items() if all(torch.equal(now[n], p) for n, p in of.items())]
    return trainer.state.best_global_step, ended


found = {name: trained(name) for name in ("default", "math")}
print(f"transformers {transformers.__version__}, peft {peft.__version__}")
for name, (best, ended) in found.items():
    print(f"{name}: the best step is {best}, the weights are those of step {ended}")
assert found == {"default": (1, [1]), "math": (1, [3])}
PYTHON
