"""Accuracy against rollouts used: TBRM with and without replay, beside TRL's GRPO and RLOO.

    python benchmarks/replay.py                     # tiny model: selection of learning rates, then the final runs
    python benchmarks/replay.py --model smollm2     # one run of each configuration on SmolLM2-135M
    python benchmarks/replay.py --smoke             # two minutes, to a temporary folder

Everything is written to docs/benchmarks/replay.{json,md,png} after each configuration. A run whose result is already
in the JSON is not repeated; delete the JSON to start over.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import io
import itertools
import json
import math
import multiprocessing
import os
import platform
import random
import runpy
import statistics
import string
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib
import torch
import transformers
from common import tiny
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, TrainerCallback
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from tbrm_trl import TBRMConfig, TBRMTrainer
from tbrm_trl.evaluation import evaluate_accuracy
from tbrm_trl.rewards import gym

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parent.parent

PACKAGES = ("torch", "transformers", "trl", "accelerate", "datasets", "reasoning-gym", "tbrm-trl")


# ---- what is compared -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Configuration:
    """A method, how many updates each window of rollouts serves, and whether the later ones draw from a buffer."""

    method: str
    iterations: int
    replay: bool = False

    def __str__(self) -> str:
        return f"{self.method} K={self.iterations}{' replay' if self.replay else ''}"


# In the order of their selection: K = 1 chooses β for a method's other rows, the first with replay the buffer size.
CONFIGURATIONS = {
    str(configuration): configuration
    for configuration in (
        Configuration("GRPO", 1),
        Configuration("GRPO", 4),
        Configuration("RLOO", 1),
        *(Configuration("TBRM", iterations) for iterations in (1, 2, 4, 8)),
        *(Configuration("TBRM", iterations, replay=True) for iterations in (4, 2, 8)),
    )
}


@dataclass(frozen=True)
class Settings:
    """Sizes of the comparison on one model."""

    updates: int
    rows: int  # trajectories per update
    evaluations: tuple[int, ...]  # after how many updates
    learning_rates: dict[str, tuple[float, ...]]  # per method
    betas: dict[str, tuple[float, ...]]  # per method: KL coefficients (of TBRM: its β)
    buffer_sizes: tuple[int, ...]
    selection_seeds: tuple[int, ...]
    final_seeds: tuple[int, ...]
    demonstration_steps: int = 0  # supervised steps that make the tiny model's starting point


def _fractions(updates: int) -> tuple[int, ...]:
    return tuple(updates * sixteenth // 16 for sixteenth in (1, 2, 3, 4, 6, 8, 10, 12, 14, 16))


TINY = Settings(
    updates=384,
    rows=64,
    evaluations=_fractions(384),
    learning_rates={
        "TBRM": (2.5e-4, 5e-4, 1e-3, 2e-3),
        "GRPO": (5e-4, 1e-3, 2e-3, 4e-3),
        "RLOO": (5e-4, 1e-3, 2e-3, 4e-3),
    },
    # TRL's defaults are 0 for GRPO and 0.05 for RLOO; 0.04 is what TRL used for GRPO before.
    betas={"TBRM": (0.02, 0.05, 0.1), "GRPO": (0.0, 0.04), "RLOO": (0.0, 0.05)},
    buffer_sizes=(256, 1024),
    selection_seeds=(100, 101),
    final_seeds=(0, 1, 2, 3, 4),
    demonstration_steps=300,
)
SMOKE = replace(
    TINY,
    updates=16,
    evaluations=_fractions(16),
    learning_rates=dict.fromkeys(("TBRM", "GRPO", "RLOO"), (1e-3,)),
    betas={"TBRM": (0.05,), "GRPO": (0.0,), "RLOO": (0.0,)},
    buffer_sizes=(128,),
    selection_seeds=(100,),
    final_seeds=(0, 1),
    demonstration_steps=100,
)
# TBRM's options are those of examples/reasoning_gym_demo.py.
SMOLLM2 = Settings(
    updates=16,
    rows=16,
    evaluations=(16,),
    learning_rates={"TBRM": (2e-5,), "GRPO": (1e-5,), "RLOO": (1e-5,)},
    betas={"TBRM": (0.02,), "GRPO": (0.0,), "RLOO": (0.05,)},
    buffer_sizes=(64,),
    selection_seeds=(),
    final_seeds=(0,),
)
SETTINGS = {"tiny": TINY, "smoke": SMOKE, "smollm2": SMOLLM2}


@dataclass(frozen=True)
class Run:
    """One training run. Its text is its key in the JSON."""

    model: str  # a key of SETTINGS
    stage: str  # "selection" or "final": they share neither seeds nor problems
    configuration: Configuration
    learning_rate: float
    beta: float
    buffer_size: int
    seed: int

    def __str__(self) -> str:
        buffer = f" buffer={self.buffer_size}" if self.configuration.replay else ""
        return (
            f"{self.model} {self.stage}: {self.configuration} lr={self.learning_rate:g} beta={self.beta:g}{buffer} "
            f"seed={self.seed}"
        )


# ---- the tasks ------------------------------------------------------------------------------------------------------


@dataclass
class Task:
    """What a run trains on, and how its accuracy is measured."""

    model: str  # folder
    train: Dataset
    reward: Callable[..., list[float]]
    accuracy: Callable[[PreTrainedModel], float]
    max_completion_length: int
    options: dict[str, Any]  # of the trainer's config


LETTERS = string.ascii_lowercase[:6]
WORD_LENGTH = 4
HELD_OUT = 128
NOISE = 0.5  # share of a demonstration's letters that are replaced by random ones


def demonstrated_model(rows: torch.Tensor, answer_length: int, tokenizer, steps: int) -> PreTrainedModel:
    """A model from random weights that has seen noisy demonstrations, so that it starts at a few percent.

    Without them, no trajectory would ever be right and nothing could be learned from a reward of 0 or 1.
    """
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": 64, "initializer_range": 0.05}
    config = AutoConfig.for_model("llama", **{**tiny.ARCHITECTURES["llama"], **sizes})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    first_letter = len(tokenizer) - len(LETTERS)
    for _ in range(steps):
        batch = rows[torch.randint(len(rows), (128,))]  # (B, T), a copy
        letters = batch[:, -answer_length:-1]
        noisy = torch.rand(letters.shape) < NOISE
        letters[noisy] = torch.randint(first_letter, len(tokenizer), (int(noisy.sum()),))
        loss = -answer_log_probs(model, batch, answer_length).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def answer_log_probs(model: PreTrainedModel, rows: torch.Tensor, answer_length: int) -> torch.Tensor:
    """Log-probability of each row's answer, its last tokens."""
    log_probs = model(input_ids=rows).logits[:, -answer_length - 1 : -1].log_softmax(-1)
    return log_probs.gather(-1, rows[:, -answer_length:, None]).squeeze(-1).sum(1)  # (B,)


