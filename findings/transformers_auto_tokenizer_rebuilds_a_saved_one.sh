#!/usr/bin/env bash
# transformers 5.23.0: AutoTokenizer gives a saved tokenizer back as another one, if a config.json of a known model stands
# beside it. A word-level tokenizer saved by `save_pretrained` (its tokenizer_config.json names the general class,
# TokenizersBackend) loads as Qwen2Tokenizer beside a configuration of type qwen2: the class of the model's type wins over
# the saved one, and builds its own pre-tokenizer. The same text gets other ids, a character outside the vocabulary gets none instead of the
# unknown token, and nothing is said. PreTrainedTokenizerFast.from_pretrained on the same folder gives the saved one back.
#
# Seen:
#   saved                      TokenizersBackend 'a b' [1, 2, 3]    'é' [0]
#   AutoTokenizer              Qwen2Tokenizer    'a b' [1, 3]       'é' []
#   PreTrainedTokenizerFast    TokenizersBackend 'a b' [1, 2, 3]    'é' [0]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q transformers==5.23.0 tokenizers==0.23.1
cd "$folder"
"$folder/venv/bin/python" - 2>/dev/null > seen <<'PYTHON'
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen2Config

backend = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, " ": 2, "b": 3}, unk_token="<unk>"))
backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
saved = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
saved.save_pretrained("model")
Qwen2Config().save_pretrained("model")


def show(name, tokenizer):
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("a b", "é")]
    print(name, type(tokenizer).__name__, *ids)


show("saved", saved)
show("auto", AutoTokenizer.from_pretrained("model"))
show("fast", PreTrainedTokenizerFast.from_pretrained("model"))
PYTHON
cat seen
grep -qx "saved TokenizersBackend \[1, 2, 3\] \[0\]" seen
grep -qx "fast TokenizersBackend \[1, 2, 3\] \[0\]" seen
grep -qx "auto Qwen2Tokenizer \[1, 3\] \[\]" seen
echo "transformers 5.23.0 still does so."
