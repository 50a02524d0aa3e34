#!/usr/bin/env bash
# PEFT 0.21.2: adding a second adapter of a configuration with init_lora_weights="pissa" changes what the first computes.
#
# PiSSA splits a weight W into a principal part, which becomes the adapter, and the rest, which takes W's place in the
# base. `add_adapter` does so again for every adapter of such a configuration, on the base that the adapters share. The
# first adapter, still the active one, then stands on a base that lacks its part twice. Whoever copies an adapter to keep
# a frozen reference beside the trained one meets this.
#
# Seen: the logits of the active adapter move by more than 0.01 though it was neither changed nor deactivated; with
# init_lora_weights=True they move by exactly 0.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0
"$folder/venv/bin/pip" install -q peft==0.21.2 transformers==5.23.0
"$folder/venv/bin/python" - <<'PYTHON'
import copy

import peft
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=64)


def moved(initialisation) -> float:
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(LlamaConfig(**sizes, initializer_range=0.2))
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=initialisation)
    model = get_peft_model(base, config).eval()
    ids = torch.arange(20)[None]
    with torch.no_grad():
        before = model(ids).logits
        model.add_adapter("second", copy.deepcopy(config))
        assert model.active_adapter == "default"
        return (model(ids).logits - before).abs().max().item()


pissa, usual = moved("pissa"), moved(True)
print(f"peft {peft.__version__}: the active adapter's logits moved by {pissa:.3f} (pissa), {usual:.3f} (default)")
assert pissa > 0.01 and usual == 0
PYTHON
