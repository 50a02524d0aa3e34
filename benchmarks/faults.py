"""How many faults a run survives: kills at random moments, and three kinds of damage to every file of a checkpoint.

    python benchmarks/faults.py                  # writes docs/benchmarks/faults.{json,md}; 90 minutes, two cores
    python benchmarks/faults.py --minutes 10     # continues for ten minutes; finished cases are not repeated

A tiny model makes 16 updates with a checkpoint at every fourth, in seven kinds of run, with this trainer and, where
TRL's GRPOTrainer has the kind, with that one. A run survives a fault if, started again with the same command, it ends
with the same bits as an undisturbed run: weights, optimizer, schedule and random states.
"""

import itertools
import os
import random
import shutil
import signal
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from common import fault_runs
from common.launch import import_once
from common.report import Store, bullets, listed, parse, processor, table, versions, wrapped, write
from common.tiny import save

from tbrm_trl.resume.checkpoint import damage, mark_complete

METHODS = ("TBRM", "GRPO")
SIGNALS = (signal.SIGKILL, signal.SIGTERM)
FAULTS = ("removed", "truncated", "one bit flipped")
SPEED_BYTES = 1 << 31


def has(method: str, kind: str) -> bool:
    return method == "TBRM" or kind in fault_runs.OF_GRPO


def fresh_folder(root: Path, name: str) -> Path:
    folder = root / name.replace("/", "-").replace(" ", "-")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


