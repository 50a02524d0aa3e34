#!/usr/bin/env bash
# accelerate 1.15.0, peft 0.21.2: a prepared model generates in mixed precision, a prepared adapter does not.
#
# `Accelerator.prepare` puts autocast around the `forward` of the object that it is given. `generate` of a transformers
# model calls that `forward`. `generate` of a PeftModel calls the `forward` of the model inside, which knows of no
# autocast. So with float32 weights and bf16 a full model draws what it scores, and an adapted one draws in float32 what
# it scores in bfloat16, at float32's speed, and nothing says so.
#
# Seen: the dtype of a linear layer's output, in a call of the prepared model and in its `generate`.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0
"$folder/venv/bin/pip" install -q transformers==5.23.0 accelerate==1.15.0 peft==0.21.2
"$folder/venv/bin/python" - <<'PYTHON'
import accelerate
import peft
import torch
from transformers import LlamaConfig, LlamaForCausalLM

accelerator = accelerate.Accelerator(mixed_precision="bf16", cpu=True)
config = LlamaConfig(
    vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, bos_token_id=1, eos_token_id=2,
)
ids = torch.full((1, 3), 5)
for adapted, expected in ((False, torch.bfloat16), (True, torch.float32)):
    model = LlamaForCausalLM(config)
    if adapted:
        model = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear"))
    prepared, seen = accelerator.prepare(model), []
    layer = next(module for name, module in prepared.named_modules() if name.endswith("mlp.up_proj"))
    layer.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    with torch.no_grad():
        prepared(input_ids=ids)
        prepared.generate(input_ids=ids, max_new_tokens=3, do_sample=False)
    name = "adapted" if adapted else "full"
    versions = f"accelerate {accelerate.__version__}, peft {peft.__version__}"
    print(f"{versions}, {name}: called in {seen[0]}, generates in {set(seen[1:])}")
    assert seen[0] == torch.bfloat16 and set(seen[1:]) == {expected}
PYTHON
