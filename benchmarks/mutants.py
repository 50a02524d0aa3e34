"""Which small changes of the code the tests notice: mutation testing of the parts that determine results.

    python benchmarks/mutants.py                  # writes docs/benchmarks/mutants.{json,md}; two hours on two cores
    python benchmarks/mutants.py --minutes 10     # continues for ten minutes; results so far are kept
    python benchmarks/mutants.py --only store --anew    # tries survivors in files with this in their name again

A mutant is the code with one change. It is killed if one of its named tests fails. These are the fastest tests that
enter the changed function, up to five seconds in total.

Modules are imported and tests collected only once. Each mutant is a forked process. It compiles the changed file, puts
code, defaults and constants into the loaded functions, classes and modules, and runs the tests.
"""

import ast
import copy
import gc
import inspect
import json
import math
import os
import resource
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

import pytest
import xxhash
from common.report import ROOT, Store, bullets, listed, parse, processor, table, versions, wrapped, write

SOURCE = ROOT / "src/tbrm_trl"
CHANGED = (
    "loss",
    "sources/replay.py",
    "sources/store.py",
    "resume/checkpoint.py",
    "resume/exact_resume.py",
    "resume/finite.py",
    "resume/folder_lock.py",
    "resume/stop.py",
)
TESTS = """
    estimators exact_resume fuzz lock_and_stop marks metrics oracle replay residual returns skipped_updates soft_values
    store terms trajectory_loss truncation checkpoints
""".split()
LIMIT = 5.0  # seconds of processor time of a mutant's tests, measured on the original code
HANGS = 30.0  # seconds of processor time after which a mutant counts as killed because it does not end
# Survivors that compute the same as the original, by reason.
_SAME_RESULT: dict[str, tuple[str, ...]] = {
    "A tensor of two dimensions: its last one is dimension 1.": (
        "loss/residual.py sum_over: -1 → 1",
        "loss/terms.py random_subset: draw.argsort(dim=1).argsort(dim=1) → draw.argsort(dim=1).argsort()",
        "loss/terms.py random_subset: draw.argsort(dim=1) → draw.argsort()",
    ),
    "A tensor of one dimension: its first one is its last.": (
        "loss/soft_value/partition.py PartitionValue._value: 0 → -1",
        "loss/soft_value/partition.py PartitionValue._value: 0 → -1 (2)",
        "loss/soft_value/quantile.py log_partition: 0 → -1",
        "loss/soft_value/quantile.py log_partition: 0 → -1 (2)",
    ),
    "Rows that do not count are masked once more, in `mean_over_counted`.": (
        "loss/residual.py squared_residual_loss: 0.0 → 1.0",
        "loss/residual.py squared_residual_loss: 0.0 → -1.0",
    ),
    "P_h is read of chosen tokens alone, and these are inside the mask.": (
        "loss/terms.py random_prefix: 1.0 → 0.0",
        "loss/terms.py random_prefix: 1.0 → 2.0",
    ),
    '`truncation="bootstrap"` beside `token_fraction` is refused, and nothing else there reads batch and scores.': (
        "loss/trajectory_loss.py TrajectoryLoss._squared_in_part: self._values(rows, batch, scores, replace(inputs, "
        "policy_value=scores.soft_value)) → self._values(rows, scores, batch, replace(inputs, "
        "policy_value=scores.soft_value))",
        "loss/trajectory_loss.py TrajectoryLoss._squared_in_part: value - upcoming → value + upcoming",
    ),
    "V is known beforehand for all rows of an update or for none.": (
        "loss/trajectory_loss.py TrajectoryLoss._values: 0 → -1",
    ),
    "The mean of ones, whatever their type.": (
        "loss/metrics.py evaluation_metrics: torch.ones_like(total, dtype=torch.bool) → torch.ones_like(total)",
    ),
    "What is left out is PyTorch's default for numbers of Python.": (
        "loss/metrics.py microbatch_totals: torch.tensor(list(shares.values()), dtype=torch.float32, device=device) → "
        "torch.tensor(list(shares.values()), device=device)",
    ),
    "NumPy's means are of float64 already.": (
        "loss/soft_value/partition.py PartitionValue._value: torch.tensor([np.mean(rewards) for _, rewards in "
        "completions], dtype=torch.float64) → torch.tensor([np.mean(rewards) for _, rewards in completions])",
    ),
    "Other draws, which depend on the seed alone as well.": (
        "loss/soft_value/sampled.py _random_state_of: 63 → 64",
        "loss/soft_value/sampled.py _random_state_of: 63 → 62",
        "loss/soft_value/sampled.py SampledValue._sampled_rewards: _random_state_of(args.seed, first + process) → "
        "_random_state_of(first + process, args.seed)",
    ),
    "0 divided by another number, or a number that nothing reads.": (
        "loss/soft_value/tracked.py TrackedValue._value: 1.0 → 2.0",
        "loss/soft_value/tracked.py TrackedValue._value: 0.0 → 1.0 (2)",
        "loss/soft_value/tracked.py TrackedValue._value: 0.0 → -1.0 (2)",
    ),
    "A model, and a trial that is None without a search for hyperparameters: transformers reads neither there.": (
        "resume/exact_resume.py ExactResume._maybe_log_save_evaluate: super()._maybe_log_save_evaluate(tr_loss, "
        "grad_norm, model, trial, *args, **kwargs) → super()._maybe_log_save_evaluate(tr_loss, grad_norm, trial, "
        "model, *args, **kwargs)",
        "resume/exact_resume.py ExactResume._write_checkpoint: super()._save_checkpoint(model, trial) → "
        "super()._save_checkpoint(trial, model)",
        "resume/exact_resume.py ExactResume._maybe_log_save_evaluate: self._save_checkpoint(model, trial) → "
        "self._save_checkpoint(trial, model)",
    ),
    "It is multiplied by a residual of 0.": (
        "loss/trajectory_loss.py TrajectoryLoss._squared_in_part: 0.0 → 1.0",
        "loss/trajectory_loss.py TrajectoryLoss._squared_in_part: 0.0 → -1.0",
    ),
    "Numbers of 16 bits are looked at as 32, in which they are the same.": ("resume/finite.py not_finite: 1 → 2",),
    "No number of the first action divides: 0, or masked.": (
        "loss/terms.py random_prefix: 1 → 2 (6)",
        "loss/terms.py random_prefix: 1 → 0 (6)",
    ),
    "All rows are new then, and weigh alike.": (
        "sources/replay.py ReplayBuffer._draw_prioritized: 1.0 → 0.0",
        "sources/replay.py ReplayBuffer._draw_prioritized: 1.0 → 2.0",
    ),
    "Rewards and samples are compared in float32.": (
        "loss/soft_value/quantile.py QuantileValue.on_window: torch.tensor(given, dtype=torch.float64) → "
        "torch.tensor(given)",
    ),
    "Any number that is not NaN.": (
        "loss/trajectory_loss.py TrajectoryLoss.left_out: 0.0 → 1.0",
        "loss/trajectory_loss.py TrajectoryLoss.left_out: 0.0 → -1.0",
    ),
    "β is one for all, and what writers found is found equal before.": (
        "loss/soft_value/base.py ValueInputs.joined: 0 → -1",
        "resume/exact_resume.py ExactResume._on_writers: 0 → -1 (2)",
    ),
    "Symmetric.": (
        "resume/folder_lock.py FolderLock._is_current: os.path.samestat(os.fstat(descriptor), os.stat(self.file)) → "
        "os.path.samestat(os.stat(self.file), os.fstat(descriptor))",
    ),
    "How many rows or states are handled at once changes no value.": (
        "sources/replay.py : 1024 → 1023",
        "sources/replay.py : 1024 → 1025",
        "loss/soft_value/model.py ModelValue.on_window: groupby(sorted(set(states), key=len), key=len) → "
        "groupby(sorted(set(states), key=len))",
        "loss/soft_value/model.py ModelValue.on_window: sorted(set(states), key=len) → sorted(set(states))",
    ),
    "No trajectory without an action enters the buffer.": ("sources/store.py TrajectoryStore.__getitem__: 1 → 0",),
    "Any number that is not whole.": (
        "resume/exact_resume.py ExactResume._maybe_log_save_evaluate: 0.5 → 1.5",
        "resume/exact_resume.py ExactResume._maybe_log_save_evaluate: 0.5 → -0.5",
    ),
    "`write_json` makes the folder.": (
        "resume/checkpoint.py mark_complete: (folder / _FOLDER).mkdir(exist_ok=True) → (deleted)",
        "resume/checkpoint.py mark_complete: (folder / _FOLDER).mkdir(exist_ok=True) → (folder / _FOLDER).mkdir()",
    ),
    "The byte that is left is written over at once.": ("resume/folder_lock.py FolderLock.acquire: 0 → 1",),
    "The timer is cancelled whenever the block is left, so none is waited for.": (
        "resume/stop.py StopRequest._hear: self._timer.daemon = True → (deleted)",
        "resume/stop.py StopRequest._hear: True → False",
    ),
    "Python writes standard error line by line.": (
        "resume/stop.py _say: print(text, file=sys.stderr, flush=True) → print(text, file=sys.stderr)",
        "resume/stop.py _say: True → False",
    ),
    "Every block counts as changed at first, so all is written before it is read.": (
        "sources/replay.py _Priorities.__init__: np.zeros → np.ones",
        "sources/replay.py _Priorities.__init__: np.zeros → np.ones (2)",
        "sources/replay.py _Priorities.__init__: np.zeros → np.ones (3)",
        "sources/replay.py _Priorities.__init__: np.zeros → np.ones (4)",
    ),
    "Read where some block has a known priority, and none of these is negative.": (
        "sources/replay.py _Priorities.update: 0.0 → -1.0",
    ),
    "Blocks that did not change are summed once more.": (
        "sources/replay.py _Priorities.update: self._changed.clear() → (deleted)",
    ),
    "Without a segment the first trajectory opens one, and sets what is used of it.": (
        "sources/store.py TrajectoryStore.clear: self._used = 0 → (deleted)",
        "sources/store.py TrajectoryStore.clear: 0 → 1 (2)",
        "sources/store.py TrajectoryStore.clear: 0 → -1 (2)",
    ),
    "Every field of the record is written afterwards.": (
        "sources/store.py TrajectoryStore.append: np.zeros → np.ones",
    ),
    "What is left is a lower number than that of any trajectory in the segment, which is all that it is asked for.": (
        "sources/store.py TrajectoryStore.popleft: 0 → 1 (2)",
    ),
    "`restore` writes it anew.": (
        "sources/store.py TrajectoryStore.state: 0 → -1",
        "sources/store.py TrajectoryStore.state: 0 → 1",
    ),
}
EQUIVALENT = {name: reason for reason, names in _SAME_RESULT.items() for name in names}