def sorting_task(run: Run, settings: Settings, folder: Path) -> Task:
    """Write a word's letters in alphabetical order, then stop; the reward is 1 for exactly that and 0 for all else."""
    words = ["".join(letters) for letters in itertools.product(LETTERS, repeat=WORD_LENGTH)]
    random.Random(0).shuffle(words)
    words = words[::2] if run.stage == "selection" else words[1::2]
    held_out, train = words[:HELD_OUT], words[HELD_OUT:]

    tokenizer = tiny.tokenizer(alphabet=LETTERS)
    answers = {word: [*tokenizer("".join(sorted(word)))["input_ids"], tokenizer.eos_token_id] for word in words}
    answer_length = WORD_LENGTH + 1

    def rows(of: list[str]) -> torch.Tensor:
        return torch.tensor([tokenizer(word)["input_ids"] + answers[word] for word in of])

    torch.manual_seed(run.seed)
    demonstrated_model(rows(train), answer_length, tokenizer, settings.demonstration_steps).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    evaluated = rows(held_out)

    def reward(prompts, completion_ids, **kwargs):
        return [float(list(ids) == answers[word]) for word, ids in zip(prompts, completion_ids, strict=True)]

    @torch.no_grad()
    def accuracy(model: PreTrainedModel) -> float:
        """Expected accuracy of a sample at T = 1: exact, as there is one right completion."""
        return answer_log_probs(model, evaluated, answer_length).exp().mean().item()

    return Task(
        model=str(folder),
        train=Dataset.from_list([{"prompt": word} for word in train]),
        reward=reward,
        accuracy=accuracy,
        max_completion_length=answer_length,
        options={"lr_scheduler_type": "linear"},
    )


