"""`padding_free=True`: a micro-batch as one row gives what padded rows give, and its trajectories stay apart."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
import transformers.modeling_flash_attention_utils as flash
from common.tiny import ARCHITECTURES, VOCABULARY, model, perturb, save
from helpers.oracle import check, copy_of_adapter, distance, merged, perturb_adapter, solve
from helpers.runs import config
from helpers.scripted import script, scripted_trainer
from helpers.sharded import unwrapped
from helpers.two_processes import one_sided
from peft import LoraConfig
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from trl.trainer.utils import add_fused_lm_head

from tbrm_trl.batch import collate
from tbrm_trl.checks.model import PACKED_MODEL_TYPES, check_packing
from tbrm_trl.loss import trajectory_loss
from tbrm_trl.loss.terms import random_prefix
from tbrm_trl.model.head import add_trajectory_head
from tbrm_trl.model.scoring import score
from tbrm_trl.trajectory import End, Trajectory

PER_TOKEN = ("log_probs", "entropy", "state_values")


def trajectories(seed: int = 0) -> list[Trajectory]:
    """Of different lengths, the shortest possible among them, with inserted tokens, and one without an action."""
    generator = torch.Generator().manual_seed(seed)

    def ids(length: int) -> torch.Tensor:
        return torch.randint(3, VOCABULARY, (length,), generator=generator)

    masks = ([1], [1, 1, 0, 1, 1], [0, 0, 1, 1, 0], [0, 0, 0], [1] * 9)
    return [
        Trajectory(ids(1 + 2 * place % 7), ids(len(mask)), torch.tensor(mask).bool(), 0.0, End.EOS)
        for place, mask in enumerate(masks)
    ]


def scorer(architecture: str) -> torch.nn.Module:
    policy = model(architecture)
    policy.config._experts_implementation = "eager"  # the grouped kernel knows no float64
    add_fused_lm_head(policy, 0.7, outputs=("log_probs", "entropy"))
    add_trajectory_head(policy, 0.7)
    return policy.double().eval()


@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
def test_scores_equal_padded_ones(architecture):
    """Every score of every trajectory in float64, and the gradient of a sum of them all that weighs each by its own.

    Rotary angles, norms and eager attention's softmax are float32 in transformers, whatever the model is.
    """
    policy, rows = scorer(architecture), trajectories()
    batch = collate(rows, pad_token_id=0)
    wanted = dict(end_value=True, every_value=True)
    padded, packed = score(policy, batch, **wanted), score(policy, replace(batch, packed=True), **wanted)
    for name in ("soft_value", "end_value", *PER_TOKEN):
        assert packed[name].shape == (padded[name].shape) and padded[name].any(), name
        torch.testing.assert_close(packed[name], padded[name], rtol=1e-6, atol=1e-6)
    assert not any(packed[name][~batch.action_mask].any() for name in PER_TOKEN)

    gradients = []
    for scores in (padded, packed):
        columns = torch.arange(1, batch.input_ids.shape[1] + 1, dtype=torch.float64)
        per_row = sum((scores[name] * columns).sum(dim=1) for name in PER_TOKEN) + scores.soft_value + scores.end_value
        policy.zero_grad()
        (per_row * torch.arange(1, len(rows) + 1)).sum().backward()
        gradients.append({n: p.grad.clone() for n, p in policy.named_parameters() if p.grad is not None})
    assert distance(gradients[1], gradients[0]) <= 1e-6


def test_trajectories_do_not_see_each_other():
    """Other tokens in one of them change no bit of the others' scores."""
    policy, rows = scorer("qwen2"), trajectories()
    changed = replace(rows[1], completion_ids=rows[1].completion_ids.flip(0), prompt_ids=rows[1].prompt_ids + 1)
    wanted = dict(end_value=True, every_value=True)
    before = score(policy, collate(rows, 0, packed=True), **wanted)
    after = score(policy, collate([rows[0], changed, *rows[2:]], 0, packed=True), **wanted)
    others = torch.tensor([0, 2, 3, 4])
    for name in ("soft_value", "end_value", *PER_TOKEN):
        assert torch.equal(before[name][others], after[name][others]), name
        assert not torch.equal(before[name][1], after[name][1]), name