def files_changed() -> list[str]:
    """The files to change, relative to the package."""
    found = [
        one for part in CHANGED for one in ([SOURCE / part] if part.endswith(".py") else (SOURCE / part).rglob("*.py"))
    ]
    return sorted(file.relative_to(SOURCE).as_posix() for file in found)


# ---- mutants ---------------------------------------------------------------------------------------------------------

_OPERATORS: dict[type, tuple[type, ...]] = {
    ast.Add: (ast.Sub,),
    ast.Sub: (ast.Add,),
    ast.Mult: (ast.Div,),
    ast.Div: (ast.Mult,),
    ast.FloorDiv: (ast.Mult,),
    ast.Mod: (ast.Mult,),
    ast.Pow: (ast.Mult,),
    ast.BitAnd: (ast.BitOr,),
    ast.BitOr: (ast.BitAnd,),
    ast.LShift: (ast.RShift,),
    ast.And: (ast.Or,),
    ast.Or: (ast.And,),
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
}
_NAMES = {"any": "all", "all": "any", "min": "max", "max": "min", "zeros": "ones", "sum": "mean", "mean": "sum"}

_SYMMETRIC = ("min", "max", "np.array_equal", "torch.equal")  # in their arguments
_WITHOUT_EFFECT = (
    "device",
    "strict",
    "stacklevel",
)  # keywords; the tests have one device and zip only equal lengths