class Bench:
    """Runs cases and stores their outcomes.

    Args:
        root: a folder for the runs.
        store: the results by case.
        until: the value of `time.monotonic` after which no further case begins.
    """

    def __init__(self, root: Path, store: Store, until: float):
        self.root, self.store, self.until = root, store, until
        self.model = save(root / "model")
        self.whole: dict[tuple[str, str], tuple[list[str], float]] = {}

    def undisturbed(self, method: str, kind: str) -> tuple[list[str], float]:
        """How an undisturbed run ends, and how many seconds its updates take."""
        if (method, kind) not in self.whole:
            folder = fresh_folder(self.root, f"whole/{method}/{kind}")
            codes = fault_runs.run(method, kind, self.model, folder)
            assert not any(codes), (folder / "log-0").read_text()[-3000:]
            self.whole[method, kind] = fault_runs.ends(folder), float((folder / "seconds").read_text())
            if (name := f"twice/{method}/{kind}") not in self.store:  # else "other bits" would mean nothing
                folder = fresh_folder(self.root, name)
                fault_runs.run(method, kind, self.model, folder)
                same = fault_runs.ends(folder) == self.whole[method, kind][0]
                self.store[name] = dict(outcome="exact" if same else "other bits")
        return self.whole[method, kind]

    def kill(self, method: str, kind: str, signum: signal.Signals, number: int) -> None:
        """Kill one run at a random moment of its updates, and start it again."""
        name = f"kill/{method}/{kind}/{signum.name}/{number}"
        if name in self.store or time.monotonic() > self.until:
            return
        expected, seconds = self.undisturbed(method, kind)
        rng = random.Random(f"{kind}/{signum.name}/{number}")
        moment, which = rng.random(), rng.randrange(2)
        options: dict[str, Any] = {"enable_jit_checkpoint": True} if signum == signal.SIGTERM else {}
        for _ in range(6):  # if the machine is faster than before, the run ends before the signal
            folder = fresh_folder(self.root, name)
            disturb = fault_runs.send(signum, moment * seconds, which)
            codes = fault_runs.run(method, kind, self.model, folder, disturb, **options)
            if not fault_runs.ends(folder):
                break
            moment *= 0.7
        else:
            raise RuntimeError(f"{name}: the run always ended before it was killed.")
        saved = sorted(int(one.name.split("-")[1]) for one in (folder / "out").glob("checkpoint-*"))
        again = fault_runs.run(method, kind, self.model, folder, **options)
        found = fault_runs.ends(folder)
        outcome = "failed" if any(again) or not found else "exact" if found == expected else "other bits"
        self.store[name] = dict(outcome=outcome, moment=round(moment, 3), codes=codes, checkpoints=saved)
        print(f"{name}: {outcome} (codes {codes}, checkpoints {saved})", flush=True)
        if outcome != "exact":
            print("\n".join((folder / "log-0").read_text().splitlines()[-1:]), flush=True)
        shutil.rmtree(folder)

    def damaged(self, method: str, kind: str) -> None:
        """Remove, truncate or flip a bit of every file of the newer of two checkpoints, and resume each time."""
        if time.monotonic() > self.until:
            return
        source = fresh_folder(self.root, f"source/{method}/{kind}")
        fault_runs.run(method, kind, self.model, source, save_total_limit=None)
        for step in range(3 * fault_runs.SAVED_EVERY, fault_runs.UPDATES + 1, fault_runs.SAVED_EVERY):
            shutil.rmtree(source / f"out/checkpoint-{step}")
        newer = f"out/checkpoint-{2 * fault_runs.SAVED_EVERY}"
        files = sorted(str(one.relative_to(source / newer)) for one in (source / newer).rglob("*") if one.is_file())
        expected: list[str] = []
        for fault in ("", *(f"{file}/{how}" for file in files for how in FAULTS)):
            name = f"file/{method}/{kind}/{fault}"
            if (fault and name in self.store) or time.monotonic() > self.until:
                continue
            folder = self.root / "damaged"
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(source, folder)
            if fault:
                file, _, how = fault.rpartition("/")
                inflict(folder / newer / file, how)
            (folder / "log-0").unlink()
            codes = fault_runs.run(method, kind, self.model, folder, save_total_limit=None)
            found, said = fault_runs.ends(folder), (folder / "log-0").read_text().lower()
            if not fault:  # resumed without damage: GRPO does not end as undisturbed
                expected = found
                assert expected, said[-3000:]
                continue
            outcome = "failed" if any(codes) or not found else "same end" if found == expected else "other end"
            name_of_newer = Path(newer).name
            if outcome == "same end" and any(
                text in said for text in (f"of {name_of_newer} is damaged", f"{name_of_newer} is not complete")
            ):
                outcome = "found"
            self.store[name] = dict(outcome=outcome)
            print(f"{name}: {outcome}", flush=True)

    def speed(self) -> None:
        """Measure how fast a large checkpoint is verified from a warm cache."""
        if "speed" in self.store or time.monotonic() > self.until:
            return
        folder = fresh_folder(self.root, "speed/checkpoint-1")
        block = torch.arange(1 << 17).numpy().tobytes()  # 1 MiB
        for part in range(2):
            with (folder / f"model-{part}.safetensors").open("wb") as file:
                for _ in range(SPEED_BYTES // len(block) // 2):
                    file.write(block)
        (folder / "tbrm").mkdir()
        mark_complete(folder, {})
        seconds, processor_seconds = [], []
        for _ in range(5):
            begin, begin_of_processor = time.perf_counter(), time.process_time()
            assert damage(folder) is None
            seconds.append(time.perf_counter() - begin)
            processor_seconds.append(time.process_time() - begin_of_processor)
        self.store["speed"] = dict(
            bytes=SPEED_BYTES, seconds=seconds, processor_seconds=processor_seconds, processors=os.cpu_count()
        )
        shutil.rmtree(folder)


def inflict(file: Path, how: str) -> None:
    content = bytearray(file.read_bytes())
    if how == "removed":
        file.unlink()
    elif how == "truncated":
        file.write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 2] ^= 1
        file.write_bytes(content)


# ---- the page --------------------------------------------------------------------------------------------------------


def cell(outcomes: Counter, good: tuple[str, ...]) -> str:
    """How many of how many cases survived, and the outcomes of the others."""
    total = sum(outcomes.values())
    if not total:
        return "–"
    others = [f"{count} {outcome}" for outcome, count in sorted(outcomes.items()) if outcome not in good]
    text = f"{sum(outcomes[one] for one in good)} of {total}"
    return f"{text} ({', '.join(others)})" if others else text


