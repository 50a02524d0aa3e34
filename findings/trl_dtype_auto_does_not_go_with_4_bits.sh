#!/usr/bin/env bash
# trl 1.16.0, transformers 5.23.0: `ModelConfig(dtype="auto", load_in_4bit=True)`, two of its documented values, cannot be
# made into a quantization configuration.
#
# `get_quantization_config` passes the model's dtype on as `bnb_4bit_compute_dtype`. There "auto" is looked up as a name
# in torch. So a script that offers TRL's own arguments fails for `--dtype auto --load_in_4bit` before a model is loaded.
#
# Seen: AttributeError, "module 'torch' has no attribute 'auto'". With dtype "bfloat16" the configuration is made.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0
"$folder/venv/bin/pip" install -q trl==1.16.0 transformers==5.23.0 accelerate==1.15.0 peft==0.21.2 bitsandbytes==0.50.2
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import torch
import transformers
import trl
from trl import ModelConfig, get_quantization_config

made = get_quantization_config(ModelConfig(dtype="bfloat16", load_in_4bit=True))
assert made.bnb_4bit_compute_dtype == torch.bfloat16
try:
    get_quantization_config(ModelConfig(dtype="auto", load_in_4bit=True))
except AttributeError as error:
    print(f"trl {trl.__version__}, transformers {transformers.__version__}: {error}")
    assert "auto" in str(error)
else:
    raise AssertionError("the configuration was made")
PYTHON
