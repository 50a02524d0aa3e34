"""The documents stay true: every option and metric is in them, and the README's program runs."""

from __future__ import annotations

import re
import runpy
import sys
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import torch
from common.tiny import save
from scripted import script, scripted_trainer
from trl import GRPOConfig

from tbrm_trl import SoftValue, TBRMConfig, TBRMTrainer
from tbrm_trl.checks.trl_options import GIVEN_A_MEANING, KEPT, REFUSED

ROOT = Path(__file__).parent.parent


def test_every_option_is_documented():
    text = (ROOT / "docs/configuration.md").read_text()
    missing = [name for name in (*KEPT, *GIVEN_A_MEANING, *REFUSED) if f"`{name}`" not in text]
    assert not missing
    for name, reason in {**GIVEN_A_MEANING, **REFUSED}.items():
        assert re.search(rf"^\|.*`{name}`.*\| {re.escape(reason)} \|$", text, flags=re.M), name


def test_every_option_of_ours_is_documented_with_its_default():
    text = (ROOT / "docs/configuration.md").read_text()
    inherited = {field.name for field in fields(GRPOConfig)}
    ours = [field for field in fields(TBRMConfig) if field.name not in inherited]
    assert {"soft_value", "replay_buffer_size", "truncation"} <= {field.name for field in ours}
    for field in ours:
        default = "terminal" if field.name == "truncation" else field.default  # None until the older alias is read
        shown = f'"{default}"' if isinstance(default, str) else str(default)
        assert re.search(rf"^\| `{field.name}` \| `{re.escape(shown)}` \|", text, flags=re.M), field.name


def test_every_estimator_is_in_the_theory():
    text = (ROOT / "docs/theory.md").read_text()
    shipped = [name for name, one in SoftValue.registry.items() if one.__module__.startswith("tbrm_trl.")]
    assert len(shipped) == 8
    for name in shipped:
        assert re.search(rf"^\| `{name}` \|", text, flags=re.M) and f"**`{name}`.**" in text, name


def test_every_metric_of_ours_is_documented(tmp_path):
    trainer = scripted_trainer(save(tmp_path / "model"), script(), tmp_path)
    trainer.train()
    text = (ROOT / "docs/metrics.md").read_text()
    logged = trainer.state.log_history[0]
    ours = [name for name in logged if not name.startswith(("completions/", "rewards/"))]
    assert {"residual/mean", "residual/rms", "soft_value", "log_ratio", "kl", "entropy", "pad_fraction"} <= set(ours)
    trainers_own = {"epoch", "step"}
    assert not [name for name in ours if f"`{name}`" not in text and name not in trainers_own]


def test_the_readmes_programs_run(tmp_path, monkeypatch):
    """Word for word, one after the other, but for the model, the number of steps and the machine."""
    programs = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.S)
    program = "\n".join(programs)
    assert "Qwen/Qwen2.5-0.5B" in program
    program = program.replace("Qwen/Qwen2.5-0.5B", save(tmp_path / "model"))
    program = re.sub(r'(output_dir="\w+")', r'\1, max_steps=2, use_cpu=True, report_to="none"', program)
    monkeypatch.chdir(tmp_path)
    scope: dict = {}
    exec(program, scope)
    assert scope["trainer"].state.global_step == 2


def test_the_example_of_an_estimator_is_the_documents_and_runs(tmp_path, monkeypatch):
    """Word for word and under 60 lines; its value is V_θ(s_1) without gradient."""
    example = ROOT / "examples/frozen_soft_value.py"
    program = example.read_text()
    (shown,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/extending.md").read_text(), flags=re.S)
    assert shown == program
    assert len(program.splitlines()) < 60
    assert program.startswith("# python examples/frozen_soft_value.py")

    monkeypatch.setattr(SoftValue, "registry", dict(SoftValue.registry))  # the name goes with this test
    monkeypatch.chdir(tmp_path)
    arguments = ["--model", save(tmp_path / "model"), "--output_dir", "out", "--max_steps", "2", "--use_cpu"]
    monkeypatch.setattr(sys, "argv", [str(example), *arguments])
    trained = []
    train = TBRMTrainer.train
    monkeypatch.setattr(TBRMTrainer, "train", lambda self: (train(self), trained.append(self)))
    frozen = runpy.run_path(str(example), run_name="__main__")["FrozenValue"]
    (trainer,) = trained
    assert trainer.state.global_step == 2
    assert type(trainer._soft_value) is frozen

    rows = SimpleNamespace(policy_value=torch.tensor([20.0, 30.0], requires_grad=True))
    value = trainer._soft_value(rows)
    assert value.tolist() == [20.0, 30.0] and not value.requires_grad
