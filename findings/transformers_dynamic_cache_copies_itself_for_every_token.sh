#!/usr/bin/env bash
# transformers 5.23.0: the dynamic key-value cache has no room to grow, and copies itself whole for every token.
#
# `DynamicLayer.update` concatenates. Nothing is set aside as in a list that grows, so one token more writes all keys and
# values of all rows anew, in every layer, and the old ones are freed. `generate` takes this cache by default. With 16
# rows of 400 tokens of a model of 135 million parameters, on a CPU, that was nearly half of the time of a step, more
# than the products of matrices.
#
# Seen: with 400 tokens cached, a forward pass of one token concatenates 401 times the numbers that it adds, at another
# address each time.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0
"$folder/venv/bin/pip" install -q transformers==5.23.0
"$folder/venv/bin/python" - <<'PYTHON'
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

ROWS, CACHED, HEADS, SIZE, LAYERS = 16, 400, 2, 8, 3


class Concatenated(TorchDispatchMode):
    """Counts the numbers in results of `torch.cat` that have the shape of a cache."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function is torch.ops.aten.cat.default and result.shape[:2] == (ROWS, HEADS) and result.shape[2] > CACHED:
            self.count += result.numel()
        return result


config = LlamaConfig(
    vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=LAYERS, num_attention_heads=4,
    num_key_value_heads=HEADS, head_dim=SIZE, max_position_embeddings=1024,
)
model, cache = LlamaForCausalLM(config).eval(), DynamicCache(config=config)
with torch.no_grad():
    model(torch.zeros(ROWS, CACHED, dtype=torch.long), past_key_values=cache)
    before = cache.layers[0].keys.data_ptr()
    with Concatenated() as counted:
        model(torch.zeros(ROWS, 1, dtype=torch.long), past_key_values=cache)
added = 2 * LAYERS * ROWS * HEADS * SIZE  # keys and values of one token
moved = cache.layers[0].keys.data_ptr() != before
print(f"transformers {transformers.__version__}: {counted.count // added} times what is added; moved: {moved}")
assert counted.count == (CACHED + 1) * added and moved
PYTHON
