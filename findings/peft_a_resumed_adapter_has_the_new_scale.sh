#!/usr/bin/env bash
# peft 0.21.2, transformers 5.23.0: a run with LoRA that is resumed with another `lora_alpha` goes on with the weights of
# its checkpoint times the new scale, without a word.
#
# The Trainer resumes with `load_adapter(checkpoint, name)`. As an adapter of this name is there, PEFT reads the weights
# alone and not the `adapter_config.json` beside them, which says another `lora_alpha`. (`use_rslora` and
# `alpha_pattern` come from the script in the same way; another `r` is an error, as shapes differ.)
#
# Seen: resumed with twice the `lora_alpha`, what the adapter adds is twice what it added when the checkpoint was
# written, and no warning names the difference.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0
"$folder/venv/bin/pip" install -q transformers==5.23.0 peft==0.21.2 accelerate==1.15.0
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import logging
import warnings

import peft
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

said = []
warnings.showwarning = lambda message, *rest: said.append(str(message))
logging.getLogger("transformers").addHandler(type("Keep", (logging.Handler,), {"emit": lambda _, r: said.append(r.getMessage())})())
ROWS = [{"input_ids": [1, 2, 3, 4], "labels": [1, 2, 3, 4]}] * 4


def run(alpha, **options):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=16, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=8,
    )
    adapter = LoraConfig(r=2, lora_alpha=alpha, target_modules=["q_proj"], lora_dropout=0.0)
    model = get_peft_model(LlamaForCausalLM(config), adapter)
    args = TrainingArguments("out", max_steps=2, save_steps=2, learning_rate=0.1, report_to="none", use_cpu=True,
                             disable_tqdm=True)
    return model, Trainer(model, args, train_dataset=ROWS, **options)


def added(model):
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    return layer.get_delta_weight("default").detach().clone()


model, trainer = run(alpha=4)
trainer.train()
before = added(model)

model, trainer = run(alpha=8)
said.clear()
trainer.train(resume_from_checkpoint="out/checkpoint-2")
ratio = (added(model).norm() / before.norm()).item()
named = [text for text in said if "alpha" in text]
print(f"peft {peft.__version__}, transformers {transformers.__version__}: {ratio:.3f} times; warnings of it: {named}")
assert before.norm() > 0 and abs(ratio - 2) < 1e-4 and not named
PYTHON
