"""Syncs of the reference: full models and adapters, one process and every way to shard over two."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType, gather_object
from common.launch import allow_fsdp_on_cpu, free_port
from common.tiny import perturb, save
from helpers.forked import launch
from helpers.oracle import TOLERANCE, plain, solve
from helpers.runs import before_each_update, build
from helpers.scripted import script, scripted_trainer
from helpers.sharded import whole
from peft import LoraConfig, get_peft_model
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from tbrm_trl.model.publisher import _published
from tbrm_trl.model.reference import keep_precision_of_scores
from tbrm_trl.trajectory import Trajectory

ZERO = pytest.approx(0, abs=1e-5)
SYNC: dict[str, Any] = dict(
    sync_ref_model=True, ref_model_sync_steps=2, learning_rate=0.01, lr_scheduler_type="constant"
)


def lora_config() -> LoraConfig:
    return LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.0)


def test_scores_under_fsdp2_keep_their_precision():
    """By default accelerate rounds the whole model's output to the compute dtype."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16, output_dtype=torch.bfloat16)
    for given, expected in ((policy, replace(policy, output_dtype=None)), (None, None)):
        plugin = SimpleNamespace(mixed_precision_policy=given)
        keep_precision_of_scores(SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin)))
        assert plugin.mixed_precision_policy == expected


@pytest.mark.parametrize("lora", [False, True])
def test_layers_wrapped_for_activation_checkpointing(lora, qwen2, tmp_path):
    """FSDP2's `activation_checkpointing` wraps the policy's layers alone, which gives their weights other names."""
    trainer = build(
        qwen2, tmp_path, **SYNC, ref_model_mixup_alpha=1.0, **({"peft_config": lora_config()} if lora else {}),
    )  # fmt: skip
    policy = trainer.model.get_base_model() if lora else trainer.model
    key, names = trainer._reference.key, _published(trainer.model).keys()
    for name, layer in list(policy.named_modules()):
        if type(layer).__name__.endswith("DecoderLayer"):
            policy.set_submodule(name, checkpoint_wrapper(layer))
    trainer._reference.renew_key()
    assert trainer._reference.key == key and _published(trainer.model).keys() == names
    perturb(torch.nn.ParameterList([p for p in trainer.model.parameters() if p.requires_grad]))
    trainer._reference.sync(1.0)
    trained, synced = trainer._reference._trained(), trainer._reference._synced()
    assert synced and all(torch.equal(trained[name], parameter) for name, parameter in synced.items())
    assert trainer._reference.key != key


@pytest.mark.parametrize(("distributed", "given"), [("NO", {}), ("MULTI_GPU", {"device_map": None})])
def test_a_reference_by_name_is_not_spread_over_gpus(distributed, given, qwen2, tmp_path, monkeypatch):
    """By TRL's default each process would spread it over all of them."""
    trainer, seen = scripted_trainer(qwen2, script(), tmp_path), {}

    def create(name, **options):
        seen.update(options)
        return AutoModelForCausalLM.from_pretrained(name)

    monkeypatch.setattr("tbrm_trl.trainer.create_model_from_path", create)
    monkeypatch.setattr(type(trainer.accelerator), "distributed_type", DistributedType[distributed])
    monkeypatch.setattr(trainer.accelerator, "prepare_model", lambda model, **options: model)
    trainer._load_reference(qwen2)
    assert {name: seen[name] for name in ("device_map",) if name in seen} == given


def test_a_reference_has_no_revision_of_the_policys(qwen2, tmp_path, monkeypatch):
    """`revision` in `model_init_kwargs` is one of the policy's repository."""
    trainer, seen = scripted_trainer(qwen2, script(), tmp_path, model_init_kwargs={"revision": "main"}), {}

    def create(name, **options):
        seen.update(options)
        return AutoModelForCausalLM.from_pretrained(name)

    monkeypatch.setattr("tbrm_trl.trainer.create_model_from_path", create)
    trainer._load_reference(qwen2)
    assert "dtype" in seen and "revision" not in seen


def test_the_policy_is_not_its_own_reference(qwen2, tmp_path):
    policy = AutoModelForCausalLM.from_pretrained(qwen2)
    with pytest.raises(ValueError, match="`reference_model` is the policy itself"):
        build(policy, tmp_path, reference_model=policy)
    given = build(policy, tmp_path, reference_model=Path(qwen2))  # a path is a name
    assert given.ref_model is not given.model


