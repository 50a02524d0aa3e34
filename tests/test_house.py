"""The architecture, read from the import statements of `src/`: which modules may import which."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest
from common.launch import ROOT

from tbrm_trl.loss.soft_value.run import Run

SOURCE = ROOT / "src/tbrm_trl"
ROOMS = ("sources", "model", "loss")
ABOVE_THE_ROOMS = ("trainer", "config", "checks", "resume", "memory", "evaluation", "report", "cli")
Graph = dict[str, set[str]]


# ---- reading ---------------------------------------------------------------------------------------------------------


def modules(root: Path) -> dict[str, Path]:
    """The modules of a package by their names within it; a package is its `__init__`, the whole one ''."""
    names = {file: file.relative_to(root).with_suffix("").parts for file in root.rglob("*.py")}
    return {".".join(parts[:-1] if parts[-1] == "__init__" else parts): file for file, parts in names.items()}


def imported(statement: ast.Import | ast.ImportFrom, name: str, file: Path, package: str) -> Iterator[str]:
    """Dotted names within the package that a statement in one of its modules imports; '' is the package itself."""
    if isinstance(statement, ast.Import):
        absolute = [alias.name for alias in statement.names]
    elif statement.level:
        here = [package, *filter(None, name.split("."))]
        base = here[: len(here) - statement.level + (file.name == "__init__.py")]
        parent = ".".join([*base, *filter(None, [statement.module])])
        absolute = [f"{parent}.{alias.name}" for alias in statement.names]
    else:
        absolute = [f"{statement.module}.{alias.name}" for alias in statement.names]
    return (one.removeprefix(package).removeprefix(".") for one in absolute if f"{one}.".startswith(f"{package}."))


def imports_of(root: Path) -> Graph:
    """The modules that each module imports anywhere in it, also only for type checkers.

    A name that is imported from a package is a module in it, or it comes from the package's `__init__`.
    """
    found, graph = modules(root), {}
    for name, file in found.items():
        statements = [n for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, (ast.Import, ast.ImportFrom))]
        asked = {one for statement in statements for one in imported(statement, name, file, root.name)}
        graph[name] = {one if one in found else one.rpartition(".")[0] for one in asked} - {name}
    return graph


def cycles(graph: Graph) -> list[list[str]]:
    """For every module in a cycle, a shortest way from it back to itself."""

    def way_back(start: str) -> list[str] | None:
        ways, seen = [[start]], set()
        for way in ways:  # the list grows
            for following in sorted(graph[way[-1]]):
                if following == start:
                    return [*way, start]
                if following not in seen:
                    seen.add(following)
                    ways.append([*way, following])
        return None

    return [way for way in map(way_back, sorted(graph)) if way]


def is_in(name: str, package: str) -> bool:
    return f"{name}.".startswith(f"{package}.")


def importers(graph: Graph, package: str) -> set[str]:
    """Modules outside of a package that import from it."""
    return {name for name, asked in graph.items() if not is_in(name, package) and any(is_in(o, package) for o in asked)}


def intrusions(graph: Graph) -> set[tuple[str, str]]:
    """Imports that a room makes from another room, or from a module above the rooms."""
    return {
        (name, other)
        for room in ROOMS
        for name, asked in graph.items()
        for other in asked
        if is_in(name, room) and any(is_in(other, one) for one in {*ROOMS, *ABOVE_THE_ROOMS} - {room})
    }


def private_reads(file: Path) -> list[str]:
    """Private attributes that are read from names such as trainer or run, or from arguments annotated as one."""
    tree = ast.parse(file.read_text())
    objects = {"trainer", "run"} | {
        argument.arg
        for argument in ast.walk(tree)
        if isinstance(argument, ast.arg) and argument.annotation is not None
        if {"Trainer", "TBRMTrainer", "GRPOTrainer", "Run"}
        & set(ast.unparse(argument.annotation).strip("'").split(" | "))
    }
    return [
        ast.unparse(node)
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__")
        if (getattr(node.value, "id", None) or getattr(node.value, "attr", None)) in objects
    ]


# ---- the house -------------------------------------------------------------------------------------------------------

GRAPH = imports_of(SOURCE)


def test_no_import_cycle():
    assert cycles(GRAPH) == []


def test_the_rooms_do_not_know_each_other():
    """Data flows sources → model → loss; only the trainer knows all three."""
    assert all(any(is_in(name, room) for name in GRAPH) for room in ROOMS)
    assert intrusions(GRAPH) == set()


def test_only_the_options_and_the_trainer_check():
    assert importers(GRAPH, "checks") == {"config", "trainer"}


def test_nothing_knows_the_trainer():
    assert importers(GRAPH, "trainer") == {""}


def test_no_one_reads_a_trainers_private_parts():
    found = {name: private_reads(file) for name, file in modules(SOURCE).items() if name != "trainer"}
    assert {name: reads for name, reads in found.items() if reads} == {}


def names_of(protocol: type) -> set[str]:
    return {n for n in {*inspect.get_annotations(protocol), *vars(protocol)} if not n.startswith("_")}


def test_an_estimator_asks_a_run_for_few_things():
    assert len(names_of(Run)) <= 12


# ---- each of these can fail ------------------------------------------------------------------------------------------


def package(folder: Path, **files: str) -> Path:
    """A package `house` whose modules have these contents; `__` stands for a dot."""
    for name, text in files.items():
        file = folder / "house" / f"{name.replace('__', '/')}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        for parent in [file.parent, *file.parent.parents][: name.count("__") + 1]:
            (parent / "__init__.py").touch()
    return folder / "house"


@pytest.mark.parametrize(
    "statement",
    [
        "from .b import thing",
        "from . import b",
        "from house.b import thing",
        "import house.b",
        "def later():\n    from .b import thing",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .b import thing",
    ],
)
def test_a_cycle_is_seen(statement, tmp_path):
    assert cycles(imports_of(package(tmp_path, a=statement, b="from .a import x"))) == [
        ["a", "b", "a"],
        ["b", "a", "b"],
    ]
    assert cycles(imports_of(package(tmp_path, a=statement, b="import a, housekeeping.a"))) == []


def test_a_cycle_through_a_packages_names_is_seen(tmp_path):
    """`room.__init__` passes on a name of room.a, and room.a imports from b."""
    root = package(tmp_path, room__a="from ..b import x", b="from .room import thing")
    assert cycles(imports_of(root)) == []
    (root / "room/__init__.py").write_text("from .a import thing")
    assert cycles(imports_of(root)) == [["b", "room", "room.a", "b"], ["room", "room.a", "b", "room"],
                                        ["room.a", "b", "room", "room.a"]]  # fmt: skip


@pytest.mark.parametrize(
    ("module", "statement", "other"),
    [
        ("sources__pool", "from ..model.head import f", "model.head"),
        ("loss__soft_value__mine", "from ...sources import store", "sources.store"),
        ("model__head", "def f():\n    from ..loss import terms", "loss.terms"),
        ("loss__terms", "from ..config import TBRMConfig", "config"),
        ("model__head", "from ..checks.options import check", "checks.options"),
    ],
)
def test_an_intrusion_is_seen(module, statement, other, tmp_path):
    files = dict.fromkeys(("sources__store", "model__head", "loss__terms", "config", "checks__options", "batch"), "")
    assert intrusions(imports_of(package(tmp_path, **files | {"sources__store": "from ..batch import x"}))) == set()
    graph = imports_of(package(tmp_path, **files | {module: statement}))
    assert intrusions(graph) == {(module.replace("__", "."), other)}


def test_an_importer_is_seen(tmp_path):
    root = package(
        tmp_path, checks__data="from .model import x", checks__model="", trainer="from .checks.data import check",
        report="from . import trainer", sources__pool="from ..checks import data",
    )  # fmt: skip
    assert importers(imports_of(root), "checks") == {"trainer", "sources.pool"}
    assert importers(imports_of(root), "trainer") == {"report"}


@pytest.mark.parametrize(
    "text", ["trainer._window", "self.trainer._window", "run._plan.mix", "def f(x: TBRMTrainer): return x._window"]
)
def test_a_private_read_is_seen(text, tmp_path):
    (tmp_path / "a.py").write_text(f"{text}\ntrainer.window, self._run, trainer.__class__, run.counts, other._window")
    assert len(private_reads(tmp_path / "a.py")) == 1


def test_a_wide_protocol_is_seen():
    wide = type("Wide", (), {f"name_{i}": property(lambda self: 0) for i in range(12)})
    assert len(names_of(wide)) == 12
    wide.__annotations__ = {"one_more": int, "_own": int}
    assert len(names_of(wide)) == 13


def test_no_test_module_imports_another():
    """Shared code is in `helpers`, which imports no test module either."""
    tests = Path(__file__).parent
    modules_of_tests = {file.stem for file in tests.glob("*.py")}
    for file in tests.rglob("*.py"):
        names = [n for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, (ast.Import, ast.ImportFrom))]
        asked = {alias.name for n in names if isinstance(n, ast.Import) for alias in n.names}
        asked |= {n.module for n in names if isinstance(n, ast.ImportFrom) and n.module}
        assert not asked & modules_of_tests, file