def variants(node: ast.AST) -> Iterator[ast.AST | None]:
    """The possible replacements of a node. None deletes a statement."""

    def with_(**parts: Any) -> Any:
        changed = copy.copy(node)
        for name, value in parts.items():
            setattr(changed, name, value)
        return changed

    if isinstance(node, ast.BinOp | ast.BoolOp):
        yield from (with_(op=other()) for other in _OPERATORS.get(type(node.op), ()))
    elif isinstance(node, ast.Compare):
        for place, operator in enumerate(node.ops):
            for other in _OPERATORS[type(operator)]:
                yield with_(ops=[*node.ops[:place], other(), *node.ops[place + 1 :]])
    elif isinstance(node, ast.UnaryOp):
        yield node.operand
    elif isinstance(node, ast.Constant):
        if isinstance(node.value, bool):
            yield with_(value=not node.value)
        elif isinstance(node.value, int | float):
            yield from (with_(value=node.value + step) for step in (1, -1))
    elif isinstance(node, ast.If | ast.While | ast.IfExp) and isinstance(node.test, ast.BoolOp | ast.Name | ast.Call):
        yield with_(test=ast.UnaryOp(ast.Not(), node.test))
    elif isinstance(node, ast.comprehension):
        yield from (with_(ifs=[*node.ifs[:n], *node.ifs[n + 1 :]]) for n in range(len(node.ifs)))
    elif isinstance(node, ast.Return) and node.value is not None:
        yield with_(value=ast.Constant(None))
    elif isinstance(node, ast.Call):
        is_symmetric = ast.unparse(node.func) in _SYMMETRIC
        for place in range(0 if is_symmetric else len(node.args) - 1):
            first, second = node.args[place : place + 2]
            yield with_(args=[*node.args[:place], second, first, *node.args[place + 2 :]])
        for place, keyword in enumerate(node.keywords):
            if keyword.arg and keyword.arg not in _WITHOUT_EFFECT:
                yield with_(keywords=[*node.keywords[:place], *node.keywords[place + 1 :]])
    elif isinstance(node, ast.Name | ast.Attribute):
        name = "id" if isinstance(node, ast.Name) else "attr"
        if (other_name := _NAMES.get(getattr(node, name))) is not None:
            yield with_(**{name: other_name})
    if isinstance(node, ast.Expr | ast.AugAssign | ast.Raise | ast.Break | ast.Continue | ast.Delete) or (
        isinstance(node, ast.Assign) and not isinstance(node.targets[0], ast.Name | ast.Tuple)
    ):
        yield None


