"""What a training step costs in time and memory: TBRM compared with TRL's GRPO, RLOO and A2PO and a minimal loop.

    python benchmarks/step.py              # SmolLM2-135M; about half an hour on two quiet cores
    python benchmarks/step.py --quick      # a tiny model, in seconds, to a temporary folder

Writes docs/benchmarks/step.{json,md,png}. With a CUDA device it uses that, and writes step_cuda.{json,md,png}.
"""

import contextlib
import functools
import gc
import itertools
import math
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from common import tasks, tiny
from common.measure import QUIET, peak_memory, quiet, set_up
from common.report import bullets, listed, parse, plt, processor, ratios, table, versions, wrapped, write
from datasets import Dataset
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PrinterCallback,
    TrainerCallback,
)
from trl.kernels.chunked_logprob import ChunkedLogProbFunction
from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as VOCABULARY_TILE

from tbrm_trl import TBRMTrainer, load_rollouts
from tbrm_trl.batch import chunks

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
from trl.experimental.a2po import A2POConfig, A2POTrainer

PARTS = ("generation", "reward", "reference", "old policy", "policy forward", "backward", "optimizer", "rest")
BETA, LEARNING_RATE = 0.002, 1e-6  # β of TBRM
# The options of each method besides those that all share. GRPO and RLOO need at least two generations per prompt.
METHODS: dict[str, dict[str, Any]] = {
    "GRPO β>0": dict(beta=0.04, num_generations=2),
    "TBRM": dict(beta=BETA),
    "minimal loop": {},
    "TBRM with replay": dict(beta=BETA, num_iterations=2),
    "GRPO β=0": dict(beta=0.0, num_generations=2),
    "RLOO": dict(num_generations=2),
    "A2PO": {},
}
COMPARED = ("TBRM", "minimal loop")
PEER = "GRPO β>0"  # ratios are to this method
PACKAGES = ("torch", "transformers", "trl", "accelerate", "tbrm-trl")
CUDA = torch.cuda.is_available()
SUFFIX = "_cuda" if CUDA else ""
MIB = 2**20
TRAINERS = tasks.METHODS | {"A2PO": (A2POTrainer, A2POConfig)}


