"""The documents stay true: every option and metric is in them, and the README's program runs."""

from __future__ import annotations

import re
from pathlib import Path

from scripted import script, scripted_trainer
from tiny import save

from tbrm_trl.config import GIVEN_A_MEANING, KEPT, REFUSED

ROOT = Path(__file__).parent.parent


def test_every_option_is_documented():
    text = (ROOT / "docs/configuration.md").read_text()
    missing = [name for name in (*KEPT, *GIVEN_A_MEANING, *REFUSED) if f"`{name}`" not in text]
    assert not missing
    for name, reason in {**GIVEN_A_MEANING, **REFUSED}.items():
        assert re.search(rf"^\|.*`{name}`.*\| {re.escape(reason)} \|$", text, flags=re.M), name


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
