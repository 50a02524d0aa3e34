"""The loss and gradient of the trainer's `train()`, against brute force in float64."""

from __future__ import annotations

import pytest
import torch
from common.tiny import ARCHITECTURES, save
from helpers.oracle import (
    TOLERANCE,
    check,
    copy_of_adapter,
    distance,
    merged,
    perturb_adapter,
    plain,
    solve,
)
from helpers.scripted import script, scripted_trainer
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig


@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
def test_architectures(architecture, tmp_path):
    """Rotary, absolute, soft-capped, scaled, biased and routed models alike, with everything a trajectory can have."""
    folder = save(tmp_path / "model", architecture)
    trainer = scripted_trainer(folder, script(unscored=(3,)), tmp_path, temperature=0.7)
    trainer.router_aux_loss_coef, trainer.aux_loss_enabled = 0.0, False  # the oracle has no load-balancing loss
    _, trajectories = check(trainer)
    assert any(not t.loss_mask[0] for t in trajectories)  # leading inserted tokens
    assert any(t.loss_mask[0] and not t.loss_mask.all() for t in trajectories)  # inserted in the middle
    assert {t.end.value for t in trajectories} == {"eos", "length"}
    assert len({len(t.prompt_ids) for t in trajectories}) > 2


def test_load_balancing_loss(tmp_path):
    """A mixture of experts adds its own auxiliary loss, of the padded batch, with the coefficient asked for."""
    trainer = scripted_trainer(save(tmp_path / "model", "qwen3_moe"), script(), tmp_path, router_aux_loss_coef=0.3)
    policy, reference = plain(trainer.model), plain(trainer.ref_model)
    trainer.train()
    trajectories = trainer.windows[0]
    ids = [torch.cat([t.prompt_ids, t.completion_ids]) for t in trajectories]
    padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
    auxiliary = policy(input_ids=padded, attention_mask=mask, output_router_logits=True).aux_loss.item()
    residual_loss = solve(policy, reference, trajectories, beta=0.1).loss
    assert trainer.losses[0] == pytest.approx(residual_loss + 0.3 * auxiliary, rel=TOLERANCE)
    assert trainer.state.log_history[0]["aux_loss"] == pytest.approx(auxiliary, rel=1e-3)


@pytest.mark.parametrize("soft_value", ["policy", "calibrated"])
@pytest.mark.parametrize("loss_units", ["reward", "logits"])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_options(soft_value, loss_units, temperature, tmp_path):
    folder = save(tmp_path / "model")
    trainer = scripted_trainer(
        folder, script(unscored=(0, 5)), tmp_path, soft_value=soft_value, loss_units=loss_units, temperature=temperature
    )
    check(trainer)


@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_accumulation_changes_nothing(accumulation, tmp_path):
    """The same eight trajectories in one, two or four micro-batches; the exclusions fall unevenly among them."""
    folder = save(tmp_path / "model")
    trainer = scripted_trainer(
        folder,
        script(unscored=(0, 1, 2)),
        tmp_path,
        per_device_train_batch_size=8 // accumulation,
        gradient_accumulation_steps=accumulation,
        mask_truncated_completions=True,
    )
    answer, _ = check(trainer)
    assert len(answer.residuals) == 4  # 8 − 3 unscored − 2 truncated, one of which is unscored too


@pytest.mark.parametrize("pad_to_multiple_of", [None, 16])
def test_truncated_completions_leave_the_loss(pad_to_multiple_of, tmp_path):
    trainer = scripted_trainer(
        save(tmp_path / "model"),
        script(),
        tmp_path,
        mask_truncated_completions=True,
        pad_to_multiple_of=pad_to_multiple_of,
    )
    answer, _ = check(trainer)
    assert len(answer.residuals) == 6


def test_pad_is_eos(tmp_path):
    """With one token for both, the end-of-sequence token still counts and padding still does not."""
    trainer = scripted_trainer(save(tmp_path / "model", pad_is_eos=True), script(), tmp_path)
    _, trajectories = check(trainer)
    assert trainer._tokenizer.pad_token_id == trainer._tokenizer.eos_token_id == 1
    ended = [t for t in trajectories if t.end.value == "eos"]
    assert len(ended) == 6 and all(t.completion_ids[-1] == 1 and t.loss_mask[-1] for t in ended)


def test_gradient_checkpointing(tmp_path):
    check(scripted_trainer(save(tmp_path / "model"), script(), tmp_path, gradient_checkpointing=True))


def test_bfloat16(tmp_path):
    """bfloat16 weights: 8 bits of mantissa leave about 1e-2; the sequence-level sums are still float32."""
    trainer = scripted_trainer(
        save(tmp_path / "model"), script(), tmp_path, bf16=True, model_init_kwargs={"dtype": torch.bfloat16}
    )
    assert next(trainer.model.parameters()).dtype == torch.bfloat16
    check(trainer, tolerance=5e-2)