# ---- the work, equal for all methods --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """One optimizer step.

    Attributes:
        model: folder of policy and reference.
        prompt: tokens of every prompt.
        lengths: tokens of each rollout's completion, the end token included.
        micro_batch: rollouts of one forward and backward.
        warm_up: `lengths` of a first step, which is not timed: it allocates gradients and optimizer states.
    """

    model: str
    prompt: int
    lengths: tuple[int, ...]
    micro_batch: int
    warm_up: tuple[int, ...]

    @property
    def tokens(self) -> int:
        return len(self.lengths) * self.prompt + sum(self.lengths)

    def in_order_of(self, seed: int) -> "Work":
        """The same rollouts in another order."""
        return replace(self, lengths=tuple(random.Random(seed).sample(self.lengths, len(self.lengths))))


def works(
    model: str, rollouts: int, micro_batch: int, equal: int, longest: int, warm_up: int | None
) -> dict[str, Work]:
    """The work under both length distributions. Prompts are half as long as the mean completion.

    The long tail is log-normal with a median of a quarter of the longest: its lengths are the quantiles at the middles
    of `rollouts` equal parts.
    """
    normal = [statistics.NormalDist().inv_cdf((i + 0.5) / rollouts) for i in range(rollouts)]
    tail = tuple(max(2, round(longest / 4 * math.exp(math.log(4) * z / normal[-1]))) for z in normal)
    return {
        name: Work(
            model=model,
            prompt=round(statistics.mean(lengths) / 2),
            lengths=lengths,
            micro_batch=micro_batch,
            warm_up=lengths if warm_up is None else (warm_up,) * rollouts,
        )
        for name, lengths in (("equal", (equal,) * rollouts), ("long_tail", tail))
    }


def prompts(tokenizer: Any, length: int, count: int, seed: int) -> list[str]:
    """Distinct texts of exactly `length` tokens."""
    words = [" the", " house", " water", " green", " seven", " music", " is", " of", " and", *"abcdefghij"]
    single = [word for word in words if len(tokenizer(text=word)["input_ids"]) == 1]
    drawn = random.Random(seed)
    texts: list[str] = []
    while len(texts) < count:
        text = "".join(drawn.choices(single, k=length))
        if len(tokenizer(text=text)["input_ids"]) == length and text not in texts:  # neighbouring words may merge
            texts.append(text)
    return texts


def reward(prompts: Sequence[Any], completions: Sequence[str], **kwargs: Any) -> list[float]:
    """0 or 1, as A2PO requires. The value does not matter here."""
    return [float(len(completion) % 2) for completion in completions]


class Clock:
    """Seconds by part. Every moment counts once: time in an inner part does not count for the outer part."""

    def __init__(self) -> None:
        self.marks: list[tuple[float, str]] = []  # the start of each part, and its name
        self.mark("rest")

    def mark(self, part: str) -> None:
        if CUDA:
            torch.cuda.synchronize()
        self.marks.append((time.perf_counter(), part))

    def lap(self) -> dict[str, float]:
        """Seconds by part since the last lap, and their `total`."""
        self.mark(self.marks[-1][1])
        seconds = dict.fromkeys(PARTS, 0.0)
        for (began, part), (ended, _) in itertools.pairwise(self.marks):
            seconds[part] += ended - began
        total = self.marks[-1][0] - self.marks[0][0]
        del self.marks[:-1]
        return {**seconds, "total": total}

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        outer = self.marks[-1][1]
        self.mark(name)
        try:
            yield
        finally:
            self.mark(outer)

    def wrap(self, owner: Any, method: str, part: str | Callable[..., str]) -> None:
        """Charge calls of a method to a part, which may depend on the arguments."""
        original = getattr(owner, method)

        @functools.wraps(original)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.part(part if isinstance(part, str) else part(*args, **kwargs)):
                return original(*args, **kwargs)

        setattr(owner, method, timed)


class Plan(LogitsProcessor):
    """Gives a model's `generate` the same sampling for all methods, and ends each row exactly at its planned length."""

    def __init__(self, work: Work, windows: int, tokenizer: Any, clock: Clock):
        self.upcoming = list(work.warm_up + work.lengths * (windows - 1))
        self.prompt, self.end_token, self.clock = work.prompt, tokenizer.eos_token_id, clock
        self.generated: list[tuple[Tensor, Tensor]] = []  # planned lengths, (B,), and ids, (B, P + C)
        self.config = GenerationConfig(
            max_new_tokens=max(self.upcoming), do_sample=True, temperature=1.0, top_p=1.0, top_k=0,
            pad_token_id=tokenizer.pad_token_id, eos_token_id=self.end_token, disable_compile=True,
        )  # fmt: skip

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        ends = input_ids.shape[1] - self.prompt + 1 >= self.lengths  # (B,) counting the token being drawn
        scores = scores.masked_fill(ends.unsqueeze(1), -torch.inf)  # (B, V)
        scores[:, self.end_token] = torch.where(ends, 0.0, -torch.inf).to(scores.dtype)  # (B,)
        return scores

    def govern(self, model: PreTrainedModel) -> None:
        original = model.generate

        def generate(input_ids: Tensor, attention_mask: Tensor, custom_generate: Any = None, **ignored: Any) -> Tensor:
            self.lengths = torch.tensor(self.upcoming[: len(input_ids)], device=input_ids.device)  # (B,)
            del self.upcoming[: len(input_ids)]
            with self.clock.part("generation"):
                output = original(
                    input_ids=input_ids, attention_mask=attention_mask, generation_config=self.config,
                    logits_processor=LogitsProcessorList([self]), custom_generate=custom_generate,
                )  # fmt: skip
            self.generated.append((self.lengths, output))
            return output

        model.generate = generate

    def check(self) -> None:
        """Assert that the whole plan was generated, and nothing else."""
        assert not self.upcoming, "every method generates the whole plan"
        for planned, output in self.generated:
            ends = (output[:, self.prompt :] == self.end_token).int().argmax(dim=1) + 1  # (B,)
            assert ends.equal(planned), f"planned completions of {planned.tolist()} tokens, got {ends.tolist()}"


