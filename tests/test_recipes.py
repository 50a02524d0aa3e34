"""Recipes: each gives the published settings and the stated batches for its processes, and the script runs them."""

from __future__ import annotations

import json
import math
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import yaml
from common.launch import run
from common.tiny import ARCHITECTURES, save
from datasets import Dataset
from helpers.examples import RECIPES, after, command_of, sums
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl import get_peft_config

from tbrm_trl import TBRMConfig

MACHINE = {"use_cpu": True, "bf16": False}  # of these tests, not of the recipes
FLAGS = ["--use_cpu", "true", "--bf16", "false"]


# What defines each method, from the papers' tables, independent of the files. `rows_per_update` and
# `updates` (of a window, fresh and further) hold for the number of processes in the recipe's command.
TBRM = dict(
    soft_value="policy", beta=0.002, num_generations=1, rows_per_update=128, updates=1, reference="initial",
    max_completion_length=2048, temperature=1.0, max_steps=760,
)  # fmt: skip
DEFINING = {
    "tbrm": {**TBRM, "learning_rate": 2.5e-6},
    "tbrm_7b": {**TBRM, "learning_rate": 2e-6},
    "reval": dict(
        soft_value="calibrated", beta=0.002, num_generations=8, rows_per_update=1024, updates=2,
        replay_buffer_size=5120, replay_sampling="uniform", sync_ref_model=True, ref_model_sync_steps=200,
        ref_model_mixup_alpha=1.0, max_completion_length=8192, learning_rate=1e-6, temperature=1.0, max_steps=1300,
    ),
    "a_star_po": dict(
        soft_value="optimal", soft_value_samples=8, soft_value_beta=0.5, beta=1e-3, num_generations=1,
        rows_per_update=128, updates=2, reference="initial", sync_ref_model=False, learning_rate=1e-6,
        max_completion_length=1024, num_train_epochs=25,
    ),
    "oapl": dict(
        soft_value="log_mean_exp", soft_value_beta=1.0, beta=1e-3, sync_ref_model=True, ref_model_sync_steps=50,
        ref_model_mixup_alpha=1.0,
    ),
    "kimi_k1_5": dict(soft_value="log_mean_exp", soft_value_beta=None, reference="previous"),
    "rpo": dict(soft_value="partition", soft_value_self_normalized=False, beta=5.0, reference="initial"),
    "vargrad_tba": dict(
        soft_value="group", num_generations=20, beta=0.012, reference="initial", rows_per_update=160,
        learning_rate=1e-5, max_completion_length=512, max_steps=1000,
    ),
    "rebel": dict(
        soft_value="group", num_generations=2, reference="previous", rows_per_update=512, updates=4, learning_rate=3e-6
    ),
    "copg": dict(soft_value="group", num_generations=2, beta=0.06, reference="initial", sync_ref_model=False),
    "gvpo": dict(
        soft_value="group", num_generations=4, beta=0.1, reference="previous", rows_per_update=1024, updates=4,
        learning_rate=1e-6, max_completion_length=1024, num_train_epochs=15,
    ),
    "dvpo": dict(soft_value="model", num_generations=1),
}  # fmt: skip


def test_every_recipe_is_tested():
    assert {recipe.stem for recipe in RECIPES.glob("*.yaml")} == set(DEFINING)


