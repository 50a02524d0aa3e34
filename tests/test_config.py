"""Options: every one of TRL's is accounted for, and errors say which number to change."""

from __future__ import annotations

import inspect
import math
import re
import warnings
from types import SimpleNamespace

import pytest
from helpers.runs import config
from transformers import HfArgumentParser
from trl import GRPOConfig

from tbrm_trl import TBRMConfig
from tbrm_trl.checks.options import COUNTS, check_batch_arithmetic
from tbrm_trl.checks.trl_options import GIVEN_A_MEANING, KEPT, REFUSED


def test_every_grpo_option_is_in_exactly_one_list():
    declared = set(inspect.get_annotations(GRPOConfig))
    lists = [set(KEPT), set(GIVEN_A_MEANING), set(REFUSED)]
    assert declared == set.union(*lists)
    assert sum(map(len, lists)) == len(declared)


def test_published_defaults():
    default = config()
    assert (default.beta, default.num_generations, default.learning_rate, default.temperature) == (
        0.002,
        1,
        2.5e-6,
        1.0,
    )
    assert (default.soft_value, default.loss_units, default.disable_dropout) == ("policy", "reward", True)


OTHER_VALUES = {
    "loss_type": "grpo",
    "importance_sampling_level": "sequence",
    "multi_objective_aggregation": "normalize_then_sum",
    "scale_rewards": "none",
    "vllm_importance_sampling_mode": "token_mask",
}


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_options_without_meaning_are_refused(name):
    default = TBRMConfig.__dataclass_fields__[name].default
    value = OTHER_VALUES.get(name, not default if isinstance(default, bool) else 0.123)
    with pytest.raises(ValueError, match=f"`{name}=.*has no meaning for TBRM: {REFUSED[name][:20]}"):
        config(**{name: value})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0.0}, "`beta=0.0` is refused"),
        ({"beta": -1.0}, "`beta=-1.0` is refused"),
        ({"temperature": 0.0}, "`temperature=0.0` is refused"),
        ({"disable_dropout": False}, "dropout biases the squared residual"),
        ({"soft_value": "critic"}, "Choose one of calibrated, .*policy"),
        ({"loss_units": "nats"}, "Choose one of reward, logits"),
        ({"num_generations": 0}, "`num_generations=0` is refused: it must be at least 1"),
        ({"bf16_full_eval": True}, "`bf16_full_eval=True` is refused: .* half precision"),
        ({"fp16_full_eval": True}, "`fp16_full_eval=True` is refused: .* half precision"),
        ({"label_smoothing_factor": 0.1}, "`label_smoothing_factor=0.1` is refused"),
        ({"train_sampling_strategy": "sequential"}, "use `shuffle_dataset=False`"),
        ({"max_completion_length": None}, "`max_completion_length=None` is refused"),
        ({"accelerator_config": {"split_batches": True}}, "`split_batches=True` is refused: each process would get"),
        (
            {"accelerator_config": {"gradient_accumulation_kwargs": {"num_steps": 3}}},
            "is refused: .* in place of gradient_accumulation_steps=.*Set gradient_accumulation_steps=3",
        ),
        ({"dataloader_in_order": False}, "would repeat some windows and lose others"),
        ({"dataloader_drop_last": True}, "would leave out the rows of the last batch"),
        (
            {"per_device_train_batch_size": 5, "num_generations": 2},
            "Make it 4 or 6, or use num_generations=1",
        ),
        (
            {"per_device_train_batch_size": 4, "generation_batch_size": 12, "num_generations": 8},
            "Make it 8 or 16, or use num_generations=1",
        ),
        ({"neftune_noise_alpha": 5.0}, "noisy embeddings bias the squared residual"),
        (
            {"gradient_accumulation_steps": 4, "steps_per_generation": 6},
            "Set steps_per_generation to 4 or 8 .*gradient_accumulation_steps to a divisor of 6",
        ),
        (
            {"gradient_accumulation_steps": 4, "steps_per_generation": 2},
            "Set steps_per_generation to 4 .*gradient_accumulation_steps to a divisor of 2",
        ),
    ],
)
def test_bad_numbers_say_what_to_change(options, message):
    with pytest.raises(ValueError, match=message):
        config(**options)