# ---- one process -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [1.0, 0.3])
def test_the_reference_follows_the_formula(alpha, tmp_path):
    """It does so after every second update, to the bit. Each loss is that of brute force with the current reference."""
    trainer = scripted_trainer(
        save(tmp_path / "model"), script(), tmp_path, num_iterations=5, max_steps=5, ref_model_mixup_alpha=alpha, **SYNC
    )
    kept = before_each_update(trainer, lambda: (plain(trainer.model), plain(trainer.ref_model)))
    trainer.train()
    expected = {name: p.float() for name, p in kept[0][1].named_parameters()}
    for update, (policy, reference) in enumerate(kept):
        if update in (2, 4):
            weights = dict(policy.named_parameters())
            expected = {n: (p * (1 - alpha)).add(weights[n].float(), alpha=alpha) for n, p in expected.items()}
        assert all(torch.equal(p.float(), expected[name]) for name, p in reference.named_parameters())
        answer = solve(policy, reference, trainer.windows[0], beta=0.1)
        assert trainer.losses[update] == pytest.approx(answer.loss, rel=TOLERANCE)


def test_a_replayed_trajectory_is_scored_again_only_by_another_reference(tmp_path):
    trainer = scripted_trainer(
        save(tmp_path / "model"), script(), tmp_path, per_device_train_batch_size=4, num_iterations=3, max_steps=15,
        replay_buffer_size=12, **SYNC | dict(ref_model_sync_steps=4),
    )  # fmt: skip
    counted, updates = 0, []  # rows the reference has read; of each update, its trajectories and that count

    def count(module, args, kwargs):
        nonlocal counted
        counted += len(kwargs["input_ids"])

    trainer.ref_model.base_model.register_forward_pre_hook(count, with_kwargs=True)
    collect = trainer._collect

    def keep(rows):
        update, held = collect(rows), trainer._replay.stored
        updates.append(({row.number for row in update}, held.end, counted, trainer._reference.key))
        return update

    trainer._collect = keep
    trainer.train()
    before, free, renewed = 0, 0, 0
    scored_by: dict[int, str] = {}  # by number in the buffer, the reference that scored it last
    for numbers, end, after, key in updates:
        fresh = end - len(scored_by)
        scored_by |= dict.fromkeys(range(end - fresh, end), key)
        if numbers == {None}:
            assert after - before == fresh == 4
        else:
            stale = {number for number in numbers if scored_by[number] != key}
            assert after - before == len(stale)
            scored_by |= dict.fromkeys(stale, key)
            free, renewed = free + len(numbers - stale), renewed + len(stale)
        before = after
    assert renewed >= 4 and free >= 4
    assert any(t.ref_key != trainer._reference.key for t in trainer._replay.stored)  # not trained on since then


