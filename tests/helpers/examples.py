"""Run the files of `examples/` by their launch lines, with only model, data, sizes and machine changed."""

import json
import math
import shlex
from pathlib import Path

import yaml
from common.launch import ROOT, free_port, run
from common.tiny import save

RECIPES, SETUPS = ROOT / "examples/recipes", ROOT / "examples/setups"
# By file: strategy, ZeRO stage, and the shares of weights and of optimizer that one of two processes holds.
HOW: dict[str, tuple[str, int | None, float, float]] = {
    "single": ("NO", None, 1, 1),
    "ddp": ("MULTI_CPU", None, 1, 1),
    "fsdp2": ("FSDP", None, 0.5, 0.5),
    "zero1": ("DEEPSPEED", 1, 1, 0.5),
    "zero2": ("DEEPSPEED", 2, 1, 0.5),
    "zero3": ("DEEPSPEED", 3, 0.5, 0.5),
    "zero3_offload": ("DEEPSPEED", 3, 0.5, 0.5),
    "multi_node": ("DEEPSPEED", 3, 0.5, 0.5),
}


def command_of(recipe: Path) -> list[str]:
    """The command in the comment at the top of the file. A backslash continues it."""
    lines, command = iter(recipe.read_text().splitlines()), "\\"
    while command.endswith("\\"):
        command = command.removesuffix("\\") + next(lines).removeprefix("#")
    return shlex.split(command)


def after(command: list[str], option: str) -> str | None:
    return command[command.index(option) + 1] if option in command else None


def processes_of(command: list[str]) -> int:
    """How many processes the line starts: by its flag, else by its launcher's file."""
    if given := after(command, "--num_processes"):
        return int(given)
    return yaml.safe_load((ROOT / after(command, "--config_file")).read_text()).get("num_processes", 1)


def sums(path: Path) -> Path:
    path.write_text(json.dumps([{"problem": f"{a}+{b}=", "answer": str(a + b)} for a in range(4) for b in range(4)]))
    return path


def small(tmp_path: Path) -> list[str]:
    """Options that override: a model of sizes for 4-bit kernels, sums as data, few short rows, no half precision."""
    model = save(tmp_path / "model", hidden_size=64, intermediate_size=128, head_dim=16)
    options = dict(
        model_name_or_path=model, dataset_name=sums(tmp_path / "sums.json"), output_dir=tmp_path / "out",
        per_device_train_batch_size=2, gradient_accumulation_steps=2, max_completion_length=4, max_steps=2,
        learning_rate=0.01, logging_steps=1, use_cpu=True, bf16=False, disable_tqdm=True,
    )  # fmt: skip
    return [text for name, value in options.items() for text in (f"--{name}", str(value))]


def run_line(file: Path, tmp_path: Path, *options: str, plugin: str | None = None, **environment: str) -> str:
    """Run the command at the top of a file with small sizes, on at most two CPU processes. Returns its output.

    Args:
        plugin: a script that runs the command's program.
    """
    line = command_of(file)
    at, program = line.index("accelerate"), next(i for i, word in enumerate(line) if word.endswith(".py"))
    environment |= dict(word.split("=") for word in line[:at])
    given = small(tmp_path)
    on_cpu = ["--mixed_precision", "no", "--main_process_port", str(free_port())]
    if processes_of(line) > 1:
        on_cpu += ["--num_processes", "2"]
        if not {"--config_file", "--use_deepspeed"} & set(line):
            on_cpu += ["--multi_gpu"]  # as accelerate concludes from several GPUs
    else:
        on_cpu += ["--cpu"]  # which starts one process, and means no DeepSpeed
    if "--gradient_accumulation_steps" in line[:program]:
        on_cpu += ["--gradient_accumulation_steps", after(given, "--gradient_accumulation_steps")]
    return run([*line[at:program], *on_cpu, *filter(None, [plugin]), *line[program:], *given, *options], **environment)


def logged_updates(tmp_path: Path) -> list[dict]:
    """The log of the two updates of a run of `run_line`."""
    (state,) = tmp_path.glob("out/checkpoint-*/trainer_state.json")
    log = [row for row in json.loads(state.read_text())["log_history"] if "residual/rms" in row]
    assert len(log) == 2
    assert all(0 < row["residual/rms"] < math.inf and 0 < row["grad_norm"] < math.inf for row in log)
    return log