@pytest.mark.parametrize("name", DEFINING)
def test_recipe(name, train_script, monkeypatch):
    """The file gives the hand-written fields, on the processes that its own command starts."""
    recipe = RECIPES / f"{name}.yaml"
    command = command_of(recipe)
    assert command[:2] == ["accelerate", "launch"] and "examples/train.py" in command
    assert after(command, "--config") == f"examples/recipes/{name}.yaml"
    processes = int(after(command, "--num_processes"))
    # The configuration checks its own batches: whole groups in every update of every process.
    monkeypatch.setattr(TBRMConfig, "world_size", property(lambda self: processes))

    data, config, model = train_script.parse(["--config", str(recipe), *FLAGS])
    values = yaml.safe_load(recipe.read_text())
    ours = {field.name for field in fields(TBRMConfig)} & set(values)
    by_hand = TBRMConfig(**{name: values[name] for name in ours}, **MACHINE)
    assert config == by_hand
    assert model.model_name_or_path == values["model_name_or_path"]
    assert data.dataset_name == values["dataset_name"] and data.dataset_config == values.get("dataset_config")

    seen = {key: getattr(config, key) for key in DEFINING[name] if key != "updates"}
    if "updates" in DEFINING[name]:
        seen["updates"] = config.steps_per_generation // config.gradient_accumulation_steps * config.num_iterations
    assert seen == DEFINING[name]
    # DeepSpeed's launcher must be told what the file says.
    assert after(command, "--gradient_accumulation_steps") in (None, str(config.gradient_accumulation_steps))


def test_rows_of_the_data(train_script, tmp_path):
    """Questions become messages, answers a column `solution`; rows with a completion stay as they are."""
    problems = [{"problem": "√18?", "answer": "3\\sqrt{2}"}, {"problem": "0?", "answer": "0"}]
    (tmp_path / "math.jsonl").write_text("\n".join(map(json.dumps, problems)))
    asked = train_script.load(train_script.DataArguments(str(tmp_path / "math.jsonl"), system_prompt="Think."))
    assert asked["prompt"][0] == [{"role": "system", "content": "Think."}, {"role": "user", "content": "√18?"}]
    assert asked["solution"][:] == ["3\\sqrt{2}", "0"]

    as_text = train_script.DataArguments(str(tmp_path / "math.jsonl"), prompt_template=r"Q: {question}\nA:")
    assert train_script.load(as_text)["prompt"][:] == ["Q: √18?\nA:", "Q: 0?\nA:"]
    with pytest.raises(ValueError, match=r"prompt_template='Solve:' has no \{question\} in it"):
        train_script.load(train_script.DataArguments(str(tmp_path / "math.jsonl"), prompt_template="Solve:"))

    Dataset.from_list([{"question": [{"role": "user", "content": "6·7?"}], "answer": "6 · 7\n#### 42"}]).to_parquet(
        tmp_path / "gsm8k.parquet"
    )
    (row,) = train_script.load(train_script.DataArguments(str(tmp_path / "gsm8k.parquet")))
    assert (row["prompt"], row["solution"]) == (row["question"], "42")

    (tmp_path / "log.json").write_text(json.dumps([{"prompt": "1+1=", "completion": "2", "reward": 1.0}]))
    assert train_script.load(train_script.DataArguments(str(tmp_path / "log.json"))).to_list() == [
        {"prompt": "1+1=", "completion": "2", "reward": 1.0}
    ]


