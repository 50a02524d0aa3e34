"""The public API, pinned: users see a change here, and it belongs in the changelog."""

from __future__ import annotations

import inspect
from dataclasses import fields

import pytest
from helpers.signatures import signature
from trl import GRPOConfig

import tbrm_trl
from tbrm_trl import TBRMConfig, evaluation, memory, report
from tbrm_trl.loss import soft_value
from tbrm_trl.loss.soft_value import Run, SoftValue, ValueInputs

# By module: every public name, with its signature if it can be called.
NAMES = {
    tbrm_trl: {
        "SoftValue": "(args)",
        "TBRMConfig": None,  # below
        "TBRMTrainer": (
            "(model, reward_funcs=None, args=None, train_dataset=None, eval_dataset=None, processing_class=None, "
            "reward_processing_classes=None, callbacks=None, optimizers=(None, None), quantization_config=None, "
            "peft_config=None, tools=None, rollout_func=None, environment_factory=None, reference_model=None)"
        ),
        "bellman_residual": "(soft_value, log_ratio, reward, beta)",
        "load_rollouts": "(folder, unrewarded=False)",
        "squared_residual_loss": "(residual, counted, denominator, weight=None)",
        "trajectory_log_ratio": "(policy_logps, ref_logps, mask)",
    },
    soft_value: {
        **dict.fromkeys(
            """
            SoftValue ConstantValue CalibratedValue GroupValue LearnedValue LogMeanExpValue ModelValue OptimalValue
            PartitionValue PolicyValue QuantileValue TrackedValue ZeroValue
            """.split(),
            "(args)",
        ),
        "Run": None,  # below
        "ValueInputs": "(policy_value, ref_value, hidden, log_ratio, reward, value, group, counted, beta)",
    },
    memory: {
        "MemoryEstimate": "(phases, parameters, trained, paged=0)",
        "estimate_memory": (
            "(model, *, rows, prompt_length, completion_length, generated_rows=None, gathered_to_generate=None, "
            "evaluated_rows=0, evaluated_length=None, accumulation=1, dtype='float32', mixed_precision='bfloat16', "
            "attn_implementation=None, gradient_checkpointing=True, optimizer='adamw_torch_fused', peft_config=None, "
            "quantization=None, double_quantization=False, reference=True, values_per_row=1, processes=1, "
            "zero_stage=0, fsdp=False, device='cuda', revision=None, trust_remote_code=False)"
        ),
    },
    report: {"write_report": "(runs, output=None)"},
}
EVALUATION = {
    "evaluate_accuracy": (
        "(model, tokenizer, prompts, score, *, samples=1, temperature=0.0, max_new_tokens=256, batch_size=64, seed=0, "
        "progress=<lambda>)"
    ),
    "Accuracy": "(mean, standard_error, problems, samples, temperature, truncated, completions, scores)",
    "Comparison": "(difference, standard_error, p_value, better, worse, problems)",
    "accuracy_from_scores": "(scores)",
    "compare": "(first, second)",
    "majority": "(answers, scores)",
    "pass_at_k": "(scores, k)",
}
OPTIONS = {
    "soft_value": "policy",
    "soft_value_beta": None,
    "soft_value_samples": 8,
    "soft_value_drop_unsolved": False,
    "soft_value_self_normalized": False,
    "soft_value_offset": False,
    "soft_value_learning_rate": 0.01,
    "soft_value_half_life": 0.06,
    "soft_value_kept": 0.96,
    "soft_value_tracks": "reward",
    "soft_value_model": None,
    "residual": "trajectory",
    "length_normalized": False,
    "truncation": None,
    "truncated_reward": 0.0,
    "loss_units": "reward",
    "reward_baseline": "none",
    "reward_pessimism": 0.0,
    "sft_coef": 0.0,
    "sft_threshold": 1.0,
    "entropy_advantage_coef": 0.0,
    "token_fraction": 1.0,
    "token_selection": "scatter",
    "max_tokens_per_microbatch": None,
    "padding_free": False,
    "replay_buffer_size": 0,
    "replay_max_age": None,
    "replay_sampling": "uniform",
    "replay_priority_exponent": 0.6,
    "replay_priority_correction": 0.4,
    "logged_fraction": None,
    "precompute_ref_log_probs": None,
    "rollout_pool": 0,
    "rollouts": "sync",
    "follow_rollouts": None,
    "follow_timeout": 1200.0,
    "max_staleness": 4,
    "async_server": None,
    "publish_policy": None,
    "save_rollouts": False,
    "max_skipped_updates": 3,
    "max_prompt_length": None,
    "long_prompts": "refuse",
    "reward_timeout": None,
    "reward_on_error": "raise",
    "reference": "initial",
    "stop_timeout": 300.0,
}
OTHER_DEFAULTS_THAN_TRLS = {
    "learning_rate": 2.5e-6,
    "disable_dropout": True,
    "num_generations": 1,
    "beta": 0.002,
    "vllm_importance_sampling_correction": False,
}
HOOKS = {
    "check": "(args)",
    "check_data": "(self, dataset, logged)",
    "attach": "(self, run)",
    "prepare": "(self, run)",
    "on_window": "(self, trajectories, rows, group_size)",
    "on_update": "(self, trajectories)",
    "after_update": "(self, metrics, residuals)",
    "state": "(self)",
    "restore": "(self, state)",
    "__call__": "(self, inputs)",
}
CLASS_ATTRIBUTES = {
    "options": frozenset(),
    "compares": None,
    "gives_constants": False,
    "takes_baseline": False,
    "bootstraps": False,
    "column": None,
}
ESTIMATORS = set("calibrated group learned log_mean_exp model optimal partition policy quantile tracked zero".split())
RUN_ATTRIBUTES = set("accelerator train_dataset evaluating tokenizer reference_key rollout_settings".split())
RUN_METHODS = {
    "counts": "(self, trajectory)",
    "logged_trajectories": "(self)",
    "sample": "(self, rows)",
    "replace_prompts": "(self, dataset)",
    "train_module": "(self, module, learning_rate)",
    "value_head": "(self, learning_rate)",
}


