"""Verdicts on the gold answers of public benchmarks by `tbrm_trl.rewards`, the earlier examples/train.py, and TRL.

    python benchmarks/verdicts.py path/to/answers                    # writes docs/benchmarks/verdicts.{json,md}
    python benchmarks/verdicts.py path/to/answers --only throughput  # measures that again, and keeps the other figures

The folder holds one file for each benchmark, with {"row": …, "answer": …} on each line. Each gold is put into a box and
compared with itself (right verdict: 1), and with the next row's gold and itself with one digit changed (right: 0). It
is also written in other forms that a model might use (right: 1). The tables of pairs in tests/data are judged too.
"""

import ast
import json
import multiprocessing
import platform
import random
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from common.report import ROOT, listed, parse, table, versions, wrapped, write
from trl.rewards import accuracy_reward

from tbrm_trl.rewards import InWorkers, correct

BEFORE = "f8ecbad"  # the last commit whose examples/train.py has its own reading of answers
PACKAGES = ("math-verify", "latex2sympy2-extended", "sympy", "trl")
TABLES = {"open": "verdicts.jsonl", "hidden": "verdicts_hidden.jsonl", "third": "verdicts_third.jsonl"}
MOST = 40  # randomly drawn pairs of each kind and set, which all three judge
WARM, BATCHES, BATCH = 10, 20, 64  # for throughput: warm-up batches, measured batches, rows of each
SLOW = 16  # for throughput: one row in so many is a product of powers and logarithms
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


def other_constants(text: str, row: int) -> str | None:
    """Small letters for capitals of arbitrary constants, and capitals for numbered small ones."""
    if re.search(r"C_|[A-Z]C|C[A-Z]|[=<>,].*[=<>,]", text):
        return None
    changed = re.sub(r"(?<=[+ ])C(?![a-zA-Z_(])", "c", re.sub(r"(?<![a-zA-Z\\])c_\{?(\d)\}?", r"C_{\1}", text))
    return changed if changed != text else None


def without_box(text: str, row: int) -> str | None:
    return text if re.fullmatch(r"-?[\d.,]+", text) else None


FORMS = {
    "power of ten": as_power_of_ten, "decimal": as_decimal, "braces": with_braces, "no braces": without_braces,
    "displayed": displayed, "slash": slash, "no currency": without_currency, "unit": with_unit, "thousands": thousands,
    "value of a name": value_of_name, "constants": other_constants, "no box": without_box,
}  # fmt: skip


