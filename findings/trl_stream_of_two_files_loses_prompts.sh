#!/usr/bin/env bash
# trl 1.16.0, accelerate 1.15.0: on two processes, GRPOTrainer never uses half of the prompts of a stream of two files,
# and uses the other half twice.
#
# TRL divides the stream into windows of all processes together, and repeats each window for every step that it serves.
# accelerate then gives each process files of its own (`IterableDataset.shard`), since there are as many as processes.
# A process draws its own, smaller window at the first step of each repetition: always the first part of the large one.
# With one file, accelerate gives each process its part of every window, and every prompt is used once.
#
# Seen: two windows of 16 prompts, two completions each, on two processes with two steps of accumulation. The 64
# completions are of 32 prompts if all are in one file, and of 16 prompts if each of two files has half of them.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0
"$folder/venv/bin/pip" install -q trl==1.16.0 transformers==5.23.0 accelerate==1.15.0 datasets==5.2.0
cd "$folder"
cat > drawn.py <<'PYTHON'
import accelerate
import trl
from accelerate.utils import gather_object
from datasets import IterableDataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer

WORDS = [f"{name}{row}" for name in "ab" for row in range(16)]
tokenizer = Tokenizer(models.WordLevel({word: at for at, word in enumerate(["<pad>", "<eos>", *WORDS])}, "<pad>"))
tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def rows(files):
    for words in files:
        yield from ({"prompt": word} for word in words)


def drawn(files):
    stream = IterableDataset.from_generator(rows, gen_kwargs={"files": files})
    prompts = []

    def reward(prompts, completions, seen=prompts, **kwargs):
        seen += prompts
        return [0.0] * len(prompts)

    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    args = GRPOConfig(
        "out", use_cpu=True, bf16=False, report_to="none", disable_tqdm=True, per_device_train_batch_size=8,
        gradient_accumulation_steps=2, num_generations=2, max_completion_length=2, max_steps=2, shuffle_dataset=False,
        save_strategy="no",
    )
    trainer = GRPOTrainer(LlamaForCausalLM(config), reward, args, stream, processing_class=tokenizer)
    trainer.train()
    return gather_object(prompts)


found = [drawn(files) for files in ([WORDS], [WORDS[:16], WORDS[16:]])]
if accelerate.PartialState().is_main_process:
    print(f"trl {trl.__version__}, accelerate {accelerate.__version__}")
    for name, prompts in zip(("one file", "two files"), found):
        print(f"{name}: {len(prompts)} draws of {len(set(prompts))} prompts: {' '.join(dict.fromkeys(prompts))}")
assert [len(set(prompts)) for prompts in found] == [32, 16]
PYTHON
"$folder/venv/bin/torchrun" --nproc_per_node 2 drawn.py 2> errors.txt || { tail -20 errors.txt; exit 1; }
