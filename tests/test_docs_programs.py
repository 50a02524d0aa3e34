"""Every program and command of the documents is run, or read by the parser of its program."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest
import yaml
from common.launch import ROOT
from common.tiny import save
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from tbrm_trl import TBRMConfig, TBRMTrainer
from tbrm_trl.actor.__main__ import command_line as actor_command_line
from tbrm_trl.cli import COMMANDS, main

PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
MODEL = "Qwen/Qwen2.5-0.5B"
PROMPTS = Dataset.from_list([{"prompt": f"{number} +"} for number in range(8)])


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", (ROOT / page).read_text(), flags=re.M | re.S)


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def test_every_block_says_its_language():
    """Python, a shell, YAML, or none: what a command prints."""
    languages = {
        (name_of(page), opened)
        for page in PAGES
        for opened in re.findall(r"^ *```(.*)$\n(?:.*\n)*?^ *```$", page.read_text(), flags=re.M)
    }
    assert {language for _, language in languages} <= {"python", "bash", "yaml", ""}, languages


# ---- Python ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path) -> str:
    return save(tmp_path / "model", max_position_embeddings=1024)


def run(program: str, model: str, scope: dict | None = None) -> dict:
    """Run a program with only model, number of steps and machine changed. Returns what it defines."""
    assert MODEL in program or "TBRMTrainer" not in program
    program = re.sub(r"max_steps=\d+,? ?", "", program.replace(f"{MODEL}-Instruct", model).replace(MODEL, model))
    program = program.replace("TBRMConfig(", 'TBRMConfig(max_steps=2, use_cpu=True, report_to="none", ')
    scope = {} if scope is None else scope
    exec(compile(program, "a document", "exec"), scope)
    return scope


def readme(model: str) -> None:
    """It ends with a checkpoint of its last update."""
    (program,) = blocks("README.md", "python")
    run(program, model)
    assert Path("out/checkpoint-2/model.safetensors").is_file()


def data(model: str) -> None:
    """The rollouts in `out` come from an earlier run. The traces and dumps have the form of their libraries."""
    options = dict(max_steps=2, use_cpu=True, report_to="none", max_completion_length=8, save_rollouts=True)
    TBRMTrainer(model, [letters], TBRMConfig("out", **options), PROMPTS).train()
    shutil.copytree(ROOT / "tests/data/verifiers", "outputs/my-env--my-model")
    Path("rollout_data_dir").mkdir()
    shutil.copytree(model, "from-log")
    Path("prompts.jsonl").write_text("".join(json.dumps({"prompt": f"{i} +", "answer": "5"}) + "\n" for i in range(8)))
    entry = {"input": "system\nBe brief.\nuser\nHow many?\nassistant\n", "output": "5", "score": 1.0}
    Path("rollout_data_dir/1.jsonl").write_text(json.dumps(entry) + "\n")
    scope: dict = {}
    for program in blocks("docs/data.md", "python"):
        run(program, model, scope)
        if "trainer" in scope:
            trainer = scope.pop("trainer")
            if not trainer.state.global_step:
                trainer.train()
            assert trainer.state.global_step == 2
    assert scope["dumps"]["prompt"] == [[{"role": "user", "content": "How many?"}]]
    assert len(scope["traces"])


def rewards(model: str) -> None:
    Path("my_module.py").write_text(
        "def my_reward(completions, **columns):\n    return [float(len(one)) for one in completions]\n"
    )
    sys.path.insert(0, os.getcwd())
    try:
        load, problems = (run(program, model) for program in blocks("docs/rewards.md", "python"))
    finally:
        sys.path.remove(os.getcwd())
    assert load["trainer"].reward_weights.tolist() == pytest.approx([1.0, 0.1, 0.5])
    assert (len(problems["train"]), len(problems["test"])) == (1000, 200)


def launching(model: str) -> None:
    """An adapter in `out` whose B is not 0 changes the merged weights."""
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(model), LoraConfig(init_lora_weights=False))
    adapted.save_pretrained("out")
    AutoTokenizer.from_pretrained(model).save_pretrained("out")
    (program,) = blocks("docs/launching.md", "python")
    run(program, model)
    before, after = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (model, "merged"))
    assert any(not before[name].equal(after[name]) for name in before)
    assert AutoTokenizer.from_pretrained("merged").get_vocab() == AutoTokenizer.from_pretrained(model).get_vocab()


def memory(model: str) -> None:
    (program,) = blocks("docs/memory.md", "python")
    estimate = run(program, model)["estimate"]
    assert estimate.total > 0 and list(estimate.phases) == ["generation", "update", "optimizer step"]


def publishing(model: str) -> None:
    """Pushed to no server here: `tests/test_publishing.py` has one."""
    options = dict(max_steps=1, use_cpu=True, report_to="none", max_completion_length=8, save_rollouts=True)
    TBRMTrainer(model, [letters], TBRMConfig("out", **options), PROMPTS).train()
    pushed = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Dataset, "push_to_hub", lambda rollouts, name, private: pushed.append((len(rollouts), name)))
        (program,) = blocks("docs/publishing.md", "python")
        run(program, model)
    assert pushed == [(8, "me/rollouts")]


def asynchronous(model: str) -> None:
    """The writer's program runs first. The learner follows what its function writes."""
    learner, writer, bounds = blocks("docs/asynchronous.md", "python")
    written = run(writer, model)
    row = {"prompt_ids": [5, 6], "completion_ids": [7, 8, 1], "reward": 1.0, "policy_step": 0}
    written["write_record"](Path("records"), "mine", [row] * 15)
    assert "/shared/records" in learner
    run(learner.replace("/shared/records", "records"), model)
    assert Path("out/checkpoint-2/model.safetensors").is_file()
    assert run(bounds, model)["bounds"].last_row(step=10) == 959


