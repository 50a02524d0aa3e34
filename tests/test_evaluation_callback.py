"""Benchmarks during training: what is logged, which checkpoint is the best, and that training does not change."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from common.tiny import model, tokenizer
from helpers.benchmark_runs import LETTERS, NAME, SETTINGS, train
from helpers.forked import launch
from helpers.runs import build
from peft import LoraConfig
from transformers import AutoModelForCausalLM, EarlyStoppingCallback

from tbrm_trl import TBRMTrainer
from tbrm_trl.evaluation.benchmarks import Benchmark
from tbrm_trl.evaluation.callback import EvaluationCallback
from tbrm_trl.evaluation.results import read_result
from tbrm_trl.evaluation.run import ModelPolicy, evaluate
from tbrm_trl.evaluation.sampling import Sampling


def test_the_best_checkpoint_is_that_of_the_benchmark(llama, tmp_path):
    """Before training it logs what `tbrm eval` finds, then each step. At the end the best step's weights are loaded."""
    seen = train(llama, str(tmp_path / "run"))
    (evaluations,) = seen["evaluations"]
    assert [step for step, _ in evaluations] == [0, 1, 2, 3] and seen["training"] == [2, 3]
    assert len({value for _, value in evaluations}) > 1
    start = ModelPolicy("start", AutoModelForCausalLM.from_pretrained(llama), tokenizer())
    before = evaluate(start, LETTERS, SETTINGS, tmp_path / "before.jsonl").metrics()
    assert evaluations[0][1] == before["avg@3"]

    after = dict(evaluations[1:])
    assert seen["best"] == max(after.values()) == after[seen["best_step"]]
    best = ModelPolicy("best", seen["model"], tokenizer())
    again = evaluate(best, LETTERS, SETTINGS, tmp_path / "best.jsonl").metrics()
    assert again["avg@3"] == seen["best"]
    kept = read_result(tmp_path / f"run/out/evaluations/step-{seen['best_step']}/letters.jsonl")
    assert kept.metrics() == again


def test_an_adapter_is_evaluated_in_the_precision_of_its_training(llama, tmp_path):
    """accelerate's autocast wraps the forward pass of the adapter, which the evaluation does not use."""
    callback, seen = EvaluationCallback([LETTERS], SETTINGS), []
    trainer = build(
        llama, tmp_path, trainer_class=TBRMTrainer, max_steps=1, bf16=True, callbacks=[callback],
        peft_config=LoraConfig(r=4, target_modules="all-linear"), eval_strategy="steps", eval_steps=1,
    )  # fmt: skip
    linear = trainer.model.get_base_model().model.layers[0].mlp.down_proj
    linear.register_forward_hook(lambda module, given, output: seen.append((module.training, output.dtype)))
    trainer.train()
    assert {training for training, _ in seen} == {True, False} and {dtype for _, dtype in seen} == {torch.bfloat16}


@pytest.mark.parametrize("pool", [0, 4])
def test_training_does_not_notice(llama, tmp_path, pool):
    """It ends with the same weights, bit for bit, as without an evaluation, and has the same rollouts under way."""
    options = {"rollout_pool": pool, "max_completion_length": 16}
    evaluated = train(llama, str(tmp_path / "evaluated"), **options)
    plain = build(llama, tmp_path / "plain", max_steps=3, **options)
    plain.train()
    assert any("residual/ahead_rms" in row for row in plain.state.log_history) == bool(pool)
    last = AutoModelForCausalLM.from_pretrained(tmp_path / "evaluated/out/checkpoint-3")
    assert evaluated["training"] == [2, 3]
    for name, one in plain.model.state_dict().items():
        assert torch.equal(one, last.state_dict()[name]), name


def test_an_evaluation_reads_the_weights_once(llama, tmp_path, monkeypatch):
    """It does so once for any number of benchmarks, since the weights' digest costs a pass over all of them."""
    read, weights = [], ModelPolicy.weights
    monkeypatch.setattr(ModelPolicy, "weights", lambda policy: read.append(weights(policy)) or read[-1])
    benchmarks = [LETTERS.first(2), LETTERS.first(3)]
    trainer = build(
        llama, tmp_path, trainer_class=TBRMTrainer, callbacks=[EvaluationCallback(benchmarks, SETTINGS)],
        eval_strategy="steps", eval_steps=1,
    )  # fmt: skip
    trainer.train()
    assert len(read) == 2 and read[0] != read[1]  # after each of two updates
    kept = tmp_path / "out/evaluations"
    headers = [read_result(kept / f"step-{step}/{one.name}.jsonl").header for step in (1, 2) for one in benchmarks]
    assert [header["weights"] for header in headers] == [read[0], read[0], read[1], read[1]]


def test_two_benchmarks_of_one_name_are_refused():
    """Otherwise one would be judged by the answers of the other."""
    with pytest.raises(ValueError, match=f"Several benchmarks are called {LETTERS.name}"):
        EvaluationCallback([LETTERS, LETTERS.first(2), LETTERS], SETTINGS)