@pytest.mark.parametrize("policy", ["new adapter", "trained adapter", "4-bit base"])
def test_hard_reset_of_an_adapter(policy, tmp_path):
    """The adapter `ref` takes over the trained one's weights every second update, and nothing else moves it."""
    folder, given = save(tmp_path / "model", "llama"), {}
    model: Any = folder
    if policy == "trained adapter":
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), lora_config())
        perturb(torch.nn.ParameterList([p for p in model.parameters() if p.requires_grad]))
    else:
        given["peft_config"] = lora_config()
    if policy == "4-bit base":
        given["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        )
    trainer = scripted_trainer(model, script(), tmp_path, max_steps=5, ref_model_mixup_alpha=1.0, **SYNC, **given)

    model = trainer.model.train()
    assert set(model.peft_config) == {"default", "ref"} and trainer.ref_model is None
    row = Trajectory(torch.arange(3, 9), torch.arange(20, 28), torch.ones(8, dtype=torch.bool), 1.0, "length")
    batch = trainer._collate([row])
    with torch.no_grad():
        with trainer._reference.module() as reference:
            of_reference = trainer._score(reference, batch)
        with model.disable_adapter():
            of_base = trainer._score(model, batch)
    starts_at_base = torch.equal(of_reference.log_probs, of_base.log_probs)
    assert starts_at_base == torch.equal(of_reference.soft_value, of_base.soft_value) == (policy != "trained adapter")

    def look():
        parameters = dict(model.named_parameters())
        for name, p in parameters.items():
            assert p.requires_grad == (".default." in name)
            assert p.requires_grad or p.grad is None
        return {name: p.detach().clone() for name, p in parameters.items()}

    kept = before_each_update(trainer, look)
    trainer.train()
    kept.append(look())

    trained = {name for name in kept[0] if ".default." in name}
    assert {id(p) for group in trainer.optimizer.param_groups for p in group["params"]} == {
        id(p) for name, p in model.named_parameters() if name in trained
    }
    for update, weights in enumerate(kept):
        latest_reset = kept[update - update % 2]
        for name in trained:
            ref = weights[name.replace(".default.", ".ref.")]
            assert torch.equal(ref, latest_reset[name]) and ref.dtype == latest_reset[name].dtype
        if update:
            assert any(not torch.equal(weights[name], kept[update - 1][name]) for name in trained)
        assert all(torch.equal(p, kept[0][name]) for name, p in weights.items() if "lora_" not in name)
    ratios = [entry["log_ratio"] for entry in trainer.state.log_history if "log_ratio" in entry]
    assert [ratio == ZERO for ratio in ratios] == [True, False, True, False, True]


@pytest.mark.parametrize("form", ["configuration", "model"])
def test_a_mixture_of_adapters_is_refused_before_anything_is_loaded(form, tmp_path):
    model: Any = "no such folder"
    if form == "model":
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(save(tmp_path / "model")), lora_config())
    adapter = lora_config() if form == "configuration" else None
    with pytest.raises(ValueError, match=r"`ref_model_mixup_alpha=0\.5` is refused with adapters"):
        scripted_trainer(model, script(), tmp_path, peft_config=adapter, ref_model_mixup_alpha=0.5, **SYNC)


# ---- two processes ---------------------------------------------------------------------------------------------------

OPTIONS = dict(num_iterations=3, max_steps=6, save_strategy="steps", save_steps=5, **SYNC)
RUNS: dict[str, dict[str, Any]] = {
    "hard reset": dict(OPTIONS, ref_model_mixup_alpha=1.0, save_strategy="no"),
    "moving average": dict(OPTIONS, ref_model_mixup_alpha=0.5),
    "adapter": dict(OPTIONS, ref_model_mixup_alpha=1.0, lora=True, save_steps=1),
}
STRATEGIES: dict[str, dict[str, Any]] = {
    "MULTI_CPU": {},
    "ZeRO-2": dict(distributed_type="DEEPSPEED", deepspeed_config=dict(zero_stage=2, gradient_accumulation_steps=1)),
    "ZeRO-3": dict(
        distributed_type="DEEPSPEED",
        deepspeed_config=dict(zero_stage=3, gradient_accumulation_steps=1, zero3_init_flag=True),
    ),
    "FSDP2": dict(
        distributed_type="FSDP",
        fsdp_config=dict(
            fsdp_version=2,
            fsdp_auto_wrap_policy="TRANSFORMER_BASED_WRAP",
            fsdp_reshard_after_forward=True,
            fsdp_state_dict_type="SHARDED_STATE_DICT",
            fsdp_cpu_ram_efficient_loading=True,
            fsdp_sync_module_states=True,
        ),
    ),
}


def run(folder: str, out: str, lora=False, loaded=False, resume: str | None = None, **options: Any) -> dict[str, Any]:
    """One run.

    Args:
        folder: of the model.
        out: where checkpoints go.
        lora: train an adapter.
        loaded: pass the model as an object, not as a folder.
        resume: the checkpoint in `out` to resume from.
    """
    adapter = lora_config() if lora else None
    model = AutoModelForCausalLM.from_pretrained(folder) if loaded else folder
    trainer = scripted_trainer(model, script(unscored=(1,)), out, peft_config=adapter, **options)
    references = before_each_update(
        trainer, lambda: (trainer.state.global_step, whole(trainer._reference._synced().items()))
    )
    scored_at = []  # updates made before each forward of the reference
    score = trainer._score

    def watched_score(*args, **kwargs):
        if not torch.is_grad_enabled():
            scored_at.append(trainer.state.global_step)
        return score(*args, **kwargs)

    trainer._score = watched_score
    trainer._logits_are_checked = True  # the check of a sharded model scores too, before the first window
    trainer.train(resume_from_checkpoint=resume and f"{out}/{resume}")
    assert isinstance(next(trainer.model.parameters()), DTensor) == trainer.is_fsdp_enabled
    losses = gather_object([trainer.losses])
    return {
        "strategy": trainer.accelerator.distributed_type.value,
        "losses": [sum(step) / len(losses) for step in zip(*losses, strict=True)],
        "scored_at": scored_at,
        "references": dict(references),
        "reference": whole(trainer._reference._synced().items()),
        "policy": whole(trainer._reference._trained().items()),
    }