def theory(model: str) -> None:
    """β falls from 0.012 towards 0.004: in the second of two updates it is at their geometric mean."""
    (program,) = blocks("docs/theory.md", "python")
    args = TBRMConfig("out", max_steps=2, use_cpu=True, report_to="none", max_completion_length=8)
    TBRMTrainer(model, [letters], args, PROMPTS, callbacks=[run(program, model)["FallingBeta"]()]).train()
    assert args.beta == pytest.approx((0.012 * 0.004) ** 0.5)


def letters(completions, **columns):
    return [float(sum(map(str.isalpha, completion))) for completion in completions]


# Each page that has programs, and what runs all of them.
RUN: dict[str, Callable[[str], None]] = {
    "README.md": readme,
    "docs/data.md": data,
    "docs/rewards.md": rewards,
    "docs/launching.md": launching,
    "docs/memory.md": memory,
    "docs/publishing.md": publishing,
    "docs/asynchronous.md": asynchronous,
    "docs/theory.md": theory,
}
# Pages with programs that other tests run.
RUN_ELSEWHERE = {
    "docs/extending.md": "tests/test_docs.py",
    "docs/first-run.md": "test_the_first_half_hour",
    "docs/evaluation.md": "test_the_first_half_hour",
}


def test_every_page_with_a_program_is_run():
    assert {name_of(page) for page in PAGES if blocks(name_of(page), "python")} == {*RUN, *RUN_ELSEWHERE}


@pytest.mark.parametrize("page", RUN)
def test_programs_run(page, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    RUN[page](model)


# ---- shells ----------------------------------------------------------------------------------------------------------

STUB = """#!/bin/bash
printf '%s\\0' "${0##*/}" "$@" $'\\n' >> "$COMMANDS"
[ "${0##*/} $1" != "git clone" ] || /bin/mkdir "${@: -1}"
"""
PROGRAMS = "tbrm accelerate vllm torchrun make pip python pytest git pre-commit inspect .ci/run".split()


def commands_of(page: str, folder: Path) -> list[list[str]]:
    """The commands of a page's shell blocks, in order, as a shell runs them with substitutes for the real programs."""
    for program in PROGRAMS:
        stub = folder / "stubs" / program
        stub.parent.mkdir(parents=True, exist_ok=True)
        stub.write_text(STUB)
        stub.chmod(0o755)
    work = folder / "work"
    shutil.copytree(folder / "stubs/.ci", work / ".ci")
    environment = {"PATH": f"{folder / 'stubs'}", "COMMANDS": str(folder / "commands")}
    script = "set -eu\n" + "\n".join(blocks(page, "bash")).replace("source .venv/bin/activate", "")
    subprocess.run(["/bin/bash", "-c", script], cwd=work, env=environment, check=True)
    text = (folder / "commands").read_text()
    return [words.split("\0")[:-1] for words in text.split("\n\0") if words]


def parsed(command: list[str], known: set[str], monkeypatch) -> None:
    """Raise if a command's program would refuse its arguments.

    Args:
        known: files that the page makes before.
    """
    program, *words = command
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    if program == "tbrm":
        parsed_by_tbrm(words, monkeypatch)
    elif program == "accelerate":
        from accelerate.commands.launch import launch_command_parser

        assert words[0] == "launch"
        parsed_script(launch_command_parser().parse_args(words[1:]), known, monkeypatch)
    elif program == "torchrun":
        from torch.distributed.run import get_args_parser

        parsed_script(get_args_parser().parse_args(words), known, monkeypatch)
    elif program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.M)
        assert {word for word in words if "=" not in word} <= set(targets), command
    elif program == "pip":
        extras = {extra for word in words for one in re.findall(r"\[(.+)\]", word) for extra in one.split(",")}
        assert words[0] == "install" and extras <= set(project["optional-dependencies"]), command
    elif program == "python" and words[:2] == ["-m", "tbrm_trl.actor"]:
        actor_command_line().parse_args(words[2:])
    elif program == "vllm":
        assert words[0] == "serve", command
    elif program == "inspect":  # it asks for older packages than the rest: `make tools` runs it
        assert words[0] == "eval", command
    elif program in ("python", "pytest"):
        script = words[0]
        assert script in known or (ROOT / script).is_file(), command
    else:
        assert program in ("git", "pre-commit", "run"), command