def arithmetic_task(run: Run) -> Task:
    """The task of examples/reasoning_gym_demo.py: sums and differences of two one-digit numbers."""
    demo = runpy.run_path(str(ROOT / "examples/reasoning_gym_demo.py"))
    folder = demo["unpack_smollm2"](ROOT / "outputs" / demo["SMOLLM2"])
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    difficulty = dict(min_terms=2, max_terms=2, min_digits=1, max_digits=1)
    train, held_out = demo["distinct_problems"]("chain_sum", difficulty, 140, 60, run.seed)

    def as_prompt(entry: dict) -> list[dict]:
        return [
            {"role": "system", "content": demo["SYSTEM_PROMPT"]},
            {"role": "user", "content": entry["question"]},
        ]

    def verify(completion: str, entry: dict) -> float:
        return gym.judge("chain_sum", entry, completion)[0]

    entries = {entry["question"]: entry for entry in train}

    def reward(completions, question, **kwargs):
        return [verify(c[0]["content"], entries[q]) for c, q in zip(completions, question, strict=True)]

    def accuracy(model: PreTrainedModel) -> float:
        return evaluate_accuracy(
            model,
            tokenizer,
            [as_prompt(entry) for entry in held_out],
            lambda index, text: verify(text, held_out[index]),
            samples=2,
            temperature=1.0,
            max_new_tokens=16,
            batch_size=120,
        ).mean

    return Task(
        model=str(folder),
        train=Dataset.from_list([{"prompt": as_prompt(entry), "question": entry["question"]} for entry in train]),
        reward=reward,
        accuracy=accuracy,
        max_completion_length=16,
        options={"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 3},
    )


# ---- one run --------------------------------------------------------------------------------------------------------


class Measure(TrainerCallback):
    """Accuracy along the run, with the rollouts generated so far."""

    def __init__(self, task: Task, evaluations: Iterable[int]) -> None:
        self.task, self.evaluations = task, set(evaluations)
        self.rollouts = 0
        self.points: list[list[float]] = []  # [updates, rollouts, accuracy]

    def reward(self, prompts, **kwargs) -> list[float]:
        self.rollouts += len(prompts)
        return self.task.reward(prompts=prompts, **kwargs)

    def measure(self, updates: int, model: PreTrainedModel) -> None:
        self.points.append([updates, self.rollouts, round(self.task.accuracy(model), 5)])

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step in self.evaluations:
            self.measure(state.global_step, model)


def train(run: Run, settings: Settings | None = None, measuring: type[Measure] = Measure) -> dict:
    """Carry out one run, in the process of a worker."""
    settings, configuration = settings or SETTINGS[run.model], run.configuration
    with tempfile.TemporaryDirectory() as temporary, contextlib.redirect_stdout(io.StringIO()):
        folder = Path(temporary)
        task = arithmetic_task(run) if run.model == "smollm2" else sorting_task(run, settings, folder / "model")
        measure = measuring(task, settings.evaluations)

        def reward(**kwargs):  # TRL wants a function with a name
            return measure.reward(**kwargs)

        options: dict[str, Any] = dict(
            output_dir=str(folder / "out"),
            num_iterations=configuration.iterations,
            learning_rate=run.learning_rate,
            beta=run.beta,
            max_steps=settings.updates,
            per_device_train_batch_size=settings.rows,
            max_completion_length=task.max_completion_length,
            seed=run.seed,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **task.options,
        )
        if configuration.method == "TBRM":
            options["soft_value"] = "calibrated"
            if configuration.replay:
                options["replay_buffer_size"] = run.buffer_size
        else:
            options["num_generations"] = 8
        trainer_class, config_class = {
            "TBRM": (TBRMTrainer, TBRMConfig),
            "GRPO": (GRPOTrainer, GRPOConfig),
            "RLOO": (RLOOTrainer, RLOOConfig),
        }[configuration.method]
        trainer = trainer_class(
            model=task.model,
            reward_funcs=reward,
            args=config_class(**options),
            train_dataset=task.train,
            callbacks=[measure],
        )
        trainer.remove_callback(transformers.PrinterCallback)
        if run.model != "smollm2" or configuration == CONFIGURATIONS["GRPO K=1"]:  # the same for all
            measure.measure(0, trainer.model)
        started = time.perf_counter()
        trainer.train()
    return {"points": measure.points, "seconds": round(time.perf_counter() - started, 1)}


def start_worker(threads: int) -> None:
    torch.set_num_threads(threads)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


# ---- all runs -------------------------------------------------------------------------------------------------------


class Results:
    """The raw JSON: what has been measured, by run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.runs: dict[str, dict] = json.loads(path.read_text())["runs"] if path.exists() else {}

    def save(self) -> None:
        processor = platform.processor() or platform.machine()
        if (info := Path("/proc/cpuinfo")).exists():
            processor = next((x.split(":")[1].strip() for x in info.open() if x.startswith("model name")), processor)
        environment = {
            "processor": processor,
            "cores": os.cpu_count(),
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in PACKAGES},
        }
        settings = {name: asdict(settings) for name, settings in SETTINGS.items()}
        lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in sorted(self.runs.items()))
        head = f'"environment": {json.dumps(environment)},\n"settings": {json.dumps(settings)}'
        unfinished = self.path.with_suffix(".part")
        unfinished.write_text(f'{{{head},\n"runs": {{\n{lines}\n}}}}\n')
        unfinished.rename(self.path)

    def __contains__(self, run: Run) -> bool:
        return str(run) in self.runs

    def points(self, run: Run) -> list[list[float]]:
        return self.runs[str(run)]["points"]

    def final(self, run: Run) -> float:
        return self.points(run)[-1][2]


class Benchmark:
    """Selection and final runs on one model."""

    def __init__(self, model: str, results: Results) -> None:
        self.model, self.settings, self.results = model, SETTINGS[model], results

    def grid(self, configuration: Configuration) -> list[Run]:
        """The candidates of a configuration, without a seed of their own."""
        settings, method = self.settings, configuration.method
        betas, buffer_sizes = settings.betas[method], settings.buffer_sizes[:1]
        if configuration.iterations > 1 and len(betas) > 1:
            betas = (self.selected(CONFIGURATIONS[f"{method} K=1"]).beta,)
        if configuration.replay:
            first = CONFIGURATIONS["TBRM K=4 replay"]
            buffer_sizes = settings.buffer_sizes if configuration == first else (self.selected(first).buffer_size,)
        return [
            Run(self.model, "selection", configuration, learning_rate, beta, buffer_size, seed=-1)
            for learning_rate, beta, buffer_size in itertools.product(
                settings.learning_rates[method], betas, buffer_sizes
            )
        ]

    def selection(self, candidate: Run) -> list[Run]:
        return [replace(candidate, seed=seed) for seed in self.settings.selection_seeds]

    def selected(self, configuration: Configuration) -> Run:
        """The candidate with the best mean final accuracy over the selection seeds."""
        grid = self.grid(configuration)
        if len(grid) == 1:
            return grid[0]
        return max(grid, key=lambda c: statistics.mean(self.results.final(run) for run in self.selection(c)))

    def is_selected(self, configuration: Configuration) -> bool:
        try:
            self.selected(configuration)
        except KeyError:
            return False
        return True

    def final(self, configuration: Configuration) -> list[Run]:
        chosen = self.selected(configuration)
        return [replace(chosen, stage="final", seed=seed) for seed in self.settings.final_seeds]

    def measured(self) -> list[Configuration]:
        """The configurations whose final runs are all there, without replay first."""
        done = [
            configuration
            for configuration in CONFIGURATIONS.values()
            if self.is_selected(configuration) and all(run in self.results for run in self.final(configuration))
        ]
        return sorted(done, key=lambda c: (c.method != "GRPO", c.method != "RLOO", c.replay, c.iterations))

    def execute(self, runs: list[Run], pool: ProcessPoolExecutor) -> None:
        missing = {pool.submit(train, run): run for run in runs if run not in self.results}
        for future in as_completed(missing):
            run, result = missing[future], future.result()
            self.results.runs[str(run)] = result
            self.results.save()
            accuracies = " ".join(f"{accuracy:.3f}" for _, _, accuracy in result["points"])
            print(f"{run}: {accuracies} ({result['points'][-1][1]} rollouts, {result['seconds']:.0f} s)", flush=True)

    def run(self, configuration: Configuration, pool: ProcessPoolExecutor) -> None:
        grid = self.grid(configuration)
        if len(grid) > 1:
            self.execute([run for candidate in grid for run in self.selection(candidate)], pool)
        self.execute(self.final(configuration), pool)


# ---- the report -----------------------------------------------------------------------------------------------------


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Mean and its standard error."""
    if len(values) == 1:
        return values[0], math.nan
    return statistics.mean(values), statistics.stdev(values) / math.sqrt(len(values))


def show(values: list[float]) -> str:
    mean, error = mean_and_error(values)
    return f"{mean:.3f}" if math.isnan(error) else f"{mean:.3f} ± {error:.3f}"


class Curves:
    """The final runs of one model: per configuration, accuracies over seeds at each rollout count."""

    def __init__(self, benchmark: Benchmark) -> None:
        self.benchmark = benchmark
        self.accuracies: dict[Configuration, dict[int, list[float]]] = {}  # by rollouts generated
        self.seconds: dict[Configuration, float] = {}
        for configuration in benchmark.measured():
            runs = benchmark.final(configuration)
            at: dict[int, list[float]] = {}
            for run in runs:
                for _, rollouts, accuracy in benchmark.results.points(run):
                    at.setdefault(int(rollouts), []).append(accuracy)
            self.accuracies[configuration] = at
            self.seconds[configuration] = statistics.mean(benchmark.results.runs[str(run)]["seconds"] for run in runs)

    def final(self, configuration: Configuration) -> list[float]:
        return self.accuracies[configuration][self.rollouts(configuration)]

    def rollouts(self, configuration: Configuration) -> int:
        return max(self.accuracies[configuration])

    def of(self, method: str) -> list[Configuration]:
        return [configuration for configuration in self.accuracies if configuration.method == method]

    def target(self) -> tuple[Configuration, float]:
        """GRPO's configuration of best final accuracy, and that accuracy less one standard error."""
        best = max(self.of("GRPO"), key=lambda c: statistics.mean(self.final(c)))
        mean, error = mean_and_error(self.final(best))
        return best, mean - error

    def best_within(self, method: str, rollouts: float) -> tuple[float, Configuration, int]:
        """The best mean accuracy that a method reaches with at most so many rollouts, and where."""
        points = (
            (statistics.mean(values), configuration, count)
            for configuration in self.of(method)
            for count, values in self.accuracies[configuration].items()
            if count <= rollouts
        )
        return max(points, key=lambda point: point[0])

    def reaches(self, configuration: Configuration, accuracy: float) -> int | None:
        """The first rollout count at which the mean accuracy is at least this."""
        counts = sorted(self.accuracies[configuration].items())
        return next((count for count, values in counts if statistics.mean(values) >= accuracy), None)


def table(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *rows])