def _is_left(parent: ast.AST, name: str, node: Any) -> bool:
    """Whether a node stays unchanged with all below it: annotations, decorators, docstrings, assertions, messages."""
    return (
        name in ("annotation", "returns", "decorator_list", "bases")
        or (isinstance(node, ast.keyword) and node.arg in _WITHOUT_EFFECT)
        or isinstance(node, ast.Assert | ast.JoinedStr)
        or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))
        or (isinstance(parent, ast.Call) and isinstance(parent.func, ast.Attribute) and parent.func.attr == "warn")
    )


@dataclass
class Mutant:
    """One change of a file.

    Attributes:
        file: path relative to the package.
        line: line of the change in the original file.
        function: the outermost function around the change, with its class; a class or "" outside of functions.
        change: the original code and its replacement.
        number: number of this change among equal ones in the function, from 1.
        source: the whole changed file.
    """

    file: str
    line: int
    function: str
    change: str
    number: int
    source: str

    @property
    def name(self) -> str:
        return f"{self.file} {self.function}: {self.change}" + (f" ({self.number})" if self.number > 1 else "")


def mutants_of(file: str) -> Iterator[Mutant]:
    """Every mutant of a file, in the order of its text. Changes that give the same text count once."""
    tree = ast.parse((SOURCE / file).read_text())
    made = {ast.unparse(tree)}
    numbers: Counter[tuple[str, str]] = Counter()

    def walk(node: ast.AST, function: str, is_inside: bool) -> Iterator[Mutant]:
        for name, value in list(ast.iter_fields(node)):
            for place, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
                if not isinstance(child, ast.AST) or _is_left(node, name, child):
                    continue
                for other in variants(child):
                    _put(node, name, place, ast.Pass() if other is None else other)
                    source = ast.unparse(ast.fix_missing_locations(tree))
                    if source not in made:
                        made.add(source)
                        change = f"{_shown(child)} → {'(deleted)' if other is None else _shown(other)}"
                        numbers[function, change] += 1
                        line = getattr(child, "lineno", getattr(node, "lineno", 0))
                        yield Mutant(file, line, function, change, numbers[function, change], source)
                    _put(node, name, place, child)
                if isinstance(child, ast.FunctionDef | ast.ClassDef) and not is_inside:
                    inner = f"{function}.{child.name}" if function else child.name
                    yield from walk(child, inner, isinstance(child, ast.FunctionDef))
                else:
                    yield from walk(child, function, is_inside)

    yield from walk(tree, "", False)