def flash_attention(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0):
    """`flash_attn_func` in torch, for a machine that has no such kernel. `(B, T, heads, dim)`."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    logits = q @ k.mT * (softmax_scale or q.shape[-1] ** -0.5)
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    behind = torch.arange(q.shape[2])[:, None] - torch.arange(k.shape[2])
    seen = (behind >= 0) if causal else torch.ones_like(behind).bool()
    seen &= (window_size[0] < 0) | (behind <= window_size[0])
    return (logits.masked_fill(~seen, -torch.inf).softmax(dim=-1) @ v).transpose(1, 2)


def flash_varlen(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0,
):  # fmt: skip
    """`flash_attn_varlen_func` in torch: attention within each sequence. `(N, heads, dim)`."""
    ends = cu_seqlens_q.tolist()
    parts = [slice(first, end) for first, end in itertools.pairwise(ends)]
    rest = (dropout_p, softmax_scale, causal, window_size, softcap)
    return torch.cat([flash_attention(q[None, one], k[None, one], v[None, one], *rest)[0] for one in parts])


@pytest.fixture
def flash_in_torch(monkeypatch):
    """transformers' own flash-attention path with only the kernel replaced, which no CPU can run."""
    monkeypatch.setattr(flash, "_loaded_implementation", "flash_attention_2")
    monkeypatch.setattr(flash, "_flash_fn", flash_attention)
    monkeypatch.setattr(flash, "_flash_varlen_fn", flash_varlen)
    monkeypatch.setattr(flash, "_process_flash_kwargs_fn", flash._lazy_define_process_function(flash_varlen))


SIZES = dict(
    vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=128, pad_token_id=0, eos_token_id=1, bos_token_id=2,
    num_experts=4, num_local_experts=4, n_routed_experts=4, num_experts_per_tok=2, moe_num_experts=4,
    moe_intermediate_size=16, n_group=1, topk_group=1, first_k_dense_replace=1, n_shared_experts=1, sliding_window=4,
    n_embd=32, n_layer=2, n_head=4, n_positions=128,
    kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8,
)  # fmt: skip


