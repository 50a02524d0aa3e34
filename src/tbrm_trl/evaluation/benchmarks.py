"""Load benchmarks, reasoning-gym tasks and files as problems with the columns that their reward needs."""

import difflib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import xxhash
from datasets import Dataset

from ..files import ROW_FILES, first_line, rows_of_file, rows_of_hub
from ..rewards import find_column, gym, read_golds, with_arguments
from ..rewards.reading import content_text

# Columns in which data sets keep the question; the first one present is used.
PROMPT_COLUMNS = ("prompt", "problem", "question")
BOXED = "Please reason step by step, and put your final answer within \\boxed{}."
GYM_PROBLEMS = 100


@dataclass(frozen=True)
class HubBenchmark:
    """Where a published benchmark is on the Hub, and how it is reported."""

    dataset: str
    split: str
    question: str
    answer: str
    problems: int
    config: str | None = None
    samples: int = 4  # default n of avg@n


BENCHMARKS: dict[str, HubBenchmark] = {
    "aime24": HubBenchmark("HuggingFaceH4/aime_2024", "train", "problem", "answer", 30, samples=32),
    "aime25": HubBenchmark("math-ai/aime25", "test", "problem", "answer", 30, samples=32),
    "amc23": HubBenchmark("math-ai/amc23", "test", "question", "answer", 40, samples=32),
    "math500": HubBenchmark("HuggingFaceH4/MATH-500", "test", "problem", "answer", 500),
    "minerva": HubBenchmark("math-ai/minervamath", "test", "question", "answer", 272),
    "olympiadbench": HubBenchmark("math-ai/olympiadbench", "test", "question", "final_answer", 674),
    "gsm8k": HubBenchmark("openai/gsm8k", "test", "question", "answer", 1319, config="main"),
}


@dataclass(frozen=True)
class Setting:
    """One line of a protocol: a benchmark, n of avg@n, and the temperature."""

    benchmark: str
    samples: int
    temperature: float


# Protocols by name; a comment names each one's publication.
SUITES: dict[str, list[Setting]] = {
    # arXiv 2505.15311: avg@32 at T = 1 on the small ones, avg@1 greedy on the others.
    "tbrm-paper": [
        *(Setting(name, 32, 1.0) for name in ("aime24", "aime25", "amc23")),
        *(Setting(name, 1, 0.0) for name in ("math500", "minerva", "olympiadbench")),
    ],
}


@dataclass(frozen=True)
class Benchmark:
    """Problems to evaluate on.

    Attributes:
        name: name under which results and metrics appear; it also names the result's file.
        prompts: the questions, as text or messages.
        columns: further columns that the reward gets, with one value per problem.
        reward: name or dotted path of the reward that judges completions, as `tbrm_trl.rewards.load` takes it.
        samples: default n of avg@n.
    """

    name: str
    prompts: list[Any]
    columns: dict[str, list[Any]]
    reward: str
    samples: int = 1

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def digest(self) -> str:
        """A digest of the prompts and columns. Results can be paired only if their digests are equal."""
        content = json.dumps([self.prompts, self.columns], sort_keys=True, default=str)
        return xxhash.xxh3_64_hexdigest(content.encode())

    def first(self, count: int) -> "Benchmark":
        """A benchmark of the first `count` problems, whose name says so."""
        if count >= len(self):
            return self
        columns = {name: values[:count] for name, values in self.columns.items()}
        return replace(self, name=f"{self.name}-first{count}", prompts=self.prompts[:count], columns=columns)


def load_benchmark(name: str, *, reward: str | None = None, answer_column: str | None = None) -> Benchmark:
    """Load a benchmark by name.

    Args:
        name: one of `BENCHMARKS`; `name=FILE` for a local copy of it; `gym:TASK`, or `gym:TASK(size=200, seed=0,
            min_terms=2)`; or a .json, .jsonl, .parquet or .csv file.
        reward: name or dotted path of a reward to use instead of the benchmark's own.
        answer_column: column of the answers in a file; by default the column most readable as answers.

    Raises:
        ValueError: in one line, if the benchmark does not exist, cannot be loaded, or is not what its name says.
    """
    known, equals, file = name.partition("=")
    if name.startswith("gym:"):
        benchmark = _gym(name)
    elif name in BENCHMARKS:
        benchmark = _published(name, _from_hub(name))
    elif equals and known in BENCHMARKS:
        benchmark = _published(known, rows_of_file(file))
    elif Path(name).suffix in ROW_FILES:
        benchmark = of_rows(Path(name).stem, rows_of_file(name), reward, answer_column)
    else:
        raise ValueError(_unknown(name))
    return benchmark if reward is None else replace(benchmark, reward=reward)


def require_distinct_names(benchmarks: Sequence[Benchmark]) -> None:
    """Refuse benchmarks that share a name, since results and metrics are told apart by it.

    Raises:
        ValueError: if several benchmarks have the same name.
    """
    counts = Counter(one.name for one in benchmarks)
    if several := [name for name, count in counts.items() if count > 1]:
        raise ValueError(
            f"Several benchmarks are called {', '.join(several)}, and so would their results. Name each once. A file's "
            "benchmark has the name of the file, without folders and ending: rename the file."
        )


