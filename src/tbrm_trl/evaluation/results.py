"""The file of an evaluation: one line of JSON that says what was evaluated, then one line per completion.

Lines are appended as completions finish. A resumed evaluation reads the lines that are there and draws the rest.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from ..files import appearing
from .statistics import accuracy_from_scores, majority, mean_and_error, pass_at_k

FORMAT = "tbrm-evaluation-1"
# Header fields that may differ between two runs of one evaluation: they change completions only by rounding.
INCIDENTAL = ("versions", "batch_size")
# Header fields that are absent unless given: an absent one means None.
WHERE_GIVEN = ("chat_template_kwargs",)
_LONGEST = 200  # bytes of a file's name; most file systems allow 255


@dataclass(frozen=True)
class Row:
    """One completion with its verdict.

    Attributes:
        problem: the problem's number in the benchmark.
        sample: its number among the completions of that problem.
        seed: the seed it was drawn with.
        ids: its token ids, the end token included.
        completion: its text.
        truncated: whether the length limit cut it.
        answer: the answer read from it; None if no answer can be read.
        score: the reward's verdict.
        judged: whether there is a verdict. A judge that crashed or ran out of time gives none; the score is then 0.
    """

    problem: int
    sample: int
    seed: int
    ids: list[int]
    completion: str
    truncated: bool
    answer: str | None
    score: float
    judged: bool = True


@dataclass
class Result:
    """The content of a result file: its header, and its rows by problem and sample."""

    path: Path
    header: dict[str, Any]
    rows: dict[tuple[int, int], Row] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return name_of(self.header["benchmark"], self.samples, self.header["sampling"]["temperature"])

    @property
    def problems(self) -> int:
        return self.header["problems"]

    @property
    def samples(self) -> int:
        return self.header["samples"]

    @property
    def missing(self) -> list[tuple[int, int]]:
        """The completions still to be drawn, as (problem, sample)."""
        every = ((problem, sample) for problem in range(self.problems) for sample in range(self.samples))
        return [place for place in every if place not in self.rows]

    def require_complete(self) -> "Result":
        if self.missing:
            raise ValueError(
                f"{self.path} holds {len(self.rows)} of {self.problems * self.samples} completions: its evaluation "
                "was interrupted. The same command finishes it."
            )
        return self

    def by_problem(self) -> list[list[Row]]:
        """(P, n) rows."""
        return [[self.rows[problem, sample] for sample in range(self.samples)] for problem in range(self.problems)]

    @property
    def scores(self) -> list[list[float]]:
        """(P, n) scores."""
        return [[row.score for row in rows] for rows in self.by_problem()]

    def metrics(self) -> dict[str, float]:
        """The metrics of a complete result, by the names under which they are reported and logged."""
        self.require_complete()
        by_problem, scores, n = self.by_problem(), self.scores, self.samples
        rows = [row for rows in by_problem for row in rows]
        mean, error = accuracy_from_scores(scores)
        found = {f"avg@{n}": mean, f"avg@{n}_error": error}
        if n > 1:
            found |= {f"pass@{k}": pass_at_k(scores, k) for k in ks(n)}
            found[f"maj@{n}"] = majority([[row.answer for row in rows] for rows in by_problem], scores)
        found["truncated"] = sum(row.truncated for row in rows) / len(rows)
        found["unparseable"] = sum(row.answer is None for row in rows) / len(rows)
        found["unjudged"] = sum(not row.judged for row in rows) / len(rows)
        found["mean_length"], found["mean_length_error"] = mean_and_error(
            [sum(len(row.ids) for row in rows) / n for rows in by_problem]
        )
        return found

    def __str__(self) -> str:
        metrics, n, header = self.metrics(), self.samples, self.header
        how = "greedy" if header["sampling"]["temperature"] == 0 else f"T={header['sampling']['temperature']:g}"
        parts = [
            f"{header['benchmark']}: avg@{n} {metrics[f'avg@{n}']:.4f} ± {metrics[f'avg@{n}_error']:.4f} "
            f"({self.problems} problems, {how})"
        ]
        parts += [f"{name} {value:.4f}" for name, value in metrics.items() if name.startswith(("pass@", "maj@"))]
        parts += [f"{name} {metrics[name]:.1%}" for name in ("truncated", "unparseable")]
        if metrics["unjudged"]:
            parts.append(f"unjudged {metrics['unjudged']:.1%}, counted as wrong")
        return ", ".join([*parts, f"mean length {metrics['mean_length']:.1f}"])


def metric_names(samples: int) -> list[str]:
    """The names of `Result.metrics`."""
    several = [*(f"pass@{k}" for k in ks(samples)), f"maj@{samples}"] if samples > 1 else []
    accuracy = [f"avg@{samples}", f"avg@{samples}_error", *several]
    return [*accuracy, "truncated", "unparseable", "unjudged", "mean_length", "mean_length_error"]


def name_of(benchmark: str, samples: int, temperature: float) -> str:
    """A result's name: its benchmark and how it was sampled."""
    return f"{benchmark}-greedy" if temperature == 0 else f"{benchmark}-avg{samples}"


def file_of(name: str) -> str:
    """The file of a result or benchmark of this name: without slashes, and short enough for a file system."""
    safe = re.sub(r"[/\\\0]", "_", name)
    if safe == name and len(name.encode()) <= _LONGEST:
        return f"{name}.jsonl"
    start = safe.encode()[: _LONGEST - 20].decode(errors="ignore")
    return f"{start}-{xxhash.xxh3_64_hexdigest(name.encode())}.jsonl"  # others may begin alike