@pytest.mark.parametrize("module", NAMES, ids=lambda module: module.__name__)
def test_names(module):
    assert set(module.__all__) == set(NAMES[module])
    for name, expected in NAMES[module].items():
        assert expected is None or signature(getattr(module, name)) == expected, name


@pytest.mark.parametrize("name", EVALUATION)
def test_evaluation(name):
    assert set(evaluation.__all__) == set(EVALUATION)
    assert signature(getattr(evaluation, name)) == EVALUATION[name]


def test_options_and_their_defaults():
    trls = {field.name: field.default for field in fields(GRPOConfig)}
    ours = {field.name: field.default for field in fields(TBRMConfig)}
    assert {name: default for name, default in ours.items() if name not in trls} == OPTIONS
    assert {n: d for n, d in ours.items() if n in trls and d != trls[n]} == OTHER_DEFAULTS_THAN_TRLS


def test_hooks_of_an_estimator():
    public = {name for name in vars(SoftValue) if not name.startswith("_")} | {"__call__"}
    assert public - {"registry"} == HOOKS.keys() | CLASS_ATTRIBUTES.keys()
    assert {name: signature(getattr(SoftValue, name)) for name in HOOKS} == HOOKS
    assert {name: getattr(SoftValue, name) for name in CLASS_ATTRIBUTES} == CLASS_ATTRIBUTES


def test_estimators_that_ship():
    shipped = {name for name, one in SoftValue.registry.items() if one.__module__.startswith("tbrm_trl.")}
    assert shipped == ESTIMATORS


def test_what_an_estimator_is_given():
    assert [field.name for field in fields(ValueInputs)] == (
        "policy_value ref_value hidden log_ratio reward value group counted beta".split()
    )


def test_what_an_estimator_may_ask():
    names = {name for name in {*inspect.get_annotations(Run), *vars(Run)} if not name.startswith("_")}
    assert names == RUN_ATTRIBUTES | RUN_METHODS.keys()
    assert {name: signature(getattr(Run, name)) for name in RUN_METHODS} == RUN_METHODS