def target_section(curves: Curves) -> str:
    best, threshold = curves.target()
    total = curves.rollouts(best)
    text = f"""\
Reach GRPO's best final accuracy less one standard error with at most a quarter of its rollouts. That is {best} with
{show(curves.final(best))} after {total} rollouts, hence **{threshold:.3f}**. Mean over seeds of the best configuration
within each allowance, its points in mid-run included:
"""
    rows = []
    for name, part in (("a quarter", 4), ("an eighth", 8)):
        cells = [f"{name}, {total // part}"]
        for method in ("TBRM", "GRPO", "RLOO"):
            if not curves.of(method):
                cells.append("–")
                continue
            accuracy, configuration, count = curves.best_within(method, total / part)
            verdict = "met" if accuracy >= threshold else "missed"
            cells.append(f"{show(curves.accuracies[configuration][count])} ({configuration}, {count}): {verdict}")
        rows.append(cells)
    return f"{text}\n{table(['rollouts', 'TBRM', 'GRPO', 'RLOO'], rows)}"


def final_section(curves: Curves) -> str:
    _, threshold = curves.target()
    rows = []
    for configuration in curves.accuracies:
        chosen = curves.benchmark.selected(configuration)
        rates = curves.benchmark.settings.learning_rates[configuration.method]
        edge = " (edge)" if len(rates) > 1 and chosen.learning_rate in (rates[0], rates[-1]) else ""
        rows.append(
            [
                str(configuration),
                str(curves.rollouts(configuration)),
                show(curves.final(configuration)),
                str(curves.reaches(configuration, threshold) or "not reached"),
                f"{chosen.learning_rate:g}{edge}",
                f"{chosen.beta:g}",
                str(chosen.buffer_size) if configuration.replay else "",
                f"{curves.seconds[configuration]:.0f}",
            ]
        )
    header = [
        "",
        "rollouts",
        "final accuracy",
        f"rollouts to {threshold:.3f}",
        "learning rate",
        "β",
        "buffer",
        "seconds",
    ]
    return table(header, rows)