def small(model_type: str):
    """Two layers of an architecture, one of each kind, with a sliding window shorter than the sequences."""
    defaults = CONFIG_MAPPING[model_type]()
    sizes = {name: size for name, size in SIZES.items() if hasattr(defaults, name)}
    if "kv_lora_rank" in sizes:  # multi-head latent attention
        del sizes["head_dim"]
        sizes["num_key_value_heads"] = 4
    if getattr(defaults, "layer_types", None):
        sizes["layer_types"] = (sorted(set(defaults.layer_types)) * 2)[:2]
    torch.manual_seed(0)
    made = CONFIG_MAPPING[model_type](**sizes)
    made._experts_implementation = "eager"
    built = AutoModelForCausalLM.from_config(made, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        for parameter in built.parameters():
            parameter += 0.3 * torch.randn(parameter.shape)
    return built.double().eval()


def mixes(policy, attention: str) -> float:
    """Relative distance between the logits of two sequences in one row and those of each alone."""
    policy.config._attn_implementation = attention
    first, second = torch.arange(3, 12)[None], torch.arange(20, 33)[None]
    with torch.no_grad():
        alone = [
            policy(input_ids=ids, position_ids=torch.arange(ids.shape[1])[None], use_cache=False).logits
            for ids in (first, second)
        ]
        positions = torch.cat([torch.arange(ids.shape[1]) for ids in (first, second)])[None]
        row = policy(input_ids=torch.cat([first, second], dim=1), position_ids=positions, use_cache=False).logits
    return ((row - torch.cat(alone, dim=1)).norm() / row.norm()).item()


@pytest.mark.parametrize("model_type", sorted(PACKED_MODEL_TYPES))
def test_the_list_of_architectures(model_type, flash_in_torch):
    """Each of them keeps two sequences of a row apart, with every attention."""
    policy = small(model_type)
    check_packing(policy)
    attentions = ["eager", *["sdpa"] * policy._supports_sdpa, *["flash_attention_2"] * policy._supports_flash_attn]
    assert len(attentions) > 1
    for attention in attentions:
        assert mixes(policy, attention) < 1e-5, attention


@pytest.mark.parametrize(
    ("model_type", "attention"),
    [("gpt_oss", "eager"), ("opt", "sdpa"), ("gpt_bigcode", "flash_attention_2"), ("qwen3_next", "sdpa")],
)
def test_why_there_is_a_list(model_type, attention, flash_in_torch):
    """All of these take `position_ids`, only the last has a state, and each lets a second sequence see the first."""
    policy = small(model_type)
    assert mixes(policy, attention) > 0.1
    with pytest.raises(ValueError, match=f"`padding_free=True` is refused for {type(policy).__name__} of type"):
        check_packing(policy)


@pytest.mark.parametrize("attention", ["flex_attention", "one_of_my_own"])
def test_other_attention_is_refused(attention):
    policy = model("qwen2")
    policy.config._attn_implementation_internal = attention
    with pytest.raises(ValueError, match=f"with attn_implementation='{attention}'"):
        check_packing(policy)


def test_code_from_elsewhere_is_refused():
    class Mine(type(model("qwen2"))):
        """A model of a repository of its own that calls itself qwen2."""

    with pytest.raises(ValueError, match="refused for Mine of type 'qwen2'"):
        check_packing(Mine(model("qwen2").config))


def test_padding_to_a_multiple_is_refused():
    with pytest.raises(ValueError, match="`pad_to_multiple_of=8` has no meaning with `padding_free=True`"):
        config(padding_free=True, pad_to_multiple_of=8)


def test_refused_before_training(tmp_path):
    folder = save(tmp_path / "model", "gpt2")
    mamba = CONFIG_MAPPING["mamba"](
        vocab_size=VOCABULARY, hidden_size=16, state_size=4, num_hidden_layers=1, pad_token_id=0, eos_token_id=1
    )
    AutoModelForCausalLM.from_config(mamba).save_pretrained(folder)  # beside gpt2's tokenizer
    with pytest.raises(ValueError, match=r"refused for MambaForCausalLM of type 'mamba'.*carry a state"):
        scripted_trainer(folder, script(), tmp_path, padding_free=True)


@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
def test_architectures(architecture, tmp_path):
    """Loss and gradient of a step are those of brute force, which takes one unpadded row at a time."""
    folder = save(tmp_path / "model", architecture)
    trainer = scripted_trainer(folder, script(unscored=(3,)), tmp_path, temperature=0.7, padding_free=True)
    trainer.router_aux_loss_coef, trainer.aux_loss_enabled = 0.0, False  # the oracle has no load-balancing loss
    rows = watch_rows(trainer.model.base_model)
    check(trainer)
    assert rows == [(1, sum(len(t) for t in trainer.windows[0]))]
    assert trainer.state.log_history[0]["pad_fraction"] == 0


def watch_rows(backbone) -> list[tuple[int, int]]:
    """The shapes that reach the backbone."""
    shapes: list[tuple[int, int]] = []

    def watch(module, args, kwargs):
        assert kwargs.get("attention_mask") is None
        shapes.append(tuple(kwargs["input_ids"].shape))

    backbone.register_forward_pre_hook(watch, with_kwargs=True)
    return shapes


@pytest.mark.parametrize(
    "options",
    [
        dict(residual="token"),
        dict(truncation="bootstrap", truncated_reward=0.3, soft_value="calibrated"),
        dict(gradient_checkpointing=True, per_device_train_batch_size=3, gradient_accumulation_steps=2),
        dict(mask_truncated_completions=True, per_device_train_batch_size=1, gradient_accumulation_steps=6),
        dict(model_init_kwargs={"attn_implementation": "eager"}),
    ],
)
def test_options(options, tmp_path):
    trainer = scripted_trainer(
        save(tmp_path / "model"), script(rows=6, unscored=(3,)), tmp_path, padding_free=True, **options
    )
    check(trainer)


@pytest.mark.parametrize("selection", ["scatter", "cut"])
def test_a_part_of_the_tokens(selection, tmp_path, monkeypatch):
    """Back-propagated through a given subset, chosen by the `(B, T)` mask as with padding."""
    if selection == "cut":
        monkeypatch.setattr(
            trajectory_loss,
            "random_prefix",
            lambda mask, fraction: random_prefix(mask, fraction, draw=0.5),
        )
    else:
        monkeypatch.setattr(
            trajectory_loss,
            "random_subset",
            lambda mask, _: (mask & (mask.cumsum(dim=1) % 2 == 1), torch.full(mask.shape, 0.5)),
        )

    def subset(n):
        if selection == "cut":
            return {h: 1 - h / n for h in range(math.ceil(0.5 * n))}
        return dict.fromkeys(range(0, n, 2), 0.5)

    trainer = scripted_trainer(
        save(tmp_path / "model"), script(unscored=(3,)), tmp_path, token_fraction=0.5, token_selection=selection,
        padding_free=True,
    )  # fmt: skip
    check(trainer, subset=subset)


def test_lora(tmp_path):
    """The reference is the same model without its adapter, and packed too."""
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], lora_dropout=0.0)
    trainer = scripted_trainer(save(tmp_path / "model"), script(), tmp_path, peft_config=lora, padding_free=True)
    reference = merged(trainer.model)
    perturb_adapter(trainer.model, seed=4)
    policy = copy_of_adapter(trainer.model).double().eval()
    rows = watch_rows(trainer.model.get_base_model().base_model)
    trainer.train()
    answer = solve(policy, reference, trainer.windows[0], beta=trainer.args.beta)
    assert sum(trainer.losses) == pytest.approx(answer.loss, rel=1e-5)
    assert distance(trainer.recorder.gradients[0], answer.gradient) <= 1e-5
    assert rows == [(1, sum(len(t) for t in trainer.windows[0]))] * 2  # the reference's forward and the policy's