def _put(node: ast.AST, name: str, place: int | None, child: ast.AST) -> None:
    if place is None:
        setattr(node, name, child)
    else:
        getattr(node, name)[place] = child


def _shown(node: ast.AST) -> str:
    """The first line of a node as code."""
    first, *more = ast.unparse(node).splitlines()
    return first + " …" * bool(more)


# ---- installing a mutant ---------------------------------------------------------------------------------------------


def exchange(old: Any, new: Any) -> bool:
    """Give a loaded module or class the code, defaults and constants of a changed one.

    Returns:
        Whether a constant or a default differs.
    """
    home = _home(old)
    differs = False
    for name, changed in list(vars(new).items()):
        present = vars(old).get(name)
        if isinstance(present, type) and present.__module__ == home and present is not old:
            differs |= exchange(present, changed)
        elif isinstance(changed, int | float | tuple | frozenset) and not name.startswith("__") and present != changed:
            setattr(old, name, changed)
            differs = True
        for mine, others in zip(_functions(present), _functions(changed), strict=False):
            if mine.__module__ == home:
                differs |= (mine.__defaults__, mine.__kwdefaults__) != (others.__defaults__, others.__kwdefaults__)
                mine.__code__ = others.__code__
                mine.__defaults__, mine.__kwdefaults__ = others.__defaults__, others.__kwdefaults__
    return differs


def _home(owner: Any) -> str:
    """The name of a module, or of the module in which a class is defined."""
    return str(owner.__name__ if isinstance(owner, ModuleType) else owner.__module__)


def _functions(value: Any) -> Iterator[FunctionType]:
    """The functions behind a value: also those of properties and class methods, and those that decorators wrap."""
    if isinstance(value, classmethod | staticmethod):
        value = value.__func__
    for one in (value.fget, value.fset) if isinstance(value, property) else (value,):
        if isinstance(one, FunctionType):
            yield inspect.unwrap(one)


def install(mutant: Mutant) -> bool:
    """Change the loaded code. Returns whether the change has taken effect there."""
    from tbrm_trl.loss.soft_value import SoftValue

    module = import_module(_module_name(mutant.file))
    changed = ModuleType(module.__name__)
    changed.__package__, changed.__file__ = module.__package__, module.__file__
    registry = dict(SoftValue.registry)  # executing the file registers its classes again
    exec(compile(mutant.source, str(module.__file__), "exec"), vars(changed))
    SoftValue.registry.clear()
    SoftValue.registry.update(registry)
    differs = exchange(module, changed)
    is_function = isinstance(_found(module, mutant.function), FunctionType | property | classmethod | staticmethod)
    return differs or is_function


def _found(owner: Any, path: str) -> Any:
    for name in path.split(".") if path else ():
        owner = vars(owner)[name]
    return owner


def _module_name(file: str) -> str:
    return "tbrm_trl." + file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


# ---- tests -----------------------------------------------------------------------------------------------------------


class Runner:
    """A pytest plug-in. Instead of running the collected tests once, it lets a function run some of them repeatedly.

    Session fixtures are made once and stay.

    Args:
        work: called with the runner in place of pytest's test loop.
    """

    def __init__(self, work: Callable[["Runner"], None]):
        self.work, self.failed = work, False
        self.items: dict[str, pytest.Item] = {}

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        self.items = {item.nodeid: item for item in session.items}
        self.work(self)
        return True

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.failed |= report.failed

    def failing(self, names: Sequence[str]) -> str | None:
        """Run tests until one fails. Returns its name, or None if all pass."""
        self.failed = False
        for name, following in zip(names, [*names[1:], None], strict=True):
            item = self.items[name]
            # If the next test is in another file, pytest keeps session fixtures and tears down all others.
            other = next(one for one in self.items.values() if one.path != item.path)
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=self.items[following] if following else other)
            if self.failed:
                return name
        return None