# One refused option of TRL's, of transformers', and of each of this library's checks, with what its error must name.
AT_ONCE = {
    "epsilon": (0.3, "`epsilon=0.3` has no meaning for TBRM: .*Leave it at 0.2"),
    "loss_type": ("grpo", "`loss_type='grpo'` has no meaning for TBRM: .*Leave it at 'dapo'"),
    "disable_dropout": (False, "`disable_dropout=False` is refused.*Leave it at True"),
    "beta": (0.0, "`beta=0.0` is refused.*Use about 0.02"),
    "truncated_reward": (0.5, "`truncated_reward=0.5` has no effect with `truncation='terminal'`"),
    "sft_threshold": (0.5, "`sft_threshold=0.5` has no effect without `sft_coef`. Set that too"),
    "token_fraction": (2.0, r"`token_fraction=2.0` must lie in \(0, 1\]"),
    "generation_kwargs": (
        '{"eos_token_id": 7}',
        "`generation_kwargs` with eos_token_id is refused.*Set the end tokens",
    ),
    "soft_value_model": ("a/model", "`soft_value_model='a/model'` has no effect with `soft_value='policy'`"),
    "replay_max_age": (3, "`replay_max_age=3` needs a buffer: set `replay_buffer_size`"),
    "ds3_gather_for_generation": (False, "`ds3_gather_for_generation=False` with `use_vllm=True` is refused"),
    "steps_per_generation": (3, "steps_per_generation=3 is not a multiple of gradient_accumulation_steps=2"),
}


def test_all_that_is_refused_is_named_at_once():
    """One error has a line for each of TRL's options without a meaning and for each contradiction."""
    given = {name: value for name, (value, _) in AT_ONCE.items()}
    with pytest.raises(ValueError) as error:
        config(gradient_accumulation_steps=2, use_vllm=True, **given)
    title, *lines = str(error.value).split("\n- ")
    assert title == f"{len(AT_ONCE)} options are refused:" and len(lines) == len(AT_ONCE)
    for _, message in AT_ONCE.values():
        assert sum(re.search(message, line) is not None for line in lines) == 1, message


@pytest.mark.parametrize(
    ("options", "messages"),
    [
        ({"bf16": True, "fp16": True, "epsilon": 0.3}, ["At most one of fp16 and bf16", "`epsilon=0.3`"]),
        ({"num_generations": 0, "beta": 0.0}, ["`num_generations=0` is refused", "`beta=0.0`"]),
        ({"soft_value": "critic", "delta": 1.0}, ["`soft_value='critic'` is unknown", "`delta=1.0`"]),
        ({"num_generations": 3, "delta": 1.0}, ["whole groups of num_generations=3", "`delta=1.0`"]),
        (
            {"soft_value": "optimal", "sync_ref_model": True, "top_k": 5, "remove_unused_columns": True},
            ["is made of samples of the initial reference", "'top_k': 5.*is refused", "would drop the column"],
        ),
        (
            {"soft_value": "partition", "reference": "previous", "precompute_ref_log_probs": False},
            ["one fixed reference", "Leave `precompute_ref_log_probs` at None"],
        ),
    ],
)
def test_what_stops_the_derivation_hides_nothing(options, messages):
    with pytest.raises(ValueError) as error:
        config(**options)
    assert all(re.search(message, str(error.value)) for message in messages)


def test_one_rollout_and_one_row():
    one = config(num_generations=1, per_device_train_batch_size=1)
    assert (one.generation_batch_size, one.steps_per_generation) == (1, 1)


@pytest.mark.parametrize(
    "options",
    [
        {"top_p": 0.9},
        {"top_k": 5},
        {"min_p": 0.1},
        {"repetition_penalty": 1.2},
        {"generation_kwargs": {"top_k": 5}},
        {"generation_kwargs": {"do_sample": False}},
        {"generation_kwargs": {"typical_p": 0.9}},
    ],
)
def test_sampling_filters_warn(options):
    with pytest.warns(UserWarning, match="makes the sampler another policy"):
        config(**options)


def test_a_top_k_of_none_is_0():
    """transformers would draw from the first 50 tokens."""
    assert config(top_k=None).top_k == config().top_k == 0
    assert config(generation_kwargs={"top_k": None}).generation_kwargs == {"top_k": 0}
    assert config(top_k=None).sampling_filters() == {}


def test_a_signal_must_not_end_the_loader_before_the_checkpoint():
    with pytest.raises(ValueError, match="also end the data loader's processes"):
        config(enable_jit_checkpoint=True, dataloader_num_workers=1)


def test_loaders_are_not_kept_for_other_sets():
    with pytest.raises(ValueError, match="keeps the loader of a first evaluation for later ones"):
        config(dataloader_persistent_workers=True, dataloader_num_workers=1)


@pytest.mark.parametrize("name", ["max_new_tokens", "max_length", "max_tokens"])
def test_one_option_says_how_long_completions_are(name):
    with pytest.raises(ValueError, match=f"`generation_kwargs` with {name} is refused: .* `max_completion_length`"):
        config(generation_kwargs={name: 5})