# ---- measuring ------------------------------------------------------------------------------------------------------


@dataclass
class Measurement:
    """One measurement of one method.

    Attributes:
        updates: seconds by part of each optimizer step after the warm-up: one, or with replay a fresh and a replay one.
        memory: MiB by name, if memory was measured.
    """

    updates: list[dict[str, float]]
    memory: dict[str, float] | None = None

    def seconds(self, part: str = "total") -> float:
        """Mean over the updates. `without generation` also counts as a part."""
        if part == "without generation":
            return self.seconds() - self.seconds("generation")
        return statistics.mean(update[part] for update in self.updates)


Repetitions = list[Measurement]  # the first with memory


def middle(measured: Repetitions, part: str = "total") -> float:
    return statistics.median(one.seconds(part) for one in measured)


def paired(mine: Repetitions, theirs: Repetitions, part: str = "total") -> list[float]:
    """The ratios of seconds within each repetition."""
    return ratios((one.seconds(part) for one in mine), (one.seconds(part) for one in theirs))


def above_floor(measured: Repetitions) -> float:
    assert measured[0].memory is not None, "measured in the first repetition"
    return measured[0].memory["above_floor"]


class Stages(TrainerCallback):
    """Ends a lap after every update, and measures memory in the updates after the timed ones.

    As a callback it also times the optimizer. A lap ends when the update has been logged, so it includes logging.
    """

    def __init__(self, clock: Clock, updates: int, memory: bool):
        self.clock, self.updates, self.windows = clock, updates, 3 if memory else 2
        self.laps: list[dict[str, float]] = []
        self.memory: dict[str, float] = {}
        self.peaks = contextlib.ExitStack()

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.clock.wrap(optimizer, "step", "optimizer")
        self.clock.wrap(model, "zero_grad", "optimizer")

    def on_log(self, args, state, control, logs=None, model=None, optimizer=None, **kwargs):
        if "train_runtime" not in logs:
            self.update_done(model, self.reference, optimizer)

    def update_done(self, model: PreTrainedModel, reference: PreTrainedModel | None, optimizer: Any) -> None:
        self.laps.append(self.clock.lap())
        if self.windows == 3 and len(self.laps) == 2 * self.updates:
            floor, grads = static_floor(model, reference, optimizer)
            self.memory = {"floor": floor / MIB, "missing": 0 if next(model.parameters()).grad is not None else grads}
            self.peak = self.peaks.enter_context(peak_memory(model.device))
        elif len(self.laps) == 3 * self.updates:
            self.peaks.close()
            self.memory["above_floor"] = (self.peak.bytes - self.memory.pop("missing")) / MIB

    def result(self) -> Measurement:
        return Measurement(self.laps[self.updates : 2 * self.updates], self.memory or None)


def static_floor(model: PreTrainedModel, reference: PreTrainedModel | None, optimizer: Any) -> tuple[int, int]:
    """Bytes of weights, gradients, optimizer states and reference; and of the gradients alone."""

    def size(tensors: Any) -> int:
        return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, Tensor))

    grads = size(p for p in model.parameters() if p.requires_grad)
    states = size(value for state in optimizer.state.values() for value in state.values())
    weights = size(itertools.chain(model.parameters(), model.buffers()))
    frozen = size(itertools.chain(reference.parameters(), reference.buffers())) if reference is not None else 0
    return weights + grads + states + frozen, grads


# ---- the methods ----------------------------------------------------------------------------------------------------


