"""A step of TBRM, without and with a pool of rollouts, compared with one of TRL's GRPO: processes that take turns.

    python benchmarks/paired_steps.py              # SmolLM2-135M; about an hour, on the cores that it may use
    python benchmarks/paired_steps.py --quick      # a tiny model and the long tail alone, to a temporary folder

Every step generates its rollouts, with planned lengths. `benchmarks/step.py` times the parts of a step, and
`benchmarks/pool.py` counts what a pool saves. Finished measurements are kept in docs/benchmarks/paired_steps.json and
are not repeated. Delete the file to start over.
"""

import itertools
import json
import os
import random
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pool
import step
import torch
from common import tasks, tiny
from common.measure import quiet, set_up
from common.report import Store, parse, table, wrapped, write
from common.turns import Process, Turns, interval, take_turns
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, DynamicCache, LogitsProcessor

POOL = 48
# By kind of lengths: the methods, each with the number of rows that may run ahead.
COMPARED = {
    "equal": {step.PEER: 0, "TBRM": 0},
    "long_tail": {step.PEER: 0, "TBRM": 0, "TBRM with a pool": POOL},
}
ASKED = {("equal", "TBRM"): 1.02, ("long_tail", "TBRM"): 0.62, ("long_tail", "TBRM with a pool"): 0.56}
WARMED_UP = 5  # updates, after which the optimizer has its states and the pool is full


class ByPrompt(LogitsProcessor):
    """Ends each prompt's completion exactly at its planned length, in whatever batch and step it is drawn."""

    def __init__(self, lengths: dict[tuple[int, ...], int], prompt: int, end_token: int):
        self.lengths, self.prompt, self.end_token = lengths, prompt, end_token

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        drawn = input_ids.shape[1] - self.prompt + 1  # counting the token being drawn
        keys = map(tuple, input_ids[:, : self.prompt].tolist())
        ends = torch.tensor([drawn >= self.lengths[key] for key in keys], device=scores.device)  # (B,)
        scores = scores.masked_fill(ends.unsqueeze(1), -torch.inf)  # (B, V)
        scores[:, self.end_token] = torch.where(ends, 0.0, -torch.inf).to(scores.dtype)  # (B,)
        return scores


def worker(method: str, ahead: int, given: dict[str, Any], windows: int) -> None:
    """Train in this process, one update for each line on stdin. Every window has the same lengths."""
    turns = Turns(lambda: FlopCounterMode(display=False), lambda counter: counter.get_total_flops())
    set_up(len(os.sched_getaffinity(0)))
    work = step.Work(**{**given, **{name: tuple(given[name]) for name in ("lengths", "warm_up")}})
    with tempfile.TemporaryDirectory() as folder, quiet():
        more = {"rollout_pool": ahead} if ahead else {}
        trainer = step.trainer_of(method, work, Path(folder), 0, windows, **more)
        trainer.add_callback(turns)
        if ahead:
            by_prompt(trainer, work)
        else:
            step.Plan(work, windows, trainer.processing_class, step.Clock()).govern(trainer.model)
        trainer.train()


def by_prompt(trainer: Any, work: step.Work) -> None:
    """Give every row of the data set one of the planned lengths."""
    tokenizer, model = trainer.processing_class, trainer.model
    ids = tokenizer(text=list(trainer.train_dataset["prompt"]))["input_ids"]
    planned = dict(zip(map(tuple, ids), itertools.cycle(work.lengths), strict=False))
    processors, plan = model._get_logits_processor, ByPrompt(planned, work.prompt, tokenizer.eos_token_id)

    def with_plan(*args: Any, **kwargs: Any) -> Any:
        given = processors(*args, **kwargs)
        given.append(plan)
        return given

    model._get_logits_processor = with_plan


def measure(work: step.Work, methods: dict[str, int], updates: int) -> dict[str, Any]:
    """Seconds of each update and floating-point operations of one update, by method."""
    windows = WARMED_UP + 1 + updates + 2 * POOL // len(work.lengths)  # the last windows have none ahead
    given = json.dumps(asdict(replace(work, warm_up=work.lengths)))
    processes = {
        name: Process(
            [__file__, "--worker", name.removesuffix(" with a pool"), str(ahead), given, str(windows)],
            os.sched_getaffinity(0),
        )
        for name, ahead in methods.items()
    }
    seconds, operations = take_turns(processes, WARMED_UP, updates)
    return {"seconds": seconds, "operations": operations}


# ---- the least that a step with a pool takes -------------------------------------------------------------------------

ROWS = (1, 2, 4, 8, 16)
REPEATS = 9


@torch.no_grad()
def decoding(work: step.Work) -> dict[str, Any]:
    """Median seconds of a decode step by the number of rows in it, and the seconds of reading one token."""
    model = AutoModelForCausalLM.from_pretrained(work.model).eval()
    context = work.prompt + sum(work.lengths) // len(work.lengths)
    steps: dict[str, float] = {}
    read = 0.0
    for rows in ROWS:
        cache, ids = DynamicCache(config=model.config), torch.full((rows, context), 7)
        took = []
        for again in range(REPEATS + 1):
            began = time.perf_counter()
            model(ids if not again else ids[:, :1], past_key_values=cache, logits_to_keep=1)
            took.append(time.perf_counter() - began)
        read, steps[str(rows)] = took[0] / (rows * context), statistics.median(took[1:])
    return {"steps": steps, "read": read}