def test_no_warning_without_filters():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        config(generation_kwargs={"top_p": 1.0, "do_sample": True, "use_cache": True})


def test_command_line():
    (parsed,) = HfArgumentParser(TBRMConfig).parse_args_into_dataclasses(
        [
            "--output_dir",
            "unused",
            "--beta",
            "0.02",
            "--soft_value",
            "calibrated",
            "--bf16",
            "false",
            "--use_cpu",
            "true",
        ]
    )
    assert (parsed.beta, parsed.soft_value) == (0.02, "calibrated")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"replay_buffer_size": 7, "num_iterations": 2}, r"smaller than one update of 8 trajectories .*Set it to 8"),
        ({"replay_buffer_size": 16}, "no effect with `num_iterations=1`"),
        ({"replay_buffer_size": 16, "num_iterations": 2, "replay_max_age": 0}, "at least 1 update"),
        ({"replay_buffer_size": 16, "num_iterations": 2, "replay_sampling": "recent"}, "one of uniform, prioritized"),
        (
            {"replay_buffer_size": 16, "num_iterations": 2, "replay_priority_exponent": 0.9},
            '`replay_priority_exponent=0.9` has no effect without `replay_sampling="prioritized"`',
        ),
        ({"replay_max_age": 3}, "needs a buffer: set `replay_buffer_size`"),
        ({"replay_sampling": "prioritized"}, "needs a buffer: set `replay_buffer_size`"),
        ({"reference": "next"}, "one of initial, previous"),
        ({"reference": "previous", "sync_ref_model": True}, "the previous policy is the reference already"),
        ({"precompute_ref_log_probs": True, "sync_ref_model": True}, "would go stale at the first sync"),
        ({"save_on_each_node": True, "sync_ref_model": True}, "saved on the first machine alone"),
        ({"sync_ref_model": True, "ref_model_mixup_alpha": 1.5}, r"must lie in \(0, 1\]"),
        ({"sync_ref_model": True, "ref_model_sync_steps": 0}, "must be at least 1"),
    ],
)
def test_bad_replay_and_references_say_what_to_change(options, message):
    with pytest.raises(ValueError, match=message):
        config(per_device_train_batch_size=8, **options)


