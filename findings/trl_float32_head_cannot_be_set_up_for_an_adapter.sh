#!/usr/bin/env bash
# trl 1.16.0: `cast_lm_head_to_fp32=True` and an adapter raise an AttributeError if head and embeddings share weights.
#
# The two options are documented without a word about each other, and each works alone; with a head of its own, the
# model takes both. For shared weights TRL puts a hook on `model.embed_tokens`, which it looks for in the PeftModel, one
# level above the model that has it.
#
# Seen: GRPOTrainer with a LoRA adapter and the option, on a model without shared weights and on one with them.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0
"$folder/venv/bin/pip" install -q trl==1.16.0 transformers==5.23.0 peft==0.21.2 accelerate==1.15.0
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import trl
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

words = {word: number for number, word in enumerate(["<pad>", "<eos>", "<unk>", "a", "b"])}
made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
made.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
seen = {}
for tied in (False, True):
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, tie_word_embeddings=tied, eos_token_id=1, pad_token_id=0, bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(f"tied-{tied}")
    tokenizer.save_pretrained(f"tied-{tied}")
    args = trl.GRPOConfig("out", cast_lm_head_to_fp32=True, use_cpu=True, bf16=False, report_to="none")
    try:
        trl.GRPOTrainer(
            f"tied-{tied}", reward_funcs=lambda completions, **_: [0.0] * len(completions), args=args,
            train_dataset=Dataset.from_list([{"prompt": "a"}] * 8), peft_config=LoraConfig(target_modules=["q_proj"]),
        )
        seen[tied] = "set up"
    except AttributeError as error:
        seen[tied] = str(error)
print(f"trl {trl.__version__}: weights of its own: {seen[False]}; shared weights: {seen[True]}")
assert seen[False] == "set up" and "embed_tokens" in seen[True]
PYTHON