def floor(work: step.Work, seconds: dict[str, list[float]], decoding: dict[str, Any]) -> float:
    """The least that a step with a pool takes, as a multiple of the peer's step.

    It is the step without a pool, but with the same tokens decoded in steps of all rows and with prefixes read again.
    """
    xs, ys = zip(*((int(rows), took) for rows, took in decoding["steps"].items()), strict=True)
    alive = [sum(length >= at for length in work.lengths) for at in range(1, max(work.lengths) + 1)]
    now = float(np.interp(alive, xs, ys).sum())
    windows = [random.Random(window).sample(work.lengths, len(work.lengths)) for window in range(200)]
    read_again = pool.count(windows, POOL).read_again / len(windows)
    full = sum(work.lengths) / len(work.lengths) * float(np.interp(len(work.lengths), xs, ys))
    least = full + read_again * decoding["read"]
    peer, alone = statistics.median(seconds[step.PEER]), statistics.median(seconds["TBRM"])
    return (alone - now + least) / peer


def report(runs: dict[str, Any], environment: dict[str, Any], works: dict[str, step.Work]) -> str:
    rows = []
    for kind in filter(runs.__contains__, COMPARED):
        found = runs[kind]
        peer, operations = found["seconds"][step.PEER], found["operations"]
        for name, took in found["seconds"].items():
            if name == step.PEER:
                continue
            # A step with a pool decodes more or fewer tokens than its window has, so only sums are comparable.
            ratio, low, high = interval(took, peer, totals=kind != "equal")
            limit = ASKED[kind, name]
            bound = high if kind == "equal" else ratio
            rows.append(
                [
                    kind.replace("_", " "), name, str(len(took)), f"{ratio:.3f} ({low:.3f} to {high:.3f})",
                    f"{limit}", "met" if bound <= limit else "**missed**",
                    f"{operations[name] / operations[step.PEER]:.3f}",
                ]
            )  # fmt: skip
    equal, tail = works["equal"], works["long_tail"]
    header = ["lengths", "", "pairs", f"of {step.PEER} (95% interval)", "at most", "", "operations"]
    text = f"""One optimizer step with the generation of its rollouts, {Path(equal.model).name}, float32, AdamW,
        micro-batches of {equal.micro_batch}, {len(equal.lengths)} rollouts: prompts of {equal.prompt} tokens and
        completions of {equal.lengths[0]}; or prompts of {tail.prompt} and completions of
        {", ".join(map(str, sorted(tail.lengths)))}. {step.PEER} draws two for each prompt, the fewest that it takes.
        Each method is a process of its own. After {WARMED_UP + 1} steps they take turns, in an order that changes; a
        pair is two steps of one turn. On equal lengths the ratio is the median of pairs, and the upper end of its
        interval is judged. On the long tail it is that of the sums, since a step with a pool (`rollout_pool={POOL}`)
        decodes more than its window or less. Intervals are over resampled pairs. Operations are the floating-point
        operations of matrix products in one step, as a multiple of {step.PEER}'s."""
    steps, read = runs["decoding"]["steps"], runs["decoding"]["read"]
    least = floor(tail, runs["long_tail"]["seconds"], runs["decoding"])
    seconds = runs["long_tail"]["seconds"]
    reached = interval(seconds["TBRM with a pool"], seconds[step.PEER], totals=True)
    of_floor = f"""The least that a step with a pool can take on the long tail here is **{least:.3f}** of
        {step.PEER}'s: the step without one, if the same tokens came from decode steps of all {len(tail.lengths)} rows,
        and what goes on under a new policy were read again. The pool's is {reached[0] - least:+.3f} from it. A decode
        step takes {", ".join(f"{1000 * took:.0f} ms with {n}" for n, took in steps.items())} rows in it, and reading
        {1000 * read:.1f} ms a token."""
    return f"""# Steps in turn

{step.introduction("paired_steps", environment)}

{wrapped(text)}

{table(header, rows)}

{wrapped(of_floor)}
"""


def main() -> None:
    options: dict[str, Any] = {
        "model": dict(help="folder of a causal language model (default: SmolLM2-135M)"),
        "equal": dict(type=int, help="pairs on equal lengths; default: 40, with --quick none"),
        "long-tail": dict(type=int, help="pairs on the long tail; default: 16, with --quick 2"),
    }
    arguments = parse(__doc__, quick="a tiny model and few tokens of the long tail", **options)
    quick, threads = arguments.quick, len(os.sched_getaffinity(0))
    pairs = {
        "equal": arguments.equal or (0 if quick else 40),
        "long_tail": arguments.long_tail or (2 if quick else 16),
    }
    with tempfile.TemporaryDirectory() as folder:
        model = arguments.model or (tiny.save(Path(folder) / "tiny", "llama") if quick else tasks.smollm2())
        works = step.works(model, 16, 4, 8 if quick else 32, 16 if quick else 64, None)
        environment = step.environment(threads)
        runs = Store(arguments.output / "paired_steps.json", environment=environment)
        for kind, methods in COMPARED.items():
            if pairs[kind] and kind not in runs:
                runs[kind] = measure(works[kind], methods, pairs[kind])
        if "decoding" not in runs:
            set_up(threads)
            runs["decoding"] = decoding(works["long_tail"])
    write(arguments.output, "paired_steps", report(runs, environment, works))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(sys.argv[2], int(sys.argv[3]), json.loads(sys.argv[4]), int(sys.argv[5]))
    else:
        main()
