"""Verdicts on the golds of public benchmarks: by `tbrm_trl.rewards`, by examples/train.py before it, and by TRL.

    python benchmarks/verdicts.py path/to/answers        # writes docs/benchmarks/verdicts.{json,md}; ten minutes

The folder holds a file {"row": …, "answer": …} a line for each benchmark. Each gold is put into a box and held against
itself (right: 1), against the next row's gold and against itself with one digit changed (right: 0), and is written in
the forms that a model would write instead (right: 1).
"""

import argparse
import ast
import importlib.metadata
import json
import platform
import random
import re
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trl.rewards import accuracy_reward

from tbrm_trl.rewards import InWorkers, correct, verdict

ROOT = Path(__file__).resolve().parent.parent
BEFORE = "f8ecbad"  # the last commit whose examples/train.py has its own reading of answers
PACKAGES = ("math-verify", "latex2sympy2-extended", "sympy", "trl")
MOST = 80  # pairs of each kind, drawn at random from a set, that the slow judges are given
EVERY = 16  # one of so many pairs is timed by itself
UNITS = ("cm", "dollars", "hours", "apples")


def bare(gold: Any) -> str:
    """A gold as a model would put it into a box."""
    text = str(gold[0] if isinstance(gold, list) else gold).strip()
    return re.sub(r"(?<!\\)\$", "", text).strip()


# --- other forms of the same answer ---


def as_power_of_ten(text: str, row: int) -> str | None:
    match = re.fullmatch(r"(-?[\d.]+)e(-?\d+)", text)
    return f"{match[1]} \\times 10^{{{match[2]}}}" if match else None


def as_decimal(text: str, row: int) -> str | None:
    match = re.fullmatch(r"(-?)(\d+)(?:\.(\d+))?e(-?\d{1,2})", text)
    if match is None:
        return None
    sign, whole, decimals, power = match[1], match[2], match[3] or "", int(match[4])
    digits = whole + decimals
    places = len(decimals) - power
    number = digits + "0" * -places if places <= 0 else digits.rjust(places + 1, "0")
    return sign + (number if places <= 0 else number[:-places] + "." + number[-places:])


def with_braces(text: str, row: int) -> str | None:
    changed = re.sub(r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}", re.sub(r"\\sqrt\s*(\d)", r"\\sqrt{\1}", text))
    return changed if changed != text else None


def without_braces(text: str, row: int) -> str | None:
    changed = re.sub(r"\\frac\{(\d)\}\{(\d)\}", r"\\frac\1\2", re.sub(r"\\sqrt\{(\d)\}", r"\\sqrt\1", text))
    return changed if changed != text else None


def displayed(text: str, row: int) -> str | None:
    if "\\frac" not in text or re.search(r"(?<![\\a-zA-Z{])[a-zA-Z]{3,}|\\text", text):
        return None
    return re.sub(r"(?<![a-zA-Z]) (?![a-zA-Z])", r"\\,", text.replace("\\frac", "\\dfrac"))


def slash(text: str, row: int) -> str | None:
    match = re.fullmatch(r"(-?)\\frac\s*\{\s*(\d+)\s*\}\s*\{\s*(\d+)\s*\}", text)
    return f"{match[1]}{match[2]}/{match[3]}" if match else None


def without_currency(text: str, row: int) -> str | None:
    return re.sub(r"\\\$\s*", "", text) if re.fullmatch(r"-?\\\$\s*[\d.,]+", text) else None


def with_unit(text: str, row: int) -> str | None:
    return f"{text}\\text{{ {UNITS[row % len(UNITS)]}}}" if re.fullmatch(r"-?[\d.,]+", text) else None


def thousands(text: str, row: int) -> str | None:
    if re.fullmatch(r"\d{4,}", text):
        return f"{int(text):,}".replace(",", "{,}")
    return text.replace(",", "") if re.fullmatch(r"\d{1,3}(,\d{3})+", text) else None


def value_of_name(text: str, row: int) -> str | None:
    match = re.fullmatch(r"[a-zA-Z]\s*=\s*([^=,]*)", text)
    return match[1] if match else None


def without_box(text: str, row: int) -> str | None:
    return text if re.fullmatch(r"-?[\d.,]+", text) else None


FORMS = {
    "power of ten": as_power_of_ten, "decimal": as_decimal, "braces": with_braces, "no braces": without_braces,
    "displayed": displayed, "slash": slash, "no currency": without_currency, "unit": with_unit, "thousands": thousands,
    "value of a name": value_of_name, "no box": without_box,
}  # fmt: skip