def of_rows(name: str, rows: Any, reward: str | None = None, answer_column: str | None = None) -> Benchmark:
    """Make a benchmark from rows with a question and an answer. A reward gets all columns, as in training."""
    columns = list(rows.column_names) if isinstance(rows, Dataset) else list(rows[0])
    question = next((one for one in PROMPT_COLUMNS if one in columns), None)
    if question is None:
        raise ValueError(f"{name}: none of the columns {', '.join(columns)} is called {', '.join(PROMPT_COLUMNS)}.")
    kept = {one: [row[one] for row in rows] for one in columns if one != "prompt"}
    prompts = [row[question] for row in rows]
    if (empty := next((at for at, one in enumerate(prompts) if one is None or one in ("", [])), None)) is not None:
        raise ValueError(f"{name}: row {empty} has no `{question}`. Drop the row.")
    for place, prompt in enumerate(prompts):
        if not isinstance(prompt, str | list):
            raise ValueError(
                f"{name}: row {place}: `{question}` is {prompt!r}, a {type(prompt).__name__}. It must be text, or a "
                "list of messages."
            )
    if gym.COLUMN in columns and reward is None:
        if answer_column is not None:
            raise ValueError(
                f"{name}: its tasks are judged by what stands in the column {gym.COLUMN}, not by answers in "
                f"{answer_column}. Leave --answer_column out."
            )
        return Benchmark(name, prompts, kept, "reasoning_gym")
    column = answer_column or find_column(rows)
    if column is None and reward in (None, "math"):
        raise ValueError(
            f"{name}: no column holds answers that can be read. Columns: {', '.join(columns)}. Call the one of the "
            "answers `answer`. `tbrm eval` also takes its name by --answer_column, or a reward of your own by "
            "--reward_funcs."
        )
    if column is not None and reward in (None, "math"):
        kept["solution"] = _golds(name, rows, column)
    return Benchmark(name, prompts, kept, reward or "math")


def _golds(name: str, rows: Any, column: str) -> list[Any]:
    try:
        return read_golds(rows, column).texts
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _published(name: str, rows: Dataset) -> Benchmark:
    known = BENCHMARKS[name]
    absent = [column for column in (known.question, known.answer) if column not in rows.column_names]
    if absent:
        raise ValueError(
            f"{name}: the column {' and '.join(absent)} is missing; there are {', '.join(rows.column_names)}."
        )
    if len(rows) != known.problems:
        raise ValueError(
            f"{name} is {known.problems} problems, and these are {len(rows)}: another benchmark. Evaluate on the file "
            "under its own name."
        )
    solution = _golds(name, rows, known.answer)
    return Benchmark(name, list(rows[known.question]), {"solution": solution}, "math", known.samples)


def _from_hub(name: str) -> Dataset:
    known = BENCHMARKS[name]
    try:
        return rows_of_hub(known.dataset, known.config, known.split)
    except ValueError as error:
        raise ValueError(f"{name}: {error} With a local copy: {name}=FILE.parquet") from None


def _gym(name: str) -> Benchmark:
    task, settings = with_arguments(name.removeprefix("gym:"), "gym:chain_sum(size=100, min_terms=2)")
    count, seed = settings.pop("size", GYM_PROBLEMS), settings.pop("seed", 0)
    if not isinstance(count, int) or count < 1:
        raise ValueError(f"{name}: size={count!r} must be a whole number of problems, at least 1.")
    try:
        _, rows = gym.train_and_test(task, train=0, test=count, seed=seed, **settings)
    except ImportError:
        raise ValueError(f'{name} needs reasoning-gym: pip install "tbrm-trl[gym]"') from None
    except (ValueError, TypeError, AssertionError) as error:
        raise ValueError(f"{name}: {first_line(error)}") from None
    return Benchmark(
        name, [row["question"] for row in rows], {gym.COLUMN: [r[gym.COLUMN] for r in rows]}, "reasoning_gym"
    )


def _unknown(name: str) -> str:
    close = difflib.get_close_matches(name.lower().replace("-", "").replace("_", ""), BENCHMARKS, 1)
    meant = f" Did you mean {close[0]}?" if close else ""
    return (
        f"There is no benchmark {name!r}.{meant} Names: {', '.join(BENCHMARKS)}; gym:TASK; or a .json, .jsonl, "
        ".parquet or .csv file."
    )


def in_template(template: str, prompt: Any) -> str:
    """The template with a question in place of `{question}`."""
    text = prompt if isinstance(prompt, str) else "\n".join(content_text(message.get("content")) for message in prompt)
    return template.replace("{question}", text)


def require_question(template: str | None) -> None:
    """Raise a ValueError if a template has no place for the question."""
    if template is not None and "{question}" not in template:
        raise ValueError(f"prompt_template={template!r} has no {{question}} in it.")


def messages(prompt: Any, system_prompt: str) -> Any:
    """A question as messages, after the system prompt if it is not empty. Messages stay as they are."""
    if not isinstance(prompt, str):
        return prompt
    system = [{"role": "system", "content": system_prompt}] if system_prompt else []
    return [*system, {"role": "user", "content": prompt}]