def trainer_of(method: str, work: Work, folder: Path, seed: int, windows: int, **more: Any) -> Any:
    trainer_class, config_class = TRAINERS[method.split()[0]]
    options = {**QUIET, **METHODS[method], **more} | dict(
        output_dir=str(folder),
        per_device_train_batch_size=work.micro_batch,
        gradient_accumulation_steps=len(work.lengths) // work.micro_batch,
        max_completion_length=max(work.lengths),
        learning_rate=LEARNING_RATE,
        max_steps=windows * updates_per_window(method),
        seed=seed,
        bf16=CUDA,
        use_cpu=not CUDA,
        model_init_kwargs={"dtype": "float32"},
        logging_strategy="steps",
        logging_steps=1,
    )
    if method == "TBRM with replay":  # a buffer of one window: replayed rollouts are as long as fresh ones
        options["replay_buffer_size"] = len(work.lengths)
    tokenizer = AutoTokenizer.from_pretrained(work.model, padding_side="left")
    rows = Dataset.from_list([{"prompt": p} for p in prompts(tokenizer, work.prompt, 4 * len(work.lengths), seed)])
    trainer = trainer_class(work.model, reward, config_class(**options), rows, processing_class=tokenizer)
    trainer.remove_callback(PrinterCallback)
    if method == "A2PO":
        trainer._optimal_values = dict.fromkeys(rows["prompt"], 0.5)  # its first stage precedes all steps
    return trainer


def updates_per_window(method: str) -> int:
    return METHODS[method].get("num_iterations", 1)


def time_parts(trainer: Any, clock: Clock) -> None:
    """Charge the functions of a trainer to the parts. Time outside them is `rest`."""
    own_scoring = {TBRMTrainer: "_score_stale", A2POTrainer: "_get_sequence_logps"}

    def scored(model: Any, *args: Any, **kwargs: Any) -> str:
        if clock.marks[-1][1] == "policy forward":
            return "policy forward"
        return "reference" if model is trainer.ref_model or isinstance(trainer, TBRMTrainer) else "old policy"

    for owner, method, part in (
        (trainer, "_calculate_rewards", "reward"),
        (trainer.accelerator, "backward", "backward"),
        (trainer.accelerator, "clip_grad_norm_", "optimizer"),
        (trainer, "compute_loss" if isinstance(trainer, A2POTrainer) else "_compute_loss", "policy forward"),
        (trainer, own_scoring.get(type(trainer), "_get_per_token_logps_and_entropies"), scored),
    ):
        clock.wrap(owner, method, part)


def measure(method: str, work: Work, seed: int, memory: bool = False) -> Measurement:
    """Run one warm-up window, one timed window, and with `memory` one more."""
    clock = Clock()
    stages = Stages(clock, updates_per_window(method), memory)
    with tempfile.TemporaryDirectory() as folder, quiet():
        if method == "minimal loop":
            plan = MinimalLoop(work, clock, seed).train(stages)
        else:
            trainer = trainer_of(method, work, Path(folder), seed, stages.windows)
            stages.reference = trainer.ref_model
            trainer.add_callback(stages)
            plan = Plan(work, stages.windows, trainer.processing_class, clock)
            plan.govern(trainer.model)
            time_parts(trainer, clock)
            trainer.train()
            del trainer
    plan.check()
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()
    return stages.result()


# ---- the minimal loop -----------------------------------------------------------------------------------------------


@dataclass
class Rollout:
    ids: Tensor  # (T,) prompt and completion
    reward: float
    ref_log_prob: float = 0.0  # log π_ref of the completion


