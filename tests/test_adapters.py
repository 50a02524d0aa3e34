"""Adapters in every form: which one is trained, what the reference is, and what is refused."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from common.tiny import perturb, save, tokenizer
from helpers import runs
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, TrainerCallback

from tbrm_trl import TBRMTrainer
from tbrm_trl.trajectory import End, Trajectory

LORA = dict(r=4, target_modules=["q_proj", "down_proj"], lora_dropout=0.0)
RESET = dict(sync_ref_model=True, ref_model_mixup_alpha=1.0, ref_model_sync_steps=1)
build = functools.partial(runs.build, trainer_class=TBRMTrainer, processing_class=tokenizer())


def base(folder):
    return AutoModelForCausalLM.from_pretrained(folder)


def adapted(folder, name="default", **changes) -> PeftModel:
    """A model with an adapter that is not 0, always the same."""
    torch.manual_seed(0)
    model = get_peft_model(base(folder), LoraConfig(**{**LORA, **changes}), adapter_name=name)
    perturb(nn.ParameterList([p for p in model.parameters() if p.requires_grad]), scale=0.2)
    return model


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(5, 20)[None]).logits


@pytest.mark.parametrize("name", ["default", "policy"])
def test_what_is_trained_beside_a_given_adapter_is_refused(name, llama, tmp_path):
    """It belongs to the reference too. What `modules_to_save` names is the adapter's own."""
    build(adapted(llama, name, modules_to_save=["lm_head"]), tmp_path)
    model = adapted(llama, name, modules_to_save=["lm_head"])
    for one, weight in model.named_parameters():
        weight.requires_grad_(weight.requires_grad or "norm" in one)
    with pytest.raises(ValueError, match=r"\d+ trainable parameters are not the adapter's .*norm.*modules_to_save"):
        build(model, tmp_path)


class Weights(TrainerCallback):
    """Keeps the adapter's weights of each evaluation, of which the first is the best."""

    def __init__(self) -> None:
        self.seen: list[dict[str, torch.Tensor]] = []

    def on_evaluate(self, args, state, control, model, metrics, **kwargs):
        self.seen.append({name: one.detach().clone() for name, one in model.named_parameters() if one.requires_grad})
        metrics["eval_falling"] = -state.global_step


@pytest.mark.parametrize("name", ["default", "policy"])
def test_the_best_adapter_is_loaded_whatever_its_name(name, llama, tmp_path):
    weights = Weights()
    trainer = build(
        adapted(llama, name), tmp_path, max_steps=3, callbacks=[weights], eval_dataset=runs.DATA.select([0, 1]),
        eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1, load_best_model_at_end=True,
        metric_for_best_model="eval_falling", greater_is_better=True, per_device_eval_batch_size=2,
    )  # fmt: skip
    trainer.train()
    first, *_, last = weights.seen
    loaded = dict(trainer.model.named_parameters())
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-1") and len(weights.seen) == 3
    assert trainer._last_loaded_step == -1  # vLLM would be sent these weights
    assert all(torch.equal(loaded[name], value) for name, value in first.items())
    assert not all(torch.equal(loaded[name], value) for name, value in last.items())


@pytest.mark.parametrize("sync", [False, True])
@pytest.mark.parametrize("name", ["default", "policy"])
def test_a_given_adapter_is_trained_against_itself_whatever_its_name(name, sync, llama, tmp_path):
    """The log-ratio is 0 at first, and later only if the reference is reset; the base never moves."""
    model = adapted(llama, name)
    start = logits(model)
    trainer = build(model, tmp_path, **(RESET if sync else {}))
    assert torch.equal(logits(trainer.model), start)
    trainer.train()
    first, second = runs.logged(trainer, "log_ratio")
    assert first == pytest.approx(0, abs=1e-6) and (abs(second) < 1e-6) is sync
    with trainer.model.disable_adapter():
        assert torch.equal(logits(trainer.model), logits(base(llama)))
    assert not torch.equal(logits(trainer.model), start)