def parsed_script(launch, known: set[str], monkeypatch) -> None:
    file = getattr(launch, "config_file", None)
    assert file is None or (ROOT / file).is_file()
    assert launch.training_script in {*known, "train.py"} or (ROOT / launch.training_script).is_file()
    if launch.training_script == "examples/train.py":
        parsed_by_tbrm(["train", *launch.training_script_args], monkeypatch)


def parsed_by_tbrm(words: list[str], monkeypatch) -> None:
    """Parse by the command's own parser, without running the command."""
    if not words:
        return
    name, *rest = words
    module = import_module(COMMANDS[name][0])
    done: list[str] = []
    with monkeypatch.context() as patch:
        if name == "train":
            patch.setattr(module, "run", lambda data, config, model: done.append(name))
            patch.setattr(module, "launch", lambda words: done.append(name))
            patch.setattr(TBRMConfig, "world_size", property(lambda self: 1))
            rest += ["--use_cpu", "true", "--bf16", "false"]
            rest += [] if "--output_dir" in rest else ["--output_dir", "out"]
        elif name == "eval":
            patch.setattr(module, "run", lambda asked, model: done.append(name))
            patch.setattr(module, "show_comparison", lambda *folders: done.append(name))
        elif name == "estimate":
            patch.setattr(module, "estimate_of_run", lambda config, model, machine, data: done.append(name))
        elif name == "report":
            patch.setattr(module, "write_report", lambda runs, output: done.append(name))
        main([name, *rest])
    assert done == [name]


@pytest.mark.parametrize("page", [name_of(page) for page in PAGES if blocks(name_of(page), "bash")])
def test_commands_are_read(page, tmp_path, monkeypatch):
    commands = commands_of(page, tmp_path)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(blocks("docs/first-run.md", "yaml")[0])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    known = set(re.findall(r"`(\w+\.(?:py|yaml))`", (ROOT / page).read_text()))
    assert commands
    for command in commands:
        parsed(command, known, monkeypatch)


@pytest.mark.parametrize("words", [["tbrm", "train", "--bta", "1"], ["make", "deom"], ["pip", "install", ".[maths]"]])
def test_a_wrong_command_would_be_noticed(words, monkeypatch):
    with pytest.raises((AssertionError, SystemExit)):
        parsed(words, set(), monkeypatch)


def test_the_forge_does_what_ci_does():
    (workflow,) = yaml.safe_load_all((ROOT / ".github/workflows/ci.yml").read_text())
    targets = workflow["jobs"]["check"]["strategy"]["matrix"]["target"]
    calls = re.findall(r"^make (.+)$", (ROOT / ".ci/run").read_text(), flags=re.M)
    here = [word for call in calls for word in call.split() if word.isalpha()]
    assert sorted(targets) == sorted([*here, "vllm"])


# ---- the first half hour, and the evaluation that goes on from it ----------------------------------------------------


def test_the_first_half_hour(model, tmp_path, monkeypatch, capsys):
    """Its files and commands run in order, with a tiny model and 2 updates, then the programs of docs/evaluation.md."""
    page = "docs/first-run.md"
    commands = commands_of(page, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    make_data, my_rewards = blocks(page, "python")
    Path("my_rewards.py").write_text(my_rewards)
    Path("recipe.yaml").write_text(blocks(page, "yaml")[0])
    Path("outputs").mkdir()
    Path("outputs/SmolLM2-135M-Instruct").symlink_to(model)
    for program, *words in commands:
        if program == "python":
            assert words == ["make_data.py"]
            run(make_data, model)
        elif program == "tbrm" and words:
            few = {
                "train": ["--max_steps", "2"],
                "eval": [] if "--compare" in words else ["--limit", "4", "--use_cpu", "true"],
            }
            main([*words, *few[words[0]]])
    printed = capsys.readouterr().out
    assert "60 prompts give 2 updates per epoch, dropping 12 tail prompts" in " ".join(printed.split())
    assert "Dry run: everything up to the first rollout is in order." in printed

    (result,) = {one.name for one in Path("after").glob("*.jsonl")}
    read, callback = blocks("docs/evaluation.md", "python")
    assert run(read.replace("math500-greedy.jsonl", result), model)["result"].metrics()["avg@8"] >= 0
    for given, small in (
        ('"math500"', '"test.jsonl"'),
        ("max_new_tokens=2048", "max_new_tokens=8"),
        ("steps=50", "steps=2"),
    ):
        assert given in callback
        callback = callback.replace(given, small)
    trainer = run(callback, model, {"correct": letters, "dataset": PROMPTS})["trainer"]
    trainer.train()
    assert any("eval_test/avg@1" in entry for entry in trainer.state.log_history)