def runs(folder: str, out: str, runs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Make all runs, one after the other, in this process."""
    allow_fsdp_on_cpu()
    return {name: run(folder, f"{out}/{options.pop('out', name)}", **options) for name, options in runs.items()}


@pytest.fixture(scope="module")
def in_one_process(qwen2, tmp_path_factory) -> dict[str, dict[str, Any]]:
    out = tmp_path_factory.mktemp("one")
    return {
        name: run(qwen2, str(out / name), per_device_train_batch_size=8, **options | dict(save_strategy="no"))
        for name, options in RUNS.items()
    }


@pytest.mark.parametrize("strategy", list(STRATEGIES))
def test_two_processes_sync_as_one_does(strategy, qwen2, in_one_process, tmp_path):
    """Six updates on two windows, three syncs: within the first window, within the second, and at the end.

    Resumed before the first or after the second, a run ends with the same bits, and scores nothing again.
    """
    asked = {name: dict(options, per_device_train_batch_size=4) for name, options in RUNS.items()}
    asked["hard reset"]["loaded"] = strategy == "FSDP2"  # there, the reference to compare it with is sharded
    resumed = [("moving average", 5), ("adapter", 5), ("adapter", 1)]
    asked |= {f"{name} from {step}": dict(asked[name], out=name, resume=f"checkpoint-{step}") for name, step in resumed}
    launcher = None
    if settings := STRATEGIES[strategy]:
        config = tmp_path / "launch.json"
        config.write_text(
            json.dumps(
                dict(
                    compute_environment="LOCAL_MACHINE", use_cpu=True, num_machines=1, num_processes=2, machine_rank=0,
                    mixed_precision="no", main_process_port=free_port(), **settings,
                )
            )
        )  # fmt: skip
        launcher = ["accelerate.commands.launch", "--config_file", str(config)]
    seen = launch("test_reference:runs", launcher, folder=qwen2, out=tmp_path, runs=asked)[0]

    for name, expected in in_one_process.items():
        two = seen[name]
        assert two["strategy"] == settings.get("distributed_type", strategy)
        assert two["losses"] == pytest.approx(expected["losses"], rel=1e-4)  # Adam amplifies rounding
        assert two["references"].keys() == set(range(6))
        for update, reference in two["references"].items():
            assert_close(reference, expected["references"][update])
        assert_close(two["reference"], expected["reference"])
        assert same(two["reference"], two["policy"]) == (name != "moving average")
        assert two["scored_at"] == [0, 2, 3, 4]  # each window by both references that it meets
    assert abs(seen["hard reset"]["losses"][2] - seen["moving average"]["losses"][2]) > 0.1

    for name, step in resumed:
        whole_run, again = seen[name], seen[f"{name} from {step}"]
        assert again["losses"] == whole_run["losses"][step:]
        assert again["scored_at"] == [update for update in whole_run["scored_at"] if update >= step]
        assert again["references"].keys() == set(range(step, 6))
        assert all(
            same(reference, whole_run["references"][update]) for update, reference in again["references"].items()
        )
        assert same(again["reference"], whole_run["reference"]) and same(again["policy"], whole_run["policy"])
    assert not same(seen["adapter"]["references"][5], seen["adapter"]["references"][0])


def same(some: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> bool:
    assert some.keys() == others.keys()
    return all(torch.equal(some[name], others[name]) for name in some)


def assert_close(some: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> None:
    assert some.keys() == others.keys()
    assert max((some[name] - others[name]).abs().max().item() for name in some) < 1e-4  # of steps of 0.01