@pytest.mark.parametrize("sync", [False, True])
def test_what_is_frozen_of_an_adapter_stays_frozen(sync, llama, tmp_path):
    policy = adapted(llama)
    for name, parameter in policy.named_parameters():
        parameter.requires_grad_("lora_B" in name)
    start = {name: parameter.detach().clone() for name, parameter in policy.named_parameters()}
    trainer = build(policy, tmp_path, **(RESET if sync else {}))
    trainer.train()
    moved = {
        name for name, one in trainer.model.named_parameters() if name in start and not torch.equal(one, start[name])
    }
    assert moved and all("lora_B" in name for name in moved)
    assert {name for name, one in trainer.model.named_parameters() if one.requires_grad} == {
        name for name in start if "lora_B" in name
    }


def test_a_run_with_another_name_resumes(llama, tmp_path):
    save_at = dict(max_steps=2, save_strategy="steps", save_steps=1)
    whole = build(adapted(llama, "policy"), tmp_path, **save_at)
    whole.train()
    resumed = build(adapted(llama, "policy"), tmp_path, **save_at)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out/checkpoint-1"))
    assert torch.equal(logits(resumed.model), logits(whole.model))


def test_of_two_adapters_the_active_one_is_trained(llama, tmp_path):
    model = adapted(llama)
    model.add_adapter("other", LoraConfig(**LORA))
    model.set_adapter("other")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = build(model, tmp_path)
    trainer.train()
    after = dict(trainer.model.named_parameters())
    moved = {name for name, p in before.items() if not torch.equal(p, after[name])}
    assert moved == {name for name in before if ".other." in name}
    assert runs.logged(trainer, "log_ratio")[0] == pytest.approx(0, abs=1e-6)


def two_active(folder):
    model = adapted(folder)
    model.add_adapter("other", LoraConfig(**LORA))
    model.base_model.set_adapter(["default", "other"])
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (two_active, "2 adapters are active .'default', 'other'., and one is trained. Choose it: `model.set_adapter"),
        (lambda folder: adapted(folder, "ref"), "an adapter named 'ref', as the reference's will be. Load it under"),
        (lambda folder: adapted(folder, "mlp"), r"The adapter is named 'mlp', as a part of the model is \(base_model"),
    ],
)
def test_adapters_that_cannot_be_told_apart(make, message, llama, tmp_path):
    with pytest.raises(ValueError, match=message):
        build(make(llama), tmp_path)


@pytest.mark.parametrize("peft_config", [None, LoraConfig(**LORA)])
def test_the_folder_of_an_adapter_is_refused(peft_config, llama, tmp_path):
    adapted(llama).save_pretrained(tmp_path / "adapter")
    folder = str(tmp_path / "adapter")
    with pytest.raises(ValueError, match=rf"`model='{folder}'` is the folder of an adapter.*is_trainable=True"):
        build(folder, tmp_path, peft_config=peft_config)
    loaded = PeftModel.from_pretrained(base(llama), folder, is_trainable=True)  # as the error says
    build(loaded, tmp_path, max_steps=1).train()


ROW = Trajectory(torch.arange(3, 9), torch.arange(20, 28), torch.ones(8, dtype=torch.bool), 1.0, End.LENGTH)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "changes",
    [
        dict(modules_to_save=["lm_head"]),
        dict(modules_to_save=["embed_tokens"]),
        dict(modules_to_save=["embed_tokens"], ensure_weight_tying=True),
        dict(target_modules=["q_proj", "embed_tokens"]),
        dict(use_dora=True),
        dict(trainable_token_indices=[5, 20, 21]),
    ],
    ids=str,
)
def test_scores_are_those_of_the_adapted_logits(changes, tied, tmp_path):
    """log π and V by the head's weight alone equal those of the model's own logits, or the adapter is refused."""
    folder = save(tmp_path / "model", "llama", tie_word_embeddings=tied)
    make = functools.partial(build, folder, tmp_path, peft_config=LoraConfig(**{**LORA, **changes}))
    if tied and "trainable_token_indices" in changes:
        with pytest.raises(
            ValueError, match=r"The model's head is a TrainableTokensWrapper.*tie_word_embeddings=False"
        ):
            make()
        return
    trainer = make()
    perturb(nn.ParameterList([p for p in trainer.model.parameters() if p.requires_grad]), scale=0.3)
    trainer.model.eval()
    with torch.no_grad():
        scores = trainer._score(trainer.model, batch := trainer._collate([ROW]))
        raw = trainer.model(input_ids=batch.input_ids).logits[0]  # (14, V)
    expected = raw[5:13].log_softmax(-1).gather(1, ROW.completion_ids[:, None])[:, 0]
    torch.testing.assert_close(scores.log_probs[0, 6:14], expected, atol=1e-5, rtol=0)
    assert scores.soft_value.item() == pytest.approx(raw[5].logsumexp(-1).item(), abs=1e-5)


