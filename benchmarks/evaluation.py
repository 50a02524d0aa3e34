"""Throughput of an evaluation with transformers, compared with a plain loop over `generate` at equal batch size.

    python benchmarks/evaluation.py           # writes docs/benchmarks/evaluation.{json,md}; half an hour on two cores
    python benchmarks/evaluation.py --quick   # a tiny model, to see that it runs

Questions with short answers and questions with long answers give lengths with a long tail. The plain loop sorts its
prompts by length and draws batch after batch; each batch waits for its longest row.

Finished repetitions are kept in docs/benchmarks/evaluation.json and are not repeated. Delete the file to start over.
"""

import os
import statistics
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from common import tasks, tiny
from common.report import Store, listed, mean_and_error, parse, processor, ratios, show, table, versions, write
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from tbrm_trl.evaluation.sampling import Request, Sampling, end_ids_of, generate, prompt_ids_of, seed_of

# Questions with short and with long answers are equally long, so that sorting by prompt does not sort by answer.
COUNTRIES = ("France", "Peru", "Japan", "Kenya", "Norway", "Egypt", "Canada", "Greece")
THINGS = ("lighthouse", "river", "clock", "violin", "volcano", "library", "bridge", "garden")
SHORT = [
    *(f"What is the capital of {name}?" for name in COUNTRIES),
    *(f"What is {number} + {number + 3}?" for number in range(5, 13)),
    *(f"Is {number} a prime? Answer yes or no." for number in range(11, 19)),
    *(f"What is the plural of {thing}?" for thing in THINGS),
]
LONG = [
    *(f"Tell a story about a {thing}." for thing in THINGS),
    *(f"Describe what a {thing} looks like." for thing in THINGS),
]
PACKAGES = ("torch", "transformers")


def plain_loop(model: Any, tokenizer: Any, requests: list[Request], sampling: Sampling, batch: int) -> list[int]:
    """Draw completions in a loop over `generate`, and return their lengths."""
    ends, lengths = end_ids_of(model, tokenizer), []
    config = GenerationConfig(
        do_sample=True,
        temperature=sampling.temperature,
        top_k=0,
        max_new_tokens=sampling.max_new_tokens,
        eos_token_id=sorted(ends),
        pad_token_id=tokenizer.pad_token_id,
    )
    ordered = sorted(requests, key=lambda one: -len(one.prompt_ids))
    for start in range(0, len(ordered), batch):
        ids = [one.prompt_ids for one in ordered[start : start + batch]]
        inputs = tokenizer.pad({"input_ids": ids}, padding_side="left", return_tensors="pt").to(model.device)
        output = model.generate(**inputs, generation_config=config)[:, inputs["input_ids"].shape[1] :]
        lengths += [next((i + 1 for i, t in enumerate(row) if t in ends), len(row)) for row in output.tolist()]
    return lengths


def evaluation(model: Any, tokenizer: Any, requests: list[Request], sampling: Sampling, batch: int) -> list[int]:
    return [len(one.ids) for one in generate(model, tokenizer, requests, sampling, batch)]


def measure(model: Any, tokenizer: Any, repetition: int, batch: int, samples: int, limit: int) -> dict[str, Any]:
    """Run the plain loop and then the evaluation, and return seconds and completion lengths of both."""
    prompts = [prompt_ids_of(tokenizer, [{"role": "user", "content": text}]) for text in SHORT + LONG]
    requests = [
        Request(ids, seed_of(repetition, prompt, sample))
        for sample in range(samples)
        for prompt, ids in enumerate(prompts)
    ]
    found: dict[str, Any] = {}
    for name, draw in (("plain loop", plain_loop), ("evaluation", evaluation)):
        torch.manual_seed(repetition)
        start = time.perf_counter()
        lengths = draw(model, tokenizer, requests, Sampling(max_new_tokens=limit), batch)
        seconds = time.perf_counter() - start
        found[name] = {"seconds": seconds, "lengths": lengths}
        rate = f"{sum(lengths) / seconds:.1f} tokens per second, {sum(lengths) / len(lengths):.0f} a completion"
        print(f"{repetition} {name}: {rate}", file=sys.stderr)
    return found


def report(store: Store, model: str, settings: dict[str, int]) -> str:
    measured = {name: [one[name] for one in store.values()] for name in ("plain loop", "evaluation")}
    rates = {name: [sum(run["lengths"]) / run["seconds"] for run in runs] for name, runs in measured.items()}
    rows = []
    for name, runs in measured.items():
        lengths = sorted(length for run in runs for length in run["lengths"])
        mean, error = mean_and_error(lengths)
        quantiles = [lengths[int(share * (len(lengths) - 1))] for share in (0.5, 0.9, 1)]
        rows.append([name, f"{statistics.median(rates[name]):.1f}", f"{mean:.1f} ± {error:.1f}", *map(str, quantiles)])
    ratio = ratios(rates["evaluation"], rates["plain loop"])
    return f"""# Throughput of an evaluation

Written by `python benchmarks/evaluation.py`. {processor()}; {listed(versions(*PACKAGES))}.
Raw numbers: [evaluation.json](evaluation.json).

{model}, batches of {settings["batch"]}, {settings["samples"]} completions at T = 1 of each of
{len(SHORT)} questions with short answers and {len(LONG)} with long ones, at most {settings["limit"]} tokens. Lengths
are of all repetitions; their means agree if both draw from the same distribution. `tests/test_evaluation_results.py`
tests the draws themselves.

{table(["", "tokens per second, median", "mean length", "median", "90%", "longest"], rows)}

Tokens per second as a multiple of the plain loop's, by repetition: {show(ratio)}.
"""


def main() -> None:
    arguments = parse(__doc__, quick="a tiny model and few rows", repetitions=dict(type=int, default=3))
    settings = dict(batch=4, samples=1, limit=32) if arguments.quick else dict(batch=16, samples=4, limit=384)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    store = Store(arguments.output / "evaluation.json", settings=settings)
    with TemporaryDirectory() as folder:
        name = tiny.save(Path(folder)) if arguments.quick else tasks.smollm2()
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = AutoModelForCausalLM.from_pretrained(name).to(device).eval()
        tokenizer = AutoTokenizer.from_pretrained(name)
    model.generation_config = GenerationConfig(eos_token_id=model.generation_config.eos_token_id)
    for repetition in range(arguments.repetitions):
        if str(repetition) not in store:
            store[str(repetition)] = measure(model, tokenizer, repetition, **settings)
    described = "A tiny model" if arguments.quick else "SmolLM2-135M-Instruct"
    write(arguments.output, "evaluation", report(store, described, settings))


if __name__ == "__main__":
    main()