@pytest.mark.parametrize(
    ("stage", "plugin", "fsdp", "refused"),
    [
        (None, None, "false", False),
        (2, None, "false", False),
        (3, None, "false", True),  # accelerate launch --config_file zero3.yaml
        (None, None, "true", True),  # and with fsdp2.yaml
        (None, {"fsdp_version": 2}, "false", True),  # --fsdp of the arguments
    ],
)
def test_sharded_weights_are_refused(stage, plugin, fsdp, refused, monkeypatch):
    """They are, also if a launcher asks for it, which leaves `fsdp` and `hf_deepspeed_config` as they are."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", fsdp)
    monkeypatch.setenv("FSDP_VERSION", "2")
    deepspeed = None if stage is None else SimpleNamespace(deepspeed_config={"zero_optimization": {"stage": stage}})
    args = SimpleNamespace(
        deepspeed_plugin=deepspeed, fsdp_plugin_args=plugin, output_dir="out", chat_template_kwargs=None, bf16=False,
        fp16=False,
    )  # fmt: skip
    callback = EvaluationCallback([LETTERS], SETTINGS)
    with pytest.raises(ValueError, match="ZeRO-3 and FSDP shard them") if refused else nullcontext():
        callback.on_train_begin(args, None, None, model=model(), processing_class=tokenizer())


def test_completions_beyond_the_models_positions_are_refused_at_the_start(llama, tmp_path):
    settings = replace(SETTINGS, sampling=Sampling(max_new_tokens=5000))
    with pytest.raises(ValueError, match=r"letters: its longest prompt of \d+ tokens and max_new_tokens 5000 pass the"):
        build(llama, tmp_path, trainer_class=TBRMTrainer, callbacks=[EvaluationCallback([LETTERS], settings)])


def test_names_are_known_before_the_metrics(tmp_path):
    for samples in (1, 3, 8):
        callback = EvaluationCallback([LETTERS], replace(SETTINGS, samples=samples))
        policy = ModelPolicy("start", model(), tokenizer())
        metrics = evaluate(policy, LETTERS, callback.settings, tmp_path / f"{samples}.jsonl").metrics()
        assert callback.metric_names == [f"eval_letters/{name}" for name in metrics]


@pytest.mark.parametrize("first", [True, False])
def test_early_stopping_sees_the_benchmark_wherever_it_is_listed(first, llama, tmp_path):
    """With weights that stay, no evaluation is better than the first one."""
    callbacks = [EarlyStoppingCallback(1), EvaluationCallback([LETTERS], SETTINGS)]
    trainer = build(
        llama, tmp_path, trainer_class=TBRMTrainer, callbacks=callbacks if first else callbacks[::-1], max_steps=4,
        eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1, load_best_model_at_end=True,
        metric_for_best_model=NAME, learning_rate=0.0,
    )  # fmt: skip
    trainer.train()
    assert trainer.state.global_step == 2


def test_the_judge_has_the_runs_time():
    sums = Benchmark("sums", ["1+1="], {"solution": ["2"]}, "math")
    limits = [one.judges["sums"].reward.time_limit for one in (
        EvaluationCallback([sums], SETTINGS), EvaluationCallback([sums], SETTINGS, time_limit=1.5)
    )]  # fmt: skip
    assert limits == [5.0, 1.5]


@pytest.mark.parametrize(("own", "asked"), [(None, "the run's:ab"), ({"name": "its own"}, "its own:ab")])
def test_prompts_are_rendered_as_in_training(own, asked, tmp_path):
    words = tokenizer()
    words.chat_template = "{{ name }}:{{ messages[-1].content }}"
    benchmark = Benchmark("letters", ["ab"], {}, "helpers.reward_functions.letters")
    callback = EvaluationCallback([benchmark], replace(SETTINGS, samples=1, chat_template_kwargs=own))
    args = SimpleNamespace(
        output_dir=str(tmp_path), chat_template_kwargs={"name": "the run's"}, process_index=0, world_size=1,
        disable_tqdm=True, should_save=True, bf16=False, fp16=False, deepspeed_plugin=None,
    )  # fmt: skip
    state = SimpleNamespace(global_step=1)
    callback.on_evaluate(args, state, None, model=model(), processing_class=words, metrics={})
    header = read_result(tmp_path / "evaluations/step-1/letters.jsonl").header
    assert header["template"] == asked
    assert header["chat_template_kwargs"] == (own or args.chat_template_kwargs)


@pytest.mark.launch
@pytest.mark.parametrize("lora", [False, True])
def test_in_two_processes(llama, tmp_path, lora):
    """Both log the same. Before training that is what one process logs. The best is the largest."""
    folder = str(tmp_path / "two")
    first, second = launch("helpers.benchmark_runs:train", model=llama, folder=folder, lora=lora, log_completions=True)
    (one, other), best = first["evaluations"], first["best"]
    assert one == other and best == second["best"] == max(value for step, value in one if step)
    alone = train(llama, str(tmp_path / "one"), lora=lora)
    assert one[0] == alone["evaluations"][0][0]
    assert Path(tmp_path / f"two/out/evaluations/step-3/{NAME.split('/')[0].removeprefix('eval_')}.jsonl").is_file()