@dataclass
class Child:
    """A forked process that calls a function and writes its result into a file.

    Args:
        work: the function. Its result must fit into JSON.
        folder: folder of the file.
        seconds: processor time that it may take. By the clock it may take six times as long.
    """

    work: Callable[[], dict[str, Any]]
    folder: Path
    seconds: float

    def __post_init__(self) -> None:
        self.began = time.monotonic()
        self.pid = os.fork()
        if not self.pid:
            os.setsid()
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, 1)
            os.dup2(nowhere, 2)
            resource.setrlimit(resource.RLIMIT_CPU, (int(self.seconds), int(self.seconds) + 1))
            try:
                said = json.dumps(self.work())
                (self.folder / str(os.getpid())).write_text(said)
            finally:
                os._exit(0)

    def has_ended(self) -> bool:
        if time.monotonic() - self.began > 6 * self.seconds:  # one that sleeps takes no processor time
            os.kill(self.pid, signal.SIGKILL)
        return os.waitpid(self.pid, os.WNOHANG) != (0, 0)

    def said(self) -> dict[str, Any] | None:
        """The result of `work`, or None if the process did not get there. Kills what the process has started."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        file = self.folder / str(self.pid)
        if not file.exists():
            return None
        said: dict[str, Any] = json.loads(file.read_text())
        file.unlink()
        return said


def wait_for(children: Sequence[Child]) -> Child:
    """Wait for the first child to end, and return it."""
    while True:
        for child in children:
            if child.has_ended():
                return child
        time.sleep(0.01)


def spent() -> float:
    """Seconds of processor time of this process and of those that it started and waited for."""
    return sum(os.times()[:4])


def refuse_processes() -> None:
    """Make tests that start a process fail from here on: it would read the files, not the code changed in memory."""

    def on_event(event: str, _: Any) -> None:
        if event == "subprocess.Popen":
            raise RuntimeError("no process is started")

    def start(_: Any) -> None:
        raise RuntimeError("no process is started")

    sys.addaudithook(on_event)
    BaseProcess.start = start  # type: ignore[assignment,method-assign]


def measure(runner: Runner, file: Path) -> dict[str, Any]:
    """Record each test's seconds and the functions it enters: none if it fails, as tests that start processes do."""
    refuse_processes()
    codes = {code: f"{changed} {name}" for changed in files_changed() for code, name in _codes(changed)}
    measured = Store(file)
    entered: set[str] = set()

    def on_call(frame: Any, event: str, _: Any) -> None:
        if frame.f_code in codes:
            entered.add(codes[frame.f_code])

    for name, item in runner.items.items():
        digest = xxhash.xxh3_64_hexdigest(Path(item.path).read_bytes())
        if name in measured and measured[name]["digest"] == digest:
            continue
        began = spent()
        failed = runner.failing([name])
        seconds = spent() - began
        if not failed and seconds < 2 * LIMIT:
            entered.clear()
            threading.settrace(on_call)
            sys.settrace(on_call)
            failed = runner.failing([name])
            sys.settrace(None)
            threading.settrace(None)
        enters = [] if failed else sorted(entered)
        entered.clear()
        measured[name] = {"digest": digest, "seconds": round(seconds, 2), "enters": enters}
    return {"tests": len(measured)}


def _codes(file: str) -> Iterator[tuple[CodeType, str]]:
    """The code of every function of a file, also inside functions, with the name of the outermost one."""
    module = import_module(_module_name(file))

    def of(owner: Any, prefix: str) -> Iterator[tuple[CodeType, str]]:
        for name, value in list(vars(owner).items()):
            for one in _functions(value):
                if one.__module__ == module.__name__:
                    yield from ((code, prefix + name) for code in _nested(one.__code__))
            if isinstance(value, type) and value.__module__ == module.__name__:
                yield from of(value, f"{prefix}{name}.")

    yield from of(module, "")


def _nested(code: CodeType) -> Iterator[CodeType]:
    yield code
    for part in code.co_consts:
        if isinstance(part, CodeType):
            yield from _nested(part)


def named_tests(mutant: Mutant, measured: dict[str, Any]) -> list[str]:
    """The tests of a mutant: those that enter its function, or, outside of functions, any of its class or file."""
    place = f"{mutant.file} {mutant.function}"
    named, seconds = [], 0.0
    for name in sorted(measured, key=lambda name: measured[name]["seconds"]):
        if any(one == place or one.startswith(f"{place}." if mutant.function else place)
               for one in measured[name]["enters"]):  # fmt: skip
            seconds += measured[name]["seconds"]
            if seconds > LIMIT:
                break
            named.append(name)
    return named