def test_adapters_of_experts(tmp_path):
    """Adapters of a mixture's expert parameters, which are not modules."""
    folder = save(tmp_path / "model", "qwen3_moe")
    config = LoraConfig(r=4, target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj"])
    trainer = build(folder, tmp_path, peft_config=config)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    moved = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if "lora_" in name} and any("experts" in name for name in moved)
    assert runs.logged(trainer, "log_ratio")[0] == pytest.approx(0, abs=1e-5)


def test_an_adapter_on_the_head_is_refused(llama, tmp_path):
    with pytest.raises(ValueError, match="Applying a PEFT adapter to `lm_head` is not supported"):
        build(llama, tmp_path, peft_config=LoraConfig(**{**LORA, "target_modules": ["lm_head"]}))


@pytest.mark.parametrize(
    ("tied", "given", "name", "changes", "message"),
    [
        (True, False, None, dict(target_modules=["q_proj", "embed_tokens"]), "is one tensor with .*lm_head.weight"),
        (False, True, "default", dict(modules_to_save=["lm_head"]), "TRL would send vLLM the reference's copy"),
        (False, False, None, dict(trainable_token_indices=[5]), "TRL would send vLLM this weight under a name"),
        (False, False, None, dict(target_modules=["q_proj", "embed_tokens"]), None),
        (False, False, None, dict(modules_to_save=["lm_head"]), None),
        (False, True, "policy", {}, None),
    ],
)
def test_what_vllm_could_not_be_sent(tied, given, name, changes, message, monkeypatch, tmp_path: Path):
    monkeypatch.setattr("trl.trainer.grpo_trainer.VLLMGeneration", lambda **options: None)
    folder = save(tmp_path / "model", "llama", tie_word_embeddings=tied)
    if given:
        make = functools.partial(build, adapted(folder, name, **changes), tmp_path, use_vllm=True)
    else:
        config = LoraConfig(**{**LORA, **changes})
        make = functools.partial(build, folder, tmp_path, peft_config=config, use_vllm=True)
    if message is None:
        make()
    else:
        with pytest.raises(ValueError, match=message):
            make()


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        (dict(modules_to_save=["lm_head"]), "it sets `modules_to_save`"),
        (dict(trainable_token_indices=[5]), "it sets `trainable_token_indices`"),
        (dict(use_dora=True), "it sets `use_dora`"),
        (dict(rank_pattern={"q_proj": 4}), "it sets `rank_pattern`"),
        (dict(alpha_pattern={"q_proj": 64}), "it sets `alpha_pattern`"),  # vLLM would scale all layers alike
        (dict(layer_replication=[(0, 1), (0, 2)]), "it sets `layer_replication`"),
        (dict(lora_bias=True), "it sets `lora_bias`"),
        ({}, None),
        (dict(use_rslora=True, init_lora_weights="gaussian", layers_to_transform=[0]), None),
    ],
)
def test_what_a_server_could_not_load_is_refused(changes, problem, tmp_path: Path):
    folder = save(tmp_path / "model", "llama", tie_word_embeddings=False)
    make = functools.partial(
        build, folder, tmp_path, peft_config=LoraConfig(**{**LORA, **changes}), publish_policy=True
    )
    if problem is None:
        make()
    else:
        with pytest.raises(ValueError, match=f"The adapter cannot be served: {problem}, and a server loads plain LoRA"):
            make()