def along_the_way_section(curves: Curves) -> str:
    total = max(curves.rollouts(configuration) for configuration in curves.accuracies)
    counts = [total >> halvings for halvings in range(6, -1, -1)]
    rows = [
        [str(configuration), *(show(at[count]) if count in at else "" for count in counts)]
        for configuration, at in curves.accuracies.items()
    ]
    return table(["rollouts", *map(str, counts)], rows)


def replay_section(curves: Curves) -> str:
    rows = []
    for configuration in curves.of("TBRM"):
        without = replace(configuration, replay=False)
        if not configuration.replay or without not in curves.accuracies:
            continue
        with_replay, same_rollouts = curves.final(configuration), curves.final(without)
        difference = [a - b for a, b in zip(with_replay, same_rollouts, strict=True)]
        mean, error = mean_and_error(difference)
        verdict = "no clear difference" if not abs(mean) > 3 * error else "helps" if mean > 0 else "**hurts**"
        cells = [f"K={configuration.iterations}", show(same_rollouts), show(with_replay), f"{mean:+.3f} ± {error:.3f}"]
        rows.append([*cells, verdict])
    return table(["", "same rollouts K times", "replay", "difference", ""], rows)


def selection_section(benchmark: Benchmark) -> str:
    rates = sorted({rate for rates in benchmark.settings.learning_rates.values() for rate in rates})
    rows = []
    for configuration in benchmark.measured():
        grid = benchmark.grid(configuration)
        for beta, buffer_size in sorted({(c.beta, c.buffer_size) for c in grid}):
            cells = [str(configuration), f"{beta:g}", str(buffer_size) if configuration.replay else ""]
            for rate in rates:
                candidate = next(c for c in grid if (c.beta, c.buffer_size) == (beta, buffer_size))
                candidate = replace(candidate, learning_rate=rate)
                runs = benchmark.selection(candidate)
                if candidate not in grid or not all(run in benchmark.results for run in runs):
                    cells.append("")
                    continue
                text = f"{statistics.mean(map(benchmark.results.final, runs)):.3f}"
                cells.append(f"**{text}**" if candidate == benchmark.selected(configuration) else text)
            rows.append(cells)
    return table(["", "β", "buffer", *(f"{rate:g}" for rate in rates)], rows)