OFFLOADED = {"stage": 2, "offload_optimizer": {"device": "cpu"}}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_vllm": True, "ds3_gather_for_generation": False}, "`ds3_gather_for_generation=False` with `use_vllm"),
        ({"fsdp": True, "fsdp_config": {"version": 1}}, "FSDP version 1 is refused.*Put `fsdp_version: 2`"),
        ({"fsdp": True, "optim": "adamw_8bit"}, "`optim='adamw_8bit'` under FSDP2 is refused.*'adamw_torch'"),
        (
            {"deepspeed": {"zero_optimization": OFFLOADED}, "optim": "paged_adamw_8bit"},
            "`optim='paged_adamw_8bit'` with DeepSpeed's optimizer offload is refused.*Use optim='adamw_torch'",
        ),
        (
            {"deepspeed": {"zero_optimization": OFFLOADED}, "optim": "sgd"},
            "`optim='sgd'` with DeepSpeed's optimizer off",
        ),
        (
            {"deepspeed": {"zero_optimization": {"stage": 0}}},
            "DeepSpeed without ZeRO is refused: it steps inside backward",
        ),
        (
            {"deepspeed": {"zero_optimization": {"stage": 2, "compute_grad_norm": False}}},
            "DeepSpeed's `zero_optimization.compute_grad_norm=false` is refused",
        ),
        (
            {
                "deepspeed": {
                    "bf16": {"enabled": True, "check_grad_overflow": False},
                    "zero_optimization": {"stage": 2},
                },
                "bf16": True,
            },
            "DeepSpeed's `bf16.check_grad_overflow=false` is refused",
        ),
    ],
)
def test_launches_that_cannot_work(options, message):
    with pytest.raises(ValueError, match=message):
        config(**options)


def test_launches_that_work():
    """8-bit optimizers under ZeRO itself, and where DeepSpeed is told to take them; FSDP2; offload as usual."""
    own = {"zero_optimization": OFFLOADED, "zero_force_ds_cpu_optimizer": False}
    config(deepspeed={"zero_optimization": {"stage": 3}}, optim="adamw_8bit")
    config(deepspeed=own, optim="adamw_8bit")
    config(deepspeed={"zero_optimization": OFFLOADED, "optimizer": {"type": "Adam"}}, optim="sgd")
    config(deepspeed={"zero_optimization": OFFLOADED}, optim="adamw_torch")
    for nothing in (None, {"device": "none"}):
        config(deepspeed={"zero_optimization": {"stage": 2, "offload_optimizer": nothing}}, optim="adamw_8bit")
        config(deepspeed={"zero_optimization": {"stage": 3, "offload_param": nothing}}, optim="adamw_8bit")
    config(fsdp=True, fsdp_config={"version": 2})
    unused = {"enabled": False, "check_grad_overflow": False}
    config(deepspeed={"zero_optimization": {"stage": 2}, "bf16": unused}, optim="adamw_8bit")


def test_fsdp_version_of_the_launcher(monkeypatch):
    """`accelerate launch` sets it in the environment, to 1 if its file has none."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="FSDP version 1 is refused"):
        config()
    monkeypatch.setenv("FSDP_VERSION", "2")
    config()


@pytest.mark.parametrize(("stage", "gather", "warned"), [(3, False, 1), (3, True, 0), (2, False, 0)])
def test_generation_without_gathering(stage, gather, warned, recwarn):
    config(deepspeed={"zero_optimization": {"stage": stage}}, ds3_gather_for_generation=gather)
    assert sum("gathers all weights once, layer by layer" in str(w.message) for w in recwarn) == warned


BUFFER = dict(replay_buffer_size=8, num_iterations=2)


NUMBERS = ("temperature", "top_p", "adam_beta1", "num_train_epochs", "repetition_penalty")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rate": -1e-6}, "`learning_rate=-1e-06` must be 0 or positive"),
        ({"learning_rate": math.inf}, "`learning_rate=inf` must be 0 or positive"),
        ({"beta": 10**400}, "`beta=10"),
        *(({name: 0}, f"`{name}=0` is refused: it must be at least 1") for name in COUNTS),
        ({"temperature": math.inf}, "`temperature=inf` is refused"),
        *(({name: math.nan}, f"`{name}=nan` is refused: it is no number") for name in NUMBERS),
        ({"soft_value": "zero", "reward_baseline": 1e30}, "`reward_baseline=1e.30` is refused: .* up to 2e.15"),
        ({"soft_value": "zero", "reward_baseline": "-1e30"}, "`reward_baseline=-1e30` is refused: .* up to 2e.15"),
        ({"logged_fraction": 1.5}, r"`logged_fraction=1\.5` must lie between 0 and 1"),
        ({"max_prompt_length": 0}, "`max_prompt_length=0` must be at least 1"),
        ({"max_skipped_updates": 0}, "`max_skipped_updates=0` must be at least 1"),
        ({"max_tokens_per_microbatch": 0}, "`max_tokens_per_microbatch=0` must be at least 1"),
        ({"max_tokens_per_microbatch": 9, "gradient_accumulation_steps": 2}, "divides an update into micro-batches"),
        ({"truncation": "bootstrap", "truncated_reward": math.inf}, "`truncated_reward=inf` must be a finite number"),
        ({"sft_coef": 0.1, "sft_threshold": math.nan}, "`sft_threshold=nan` must be a finite number"),
        ({"truncation": "bootstrap", "truncated_reward": 1e38}, "`truncated_reward=1e.38` must be .* at most 2e.15"),
        ({"reward_weights": [1.0, math.nan]}, r"`reward_weights=\[1\.0, nan\]` must be finite"),
        (BUFFER | {"replay_max_age": 0}, "`replay_max_age=0` must be at least 1 update"),
        (BUFFER | {"num_iterations": 1}, "`replay_buffer_size` has no effect with `num_iterations=1`"),
        (BUFFER | {"residual": "token"}, "the buffer keeps the sum of the reference's"),
        (
            BUFFER | {"replay_sampling": "prioritized", "replay_priority_exponent": 1.5},
            r"`replay_priority_exponent=1\.5` must lie between 0 and 1",
        ),
    ],
    ids=str,
)
def test_numbers_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        config(**dict(per_device_train_batch_size=4) | options)


def test_rows_are_whole_and_evenly_divided_on_several_processes(monkeypatch):
    """A process without its share of the rows, or with another's, would leave the others waiting."""
    monkeypatch.setattr(TBRMConfig, "world_size", 2)
    with pytest.raises(ValueError, match="`even_batches=False` is refused: a process with fewer rows would leave"):
        config(accelerator_config={"even_batches": False})
    monkeypatch.setattr(TBRMConfig, "world_size", 1)
    config(accelerator_config={"even_batches": False})
    args = config()
    args.parallelism_config = SimpleNamespace(tp_size=2)
    assert ["those that share tensors would need the same rows" in one for one in check_batch_arithmetic(args)] == [
        True
    ]