def changed_digit(text: str) -> str | None:
    digits = list(re.finditer(r"\d", text))
    if not digits:
        return None
    at = digits[len(digits) // 2].start()
    return text[:at] + str((int(text[at]) + 3) % 10) + text[at + 1 :]


def pairs_of(golds: list[Any]) -> dict[str, list[tuple[Any, str, float]]]:
    """Triples of gold, completion and right verdict, by kind."""
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
        for form, rewritten in FORMS.items():
            if (written := rewritten(text, row)) is not None:
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


# --- the three judges ---


def verifiable_before() -> Callable[[Any], str]:
    """`verifiable` of examples/train.py at `BEFORE`."""
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
    """TRL's reward on the unchanged gold of the data."""
    golds = [str(gold[0] if isinstance(gold, list) else gold) for gold in solution]
    return accuracy_reward([[{"content": one}] for one in completions], golds)


_verifiable: Callable[[Any], str] | None = None


def by_example_before(completions: list[str], solution: list[Any], **columns: Any) -> list[float | None]:
    """examples/train.py at `BEFORE`."""
    global _verifiable
    _verifiable = _verifiable or verifiable_before()
    return accuracy_reward([[{"content": one}] for one in completions], [_verifiable(gold) for gold in solution])


def by_now(completions: list[str], solution: list[Any], log_extra: Any, **columns: Any) -> list[float | None]:
    """`tbrm_trl.rewards.correct`, with the seconds that each verdict took."""
    started = time.perf_counter()
    verdicts = correct(completions, solution)
    log_extra("seconds", [time.perf_counter() - started])
    return verdicts


def judges(workers: int) -> dict[str, InWorkers]:
    """Each judge in workers. A row that is late or raises gets -1, which is always wrong."""
    functions: dict[str, Any] = {"now": by_now, "before": by_example_before, "TRL": by_trl}
    return {name: InWorkers(one, time_limit=20.0, workers=workers, failed=-1.0) for name, one in functions.items()}


# --- measuring ---


def judged(
    score: InWorkers, pairs: Sequence[tuple[Any, str, float | None]], seconds: list[float] | None = None
) -> list[bool]:
    """Whether the verdict on each pair is right."""
    extra: dict[str, list] = {}
    verdicts = score([one[1] for one in pairs], solution=[one[0] for one in pairs], log_extra=extra.__setitem__)
    if seconds is not None:
        seconds += [score.time_limit if one is None else one for one in extra.get("seconds", [])]
    return [given == wanted for given, (_, _, wanted) in zip(verdicts, pairs, strict=True)]


def share(values: list[bool]) -> float | None:
    return round(100 * sum(values) / len(values), 2) if values else None


def on_answers(golds_of: dict[str, list[Any]], score_by: dict[str, InWorkers]) -> dict[str, Any]:
    """Shares of right verdicts by set and kind: `now` on all pairs, and all judges on the drawn pairs."""
    sets: dict[str, Any] = {}
    seconds: list[float] = []
    for name, golds in golds_of.items():
        sets[name] = {"golds": len(golds), "asked": {}}
        for kind, pairs in pairs_of(golds).items():
            right = judged(score_by["now"], pairs, seconds)
            for one, is_right in zip(pairs, right, strict=True):
                if not is_right:
                    print("wrong:", name, kind, *one, flush=True)  # the sets' own text is printed, not kept
            drawn = random.Random(0).sample(range(len(pairs)), min(MOST, len(pairs)))
            row = sets[name]["asked"][kind] = {"pairs": len(pairs), "now": share(right), "drawn": len(drawn)}
            row["now, drawn"] = share([right[at] for at in drawn])
            for judge in [one for one in score_by if one != "now"]:
                row[judge] = share(judged(score_by[judge], [pairs[at] for at in drawn]))
            print(name, kind, row, flush=True)
    return {"sets": sets, "time": times(seconds)}


def times(seconds: list[float]) -> dict[str, Any]:
    """The time of one verdict, over all pairs."""
    ordered = sorted(seconds)
    return {
        "verdicts": len(seconds),
        "median_ms": round(1e3 * statistics.median(seconds), 2),
        "p99_ms": round(1e3 * ordered[int(0.99 * len(ordered))], 1),
        "worst_s": round(ordered[-1], 2),
    }


def on_tables(score_by: dict[str, InWorkers]) -> dict[str, Any]:
    """Right verdicts on the pairs that a person calls clear, by kind and by table, and verdicts on the other pairs."""
    found: dict[str, Any] = {}
    unclear = []
    for named, file in TABLES.items():
        everything = [json.loads(line) for line in (ROOT / "tests/data" / file).open()]
        rows = [row for row in everything if row["clear"]]
        pairs = [(r["gold"], r["completion"], None if r["verdict"] == "unreadable" else r["verdict"]) for r in rows]
        right = {judge: judged(score, pairs) for judge, score in score_by.items()}
        for kind in [*dict.fromkeys(row["kind"] for row in rows), f"all of {named}"]:
            at = [i for i, row in enumerate(rows) if kind in (row["kind"], f"all of {named}")]
            into = found.setdefault(kind, {"pairs": 0, **dict.fromkeys(score_by, 0)})
            into["pairs"] += len(at)
            for judge in score_by:
                into[judge] += sum(right[judge][i] for i in at)
        others = [row for row in everything if not row["clear"]]
        given = correct([row["completion"] for row in others], [row["gold"] for row in others])
        unclear += [
            [r["kind"], str(r["gold"]), r["completion"], one, r["note"]] for r, one in zip(others, given, strict=True)
        ]
        print(named, found.get(f"all of {named}"), flush=True)
    return {"tables": found, "unclear": unclear}


def cold_start(golds: list[Any]) -> dict[str, float]:
    """Seconds to score a benchmark's golds in this process, a cold start included."""
    completions = [boxed(bare(gold)) for gold in golds]
    started = time.perf_counter()
    correct(completions, golds)
    return {"rows": len(golds), "seconds": round(time.perf_counter() - started, 2)}


SENTENCES = (
    "Let us consider the next case and add what it gives.",
    "Since $a^2 + b^2 = c^2$, we have \\(c = \\sqrt{%d}\\) here.",
    "There are %d of them, so each gets $\\frac{%d}{7}$ of the rest.",
    "Wait, let me check this again: %d times 12 is not what we want.",
    "Substituting back, the left side becomes \\[x^{%d} - 3x + 1 = 0.\\]",
)


def reasoning(rng: random.Random) -> str:
    """Text of 1,200 to 3,200 characters: 300 to 800 tokens."""
    text, length = "", rng.randint(1200, 3200)
    while len(text) < length:
        sentence = rng.choice(SENTENCES)
        text += sentence.replace("%d", str(rng.randint(2, 99))) + " "
    return text


def throughput(golds: list[Any], workers: int) -> dict[str, Any]:
    """Time in this process divided by time in workers, on batches that both score once, in alternating order.

    Half of the answers are wrong, and one row of 16 takes a hundred times as long as most.
    """
    rng = random.Random(0)
    rows = [(gold, boxed(bare(gold if rng.random() < 0.5 else rng.choice(golds)))) for gold in golds]
    rows = [rng.choice(rows) for _ in range(BATCH * (WARM + BATCHES))]
    for at in range(0, len(rows), SLOW):
        rows[at] = (f"{at + 2} \\ln(3) x 3^{{x^2}}", boxed(f"\\ln(3) \\cdot {at + 2} x e^{{x^2 \\ln 3}}"))
    batches = [rows[at : at + BATCH] for at in range(0, len(rows), BATCH)]
    in_workers = InWorkers(correct, workers=workers)
    spent: dict[str, list[float]] = {"process": [], "workers": []}
    for round_, batch in enumerate(batches):
        completions, solution = [reasoning(rng) + row[1] for row in batch], [row[0] for row in batch]
        functions: list[tuple[str, Any]] = [("process", correct), ("workers", in_workers)]
        for name, function in functions if round_ % 2 else functions[::-1]:
            started = time.perf_counter()
            function(completions, solution=solution)
            spent[name] += [time.perf_counter() - started] if round_ >= WARM else []
    in_workers.close()
    shares = sorted(first / second for first, second in zip(spent["process"], spent["workers"], strict=True))
    return {
        **{name: round(BATCH / statistics.median(seconds)) for name, seconds in spent.items()},
        "workers_used": in_workers.workers,
        "share": round(statistics.median(shares), 2),
        # The order statistics that contain the median with probability 95.9% (of 20 values).
        "interval": [round(shares[5], 2), round(shares[14], 2)],
    }


def measure(golds_of: dict[str, list[Any]], workers: int, only: str | None, results: dict[str, Any]) -> None:
    """Bring the results up to date, or one part of them."""
    if only in (None, "gsm8k"):
        results["gsm8k"] = cold_start(golds_of["gsm8k"])
    score_by = judges(workers)
    if only in (None, "answers"):
        results.update(on_answers(golds_of, score_by))
    if only in (None, "tables"):
        results.update(on_tables(score_by))
    for score in score_by.values():
        score.close()
    if only in (None, "throughput"):
        everything = [gold for golds in golds_of.values() for gold in golds]
        some = {"gsm8k": golds_of["gsm8k"], "college_math": golds_of["college_math"], "all eight": everything}
        # Each in a new process: this one and sympy remember what they have read.
        fresh = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), max_tasks_per_child=1)
        results["throughput"] = {
            f"{name}, {count}": fresh.submit(throughput, golds, count).result()
            for name, golds in some.items()
            for count in (1, workers)
        }
        print(results["throughput"], flush=True)
    results["versions"] = versions(*PACKAGES)