def smollm2_section(curves: Curves) -> str:
    settings = curves.benchmark.settings
    starts = [at[0][0] for at in curves.accuracies.values() if 0 in at]
    rows = [
        [
            str(configuration),
            str(curves.rollouts(configuration)),
            f"{curves.final(configuration)[0]:.3f}",
            f"{curves.benchmark.selected(configuration).learning_rate:g}",
            str(curves.benchmark.selected(configuration).buffer_size) if configuration.replay else "",
            f"{curves.seconds[configuration]:.0f}",
        ]
        for configuration in curves.accuracies
    ]
    return f"""## SmolLM2-135M, one seed

`python benchmarks/replay.py --model smollm2`: the task of `examples/reasoning_gym_demo.py` (sums and differences of two
one-digit numbers), {settings.updates} updates of {settings.rows} trajectories. Accuracy is on 60 held-out problems,
avg@2 at T = 1; before training it is {starts[0]:.3f}. Nothing was tuned here: TBRM has the demo's learning rate and β,
GRPO and RLOO ten times TRL's default learning rate (1e-6, too small for so few updates) and TRL's KL coefficients.
**One seed: small differences mean nothing.**

{table(["", "rollouts", "final accuracy", "learning rate", "buffer", "seconds of training"], rows)}
"""


def write_report(results: Results, model: str, output: Path) -> None:
    benchmark = Benchmark(model, results)
    curves = Curves(benchmark)
    if not curves.of("GRPO"):
        return
    settings, environment = benchmark.settings, json.loads(results.path.read_text())["environment"]
    versions = ", ".join(f"{name} {environment[name]}" for name in PACKAGES)
    selected, final = (", ".join(map(str, seeds)) for seeds in (settings.selection_seeds, settings.final_seeds))
    start = mean_and_error(curves.accuracies[curves.of("GRPO")[0]][0])[0]
    text = f"""# Replay: accuracy against rollouts used

Written by `python benchmarks/replay.py`; raw numbers: [replay.json](replay.json). {environment["processor"]},
{environment["cores"]} cores, one thread a run; Python {environment["python"]},
{versions}.

![accuracy against rollouts](replay.png)

K is `num_iterations`: the updates that each window of rollouts serves. All configurations make {settings.updates}
updates of {settings.rows} trajectories, so K = 8 uses an eighth of the rollouts of K = 1. Without replay the same
rollouts are used K times; with it, the first update of a window is on them and the others on uniform samples from the
buffer.

## Target

{target_section(curves)}

## Final accuracy

{final_section(curves)}

± is the standard error over {len(settings.final_seeds)} seeds. Seconds are of training alone, on a machine that was
also doing other things.

## Accuracy at equal rollouts

{along_the_way_section(curves)}

All but the last entry of a row are in mid-run, where the learning rate has not yet decayed.

## What replay adds

The same seeds with and without, final accuracy, paired; "no clear difference" is less than three standard errors (with
five seeds, two are not rare by chance).

{replay_section(curves)}

## Task and selection

A two-layer Llama of width 32 sorts the letters of words: {WORD_LENGTH} of {len(LETTERS)} letters, one token each, then
the end token; the reward is 1 for exactly that, else 0. It starts from random weights and
{settings.demonstration_steps} supervised steps on demonstrations of which half the letters are replaced by random ones:
accuracy {start:.3f}, the same start for all methods of a seed. Accuracy is the exact probability of the right
completion at T = 1, on {HELD_OUT} words that no run trains on.

GRPO and RLOO: TRL's trainers with 8 generations per prompt and their other defaults. TBRM: one rollout per prompt,
calibrated soft value. So a window has {settings.rows // 8} words for the former and {settings.rows} for the latter.
Everyone: AdamW, linear decay, gradient norm clipped at 1.

Learning rate and β (GRPO's and RLOO's is the KL coefficient, in TRL 0 and 0.05 by default) are those of the best mean
final accuracy on seeds {selected} and the other half of the words; the final runs are on seeds {final}. β is chosen at
K = 1 and kept for a method's other rows, the buffer size at K = 4. "edge": the best learning rate is at the end of the
grid. Candidates, mean final accuracy by learning rate:

{selection_section(benchmark)}
"""
    real = Curves(Benchmark("smollm2", results))
    if model == "tiny" and real.of("GRPO"):
        text += f"\n{smollm2_section(real)}"
    (output / "replay.md").write_text(text)
    draw(curves, output / "replay.png")


