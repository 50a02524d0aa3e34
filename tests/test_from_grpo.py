"""Scripts for `GRPOTrainer` run after two names are changed. Options without a meaning here are reported at once."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from common.launch import ROOT
from common.tiny import save

MODEL, DATA = "Qwen/Qwen2-0.5B-Instruct", "trl-lib/DeepMath-103K"

# The quick start of TRL's documentation of GRPO.
QUICK_START = f"""
from datasets import load_dataset
from trl import GRPOTrainer
from trl.rewards import accuracy_reward

dataset = load_dataset("{DATA}", split="train")

trainer = GRPOTrainer(
    model="{MODEL}",
    reward_funcs=accuracy_reward,
    train_dataset=dataset,
)
trainer.train()
"""

# With options and a reward function of the user's own, as in the documentation's further examples.
WITH_OPTIONS = f"""
from datasets import load_dataset
from trl import GRPOConfig, GRPOTrainer

dataset = load_dataset("{DATA}", split="train")

def reward_num_unique_letters(completions, **kwargs):
    completion_contents = [completion[0]["content"] for completion in completions]
    return [float(len(set(content))) for content in completion_contents]

training_args = GRPOConfig(
    output_dir="grpo", per_device_train_batch_size=4, num_generations=4, max_completion_length=16, max_steps=2,
    logging_steps=1, beta=0.04, log_completions=True, scale_rewards=SCALE,
)
trainer = GRPOTrainer(
    model="{MODEL}", reward_funcs=reward_num_unique_letters, args=training_args, train_dataset=dataset
)
trainer.train()
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> Path:
    """A folder that holds a tiny model and problems under the names of the hub."""
    folder = tmp_path_factory.mktemp("hub")
    save(folder / MODEL, "qwen2", max_position_embeddings=1024)
    rows = [
        {"prompt": [{"role": "user", "content": f"{i} + {i} = ?"}], "solution": str(2 * i), "difficulty": i % 3}
        for i in range(8)
    ]
    (folder / DATA).mkdir(parents=True)
    (folder / DATA / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def run(hub, monkeypatch):
    """Runs a script there. It allows bfloat16, which a CPU can compute but transformers refuses without a GPU."""
    monkeypatch.chdir(hub)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", hub / "cache")
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)

    def run_here(script: str) -> dict:
        names: dict = {"__name__": "__main__"}
        exec(script, names)
        return names

    return run_here


def by_two_names(script: str) -> str:
    script = re.sub("^from trl import", "from tbrm_trl import", script, flags=re.M)
    return script.replace("GRPOTrainer", "TBRMTrainer").replace("GRPOConfig", "TBRMConfig")


def test_the_quick_start_changed_by_its_names(run):
    trainer = run(by_two_names(QUICK_START))["trainer"]
    assert type(trainer).__module__ == "tbrm_trl.trainer" and trainer.num_generations == 1
    assert trainer.state.global_step == 3  # 3 epochs of 8 prompts, 8 at a time
    policy, reference = (dict(model.named_parameters()) for model in (trainer.model, trainer.ref_model))
    assert any((policy[name] != reference[name]).any() for name in policy)


def test_a_script_with_options_changed_by_its_names(run):
    trainer = run(by_two_names(WITH_OPTIONS).replace("SCALE", '"group"'))["trainer"]
    logged = [entry for entry in trainer.state.log_history if "rewards/reward_num_unique_letters/mean" in entry]
    assert len(logged) == 2 and all({"reward", "kl", "residual/rms"} <= set(entry) for entry in logged)
    assert len(list(Path("grpo/completions").glob("*.parquet"))) == 2


def test_options_without_a_meaning_are_named_at_once(run):
    script = by_two_names(WITH_OPTIONS).replace("SCALE", 'False, epsilon_high=0.28, loss_type="dr_grpo", beta=0.0')
    script = script.replace("beta=0.04, ", "")
    with pytest.raises(ValueError) as error:
        run(script)
    named = re.findall(r"^- `(\w+)=", str(error.value), flags=re.M)
    assert sorted(named) == ["beta", "epsilon_high", "loss_type", "scale_rewards"]


# ---- the table -------------------------------------------------------------------------------------------------------

PAGE = ROOT / "docs/from-grpo.md"
TESTS = ROOT / "tests/data/from_grpo.yaml"
STATES = {"supported", "warned of", "refused", "other"}


def test_every_line_of_the_tables_is_held_by_tests_that_exist():
    rows = [line.strip("|").split(" | ") for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    lines = [[cell.strip() for cell in row] for row in rows if row[0].strip() != "GRPO"]
    assert len(lines) > 50 and all(len(line) == 3 and line[1] in STATES for line in lines)
    assert all(state == "supported" or how != "–" for _, state, how in lines)
    tests = yaml.safe_load(TESTS.read_text())
    assert list(tests) == [what for what, _, _ in lines]
    for what, named in tests.items():
        assert named, what
        for file, name in (one.split("::") for one in named):
            assert f"\ndef {name}(" in (ROOT / "tests" / file).read_text(), (what, file, name)