def outcome(mutant: Mutant, runner: Runner, names: Sequence[str]) -> dict[str, Any]:
    """Install a mutant, run its tests, and return the result."""
    refuse_processes()
    try:
        has_arrived = install(mutant)
    except Exception as error:
        if "free vars" in str(error):  # a function that closes over other variables cannot be exchanged
            return {"result": "not reached"}
        return {"result": "killed", "by": f"import: {type(error).__name__}"}
    if not has_arrived:
        return {"result": "not reached"}
    by = runner.failing(names)
    return {"result": "killed", "by": by} if by else {"result": "survived"}


# ---- the page --------------------------------------------------------------------------------------------------------


def main() -> None:
    arguments = parse(
        __doc__,
        minutes=dict(type=float, default=10**6, help="begin no mutant after so many"),
        only=dict(default="", help="the files whose names hold this"),
        anew=dict(action="store_true", help="try survivors once more"),
        processes=dict(type=int, default=len(os.sched_getaffinity(0)), help="mutants at a time (default: all cores)"),
    )
    until = time.monotonic() + 60 * arguments.minutes
    head = {"machine": processor(), "versions": versions("torch", "transformers", "trl", "pytest")}
    store = Store(arguments.output / "mutants.json", **head)
    files = [file for file in files_changed() if arguments.only in file]
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HYPOTHESIS_STORAGE_DIRECTORY"] = f"{folder}/hypothesis"

        def work(runner: Runner) -> None:
            measured = measured_tests(runner, Path(folder))
            every = [mutant for file in files for mutant in mutants_of(file)]
            again = {name for name, one in store.items() if one["result"] == "survived" and name not in EQUIVALENT}
            known = store.keys() - (again if arguments.anew else set())
            # In the order of their digests, the first ones are a random sample. Old survivors come before them.
            left = sorted(
                (mutant for mutant in every if mutant.name not in known),
                key=lambda one: (one.name not in store, xxhash.xxh3_64_intdigest(one.name.encode())),
            )
            try_all(left, runner, measured, store, until, Path(folder), arguments.processes)

        chosen = ["-m", "not launch and not vllm", "-k", "not two_processes"]  # launched processes read the files
        options = ["-p", "no:cacheprovider", "--capture", "no", *chosen, "--basetemp", f"{folder}/tests", "--rootdir"]
        tests = [str(ROOT / f"tests/test_{name}.py") for name in TESTS]
        pytest.main([*options, str(ROOT), *tests], plugins=[Runner(work)])
    write(arguments.output, "mutants", page(store))


def measured_tests(runner: Runner, folder: Path) -> dict[str, Any]:
    """Seconds and entered functions of each test. Known ones of unchanged test files are read from a file."""
    file = Path(tempfile.gettempdir()) / "tbrm-mutants-tests.json"
    for fixture in ("llama", "qwen2"):
        runner.failing([next(name for name, one in runner.items.items() if fixture in one.fixturenames)])  # type: ignore[attr-defined]
    gc.freeze()  # later collections, as at the beginning of a training, skip what is permanent
    child = wait_for([Child(partial(measure, runner, file), folder, 3600)])
    assert child.said() is not None, "the tests could not be measured"
    print("measured", file=sys.stderr, flush=True)
    return {name: test for name, test in Store(file).items() if name in runner.items}


def try_all(
    mutants: Sequence[Mutant],
    runner: Runner,
    measured: dict[str, Any],
    store: Store,
    until: float,
    folder: Path,
    processes: int,
) -> None:
    """Try mutants, `processes` at a time, and store the result of each."""
    kills: Counter[str] = Counter(one["by"] for one in store.values() if "by" in one)
    running: dict[int, tuple[Child, Mutant, int]] = {}
    waiting = list(reversed(mutants))
    while running or (waiting and time.monotonic() < until):
        while waiting and len(running) < processes and time.monotonic() < until:
            mutant = waiting.pop()
            # Tests that have killed many mutants run first. Only the order changes, not which tests run.
            names = sorted(
                named_tests(mutant, measured), key=lambda name: -kills[name] / (0.1 + measured[name]["seconds"])
            )
            child = Child(partial(outcome, mutant, runner, names), folder, HANGS)
            running[child.pid] = child, mutant, len(names)
        child, mutant, tests = running.pop(wait_for([child for child, _, _ in running.values()]).pid)
        said = child.said() or {"result": "killed", "by": "does not end"}
        kills[said.get("by", "")] += 1
        seconds = round(time.monotonic() - child.began, 2)
        late = {"late": True} if mutant.name in store else {}  # it had survived earlier
        store[mutant.name] = {"line": mutant.line, **said, "tests": tests, "seconds": seconds, **late}
        print(f"{said['result']:10} {seconds:6.2f} {mutant.line:4} {mutant.name}", file=sys.stderr, flush=True)