def draw(curves: Curves, path: Path) -> None:
    """Two panels, TBRM without replay and with it; the peers are in both."""
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.8), sharey=True, layout="constrained")
    colors = {1: "tab:blue", 2: "tab:green", 4: "tab:orange", 8: "tab:red"}
    best, threshold = curves.target()
    for axes, replay in zip(panels, (False, True), strict=True):
        for configuration, at in curves.accuracies.items():
            tbrm = configuration.method == "TBRM"
            if tbrm and configuration.replay != replay and configuration.iterations > 1:
                continue
            counts = sorted(at.items())[1:]  # zero rollouts have no place on a log axis
            x = [count for count, _ in counts]
            mean, error = zip(*(mean_and_error(values) for _, values in counts), strict=True)
            color = (
                colors[configuration.iterations] if tbrm else "black" if configuration.method == "GRPO" else "tab:gray"
            )
            style = "-" if tbrm else "--" if configuration.iterations == 1 else ":"
            axes.plot(x, mean, style, marker="o", markersize=3, color=color, label=str(configuration))
            low, high = ([m + sign * e for m, e in zip(mean, error, strict=True)] for sign in (-1, 1))
            axes.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
        axes.axhline(threshold, color="black", linewidth=0.6)
        axes.text(0.0, threshold, " target", va="bottom", fontsize=9, transform=axes.get_yaxis_transform())
        for part, name in ((4, "¼"), (8, "⅛")):
            axes.axvline(curves.rollouts(best) / part, color="black", linewidth=0.6, alpha=0.5)
            axes.text(curves.rollouts(best) / part, 1.0, f" {name}", va="top", fontsize=9)
        axes.set_xscale("log", base=2)
        ticks = [curves.rollouts(best) >> halvings for halvings in range(7, -1, -1)]
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks], fontsize=8)
        axes.set(xlabel="rollouts generated", ylim=(0, 1), title=f"TBRM {'with' if replay else 'without'} replay")
        axes.grid(alpha=0.25)
        axes.legend(loc="lower right", fontsize=8)
    panels[0].set_ylabel("held-out accuracy (mean ± s.e. over seeds)")
    figure.suptitle(
        "The same number of updates each; thin lines: the target, and ¼ and ⅛ of GRPO's rollouts", fontsize=10
    )
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["tiny", "smollm2"], default="tiny")
    parser.add_argument("--jobs", type=int, help="worker processes (default: all cores; smollm2: 1)")
    parser.add_argument("--threads", type=int, help="threads of each (default: 1; smollm2: all cores)")
    parser.add_argument("--only", nargs="+", default=list(CONFIGURATIONS), metavar="NAME", help="some configurations")
    parser.add_argument("--output", type=Path, default=ROOT / "docs/benchmarks")
    parser.add_argument("--smoke", action="store_true", help="few and short runs, to a temporary folder")
    arguments = parser.parse_args()
    if unknown := set(arguments.only) - set(CONFIGURATIONS):
        parser.error(f"--only knows {', '.join(CONFIGURATIONS)}; not {', '.join(unknown)}")
    name = "smoke" if arguments.smoke else arguments.model
    output = Path(tempfile.mkdtemp(prefix="replay-")) if arguments.smoke else arguments.output
    cores, big = os.cpu_count() or 1, name == "smollm2"
    jobs, threads = arguments.jobs or (1 if big else cores), arguments.threads or (cores if big else 1)

    output.mkdir(parents=True, exist_ok=True)
    results = Results(output / "replay.json")
    benchmark = Benchmark(name, results)
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), start_worker, (threads,)) as pool:
        for configuration in CONFIGURATIONS.values():
            if str(configuration) in arguments.only:
                benchmark.run(configuration, pool)
                write_report(results, "tiny" if big else name, output)
    print(f"{output / 'replay.md'}")


if __name__ == "__main__":
    main()