def ks(samples: int) -> list[int]:
    """The k for which pass@k is reported: the powers of two from 2 to n, and n."""
    return sorted({2**power for power in range(1, samples.bit_length()) if 2**power <= samples} | {samples})


def open_result(path: Path, header: Mapping[str, Any]) -> Result:
    """The result under way at `path`, or a new one.

    Raises:
        ValueError: if the file holds another evaluation. The error names what differs.
    """
    if not path.exists():
        with appearing(path) as partial:
            partial.write_text(json.dumps({"format": FORMAT, **header}, ensure_ascii=False) + "\n", encoding="utf-8")
        return Result(path, dict(header))
    require_same(path, header)
    return _read(path, mend=True)


def require_same(path: Path, header: Mapping[str, Any]) -> None:
    """Raise ValueError if there is a file at `path` with another evaluation. The error names what differs."""
    if not path.exists():
        return
    # A field that the file lacks, such as `judge`, is not compared, since an older version wrote the file.
    there = {**dict.fromkeys(WHERE_GIVEN), **_read(path).header}
    differing = [one for name in there if name not in INCIDENTAL for one in _differences(name, there, header)]
    if differing:
        raise ValueError(
            f"{path} holds another evaluation. It differs in {'; '.join(differing)}. Give another --output_dir, or "
            "move the file."
        )


def _differences(name: str, there: Mapping[str, Any], here: Mapping[str, Any], within: str = "") -> Iterator[str]:
    """What differs in a field of two headers, part by part if it is a mapping in both."""
    first, second = there.get(name), here.get(name)
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        for part in {**first, **second}:
            yield from _differences(part, first, second, f"{within}{name}.")
    elif first != second:
        yield f"{within}{name} (there {_short(first)}, here {_short(second)})"


def append(result: Result, rows: Iterable[Row]) -> None:
    """Add rows, in memory and in the file."""
    rows = list(rows)
    with result.path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(vars(row), ensure_ascii=False) + "\n" for row in rows)
    result.rows.update(((row.problem, row.sample), row) for row in rows)


def read_result(path: str | Path) -> Result:
    """Read a complete result.

    Raises:
        ValueError: if the file does not exist, is no result, or is of an interrupted evaluation.
    """
    return _read(Path(path)).require_complete()


def _read(path: Path, mend: bool = False) -> Result:
    """Read a result file without a last line that an interrupt cut short; with `mend`, cut that line off."""
    try:
        whole, newline, tail = path.read_bytes().rpartition(b"\n")
        # Not `splitlines`: it also ends a line at U+2028, U+2029 and U+0085, which a completion may hold.
        first, *lines = whole.decode("utf-8").split("\n")
        header = json.loads(first)
        if header.pop("format") != FORMAT:
            raise ValueError
        rows = [Row(**json.loads(line)) for line in lines]
    except OSError as error:
        raise ValueError(f"There is no result at {path} ({error.strerror}).") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{path} is not a result of `tbrm eval`, or it is damaged.") from None
    if mend and tail:
        with path.open("r+b") as file:
            file.truncate(len(whole) + len(newline))
    return Result(path, header, {(row.problem, row.sample): row for row in rows})


def results_of(path: str | Path) -> dict[str, Result]:
    """The complete results in a file or folder, by result name, which may differ from the file's name.

    For example, the files of a training step are named by their benchmark only.

    Raises:
        ValueError: if there is no result, a result is not complete, or two have the same name.
    """
    path = Path(path)
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"{path} holds no result of `tbrm eval` (no .jsonl file).")
    found: dict[str, Result] = {}
    for result in map(read_result, files):
        if result.name in found:
            raise ValueError(
                f"{found[result.name].path} and {result.path} are both {result.name}. Name the file that is meant."
            )
        found[result.name] = result
    return found


def paired_results(first: str | Path, second: str | Path) -> dict[str, tuple[Result, Result]]:
    """Pair the results in two files or folders that have the same benchmark and sampling, by result name.

    If both hold exactly one result, of the same benchmark, the two are paired however they were sampled. A result that
    only one of them holds is left out; `unpaired` names it.

    Raises:
        ValueError: if nothing can be paired, or a pair differs in its problems, reward or judge.
    """
    before, after = results_of(first), results_of(second)
    pairs = {name: (before[name], after[name]) for name in before if name in after}
    if not pairs and len(before) == len(after) == 1:
        (one,), (other,) = before.values(), after.values()
        if one.header["benchmark"] == other.header["benchmark"]:
            pairs = {one.header["benchmark"]: (one, other)}
    if not pairs:
        raise ValueError(
            f"{first} and {second} share no benchmark that was sampled alike: {', '.join(before)} there, "
            f"{', '.join(after)} here. Two files of one benchmark are compared however they were sampled."
        )
    for name, (one, other) in pairs.items():
        for what in ("reward", "judge", "data"):  # the digest of the data covers the reward's columns
            there, here = one.header, other.header
            if what in there and what in here and there[what] != here[what]:  # old results lack `judge`
                raise ValueError(
                    f"{name}: the two results differ in their {what} ({_short(there[what])} and {_short(here[what])}), "
                    "so they cannot be paired."
                )
    return pairs


def unpaired(path: str | Path, pairs: Mapping[str, tuple[Result, Result]]) -> list[str]:
    """Names of the results in a file or folder that are in none of these pairs."""
    paired = {result.path for pair in pairs.values() for result in pair}
    return [name for name, result in results_of(path).items() if result.path not in paired]


def differing_settings(first: Result, second: Result) -> list[str]:
    """Names of the settings for asking and sampling in which two results differ."""
    names = ("sampling", "system_prompt", "chat_template_kwargs", "template", "samples")
    return [name for name in names if first.header.get(name) != second.header.get(name)]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