def page(store: Store) -> str:
    head, every = store.head, {mutant.name: mutant for file in files_changed() for mutant in mutants_of(file)}
    results = {name: store[name]["result"] for name in every if name in store}
    total: Counter[str] = Counter()
    rows = []
    for part in CHANGED:
        of_part = [name for name in every if name.startswith(part)]
        tried = Counter(results[name] for name in of_part if name in results)
        tried["equivalent"] = sum(results.get(name) == "survived" and name in EQUIVALENT for name in of_part)
        tried["made"] = len(of_part)
        total += tried
        rows.append(_row(f"`{part}`", tried))
    rows.append(_row("all", total))
    survivors = [name for name, result in results.items() if result == "survived"]
    alike = [f"`{_code(name)}`: {EQUIVALENT[name]}" for name in survivors if name in EQUIVALENT]
    others = [f"line {store[name]['line']}, `{_code(name)}`" for name in survivors if name not in EQUIVALENT]
    about = wrapped(
        f"Written by `python benchmarks/mutants.py`. {head['machine']}; {listed(head['versions'])}. Every mutant: "
        "[mutants.json](mutants.json)."
    )
    how = wrapped(
        "A mutant is the code with one change: another operator, a number more or one less, a condition negated, a "
        "statement left out, `None` returned, arguments exchanged, a keyword left out. Texts, annotations, decorators "
        "and assertions stay. It is killed if one of its named tests fails: those that enter the changed function, the "
        f"fastest first, as far as they take {LIMIT:.0f} seconds of processor time together. The mutants are tried in "
        "an order that is as good as random, so that those tried first are a sample. Where not all were, a share has "
        "its 95% interval."
    )
    late = sum(store[name].get("late", False) for name, result in results.items() if result == "killed")
    what = wrapped(
        f"Of the mutants killed, {late} had survived until a test was written for what they change. Not reached are "
        "changes of what is made at import and is more than a number, and of functions that close over other variables "
        "then. Equivalent are survivors that compute the same as the original."
    )
    parts = [f"# Mutants killed\n\n{about}\n\n{how}", table(_HEADER, rows), what]
    if others:
        parts.append(f"## Survivors\n\n{bullets(others)}")
    if alike:
        parts.append(f"## Survivors that no test can tell from the original\n\n{bullets(alike)}")
    return "\n\n".join(parts) + "\n"


_HEADER = (
    "changed",
    "mutants",
    "tried",
    "killed",
    "not reached",
    "survived",
    "of these equivalent",
    "killed of the others",
)


def _row(name: str, counts: Counter[str]) -> list[str]:
    tried = counts["killed"] + counts["survived"] + counts["not reached"]
    others = counts["killed"] + counts["survived"] - counts["equivalent"]
    share = f"{counts['killed'] / others:.1%}" if others else "–"
    if others and tried < counts["made"]:
        low, high = wilson(counts["killed"], others)
        share += f" ({low:.0%} to {high:.0%})"
    numbers = (counts["made"], tried, counts["killed"], counts["not reached"], counts["survived"], counts["equivalent"])
    return [name, *map(str, numbers), share]


def wilson(killed: int, tried: int) -> tuple[float, float]:
    """Wilson's 95% interval of a share, from a sample."""
    z, share = 1.96, killed / tried
    middle, width = share + z**2 / (2 * tried), z * math.sqrt(share * (1 - share) / tried + z**2 / (4 * tried**2))
    return (middle - width) / (1 + z**2 / tried), (middle + width) / (1 + z**2 / tried)


def _code(name: str) -> str:
    return name.replace("`", "'").replace("|", "\\|")


if __name__ == "__main__":
    main()
