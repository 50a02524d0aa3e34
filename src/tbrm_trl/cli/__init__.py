"""The command line: `tbrm COMMAND ...`. Nothing heavy is imported before a command is chosen."""

import os
import sys
from importlib import import_module

# Each command's module, in which `main(arguments)` runs it, and what the command does.
COMMANDS = {
    "train": ("tbrm_trl.cli.train", "train a model by a recipe"),
    "eval": ("tbrm_trl.cli.evaluate", "evaluate a model on benchmarks, or compare two results"),
    "estimate": ("tbrm_trl.cli.estimate", "say how much memory a run will take"),
    "report": ("tbrm_trl.report.page", "write a run as one page"),
    "demo": ("tbrm_trl.cli.demo", "teach a small model arithmetic, and measure it before and after"),
}


def usage() -> str:
    lines = [f"  {name:10} {what}" for name, (_, what) in COMMANDS.items()]
    return "\n".join(["usage: tbrm COMMAND ...", "", *lines, "", "tbrm COMMAND --help says what a command takes."])


def main(arguments: list[str] | None = None) -> None:
    """Run the command that the first argument names."""
    name, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if name in ("-h", "--help"):
        print(usage())
        return
    if name == "--version":
        from importlib.metadata import version

        print(version("tbrm-trl"))
        return
    if name not in COMMANDS:
        import difflib

        meant = difflib.get_close_matches(name, COMMANDS, 1)
        sys.exit(f"tbrm: there is no command {name!r}.{f' Did you mean {meant[0]}?' if meant else ''}\n\n{usage()}")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # like TRL's command line, to import `my_rewards.mine` beside the recipe
    if name == "demo":
        from .quiet import see_one_gpu

        see_one_gpu()
    import_module(COMMANDS[name][0]).main(rest)