# --- the page ---

ASKED = {
    "itself": "Each gold in a box, against itself", "next": "The next row's gold, where it is another",
    "digit": "The gold with one digit changed", "forms": "The gold in the forms that a model would write",
}  # fmt: skip


def shown(head: str, rows: Iterable[Sequence[Any]]) -> str:
    """A table, with numbers to two digits."""

    def cell(value: Any) -> str:
        return "–" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value)

    return table(head.split(" | "), [list(map(cell, row)) for row in rows])


def code(text: str) -> str:
    """The end of a text as code in a cell."""
    text = " ".join(text.split()).replace("|", "\\|").replace("`", "'")
    return f"`{text if len(text) <= 60 else '… ' + text[-58:]}`"


def page(results: dict[str, Any]) -> str:
    asked = []
    for kind, title in ASKED.items():
        names = ("pairs", "now", "now, drawn", "before", "TRL")
        rows = [[name, *(found["asked"][kind][one] for one in names)] for name, found in results["sets"].items()]
        asked.append(f"{title}:\n\n{shown('set | pairs | now, all | now | before | TRL', rows)}")
    of_sets = "\n\n".join(asked)
    tables = [[kind, *map(row.get, ("pairs", "now", "before", "TRL"))] for kind, row in results["tables"].items()]
    throughput = [
        [name.rpartition(",")[0], *map(row.get, ("process", "workers", "workers_used", "share")),
         "{} to {}".format(*row["interval"])]
        for name, row in results["throughput"].items()
    ]  # fmt: skip
    unclear = [
        [kind, code(gold), code(completion), None if given is None else int(given), why.replace("|", "\\|")]
        for kind, gold, completion, given, why in sorted(results["unclear"], key=lambda row: row[0])
    ]
    spent, one = results["time"], results["gsm8k"]
    meant = f"""Percent of right verdicts. *now*: `tbrm_trl.rewards.correct`; *before*: `correct(verifiable(gold))` of
        `examples/train.py` at {BEFORE}; *TRL*: its `accuracy_reward` on the gold as it stands. A verdict of None counts
        as wrong. The last three columns are of the same pairs, at most {MOST} drawn at random."""
    of_tables = """Right verdicts on the tables of pairs in `tests/data`, of those that a person calls clear. *open* and
        *hidden* were written before the code; *hidden* was measured once the code was done, with 412 of 421 right.
        *third* was written before those nine were mended, and measured after, with 189 of 191 right; the two were
        mended then."""
    took = f"""Time of one verdict, of all {spent["verdicts"]} above: median {spent["median_ms"]} ms, 99 of 100 within
        {spent["p99_ms"]} ms, the worst {spent["worst_s"]} s. In workers the time limit bounds it, 5 s by default. All
        {one["rows"]} golds of gsm8k against themselves: {one["seconds"]} s in one process, from a cold start. The
        machine was shared: a quiet one is faster."""
    rate = f"""Rows a second in batches of {BATCH}: half of the answers wrong, 300 to 800 tokens of reasoning before
        each, one in {SLOW} a formula that takes a hundred times as long as a number. *share* is the time in this
        process by that in workers, on the same batch: the median of {BATCHES} in alternating order after {WARM} to warm
        up, with its 95% interval. One worker shows what sending costs; more gain what cores are free, and each of them
        learns by itself what math-verify and sympy remember."""
    return f"""# Verdicts on the golds of eight benchmarks

Written by `python benchmarks/verdicts.py <folder of answers>`. {platform.machine()}; {listed(results["versions"])}. Raw
numbers: [verdicts.json](verdicts.json).

{wrapped(meant)}

{of_sets}

{wrapped(of_tables)}

{shown("kind | pairs | now | before | TRL", tables)}

{wrapped(took)}

{wrapped(rate)}

{shown("set | in process | in workers | workers | share | interval", throughput)}

Pairs of the tables that a person would call unclear, and the verdict given (“–”: the gold is unreadable):

{shown("kind | gold | end of the completion | verdict | why", unclear)}
"""


def main() -> None:
    arguments = parse(
        __doc__,
        positional={"answers": dict(type=Path, help="folder of .jsonl files with the golds")},
        workers=dict(type=int, default=2),
        only=dict(choices=["gsm8k", "answers", "tables", "throughput"], help="keep the other figures"),
    )
    golds_of = {
        path.stem: [json.loads(line)["answer"] for line in path.open()]
        for path in sorted(arguments.answers.glob("*.jsonl"))
    }
    raw = arguments.output / "verdicts.json"
    results = json.loads(raw.read_text()) if arguments.only else {}
    measure(golds_of, arguments.workers, arguments.only, results)
    raw.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    write(arguments.output, "verdicts", page(results))


if __name__ == "__main__":
    main()