def page(runs: dict[str, Any], facts: str) -> str:
    def count(begin: str, end: str = "") -> Counter:
        return Counter(one["outcome"] for name, one in runs.items() if name.startswith(begin) and name.endswith(end))

    kills = [
        [kind, signum.name, *(cell(count(f"kill/{one}/{kind}/{signum.name}/"), ("exact",)) for one in METHODS)]
        for signum in SIGNALS
        for kind in fault_runs.KINDS
    ]
    files = [[how, *(cell(count(f"file/{one}/", f"/{how}"), ("found",)) for one in METHODS)] for how in FAULTS]
    lost = sorted(
        f"`{name}`: {one['outcome']}"
        for name, one in runs.items()
        if "/TBRM/" in name and one["outcome"] not in ("exact", "found")
    )
    speed = "not measured yet"
    if "speed" in runs:
        measured = runs["speed"]
        rates = [measured["bytes"] / min(measured[of]) / 1e9 for of in ("seconds", "processor_seconds")]
        speed = (
            f"{rates[0]:.1f} GB/s from a warm cache, {rates[1]:.1f} GB per second of a processor's time (best of "
            f"{len(measured['seconds'])} over {measured['bytes'] / 1e9:.1f} GB in two files, {measured['processors']} "
            "processors that other work shared)"
        )
    return (
        "\n\n".join(
            [
                "# Faults injected and survived",
                wrapped(
                    f"Written by `python benchmarks/faults.py`. {facts}. Every case: [faults.json](faults.json). A "
                    f"tiny model makes {fault_runs.UPDATES} updates, with a checkpoint after every "
                    f"{fault_runs.SAVED_EVERY}. GRPO is TRL's own trainer, started again with "
                    "`resume_from_checkpoint=True` where there is a checkpoint."
                ),
                "## Kills",
                wrapped(
                    "The signal comes at a random moment of the updates. The run is then started once more by the same "
                    "line. It survived if it ends with the bits of a run that nothing disturbed: weights, optimizer, "
                    "schedule and random states. Two undisturbed runs end with the same bits, in every kind and with "
                    "both trainers. A kill before the first checkpoint starts the run anew. SIGKILL hits one process "
                    "of two. SIGTERM comes to runs with `enable_jit_checkpoint=True`; transformers' own waits 3 "
                    "seconds after it, which is set to 0 here."
                ),
                table(["run", "signal", "TBRM", "GRPO"], kills),
                "## Damaged files",
                wrapped(
                    "Each file of the newer of two checkpoints is damaged in turn, and the run resumed. It survived if "
                    "the damage is said and the run ends as it ends without, from the older checkpoint. *same end*: "
                    "the damage went unsaid and changed nothing. *other end*: it went unsaid, and the run ended with "
                    "other bits. *failed*: the run ended in an error."
                ),
                table(["fault", "TBRM", "GRPO"], files),
                "## Not survived" if lost else "No fault of the tables was lost on TBRM.",
                *([bullets(lost)] if lost else []),
                "## Verification",
                wrapped(f"The digests of a checkpoint are compared at {speed}."),
            ]
        )
        + "\n"
    )


def main() -> None:
    arguments = parse(
        __doc__,
        "one kill of each signal in fresh runs, no damaged files",
        kills=dict(type=int, default=10, help="of each signal, in each kind of run"),
        minutes=dict(type=float, default=float("inf"), help="begin no further case after these"),
        kinds=dict(nargs="+", default=list(fault_runs.KINDS), choices=list(fault_runs.KINDS)),
        damaged=dict(nargs="+", default=["fresh", "LoRA"], help="kinds whose files are damaged"),
    )
    kinds, kills, damaged = arguments.kinds, arguments.kills, arguments.damaged
    if arguments.quick:
        kinds, kills, damaged = ["fresh"], 1, []
    facts = f"{processor()}; {listed(versions('tbrm-trl', 'trl', 'transformers', 'torch'))}"
    store = Store(arguments.output / "faults.json", facts=facts)
    import_once("common.fault_runs")
    with tempfile.TemporaryDirectory() as root:
        bench = Bench(Path(root), store, time.monotonic() + 60 * arguments.minutes)
        if not arguments.quick:
            bench.speed()
        # In this order every kind has equally many cases, give or take one, whenever the time is up.
        for number, kind, signum, method in itertools.product(range(kills), kinds, SIGNALS, METHODS):
            if has(method, kind):
                bench.kill(method, kind, signum, number)
        for kind, method in itertools.product(damaged, METHODS):
            if has(method, kind):
                bench.damaged(method, kind)
    differing = [name for name, one in store.items() if name.startswith("twice/") and one["outcome"] != "exact"]
    assert not differing, f"Undisturbed runs differ, so the comparison says nothing: {differing}"
    write(arguments.output, "faults", page(store, facts))


if __name__ == "__main__":
    main()
