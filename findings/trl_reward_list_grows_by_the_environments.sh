#!/usr/bin/env bash
# trl 1.16.0: a list of reward functions that is passed beside an environment is changed. The caller's own list has the
# environment's `get_reward` at its end afterwards, and a second trainer that is made with the same list counts that
# reward twice.
#
# The trainer keeps the list that it is given, and appends to it. A list of `reward_processing_classes` is treated alike.
#
# Seen: the list of one function has two entries after the first trainer and three after the second, which has three
# rewards of weight 1, two of them the environment's. With `reward_weights` given for the one function, the second
# trainer cannot be made.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0
"$folder/venv/bin/pip" install -q trl==1.16.0 transformers==5.23.0 accelerate==1.15.0 jmespath tokenizers
cd "$folder"
TRL_EXPERIMENTAL_SILENCE=1 "$folder/venv/bin/python" - <<'PYTHON'
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer
from trl.chat_template_utils import qwen3_chat_template

words = Tokenizer(models.WordLevel({"<unk>": 0, "<eos>": 1, "<pad>": 2}, unk_token="<unk>"))
words.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="<eos>", pad_token="<pad>")
tokenizer.chat_template = qwen3_chat_template
rows = Dataset.from_list([{"prompt": [{"role": "user", "content": "a"}]}] * 4)


class Environment:
    def reset(self, **kwargs):
        return None

    def look(self) -> str:
        """Look."""
        return "nothing"

    def get_reward(self) -> float:
        return 1.0


def length(completions, **kwargs):
    return [0.0 for _ in completions]


def trainer(functions, **options):
    config = LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        max_position_embeddings=256,
    )
    args = GRPOConfig("out", use_cpu=True, bf16=False, report_to="none", per_device_train_batch_size=4,
                      num_generations=2, **options)
    return GRPOTrainer(
        LlamaForCausalLM(config), functions, args, rows, processing_class=tokenizer, environment_factory=Environment
    )


mine = [length]
names, lengths = [], []
for _ in range(2):
    names.append(trainer(mine).reward_func_names)
    lengths.append(len(mine))
print(f"trl {trl.__version__}: {lengths} functions in the caller's list; rewards of the second trainer: {names[1]}")
assert lengths == [2, 3] and len(names[1]) == 3, (lengths, names)

mine = [length]
trainer(mine, reward_weights=[1.0])
try:
    trainer(mine, reward_weights=[1.0])
except ValueError as error:
    print("second trainer with weights:", error)
else:
    raise AssertionError("the second trainer was made")
PYTHON