def test_load_balancing_loss_and_evaluation(tmp_path):
    """Padding never entered the router's loss, so it is the same without padding. So are all evaluation metrics."""
    results = []
    for padding_free in (False, True):
        trainer = scripted_trainer(
            save(tmp_path / "model", "qwen3_moe"), script(), tmp_path, router_aux_loss_coef=0.3,
            padding_free=padding_free,
        )  # fmt: skip
        trainer.train()
        evaluated = trainer.evaluate(trainer._given_dataset)
        results.append((trainer, trainer.state.log_history[0], evaluated))
    (padded, before, eval_before), (packed, after, eval_after) = results
    assert before["aux_loss"] > 1 and after["aux_loss"] == pytest.approx(before["aux_loss"], rel=1e-5)
    assert packed.losses == pytest.approx(padded.losses, rel=1e-5)
    assert distance(packed.recorder.gradients[0], padded.recorder.gradients[0]) <= 1e-5
    assert eval_before["eval_pad_fraction"] > 0 == eval_after["eval_pad_fraction"]
    for name in ("eval_loss", "eval_residual/rms", "eval_entropy", "eval_soft_value"):
        assert eval_after[name] == pytest.approx(eval_before[name], rel=1e-5), name


@pytest.mark.launch
def test_two_processes(tmp_path):
    """Packed on two processes, one of which has nothing that counts: the gradient of padded rows on one."""
    folder, rows, seen = one_sided(
        tmp_path, padding_free=True, per_device_train_batch_size=2, gradient_accumulation_steps=2
    )
    one = scripted_trainer(folder, rows, tmp_path, per_device_train_batch_size=8)
    perturb(one.ref_model)
    one.train()
    assert distance(unwrapped(seen["gradients"]), one.recorder.gradients[0]) <= 1e-5
    assert seen["log"][0]["pad_fraction"] == 0 < one.state.log_history[0]["pad_fraction"]
