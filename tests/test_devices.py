"""Runs on a device that is not the CPU: no operation mixes devices, and the weights are those of a run on the CPU."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from accelerate.utils import send_to_device
from common.tiny import letters, save_value_model, tokenizer
from datasets import Dataset
from helpers import benchmark_runs
from helpers.pretended_device import DEVICE, pretended_device
from helpers.runs import DATA, build, differ, digits, log, logged, train
from helpers.scripted import script, scripted_trainer
from helpers.writers import made_rows, write_record
from peft import LoraConfig
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, GenerationConfig

from tbrm_trl import TBRMTrainer
from tbrm_trl.evaluation.callback import EvaluationCallback
from tbrm_trl.evaluation.sampling import Sampling, draw
from tbrm_trl.model.decoding import Slots

ON_DEVICE: dict[str, Any] = dict(
    use_cpu=False, optim="adamw_torch", dataloader_pin_memory=False, max_completion_length=5
)  # fmt: skip
LOGGED: dict[str, Any] = dict(train_dataset=Dataset.from_list(log()), reward_funcs=None)
GROUPS: dict[str, Any] = dict(num_generations=2, per_device_train_batch_size=4)
MIXED = [
    *({"prompt": f"{i}!", "completion": None, "reward": None} for i in range(8)),
    *({"prompt": f"{i}", "completion": "abc"[: i % 3 + 1], "reward": None if i % 2 else 0.5} for i in range(8)),
]
LORA = LoraConfig(r=4, target_modules="all-linear")

# What a run computes, each in one run at least.
CASES: dict[str, dict[str, Any]] = {
    "policy": dict(gradient_checkpointing=True, gradient_accumulation_steps=2, save_rollouts=True),
    "calibrated": dict(soft_value="calibrated", truncation="bootstrap", padding_free=True),
    "group": dict(soft_value="group", rollout_pool=4, **GROUPS),
    "log_mean_exp": dict(soft_value="log_mean_exp", loss_units="logits", **GROUPS),
    "learned": dict(soft_value="learned", length_normalized=True, reward_baseline="batch_mean"),
    "tracked": dict(soft_value="tracked", soft_value_tracks="value", soft_value_offset=True),
    "optimal": dict(soft_value="optimal", soft_value_samples=2, train_dataset=DATA.select(range(2))),
    "partition": dict(soft_value="partition", **LOGGED),
    "zero": dict(soft_value="zero", reward_baseline="0.5", reference="previous", num_iterations=2),
    "token": dict(residual="token"),
    "replay": dict(replay_buffer_size=8, num_iterations=2, max_steps=3, token_fraction=0.5),
    "prioritized replay": dict(
        replay_buffer_size=8, replay_sampling="prioritized", num_iterations=2, token_fraction=0.5, token_selection="cut"
    ),
    "logged": dict(truncation="mask", **LOGGED),
    "logged, scored later": dict(precompute_ref_log_probs=False, sft_coef=0.1, entropy_advantage_coef=0.1, **LOGGED),
    "logged and rolled out": dict(train_dataset=Dataset.from_list(MIXED), logged_fraction=0.5),
    "LoRA": dict(peft_config=LORA, sync_ref_model=True, ref_model_mixup_alpha=1.0, ref_model_sync_steps=1),
    "half precision": dict(
        model_init_kwargs={"dtype": "bfloat16"}, cast_lm_head_to_fp32=True, sync_ref_model=True, ref_model_sync_steps=1
    ),
    "two rewards": dict(reward_funcs=[letters, digits], reward_pessimism=0.5, reward_on_error="skip"),
    "evaluation": dict(eval_dataset=DATA.select(range(2)), eval_strategy="steps", eval_steps=1, log_completions=True),
    "micro-batches of tokens": dict(max_tokens_per_microbatch=24, reward_baseline="group_mean", **GROUPS),
}


@pytest.fixture
def device():
    with pretended_device() as given:
        yield given


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=DEVICE)


# ---- the device itself -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mix",
    [
        lambda: vector(1, 2) + torch.ones(2),
        lambda: torch.ones(2) + vector(1, 2).sum(),
        lambda: torch.tensor(1.0).add_(vector(1, 2).sum()),
        lambda: torch.ones(2).mul_(vector(1, 2)),
        lambda: vector(1, 2) @ torch.ones(2),
        lambda: torch.cat([vector(1), torch.ones(1)]),
        lambda: torch.stack([vector(1, 2).sum(), torch.tensor(1.0)]),
        lambda: torch.where(vector(1, 2) > 1, vector(1, 2), torch.ones(2)),
        lambda: vector(1, 2).masked_fill(torch.tensor([True, False]), 0.0),
        lambda: torch.ones(2)[vector(1, 2) > 1],
        lambda: vector(1, 2).index_put_((torch.tensor([0, 1]),), torch.ones(2)),
        lambda: vector(1, 2).gather(0, torch.tensor([0])),
        lambda: torch.equal(vector(1, 2), torch.ones(2)),
        lambda: torch.add(vector(1, 2), 1, out=torch.empty(2)),
        lambda: nn.Linear(2, 1)(vector(1, 2)),
        lambda: nn.Linear(2, 1, device=DEVICE)(torch.ones(2)),
        lambda: torch.rand(2, device=DEVICE, generator=torch.Generator()),
    ],
)
def test_what_a_gpu_refuses_is_refused(mix, device):
    with pytest.raises(RuntimeError, match=r"^Expected (all tensors to be on the same device|a 'lazy' device type)"):
        mix()


@pytest.mark.parametrize("read", [lambda x: x.numpy(), lambda x: memoryview(x), lambda x: torch.from_numpy(x)])
def test_no_values_without_a_copy(read, device):
    with pytest.raises((RuntimeError, TypeError)):
        read(vector(1, 2))


@pytest.mark.parametrize(
    ("allowed", "value"),
    [
        (lambda: vector(1, 2) * torch.tensor(2.0), [2, 4]),
        (lambda: vector(1, 2)[torch.tensor([False, True])], [2]),
        (lambda: vector(1, 2)[[1, 0]], [2, 1]),
        (lambda: vector(1, 2).index_put_((torch.tensor([0]),), torch.tensor(5.0)), [5, 2]),
        (lambda: vector(1, 2).copy_(torch.ones(2)), [1, 1]),
        (lambda: torch.ones(2).to(vector(1, 2)), [1, 1]),
        (lambda: vector(1, 2).new_tensor([3.0]) + vector(1), [4]),
        (lambda: torch.arange(2, device=DEVICE) + torch.zeros_like(vector(1, 2)), [0, 1]),
        (lambda: torch.tensor([vector(1, 2).sum(), 4.0], device=DEVICE), [3, 4]),
        (
            lambda: torch.full((2,), math.pi, device="lazy").where(vector(1, 0) > 0, 0),
            [torch.tensor(math.pi).item(), 0],
        ),
    ],
)
def test_what_a_gpu_takes_is_taken(allowed: Callable[[], Tensor], value, device):
    assert allowed().device == DEVICE
    assert allowed().cpu().device.type == "cpu"
    assert allowed().tolist() == value


def test_changes_in_place_are_seen_through_views(device):
    values = vector(1, 2, 3)
    assert values.add_(1) is values
    values[1:].mul_(2)
    values.view(3, 1)[0] = 7
    assert values.tolist() == [7, 6, 8] and values[1].item() == 6


def test_a_module_learns_as_on_the_cpu(device):
    """Gradients, clipping and three steps of Adam; tied weights stay tied."""
    torch.manual_seed(0)
    module, states = nn.Sequential(nn.Embedding(5, 4), nn.Tanh(), nn.Linear(4, 5, bias=False)), torch.arange(5)
    module[2].weight = module[0].weight
    there = copy.deepcopy(module).to(DEVICE)
    assert there[2].weight is there[0].weight and isinstance(there[0].weight, nn.Parameter)
    for one, inputs in ((module, states), (there, states.to(DEVICE))):
        optimizer = torch.optim.AdamW(one.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            nn.functional.cross_entropy(one(inputs), inputs.flip(0)).backward()
            nn.utils.clip_grad_norm_(one.parameters(), 0.1)
            optimizer.step()
    assert there[0].weight.grad.device == DEVICE
    torch.testing.assert_close(there[0].weight.cpu(), module[0].weight)


# ---- runs on it ------------------------------------------------------------------------------------------------------


def on_device(*given: Any, **options: Any) -> Any:
    """A run of `helpers.runs.train` on the device."""
    trainer = train(*given, **ON_DEVICE | options)
    assert trainer.accelerator.device == DEVICE
    assert {one.device for one in trainer.model.parameters()} == {DEVICE}
    assert all(one.isfinite().all() for one in trainer.model.parameters())
    return trainer


@pytest.mark.parametrize("case", CASES)
def test_trains(case, device, llama, tmp_path):
    on_device(llama, tmp_path, **CASES[case])


def test_the_weights_are_the_cpus(llama, tmp_path):
    """The same tokens are drawn, and SGD, which amplifies no rounding, ends at the same weights."""
    options = ON_DEVICE | dict(
        optim="sgd", learning_rate=0.1, max_steps=3, model_init_kwargs={"attn_implementation": "eager"}
    )
    here = train(llama, tmp_path / "here", **options | dict(use_cpu=True))
    with pretended_device():
        there = on_device(llama, tmp_path / "there", **options)
        weights = [one.detach().cpu() for one in there.model.parameters()]
    for window, other in zip(here.windows, there.windows, strict=True):
        assert [t.completion_ids.tolist() for t in window] == [t.completion_ids.tolist() for t in other]
    for one, other in zip(here.model.parameters(), weights, strict=True):
        torch.testing.assert_close(one.detach(), other, atol=1e-6, rtol=0)


def test_tool_masks(device, llama, tmp_path):
    trainer = scripted_trainer(llama, script(unscored=(1,)), tmp_path, **ON_DEVICE | dict(max_grad_norm=1.0))
    trainer.train()
    assert all(map(math.isfinite, trainer.losses)) and any(g.any() for g in trainer.recorder.gradients[0].values())


def test_models_as_reward_and_as_value(device, llama, tmp_path):
    folder = save_value_model(tmp_path / "value", "llama")
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    on_device(llama, tmp_path, [model, letters], reward_processing_classes=[tokenizer(), None], soft_value="model",
              soft_value_model=folder)  # fmt: skip


def test_rollouts_of_others(device, llama, tmp_path):
    write_record(tmp_path / "records", "other", 0, made_rows(8))
    on_device(llama, tmp_path, None, None, follow_rollouts=str(tmp_path / "records"))


def test_evaluation_on_a_benchmark(device, llama, tmp_path):
    callback = EvaluationCallback([benchmark_runs.LETTERS], benchmark_runs.SETTINGS)
    trainer = build(llama, tmp_path, trainer_class=TBRMTrainer, callbacks=[callback], eval_strategy="steps",
                    eval_steps=1, **ON_DEVICE)  # fmt: skip
    trainer.train()
    assert all(map(math.isfinite, logged(trainer, benchmark_runs.NAME)))


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(top_p=0.5, top_k=3)])
def test_draws_under_deterministic_algorithms(sampling, device):
    """A GPU has no deterministic cumulative sum."""
    logits = torch.randn(4, 9, generator=torch.Generator().manual_seed(0))  # (B, V)
    numbers = torch.linspace(0, 0.9, 4, dtype=torch.float64)  # (B,)
    drawn = draw(logits, numbers, sampling).tolist()
    torch.use_deterministic_algorithms(True)
    try:
        assert draw(logits.to(DEVICE), numbers.to(DEVICE), sampling).tolist() == drawn
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_pool_of_a_model_whose_weights_lie_elsewhere(device, llama):
    """Weights that FSDP2 offloads are on the CPU. It moves the inputs to the device, and the logits are there."""
    model: Any = AutoModelForCausalLM.from_pretrained(llama).to(DEVICE).eval()
    model.register_forward_pre_hook(lambda module, args, given: (args, send_to_device(given, DEVICE)), with_kwargs=True)
    config = GenerationConfig(do_sample=False, max_new_tokens=3)
    config._eos_token_tensor = torch.tensor([1])
    rows: list[Any] = [SimpleNamespace(prompt_ids=one, completion_ids=[]) for one in ([5, 6, 7], [8], [8])]
    waiting = list(rows)
    with torch.no_grad(), patch.object(type(model), "device", torch.device("cpu")):
        slots = Slots(model, config, 2, device=DEVICE)
        slots.run(
            lambda free: [waiting.pop() for _ in range(min(free, len(waiting)))], lambda: not waiting and not slots.rows
        )
    assert all(1 <= len(row.completion_ids) <= 3 for row in rows)


@pytest.mark.parametrize(
    "options", [dict(soft_value="learned", replay_buffer_size=8, num_iterations=2), dict(peft_config=LORA)]
)
def test_resumes(options, device, llama, tmp_path):
    options = dict(save_strategy="steps", save_steps=1, save_rollouts=True, logging_steps=2, **ON_DEVICE | options)
    train(llama, tmp_path, **options)
    trainer = build(llama, tmp_path, **options | dict(max_steps=4))
    start = [one.detach().clone() for one in trainer.model.parameters()]
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 4 and differ(start, trainer.model.parameters())
