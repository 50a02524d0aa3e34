#!/usr/bin/env bash
# trl 1.16.0, transformers 5.23.0: `model_init_kwargs={"torch_dtype": "bfloat16"}` loads the model in float32, without a
# word.
#
# transformers still takes `torch_dtype`, the older name of `dtype`, and most published scripts write it. GRPOTrainer
# puts `dtype="float32"` beside the given arguments unless they hold a `dtype`, and of the two names transformers
# prefers the newer. The weights take twice the memory that was asked for.
#
# Seen: `from_pretrained` gives bfloat16 for either name, GRPOTrainer bfloat16 for `dtype` and float32 for `torch_dtype`.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0
"$folder/venv/bin/pip" install -q trl==1.16.0 transformers==5.23.0 accelerate==1.15.0 datasets==5.2.0
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON' 2>/dev/null
import transformers
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer

words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, "a": 2, "b": 3}, unk_token="<pad>"))
words.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")
config = LlamaConfig(
    vocab_size=16, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
    max_position_embeddings=32, eos_token_id=1, pad_token_id=0,
)
LlamaForCausalLM(config).save_pretrained("model")
tokenizer.save_pretrained("model")


def of_trl(**given):
    args = GRPOConfig("out", report_to="none", use_cpu=True, bf16=False, model_init_kwargs=given)
    rows = Dataset.from_list([{"prompt": "a b"}] * 8)
    return GRPOTrainer("model", lambda completions, **_: [0.0] * len(completions), args, rows).model.dtype


print(f"trl {trl.__version__}, transformers {transformers.__version__}")
found = {}
for name in ("dtype", "torch_dtype"):
    plain = AutoModelForCausalLM.from_pretrained("model", **{name: "bfloat16"}).dtype
    found[name] = (str(plain), str(of_trl(**{name: "bfloat16"})))
    print(f"{name}: from_pretrained {found[name][0]}, GRPOTrainer {found[name][1]}")
assert found == {"dtype": ("torch.bfloat16",) * 2, "torch_dtype": ("torch.bfloat16", "torch.float32")}
PYTHON
