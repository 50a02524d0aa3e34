"""A user's first half hour: run docs/first-run.md word for word in a clone, and show each command with its output.

    python benchmarks/first_half_hour.py    # half an hour on two cores; writes docs/benchmarks/first_half_hour.md

At the end the trained model is evaluated again from its folder: every completion is the same.
"""

import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common.report import ROOT, parse, printed, processor, wrapped, write

PAGE = ROOT / "docs/first-run.md"
ELSEWHERE = "pip install"  # marks blocks for the user's own environment, which are left out
AGAIN = [
    'tbrm eval --model_name_or_path out $eval --system_prompt "Reply with a number." --output_dir again',
    "tbrm eval --compare after again",
]
TRAINED = "make demo"
LAST = 16  # lines of an output that are shown
ENDED = "-- ended --"


class Shell:
    """A user's shell: folder, variables and environment last from command to command."""

    def __init__(self, folder: Path):
        self.process = subprocess.Popen(
            ["bash"], cwd=folder, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )

    def run(self, command: str) -> tuple[str, float]:
        """Run a command, and return its output and its seconds. Exits with the output if the command fails."""
        assert self.process.stdin is not None and self.process.stdout is not None
        print(f"$ {command}", file=sys.stderr, flush=True)
        began, lines = time.perf_counter(), list[str]()
        self.process.stdin.write(f"{command}\necho; echo {ENDED} $?\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith(ENDED):
                if line.split()[-1] != "0":
                    sys.exit("".join(lines))
                return "".join(lines), time.perf_counter() - began
            lines.append(line)
        sys.exit("The shell has ended.")


def steps() -> list[tuple[str, str]]:
    """The page's blocks in order: a file's name and its text, or "" and a command of a shell block."""
    found, named = list[tuple[str, str]](), ""
    for text, language, block in re.findall(r"(.*?)^```(\w*)\n(.*?)^```$", PAGE.read_text(), flags=re.M | re.S):
        named = next(iter(re.findall(r"`([\w.]+\.(?:py|yaml))`", text)), named)
        if language in ("python", "yaml"):
            found.append((named, block))
        elif language == "bash" and ELSEWHERE not in block:
            found += [("", command) for command in block.replace("\\\n   ", "").splitlines()]
    return found


def main() -> None:
    arguments = parse(__doc__)
    parts, total, trained = list[str](), 0.0, 0.0
    with tempfile.TemporaryDirectory() as folder:
        shell, place = Shell(Path(folder)), Path(folder) / "tbrm-trl"
        for name, text in [*steps(), *(("", command) for command in AGAIN)]:
            if name:
                (place / name).write_text(text)
                continue
            output, seconds = shell.run(text.replace("URL", str(ROOT)))
            total += seconds
            trained = total if text.endswith(TRAINED) else trained
            lines = printed(output.replace(folder, "").replace(str(ROOT), "URL"))
            lines = [f"[{len(lines) - LAST} lines]", *lines[-LAST:]] if len(lines) > LAST else lines
            parts.append("\n".join([f"$ {text}", *(line[:160] for line in lines), f"[{seconds:.0f} s]"]))
    text = wrapped(
        f"[The first half hour](../first-run.md) in an empty folder, on {processor()}, whose cores other work shared: "
        f"{total / 60:.0f} minutes for all of it, {trained / 60:.0f} until the first trained model, with the "
        "installation. Bars, warnings and the metrics of single steps are left out."
    )
    transcript = "\n\n".join(parts)
    page = f"""# The first half hour, as it ran

Written by `python benchmarks/first_half_hour.py`.

{text}

```
{transcript}
```
"""
    write(arguments.output, "first_half_hour", page)


if __name__ == "__main__":
    main()