class MinimalLoop:
    """TBRM by hand: generate, reward, score the reference, forward, backward, AdamW. Micro-batches are by length."""

    def __init__(self, work: Work, clock: Clock, seed: int):
        self.work, self.clock, self.seed = work, clock, seed
        torch.manual_seed(seed)
        device = "cuda" if CUDA else "cpu"
        load = functools.partial(AutoModelForCausalLM.from_pretrained, work.model, dtype=torch.float32)
        self.policy, self.reference = load().to(device).train(), load().to(device).requires_grad_(False)
        self.tokenizer = AutoTokenizer.from_pretrained(work.model, padding_side="left")
        self.optimizer = torch.optim.AdamW(self.policy.parameters(), lr=LEARNING_RATE, weight_decay=0.0, fused=True)

    def score(self, model: PreTrainedModel, rollouts: Sequence[Rollout], *outputs: str) -> tuple[Tensor, Tensor]:
        """`(B,)` log-probability of each completion, and V of its first state; TRL's kernel computes `outputs`."""
        rows = [one.ids for one in rollouts]
        ids = pad_sequence(rows, batch_first=True, padding_value=self.tokenizer.pad_token_id).to(model.device)  # (B, T)
        columns = torch.arange(ids.shape[1], device=model.device)
        ends = torch.tensor([[len(row)] for row in rows], device=model.device)  # (B, 1)
        acting = (columns >= self.work.prompt - 1) & (columns < ends - 1)  # (B, T) states in which a token is chosen
        with torch.autocast(model.device.type, torch.bfloat16, enabled=CUDA):
            # Rows are padded on the right, which no causal state sees: a mask would only cost time.
            states = model.base_model(ids, use_cache=False).last_hidden_state  # (B, T, hidden)
            head = model.get_output_embeddings()
            value = head(states[:, self.work.prompt - 1]).float().logsumexp(dim=-1)  # (B,)
            chosen = ids.roll(-1, dims=1)[acting]  # (N,)
            log_probs, *_ = ChunkedLogProbFunction.apply(
                states[acting], head.weight, None, chosen, 1.0, VOCABULARY_TILE, None, 1.0, outputs
            )
        return torch.zeros_like(value).index_add(0, acting.nonzero()[:, 0], log_probs), value

    def loss(self, rollouts: Sequence[Rollout]) -> Tensor:
        log_prob, value = self.score(self.policy, rollouts, "log_probs", "entropy")
        rewards = torch.tensor([one.reward for one in rollouts], device=value.device)  # (B,)
        reference = torch.tensor([one.ref_log_prob for one in rollouts], device=value.device)  # (B,)
        return (BETA * (value + log_prob - reference) - rewards).square().sum() / len(self.work.lengths)

    def micro_batches(self, rollouts: list[Rollout]) -> list[Sequence[Rollout]]:
        return chunks(sorted(rollouts, key=lambda one: len(one.ids), reverse=True), self.work.micro_batch)

    @torch.no_grad()
    def score_reference(self, micro_batch: Sequence[Rollout]) -> None:
        log_probs, _ = self.score(self.reference, micro_batch, "log_probs")  # (B,)
        for one, log_prob in zip(micro_batch, log_probs.tolist(), strict=True):
            one.ref_log_prob = log_prob

    def roll_out(self, texts: list[str]) -> list[Rollout]:
        given = self.tokenizer(texts, return_tensors="pt").to(self.policy.device)
        output = self.policy.generate(**given).cpu()  # (B, P + C)
        lengths = (output[:, self.work.prompt :] == self.tokenizer.eos_token_id).int().argmax(dim=1) + 1  # (B,)
        ids = [row[: self.work.prompt + length] for row, length in zip(output, lengths, strict=True)]
        completions = self.tokenizer.batch_decode([row[self.work.prompt :] for row in ids], skip_special_tokens=True)
        with self.clock.part("reward"):
            rewards = reward(texts, completions)
        return [Rollout(row, one) for row, one in zip(ids, rewards, strict=True)]

    def update(self, texts: list[str]) -> None:
        part, micro_batches = self.clock.part, self.micro_batches(self.roll_out(texts))
        for micro_batch in micro_batches:
            with part("reference"):
                self.score_reference(micro_batch)
        for micro_batch in micro_batches:
            with part("policy forward"):
                loss = self.loss(micro_batch)
            with part("backward"):
                loss.backward()
        with part("optimizer"):
            torch.nn.utils.clip_grad_norm_(self.policy.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()

    def train(self, stages: Stages) -> Plan:
        plan = Plan(self.work, stages.windows, self.tokenizer, self.clock)
        plan.govern(self.policy)
        texts = prompts(self.tokenizer, self.work.prompt, stages.windows * len(self.work.lengths), self.seed)
        self.clock.lap()
        for _ in range(stages.windows):
            batch, texts = texts[: len(self.work.lengths)], texts[len(self.work.lengths) :]
            self.update(batch)
            stages.update_done(self.policy, self.reference, self.optimizer)
        return plan


def losses_on_the_same_rollouts(work: Work) -> tuple[float, float]:
    """The loss of the trainer's first update, and the minimal loop's on the same rollouts, of several lengths."""
    lengths, clock = tuple(2 + i % 7 for i in range(len(work.lengths))), Clock()
    work = replace(work, lengths=lengths, warm_up=lengths)
    with tempfile.TemporaryDirectory() as folder, quiet():
        trainer = trainer_of("TBRM", work, Path(folder), 0, 1, save_rollouts=True)
        Plan(work, 1, trainer.processing_class, clock).govern(trainer.model)
        trainer.train()
        rows = load_rollouts(folder)
    loop = MinimalLoop(work, clock, 0)
    rollouts = [Rollout(torch.tensor(row["prompt_ids"] + row["completion_ids"]), row["reward"]) for row in rows]
    micro_batches = loop.micro_batches(rollouts)
    for micro_batch in micro_batches:
        loop.score_reference(micro_batch)
    return trainer.state.log_history[0]["loss"], sum(loop.loss(micro_batch).item() for micro_batch in micro_batches)


# ---- all of it ------------------------------------------------------------------------------------------------------


Measurements = dict[Any, dict[str, Repetitions]]  # by name of the work (here its length distribution) and method


@dataclass
class Results:
    works: dict[str, Work]
    measurements: Measurements
    overhead: Measurements  # TBRM and the minimal loop alone: they cost almost the same, so take more and closer pairs
    losses: tuple[float, float]  # the trainer's and the loop's


def run(all_works: dict[Any, Work], repetitions: int, methods: Sequence[str], memory: bool) -> Measurements:
    """Measure the methods in turn, in another order each repetition. `memory` is measured in the first repetition."""
    results: Measurements = {work: {m: [] for m in methods} for work in all_works}
    for repetition, name in itertools.product(range(repetitions), all_works):
        turn = repetition % len(methods)
        for method in (*methods[turn:], *methods[:turn]):
            work = all_works[name].in_order_of(repetition)
            measured = measure(method, work, seed=repetition, memory=memory and repetition == 0)
            results[name][method].append(measured)
            print(f"{repetition} {name} {method}: {measured.seconds():.2f} s {measured.memory or ''}", file=sys.stderr)
    return results


def spread(values: Sequence[float]) -> str:
    around = f" ({min(values):.2f} to {max(values):.2f})" if len(values) > 1 else ""
    return f"{statistics.median(values):.2f}{around}"


def targets(results: Results) -> list[tuple[str, float, list[float]]]:
    """The targets: description, largest allowed ratio, and the paired ratios."""
    equal, tail = (results.measurements[work] for work in ("equal", "long_tail"))
    memory = [above_floor(tail["TBRM"]) / above_floor(tail[PEER])]
    found = [
        (f"TBRM step of {PEER}, equal, generation included", 1.0, paired(equal["TBRM"], equal[PEER])),
        (f"TBRM step of {PEER}, long_tail, generation included", 0.8, paired(tail["TBRM"], tail[PEER])),
        (f"TBRM peak memory above the floor of {PEER}, long_tail", 0.9, memory),
    ]
    for work, of in results.measurements.items():
        mine, theirs = (results.overhead[work][method] for method in COMPARED)
        fresh, replay = zip(*(one.updates for one in of["TBRM with replay"]), strict=True)
        without_generation = (update["total"] - update["generation"] for update in fresh)
        replayed = ratios((update["total"] for update in replay), without_generation)
        found.append((f"TBRM step of the minimal loop, {work}", 1.05, paired(mine, theirs)))
        found.append((f"replay update of a fresh one without generation, {work}", 0.85, replayed))
    return found


def seconds_table(results: Results, work: str) -> str:
    rows = []
    for method, measured in results.measurements[work].items():
        lines = {method: measured}
        if method == "TBRM with replay":
            for number, kind in enumerate(("its fresh update", "its replay update")):
                lines[kind] = [Measurement([one.updates[number]]) for one in measured]
        for name, of in lines.items():
            total = middle(of)
            # The repetition with the median total, so that the parts add up to the total in their row.
            one = min(of, key=lambda one: abs(one.seconds() - total))
            parts = [one.seconds(part) for part in PARTS]
            numbers = [f"{number:.2f}" for number in (one.seconds(), *parts, sum(parts))]
            memory = f"{above_floor(of):.0f}" if of is measured else ""
            rows.append([name, *numbers, f"{results.works[work].tokens / one.seconds():.0f}", memory])
    return table(["", "step, s", *PARTS, "sum", "tokens/s", "above the floor, MiB"], rows)


def ratio_table(results: Results) -> str:
    kinds = {"with": "total", "without": "without generation"}
    tail, rows = results.measurements["long_tail"], []
    for method in tail:
        pairs = [(of[method], of[PEER]) for of in results.measurements.values()]
        cells = [spread(paired(*pair, part)) for pair in pairs for part in kinds.values()]
        rows.append([method, *cells, f"{above_floor(tail[method]) / above_floor(tail[PEER]):.2f}"])
    header = [f"{work}, {kind} generation" for work in results.works for kind in kinds]
    return table(["", *header, "memory, long_tail"], rows)


def environment(threads: int) -> dict[str, Any]:
    return {
        "device": torch.cuda.get_device_name() if CUDA else processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        "python": platform.python_version(),
        **versions(*PACKAGES),
    }


def introduction(script: str, environment: dict[str, Any]) -> str:
    """The first lines of a page."""
    packages, raw = listed({name: environment[name] for name in PACKAGES}), f"{script}{SUFFIX}.json"
    return wrapped(f"""Written by `python benchmarks/{script}.py`. {environment["device"]}, {environment["cores"]}
        cores, {environment["threads"]} of them used; Python {environment["python"]}, {packages}.
        Raw numbers: [{raw}]({raw}).""")


def report(results: Results, environment: dict[str, Any]) -> str:
    judged = []
    for asked, limit, measured in targets(results):
        verdict = "met" if statistics.median(measured) <= limit else "**missed**"
        judged.append([asked, f"{limit:.2f}", spread(measured), verdict])
    repetitions = len(results.measurements["equal"]["TBRM"])
    equal, tail = results.works["equal"], results.works["long_tail"]
    blocks = "\n\n".join(
        f"## {title}\n\n{wrapped(text)}\n\n{seconds_table(results, work)}"
        for work, title, text in (
            ("equal", "Equal lengths", f"{len(equal.lengths)} rollouts of {equal.prompt} + {equal.lengths[0]} tokens."),
            (
                "long_tail",
                "Long tail",
                f"""{len(tail.lengths)} rollouts, prompts of {tail.prompt} tokens, completions log-normal: of
                {", ".join(map(str, sorted(tail.lengths)))} tokens, the median a quarter of the longest.""",
            ),
        )
    )
    setting = f"""One optimizer step of {Path(equal.model).name}, {"bfloat16 autocast" if CUDA else "float32"}, no
        gradient checkpointing, AdamW, micro-batches of {equal.micro_batch}. All methods in one process, in turn, their
        order rotated; medians of {repetitions} repetitions with the smallest and the largest, ratios taken within a
        repetition."""
    fairness = (
        """Every method generates with its trainer's own call of `generate` on the same sampling settings and a plan of
        lengths: a logits processor forbids the end token before a row's length and forces it there. Prompts of a step
        are equally long. A2PO generates for each micro-batch by itself, as its trainer does, the others for all
        rollouts at once. Its values of the first stage are given, since they are no part of a step.""",
        f"""GRPO and RLOO take two rollouts for each of {len(equal.lengths) // 2} prompts, the fewest they accept, the
        others one for each of {len(equal.lengths)}. Logging every step, no completions printed.""",
        """A part is the time inside a trainer's functions: `generate`, rewards, scoring the reference (TBRM's includes
        padding to batches), scoring the old policy (RLOO alone), the loss (padding and metrics included),
        `accelerator.backward`, clipping and AdamW. The rest is what is left: tokenizing, decoding, shuffling, logging,
        the Trainer's loop. The parts shown are those of the repetition with the median time.""",
        """Memory is the peak of allocated tensor bytes in a further step that is not timed, above weights, gradients,
        optimizer states and reference; GRPO with β = 0 has no reference and a lower floor.""",
        f"""The minimal loop is `MinimalLoop` in the script: plain PyTorch with TRL's chunked head, no trainer. The
        ratio to it in the first table is of {len(results.overhead["equal"]["TBRM"])} further pairs of these two alone.
        On the same rollouts its loss is {results.losses[1]:.6g}, the trainer's {results.losses[0]:.6g}.""",
    )
    return f"""# What a step costs

{introduction("step", environment)}

![seconds by part](step{SUFFIX}.png)

{wrapped(setting)}

## Targets

{table(["ratio", "at most", "measured", ""], judged)}

## Ratios to {PEER}

{ratio_table(results)}

{blocks}

## How it is made equal

{bullets(fairness)}
"""


def draw(results: Results) -> plt.Figure:
    figure, panels = plt.subplots(1, len(results.works), figsize=(12, 4.2))
    for axes, (work, of) in zip(panels, results.measurements.items(), strict=True):
        left = [0.0] * len(of)
        for part in PARTS:
            width = [middle(measured, part) for measured in of.values()]
            axes.barh(list(of), width, left=left, label=part)
            left = [a + b for a, b in zip(left, width, strict=True)]
        axes.invert_yaxis()
        axes.set(xlabel="seconds per optimizer step (medians)", title=work.replace("_", " "))
        axes.grid(visible=False)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper")
    return figure


def main() -> None:
    options: dict[str, Any] = {
        "model": dict(help="folder of a causal language model (default: SmolLM2-135M)"),
        "repetitions": dict(type=int, help="default: 5, with --quick 2"),
        "rollouts": dict(type=int, default=16, help="per optimizer step"),
        "micro-batch": dict(type=int, default=4, help="rollouts of a forward"),
        "equal": dict(type=int, default=32, help="tokens of a completion where all are equal"),
        "longest": dict(type=int, default=64, help="tokens of the longest completion in the long tail"),
        "threads": dict(type=int, default=2),
    }
    arguments = parse(__doc__, quick="a tiny model and few tokens", **options)
    if arguments.rollouts % arguments.micro_batch or arguments.rollouts % 2:
        raise SystemExit("--rollouts must be even and divisible by --micro-batch")
    set_up(arguments.threads)
    quick = arguments.quick
    with tempfile.TemporaryDirectory() as folder:
        model = arguments.model or (tiny.save(Path(folder) / "tiny", "llama") if quick else tasks.smollm2())
        equal, longest = (8, 16) if quick else (arguments.equal, arguments.longest)
        # The allocator of a GPU must have seen every size; on a CPU a short step is enough.
        warm_up = None if quick or CUDA else 4
        repetitions = arguments.repetitions or (2 if quick else 5)
        all_works = works(model, arguments.rollouts, arguments.micro_batch, equal, longest, warm_up)
        losses = losses_on_the_same_rollouts(all_works["equal"])
        assert math.isclose(*losses, rel_tol=1e-2 if CUDA else 1e-4), f"the trainer's and the loop's loss: {losses}"
        measurements = run(all_works, repetitions, list(METHODS), memory=True)
        overhead = run(all_works, 2 * repetitions, COMPARED, memory=False)
    results, where = Results(all_works, measurements, overhead, losses), environment(arguments.threads)
    raw = {
        "environment": where,
        "works": {name: asdict(work) | {"model": Path(work.model).name} for name, work in all_works.items()},
        "losses": dict(zip(("trainer", "minimal loop"), losses, strict=True)),
        "measurements": measurements,
        "overhead": overhead,
    }
    write(arguments.output, f"step{SUFFIX}", report(results, where), raw, draw(results))


if __name__ == "__main__":
    main()
