"""Rewrite the parts of the documents that come from the code: tables of options, and line numbers of links to code.

    python docs/generate.py            # rewrite
    python docs/generate.py --check    # rewrite nothing; fail if something is out of date

The tables are between `<!-- name: begin -->` and `<!-- name: end -->`. A link to code has an identifier as its text:
[`TBRMTrainer._collect`](../src/tbrm_trl/trainer.py#L1-L2); its lines are those of the identifier's definition.
"""

import ast
import inspect
import re
import sys
from collections import defaultdict
from dataclasses import MISSING, fields
from functools import cache
from pathlib import Path

from tbrm_trl.checks.trl_options import GIVEN_A_MEANING, KEPT, REFUSED
from tbrm_trl.cli.evaluate import EvaluationArguments
from tbrm_trl.cli.train import DataArguments
from tbrm_trl.options import TBRMOptions, option_texts

DOCS = Path(__file__).parent
CODE_LINK = re.compile(r"\[`([\w.]+)`\]\((\S+\.py)#L(\d+)-L(\d+)\)")


def option_defaults(options: type) -> dict[str, str]:
    """The default of each option from the docstring of its class; "None" if the docstring gives none."""
    entry = re.compile(r"^    (\w+) \(.+?(?:, defaults to `(.+?)`)?\):$", flags=re.M)
    return {name: default or "None" for name, default in entry.findall(inspect.cleandoc(options.__doc__ or ""))}


def own_options() -> str:
    """One table for each part of the docstring."""
    texts, defaults = option_texts(TBRMOptions), option_defaults(TBRMOptions)
    lines: list[str] = []
    for line in inspect.cleandoc(TBRMOptions.__doc__ or "").splitlines():
        if part := re.match(r"    > (.+)", line):
            lines += ["", f"### {part[1]}", "", "| option | default | what it does |", "|---|---|---|"]
        elif option := re.match(r"    (\w+) \(", line):
            text = texts[option[1]].replace("|", r"\|").replace("[`SoftValue`]", "[`SoftValue`](extending.md)")
            text = re.sub(r"`docs/(\w+\.md)`", r"[\1](\1)", text)
            lines.append(f"| `{option[1]}` | `{defaults[option[1]]}` | {text} |")
    return "\n".join(lines[1:])


def given_a_meaning() -> str:
    return "\n".join(["| option | meaning |", "|---|---|", *(f"| `{n}` | {m} |" for n, m in GIVEN_A_MEANING.items())])


def refused() -> str:
    """Options that are refused for one reason share a row."""
    names = defaultdict(list)
    for name, reason in REFUSED.items():
        names[reason].append(f"`{name}`")
    return "\n".join(["| option | why |", "|---|---|", *(f"| {', '.join(n)} | {why} |" for why, n in names.items())])


def kept() -> str:
    return ", ".join(f"`{name}`" for name in sorted(KEPT)) + "."


def options_of(arguments: type) -> str:
    """A table of a command's options, from the fields of its arguments."""
    rows = ["| option | default | what it says |", "|---|---|---|"]
    for field in fields(arguments):
        default = field.default_factory() if field.default_factory is not MISSING else field.default
        shown = "needed" if default is MISSING else "" if default in (None, []) else f"`{_plain(default)}`"
        choices = " or ".join(f"`{one}`" for one in field.metadata.get("choices", ()))
        says = f"{field.metadata['help']} {choices and f'It is {choices}.'}".strip()
        rows.append(f"| `--{field.name}` | {shown} | {says} |")
    return "\n".join(rows)


def _plain(default: object) -> str:
    if isinstance(default, list):
        return " ".join(default)
    return str(default).lower() if isinstance(default, bool) else str(default)


def train_options() -> str:
    return options_of(DataArguments)


def eval_options() -> str:
    return options_of(EvaluationArguments)


@cache
def tree_of(file: Path) -> ast.Module:
    return ast.parse(file.read_text())


def definition(file: Path, name: str) -> tuple[int, int]:
    """First and last line of a class, function, method or constant. Dots join nested names."""
    node: ast.AST = tree_of(file.resolve())
    for part in name.split("."):
        for child in list(ast.walk(node))[1:]:
            targets = child.targets if isinstance(child, ast.Assign) else []
            defined = [child.name] if isinstance(child, ast.ClassDef | ast.FunctionDef) else []
            if part in [*defined, *(target.id for target in targets if isinstance(target, ast.Name))]:
                node = child
                break
        else:
            raise ValueError(f"{file.name} does not define {name}.")
    return node.lineno, node.end_lineno  # type: ignore[attr-defined, return-value]


def relinked(link: re.Match) -> str:
    first, last = definition(DOCS / link[2], link[1])
    return f"[`{link[1]}`]({link[2]}#L{first}-L{last})"


TABLES = {
    "configuration.md": (own_options, given_a_meaning, refused, kept),
    "command-line.md": (train_options, eval_options),
}


def generated() -> dict[Path, str]:
    """Every page as it should be."""
    pages = {page: CODE_LINK.sub(relinked, page.read_text()) for page in sorted(DOCS.glob("*.md"))}
    for name, tables in TABLES.items():
        for table in tables:
            begin, end = (f"<!-- {table.__name__}: {edge} -->" for edge in ("begin", "end"))
            before, rest = pages[DOCS / name].split(begin)
            pages[DOCS / name] = f"{before}{begin}\n\n{table()}\n\n{end}{rest.split(end)[1]}"
    return pages


def outdated() -> list[Path]:
    """The pages that are not as they should be."""
    return [page for page, text in generated().items() if text != page.read_text()]


def main() -> None:
    pages = outdated()
    if "--check" in sys.argv[1:]:
        sys.exit(f"Run python docs/generate.py: {', '.join(p.name for p in pages)} are out of date." if pages else 0)
    for page, text in generated().items():
        if page in pages:
            page.write_text(text)
            print(f"{page.name} is rewritten.")


if __name__ == "__main__":
    main()