@pytest.mark.parametrize("trained_adapter", [False, True])
def test_lora(trained_adapter, tmp_path):
    """A fresh adapter's reference is the base model; a trained adapter's is its own copy. Neither ever moves."""
    folder = save(tmp_path / "model")
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], lora_dropout=0.0)
    base = AutoModelForCausalLM.from_pretrained(folder)
    if trained_adapter:
        model = get_peft_model(base, lora)
        perturb_adapter(model, seed=3)
        trainer = scripted_trainer(model, script(), tmp_path, learning_rate=0.1)
    else:
        trainer = scripted_trainer(folder, script(), tmp_path, peft_config=lora, learning_rate=0.1)
    reference = merged(trainer.model)  # before the policy departs from it
    perturb_adapter(trainer.model, seed=4)
    frozen = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if ".default." not in n}

    oracle_policy = copy_of_adapter(trainer.model).double().eval()
    trainer.train()
    answer = solve(oracle_policy, reference, trainer.windows[0], beta=trainer.args.beta)
    assert sum(trainer.losses) == pytest.approx(answer.loss, rel=TOLERANCE)
    assert distance(trainer.recorder.gradients[0], answer.gradient) <= TOLERANCE
    for name, parameter in trainer.model.named_parameters():
        if ".default." not in name:
            assert torch.equal(parameter, frozen[name]), name
    moved = [n for n, p in trainer.model.named_parameters() if ".default." in n and p.requires_grad]
    assert moved and all(g.norm() > 0 for g in trainer.recorder.gradients[0].values())


@pytest.mark.parametrize("reward", [0.0, 1.0])
def test_equal_rewards_still_teach(reward, tmp_path):
    """All-0 and all-1 batches, on which a group-normalised advantage is zero, give finite non-zero gradients."""
    rows = script()
    for row in rows:
        row.reward = reward
    trainer = scripted_trainer(save(tmp_path / "model"), rows, tmp_path)
    check(trainer)
    norms = [g.norm() for g in trainer.recorder.gradients[0].values()]
    assert all(norm.isfinite() for norm in norms) and any(norm > 0 for norm in norms)


def test_nothing_counts(tmp_path):
    """No trajectory could be scored: loss 0, a gradient of 0 that the optimizer is not given, and no NaN."""
    rows = script(unscored=tuple(range(8)))
    trainer = scripted_trainer(save(tmp_path / "model"), rows, tmp_path, learning_rate=1.0)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainer.train()
    assert trainer.losses == [0.0]
    assert trainer.state.log_history[0]["grad_norm"] == 0 and trainer.recorder.gradients == [{}]
    assert all(torch.equal(p, before[n]) for n, p in trainer.model.named_parameters())
    assert trainer.state.log_history[0]["left_out/unscored"] == 1.0


def test_kl_is_of_fresh_rows(tmp_path):
    """Two passes over a window: the second, off-policy one adds nothing to `kl`, and everything to the residual."""
    trainer = scripted_trainer(
        save(tmp_path / "model"),
        script(),
        tmp_path,
        num_iterations=2,
        max_steps=2,
        learning_rate=0.01,
        soft_value="calibrated",
    )
    trainer.train()
    first, second = trainer.state.log_history[:2]
    assert first["kl"] == pytest.approx(0, abs=1e-5) and "kl" not in second
    assert abs(first["log_ratio"]) < 1e-5 < abs(second["log_ratio"])


def test_qlora(tmp_path):
    """A 4-bit base with a LoRA adapter: calibrated, the residual starts at −R; only the adapter moves."""
    trainer = scripted_trainer(
        save(tmp_path / "model", "llama"), script(), tmp_path, soft_value="calibrated", learning_rate=0.01, max_steps=2,
        num_iterations=2,
        peft_config=LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.0),
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        ),
    )  # fmt: skip
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainer.train()
    first, second = trainer.state.log_history[:2]
    rewards = [t.reward for t in trainer.windows[0]]
    assert first["residual/mean"] == pytest.approx(-sum(rewards) / 8, abs=1e-4)
    assert abs(second["log_ratio"]) > 1e-4
    moved = {n for n, p in trainer.model.named_parameters() if not torch.equal(p, before[n])}
    assert moved and all("lora_" in n for n in moved)


_SMALL = dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
              num_key_value_heads=2, head_dim=8)  # fmt: skip
UNMASKED = {  # models that could take distances, windows or states from a mask
    "bloom": dict(vocab_size=97, hidden_size=32, n_layer=2, n_head=4),
    "mpt": dict(vocab_size=97, d_model=32, n_layers=2, n_heads=4, expansion_ratio=2),
    "falcon": dict(vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=True),
    "opt": dict(vocab_size=97, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
                word_embed_proj_dim=32),
    "mistral": {**_SMALL, "sliding_window": 6},
    "gemma2": {**_SMALL, "sliding_window": 6},
    "qwen3_moe": ARCHITECTURES["qwen3_moe"],
    "mamba": dict(vocab_size=97, hidden_size=32, state_size=8, num_hidden_layers=2),
    "qwen3_next": {**_SMALL, "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8,
                   "linear_value_head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
                   "shared_expert_intermediate_size": 16},
}  # fmt: skip


@pytest.mark.parametrize("architecture", list(UNMASKED))
def test_padding_on_the_right_needs_no_mask(architecture):
    """Without a mask, real tokens have the logits of the row alone, whatever the padding behind them is."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **UNMASKED[architecture])).eval()
    ids = torch.randint(3, 90, (2, 24))  # (B, T)
    with torch.no_grad():
        padded = model(input_ids=ids, use_cache=False).logits[0, :11]
        alone = model(input_ids=ids[:1, :11], attention_mask=torch.ones(1, 11).long(), use_cache=False).logits[0]
    assert distance({"": padded}, {"": alone}) <= TOLERANCE
