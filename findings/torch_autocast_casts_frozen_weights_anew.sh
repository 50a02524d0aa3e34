#!/usr/bin/env bash
# torch 2.13.0: inside one autocast block a trained weight is cast once, and a frozen one in every forward pass.
#
# Autocast keeps its low-precision copies of float32 weights until the block ends. It keeps them for leaves that require
# a gradient, and for no others, also where no gradient is wanted. With an adapter on a float32 base, the whole base is
# cast again for every token that is generated.
#
# Seen: casts in ten passes through one linear layer without gradients, trained and frozen.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy
"$folder/venv/bin/python" - <<'PYTHON'
import torch
from torch.utils._python_dispatch import TorchDispatchMode


class CastsOf(TorchDispatchMode):
    def __init__(self, weight):
        super().__init__()
        self.weight, self.count = weight, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._to_copy.default and args[0] is self.weight
        return function(*args, **(kwargs or {}))


counts = {}
for trained in (True, False):
    layer = torch.nn.Linear(8, 8).requires_grad_(trained)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), CastsOf(layer.weight) as casts:
        for _ in range(10):
            layer(torch.ones(1, 8))
    counts["trained" if trained else "frozen"] = casts.count
print(f"torch {torch.__version__}: casts of a weight in ten passes: {counts}")
assert counts == {"trained": 1, "frozen": 10}
PYTHON