def changed_digit(text: str) -> str | None:
    digits = list(re.finditer(r"\d", text))
    if not digits:
        return None
    at = digits[len(digits) // 2].start()
    return text[:at] + str((int(text[at]) + 3) % 10) + text[at + 1 :]


def pairs_of(golds: list[Any]) -> dict[str, list[tuple[Any, str, float]]]:
    """Gold, completion and right verdict, by what is asked."""
    texts = [bare(gold) for gold in golds]
    asked: dict[str, list[tuple[Any, str, float]]] = {"itself": [], "next": [], "digit": [], "forms": []}
    for row, (gold, text) in enumerate(zip(golds, texts, strict=True)):
        if not text:
            continue  # two rows of Gaokao2023en have no answer
        asked["itself"].append((gold, boxed(text), 1.0))
        other = texts[(row + 1) % len(texts)]
        if not same_text(other, text):
            asked["next"].append((gold, boxed(other), 0.0))
        if (digit := changed_digit(text)) is not None:
            asked["digit"].append((gold, boxed(digit), 0.0))
        for form, write in FORMS.items():
            if (written := write(text, row)) is not None:
                completion = f"Adding these up.\n\nThe answer is {written}." if form == "no box" else boxed(written)
                asked["forms"].append((gold, completion, 1.0))
    return asked


def boxed(text: str) -> str:
    return f"Adding these up gives $\\boxed{{{text}}}$."


def same_text(first: str, second: str) -> bool:
    def plain(text: str) -> str:
        text = re.sub(r"^[a-zA-Z]\s*=|[\s{},]|\\(?:left|right|mathrm|text)|^\\\{|\\\}$", "", text.strip())
        return text.rstrip("0").rstrip(".") if re.fullmatch(r"-?\d+\.\d+", text) else text

    return plain(first) == plain(second)


# --- the three that judge ---


def verifiable_before() -> Callable[[Any], str]:
    """`verifiable` of examples/train.py as it was."""
    source = subprocess.run(
        ["git", "show", f"{BEFORE}:examples/train.py"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    kept = [
        node
        for node in ast.parse(source).body
        if getattr(node, "name", "") == "verifiable"
        or "LATEX" in [getattr(t, "id", "") for t in getattr(node, "targets", [])]
    ]
    names: dict[str, Any] = {"Any": Any}
    exec(compile(ast.Module(kept, []), "train.py", "exec"), names)
    return names["verifiable"]


def by_trl(completions: list[str], solution: list[Any], **columns: Any) -> list[float | None]:
    """TRL's reward on the gold as it stands in the data."""
    golds = [str(gold[0] if isinstance(gold, list) else gold) for gold in solution]
    return accuracy_reward([[{"content": one}] for one in completions], golds)


_verifiable: Callable[[Any], str] | None = None


def by_example_before(completions: list[str], solution: list[Any], **columns: Any) -> list[float | None]:
    """examples/train.py at `BEFORE`."""
    global _verifiable
    _verifiable = _verifiable or verifiable_before()
    return accuracy_reward([[{"content": one}] for one in completions], [_verifiable(gold) for gold in solution])


def judges(workers: int) -> dict[str, InWorkers]:
    functions = {"now": correct, "before": by_example_before, "TRL": by_trl}
    return {name: InWorkers(function, time_limit=20.0, workers=workers) for name, function in functions.items()}


# --- measuring ---


def timed(golds: list[Any]) -> dict[str, float]:
    """Seconds to score a benchmark's golds in this process, a cold start included."""
    completions = [boxed(bare(gold)) for gold in golds]
    started = time.perf_counter()
    correct(completions, golds)
    return {"rows": len(golds), "seconds": round(time.perf_counter() - started, 2)}


def slowest(pairs: list[tuple[Any, str, float]]) -> dict[str, Any]:
    """Times of single verdicts in this process, after one to warm up."""
    verdict("x+1", "\\boxed{1+x}")
    times = []
    for gold, completion, _ in pairs:
        started = time.perf_counter()
        verdict(gold, completion)
        times.append((time.perf_counter() - started, str(gold)[:60]))
    seconds = sorted(one for one, _ in times)
    return {
        "verdicts": len(times),
        "median_ms": round(1e3 * statistics.median(seconds), 2),
        "p99_ms": round(1e3 * seconds[int(0.99 * len(seconds))], 1),
        "worst_s": round(max(times)[0], 2),
        "worst": max(times)[1],
    }


def throughput(golds: list[Any], rounds: int) -> dict[str, float]:
    """Rows a second in batches of 64, half of them wrong, with long reasoning: in workers and in process."""
    words = "Let us consider the next case and add what it gives. " * 40
    completions = [words + boxed(bare(golds[row if row % 2 else row - 1])) for row in range(len(golds))]
    batches = [slice(start, start + 64) for start in range(0, len(golds) - 63, 64)][:rounds]
    in_workers = InWorkers(correct)
    correct(completions[batches[0]], golds[batches[0]])
    in_workers(completions[batches[0]], solution=golds[batches[0]])
    spent = {"process": 0.0, "workers": 0.0}
    for at in batches:
        for name, function in (("process", correct), ("workers", in_workers)):
            started = time.perf_counter()
            function(completions[at], solution=golds[at])
            spent[name] += time.perf_counter() - started
    rows = 64 * len(batches)
    per_second = {name: round(rows / seconds) for name, seconds in spent.items()}
    in_workers.close()
    return {**per_second, "workers_used": in_workers.workers, "share": round(spent["process"] / spent["workers"], 2)}


def share(values: list[bool]) -> float | None:
    return round(100 * sum(values) / len(values), 2) if values else None


def measure(folder: Path, workers: int, only_now: bool) -> dict[str, Any]:
    results: dict[str, Any] = {"sets": {}, "wrong_now": []}
    everything: list[tuple[Any, str, float]] = []
    golds_of = {
        path.stem: [json.loads(line)["answer"] for line in path.open()] for path in sorted(folder.glob("*.jsonl"))
    }
    results["gsm8k"] = timed(golds_of["gsm8k"])
    pairs_by_set = {name: pairs_of(golds) for name, golds in golds_of.items()}
    for name, asked in pairs_by_set.items():
        counts = {kind: len(pairs) for kind, pairs in asked.items()}
        results["sets"][name] = {"golds": len(golds_of[name]), "pairs": counts}
        everything += [pair for pairs in asked.values() for pair in pairs]
    for judge, score in judges(workers).items():
        if only_now and judge != "now":
            continue
        for name, asked in pairs_by_set.items():
            shares = results["sets"][name][judge] = {}
            for kind, pairs in asked.items():
                if judge != "now":
                    pairs = random.Random(0).sample(pairs, min(MOST, len(pairs)))
                verdicts = score([one[1] for one in pairs], solution=[one[0] for one in pairs])
                right = [given == wanted for given, (_, _, wanted) in zip(verdicts, pairs, strict=True)]
                shares[kind] = share(right)
                if judge == "now":
                    wrong = [pair for pair, good in zip(pairs, right, strict=True) if not good]
                    results["wrong_now"] += [[name, kind, str(gold), completion] for gold, completion, _ in wrong]
            print(judge, name, shares, flush=True)
        score.close()
    results["time"] = slowest(everything[::EVERY])
    results["throughput"] = {
        name: throughput(golds_of[name], rounds=6) for name in ("gsm8k", "college_math", "olympiadbench")
    }
    results["versions"] = {name: importlib.metadata.version(name) for name in PACKAGES}
    return results


def write(results: dict[str, Any], folder: Path) -> None:
    (folder / "verdicts.json").write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    kinds = {
        "itself": "Each gold in a box, against itself", "next": "The next row's gold, where it is another",
        "digit": "The gold with one digit changed", "forms": "The gold in the forms that a model would write",
    }  # fmt: skip
    lines = [
        "# Verdicts on the golds of eight benchmarks",
        "",
        "Written by `python benchmarks/verdicts.py <folder of answers>`. "
        f"{platform.machine()}; {versions}. Raw numbers, and every pair that is judged wrong: "
        "[verdicts.json](verdicts.json).",
        "",
        "Percent of right verdicts. *now*: `tbrm_trl.rewards.correct`; *before*: `correct(verifiable(gold))` of "
        f"`examples/train.py` at {BEFORE}; *TRL*: its `accuracy_reward` on the gold as it stands. A verdict of None "
        f"counts as wrong. *before* and *TRL* judge {MOST} of the pairs, drawn at random.",
    ]
    for kind, title in kinds.items():
        lines += ["", f"{title}:", "", "| set | pairs | now | before | TRL |", "|---|---|---|---|---|"]
        for name, rows in results["sets"].items():
            cells = [rows.get(judge, {}).get(kind) for judge in ("now", "before", "TRL")]
            shown = " | ".join("–" if cell is None else f"{cell:.2f}" for cell in cells)
            lines.append(f"| {name} | {rows['pairs'][kind]} | {shown} |")
    spent, one = results["time"], results["gsm8k"]
    lines += [
        "",
        f"Time of one verdict, of {spent['verdicts']} of those above: median {spent['median_ms']} ms, 99 of 100 within "
        f"{spent['p99_ms']} ms, the worst {spent['worst_s']} s (`{spent['worst']}`). In workers the time limit bounds "
        f"it, 5 s by default. All {one['rows']} golds of gsm8k against themselves: {one['seconds']} s in one process, "
        "from a cold start.",
        "",
        "Rows a second in batches of 64, half of them wrong, 2,000 characters of reasoning before each answer:",
        "",
        "| set | in process | in workers | workers | share |",
        "|---|---|---|---|---|",
    ]
    for name, row in results["throughput"].items():
        lines.append(f"| {name} | {row['process']} | {row['workers']} | {row['workers_used']} | {row['share']:.2f} |")
    (folder / "verdicts.md").write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("answers", type=Path, help="folder of .jsonl files with the golds")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only-now", action="store_true", help="do not judge by what was before, nor by TRL")
    parser.add_argument("--output", type=Path, default=ROOT / "docs/benchmarks")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    write(measure(arguments.answers, arguments.workers, arguments.only_now), arguments.output)


if __name__ == "__main__":
    main()
