#!/usr/bin/env bash
# trl 1.16.0, transformers 5.23.0: for some architectures the fused head's log-probabilities are not those of the
# model's own logits, without a word.
#
# GRPOTrainer and others score completions with `add_fused_lm_head`, which multiplies hidden states by the head's weight.
# What the model does besides is looked up in its configuration by the names that other families use. RecurrentGemma
# calls its soft cap `logits_soft_cap`, and ModernBERT's decoder has a layer between the backbone and the head: both are
# skipped. Tokens are drawn from the model's own logits, so the policy that is trained is not the one that samples.
#
# Seen: the mean difference of log-probabilities of random tokens, in nats, for small models with random weights: none
# for Llama, more than 0.1 for RecurrentGemma, whose cap is set to 2, and for ModernBERT's decoder.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0
"$folder/venv/bin/pip" install -q trl==1.16.0 transformers==5.23.0 accelerate==1.15.0
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import torch
import transformers
import trl
from transformers import AutoConfig, AutoModelForCausalLM
from trl.trainer.utils import add_fused_lm_head

SIZES = dict(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=64, pad_token_id=0, eos_token_id=1, bos_token_id=2,
    cls_token_id=3, sep_token_id=4, initializer_range=0.2,
)
seen = {}
for kind, more in (
    ("llama", {}),
    ("recurrent_gemma", dict(lru_width=32, attention_window_size=32, logits_soft_cap=2.0)),
    ("modernbert-decoder", {}),
):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES, **more), dtype=torch.float32).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight *= 2
        ids = torch.randint(5, 64, (2, 16))
        own = model(input_ids=ids, use_cache=False).logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
        add_fused_lm_head(model)
        fused = model(input_ids=ids, labels=ids, fused_lm_head=True, use_cache=False).log_probs
    seen[kind] = (fused - own).abs().mean().item()
    print(f"trl {trl.__version__}, transformers {transformers.__version__}: {kind}: {seen[kind]:.6f} nats")
assert seen["llama"] < 1e-4 and seen["recurrent_gemma"] > 0.1 and seen["modernbert-decoder"] > 0.1
PYTHON