def test_only_rows_that_math_judges_need_an_answer(train_script, tmp_path, capsys):
    """A logged row with its reward needs none, and no other reward has the answers read."""
    logged = {"completion": "so 2", "reward": 1.0, "answer": ""}
    rows = [{"prompt": "1+1=", **logged}, {"prompt": "2+2=", "answer": "4"}, {"prompt": "3+3=", "answer": "?!"}]
    data = tmp_path / "mixed.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ValueError, match=r"1 of 2 answers in the column 'answer' .* Rows without: 2 \("):
        train_script.load(train_script.DataArguments(str(data)))
    kept = train_script.load(train_script.DataArguments(str(data), unreadable_answers="leave_out"))
    assert kept["solution"][:] == [None, "4"] and kept["reward"][:] == [1.0, None]
    assert kept["prompt"][:] == ["1+1=", "2+2="]
    assert "1 of 2 rows are to be rolled out. Their prompts are text" in capsys.readouterr().out
    own = train_script.load(train_script.DataArguments(str(data), reward_funcs=["helpers.reward_functions.length"]))
    assert own["answer"][:] == ["", "4", "?!"] and "solution" not in own.column_names


def test_an_answer_that_takes_the_place_of_a_solution_is_said(train_script, tmp_path, capsys):
    data = tmp_path / "worked.jsonl"
    data.write_text(json.dumps({"problem": "1+1=", "solution": "A long way. " * 30, "answer": "2"}))
    both = ["math", "helpers.reward_functions.length"]
    asked = train_script.load(train_script.DataArguments(str(data), reward_funcs=both))
    assert asked["solution"][:] == ["2"]
    assert "'solution' becomes the answer in 'answer'" in capsys.readouterr().out


def test_answers_that_cannot_be_read(train_script, tmp_path):
    """They are in the column with most answers, and are refused or left out."""
    rows = [{"question": "½?", "solution": ["A long way. " * 30], "final_answer": [text]} for text in ("0.5", "", "1")]
    data = tmp_path / "olympiad.json"
    data.write_text(json.dumps(rows))
    with pytest.raises(ValueError, match=r"2 of 3 answers in the column 'final_answer' .* Rows without: 1 "):
        train_script.load(train_script.DataArguments(str(data)))
    kept = train_script.load(train_script.DataArguments(str(data), unreadable_answers="leave_out"))
    assert kept["solution"][:] == ["0.5", "1"]
    assert (
        train_script.load(train_script.DataArguments(str(data), answer_column="question"))["solution"][:] == ["½?"] * 3
    )


def test_verified_correctness(train_script):
    """Equal values count, not equal strings; 3√2 is not taken for 3; without a readable answer a row is left out."""
    answers = ["3\\sqrt{2}", "3\\sqrt{2}", "0.5", "text with $x=4$, so \\boxed{4}"]
    said = ["\\sqrt{18}", "3", "\\frac{1}{2}", "4"]
    completions = [[{"role": "assistant", "content": f"It is \\boxed{{{answer}}}."}] for answer in said]
    (reward,), _ = train_script.load_rewards("math")
    assert reward(completions, solution=answers) == [1.0, 0.0, 1.0, 1.0]
    assert reward(["\\boxed{4}", "\\boxed{4}"], solution=["$4$", ""]) == [1.0, None]  # text as well as messages


def test_lora_has_no_dropout(train_script, tmp_path):
    """TRL's default is 0.05, which the trainer refuses."""
    _, _, model = train_script.parse(
        ["--dataset_name", "none", "--use_peft", "true", "--output_dir", str(tmp_path), *FLAGS]
    )
    assert get_peft_config(model).lora_dropout == 0.0


def flags(recipe: str, model: str, out: Path, **options) -> list[str]:
    """A recipe with overrides that make it small."""
    settings = dict(
        model_name_or_path=model, output_dir=out, per_device_train_batch_size=4, gradient_accumulation_steps=1,
        max_completion_length=4, max_steps=2, learning_rate=0.01, logging_steps=1, disable_tqdm=True,
    )  # fmt: skip
    given = [text for name, value in {**settings, **options}.items() for text in (f"--{name}", str(value))]
    return ["--config", str(RECIPES / f"{recipe}.yaml"), *given, *FLAGS]


def log_of(out: Path, model: str) -> list[dict]:
    """The log of each update, from the last checkpoint. The saved model must differ from the first one."""
    (state,) = out.glob("checkpoint-*/trainer_state.json")
    saved, before = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (out, model))
    assert any(not torch.equal(saved[name], before[name]) for name in before)
    return [row for row in json.loads(state.read_text())["log_history"] if "residual/rms" in row]


ONE_PROCESS = ["accelerate", "launch", "--cpu", "--num_processes", "1", "examples/train.py"]


@pytest.mark.parametrize("name", sorted(DEFINING.keys() - {"rpo"}))
def test_every_recipe_trains(name, train_script, tmp_path, monkeypatch):
    """Two updates of each, smaller but of the same shape: whole groups, as many updates of a window."""
    model, options = save(tmp_path / "model"), {"dataset_name": sums(tmp_path / "sums.json")}
    if name == "copg":
        rows = [{"prompt": f"{a}+", "completion": str(b), "reward": b / 4} for a in range(4) for b in range(4)]
        (tmp_path / "log.json").write_text(json.dumps(rows))
        options["dataset_name"] = tmp_path / "log.json"
    if name == "dvpo":
        options["soft_value_model"] = save(tmp_path / "value")
        values = AutoConfig.for_model("qwen2", **{**ARCHITECTURES["qwen2"], "num_labels": 1})
        AutoModelForSequenceClassification.from_config(values).save_pretrained(tmp_path / "value")

    rewarded = []

    def variety(completions, **kwargs):  # no random model solves a sum; this differs between completions
        rewarded.extend(completions)
        return [len(set(completion[0]["content"])) / 4 for completion in completions]

    monkeypatch.setattr(train_script, "load_rewards", lambda names, **_: ([variety], None))
    published = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())
    if "steps_per_generation" in published:
        options["steps_per_generation"] = published["steps_per_generation"] // published["gradient_accumulation_steps"]
    rows = 2 * published["num_generations"] if published["num_generations"] > 1 else 4
    out = tmp_path / "out"
    train_script.run(*train_script.parse(flags(name, model, out, per_device_train_batch_size=rows, **options)))
    log = log_of(out, model)
    assert len(log) == 2 and bool(rewarded) == (name != "copg")  # whose log brings its rewards
    assert all(0 < row["residual/rms"] < math.inf and 0 < row["grad_norm"] < math.inf for row in log)


def test_the_script_on_prompts(train_script, tmp_path):
    """Launched as users launch it, with math-verify: a random model is never right. Its saved rollouts load again."""
    model, out = save(tmp_path / "model"), tmp_path / "out"
    data = sums(tmp_path / "sums.json")
    run([*ONE_PROCESS, *flags("tbrm", model, out, dataset_name=data, save_rollouts=True)])
    log = log_of(out, model)
    assert [row["rewards/correct/mean"] for row in log] == [0, 0]
    assert all(0 < row["residual/fresh_rms"] < math.inf for row in log)
    saved = train_script.load(train_script.DataArguments(str(out)))
    assert len(saved) == 8 and all(len(ids) <= 4 for ids in saved["completion_ids"]) and saved["reward"][:] == [0.0] * 8


def test_the_script_on_a_log(tmp_path):
    """Reward partitioning, at its first update: the residual by hand, in float64, is `β log Z(x) − r` on average."""
    log = (("1+1=", "2", 4.0), ("1+1=", "11", 1.0), ("2+3=", "5", 3.0), ("2+3=", "6", -2.0))
    rows = [dict(zip(("prompt", "completion", "reward"), row, strict=True)) for row in log]
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, rows)))
    model, out = save(tmp_path / "model"), tmp_path / "out"
    arguments = flags("rpo", model, out, dataset_name=tmp_path / "log.jsonl", max_steps=1)
    run([*ONE_PROCESS, *arguments])
    (first,) = log_of(out, model)

    tokenizer, policy = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model).double()
    terms: dict[str, list[float]] = {}  # log π_ref(y|x) + r/β, by prompt
    for row in rows:
        prompt, completion = (tokenizer(row[name])["input_ids"] for name in ("prompt", "completion"))
        ids = torch.tensor([[*prompt, *completion, tokenizer.eos_token_id]])
        log_probs = policy(ids).logits[0, :-1].log_softmax(dim=-1).gather(1, ids[0, 1:, None])[len(prompt) - 1 :]
        terms.setdefault(row["prompt"], []).append(log_probs.sum().item() + row["reward"] / 5)
    values = {prompt: 5 * math.log(sum(map(math.exp, exponents))) for prompt, exponents in terms.items()}
    residuals = [values[row["prompt"]] - row["reward"] for row in rows]
    assert first["residual/mean"] == pytest.approx(sum(residuals) / 4, rel=1e-5)
    assert first["residual/rms"] == pytest.approx(math.sqrt(sum(r**2 for r in residuals) / 4), rel=1e-5)
