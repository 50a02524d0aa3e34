"""Faults that practitioners met: a policy, a reference or an evaluation that is silently a wrong one."""

import functools
import json
import math
import re
import warnings
from contextlib import nullcontext

import pandas
import pytest
import torch
from common.launch import allow_fsdp_on_cpu
from common.tiny import ARCHITECTURES, model, perturb, save, tokenizer
from datasets import Dataset
from helpers import runs
from helpers.forked import launch
from peft import IA3Config, LoHaConfig, LoraConfig, OFTConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, TrainerCallback
from transformers.utils.import_utils import enable_tf32
from trl.generation.vllm_client import VLLMClient

from tbrm_trl import TBRMTrainer
from tbrm_trl.checks.model import check_start, computes_in_half, warn_of_half_precision
from tbrm_trl.model.randomness import keep_weights_unpacked
from tbrm_trl.model.rotary import rotary_limit

PROMPTS = Dataset.from_list([{"prompt": f"{i}:"} for i in range(8)])
build = functools.partial(runs.build, trainer_class=TBRMTrainer)  # which checks where a run starts
ADAPTER = dict(r=4, target_modules=["q_proj", "down_proj"], lora_dropout=0.0)


def letters(completions, **kwargs):
    return [sum(map(str.islower, text)) / 8 for text in completions]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save(tmp_path_factory.mktemp("llama") / "model", "llama")


@pytest.mark.parametrize("initialisation", ["pissa", "olora", False])
@pytest.mark.parametrize("sync", [False, True])
def test_1_2_an_adapter_that_moves_the_start_is_refused(initialisation, sync, folder, tmp_path):
    options = dict(sync_ref_model=True, ref_model_mixup_alpha=1.0, ref_model_sync_steps=5) if sync else {}
    adapter = LoraConfig(**ADAPTER, init_lora_weights=initialisation)
    trainer = build(folder, tmp_path, letters, PROMPTS, peft_config=adapter, max_steps=1, **options)
    with pytest.raises(ValueError, match="before anything is trained: log-probabilities differ by"):
        trainer.train()


@pytest.mark.parametrize("initialisation", [True, "gaussian"])
@pytest.mark.parametrize("sync", [False, True])
def test_1_2_an_adapter_that_begins_at_0_trains(initialisation, sync, folder, tmp_path):
    options = dict(sync_ref_model=True, ref_model_mixup_alpha=1.0, ref_model_sync_steps=5) if sync else {}
    adapter = LoraConfig(**ADAPTER, init_lora_weights=initialisation)
    trainer = build(folder, tmp_path, letters, PROMPTS, peft_config=adapter, max_steps=1, **options)
    trainer.train()
    assert trainer.state.log_history[0]["log_ratio"] == pytest.approx(0, abs=1e-5)


def test_1_2_a_given_adapter_keeps_its_base(folder, tmp_path):
    """The adapter `ref` is made without the initialisation that rewrote the base, so the policy does not change."""
    base = AutoModelForCausalLM.from_pretrained(folder)
    given = get_peft_model(base, LoraConfig(**ADAPTER, init_lora_weights="pissa"))
    given.save_pretrained(tmp_path / "adapter")
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        before = given(ids).logits
    trainer = build(given, tmp_path / "out", letters, PROMPTS, max_steps=1, processing_class=tokenizer())
    with torch.no_grad():
        torch.testing.assert_close(trainer.model(ids).logits, before)
    trainer.train()
    assert trainer.state.log_history[0]["log_ratio"] == pytest.approx(0, abs=1e-5)


def starts(folder: str, out: str) -> list[str]:
    """In each process of a sharded launch: how runs begin with unchanged policies, and with changed ones."""
    from pathlib import Path

    allow_fsdp_on_cpu()
    said = []
    for kind, moved in (("full", False), ("full", True), ("new", False), ("new", True), ("given", False)):
        model, options = folder, {}
        if kind == "new":
            options["peft_config"] = LoraConfig(**ADAPTER)
        if kind == "given":
            model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), LoraConfig(**ADAPTER), "policy")
            options["processing_class"] = tokenizer()
        trainer = build(model, Path(out), letters, PROMPTS, max_steps=1, **options)
        if moved:
            trained = nn.ParameterList([p for p in trainer.model.parameters() if p.requires_grad])
            sharded = any(hasattr(parameter, "ds_id") for parameter in trained)
            with gathered(trained) if sharded else nullcontext():
                perturb(trained)
        try:
            trainer.train()
            said.append(f"log-ratio {trainer.state.log_history[0]['log_ratio']:.6f}")
        except ValueError as refusal:
            said.append(str(refusal))
    return [trainer.accelerator.distributed_type.value, *said]


def gathered(parameters):
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters, modifier_rank=0)


@pytest.mark.parametrize(("file", "strategy"), [("fsdp2", "FSDP"), ("zero3", "DEEPSPEED")])
def test_1_2_the_start_is_checked_where_models_are_sharded(file, strategy, folder, tmp_path):
    for seen in launch("test_faults_start:starts", file, folder=folder, out=str(tmp_path)):
        kind, sound, moved, adapter, moved_adapter, given_adapter = seen
        assert kind == strategy
        assert {sound, adapter, given_adapter} <= {"log-ratio 0.000000", "log-ratio -0.000000"}
        for refusal in (moved, moved_adapter):
            assert re.match(r"The policy is not its reference before .*: log-prob.* differ by \d\.\d+ nats", refusal)


def test_the_start_has_a_tolerance():
    check_start(9e-4, dtype_is_half=False, of_adapter=False)
    check_start(0.09, dtype_is_half=True, of_adapter=False)
    with pytest.raises(ValueError, match=r"differ by 0.0011 nats per token \(allowed: 0.001\)"):
        check_start(1.1e-3, dtype_is_half=False, of_adapter=False)
    with pytest.raises(ValueError, match=r"allowed: 0.1"):
        check_start(0.11, dtype_is_half=True, of_adapter=True)


def tf32_seen(switch):
    """In a process of its own, since PyTorch's old switches and its new one exclude each other."""
    if switch == "precision":
        torch.set_float32_matmul_precision("high")
    elif switch == "flag":
        torch.backends.cuda.matmul.allow_tf32 = True
    else:
        enable_tf32(True)  # as `tf32=True` does
    return computes_in_half(nn.Linear(2, 2), "no")


def test_tf32_is_seen_whoever_switches_it_on():
    assert not computes_in_half(nn.Linear(2, 2), "no") and computes_in_half(nn.Linear(2, 2), "bf16")
    assert computes_in_half(nn.Linear(2, 2, dtype=torch.bfloat16), "no")
    for switch in ("precision", "flag", "transformers"):
        assert launch("test_faults_start:tf32_seen", processes=1, switch=switch) == [True]


def test_1_3_resized_embeddings_are_refused_by_name(folder, tmp_path):
    resized = AutoModelForCausalLM.from_pretrained(folder)
    resized.resize_token_embeddings(resized.config.vocab_size + 3)
    with pytest.raises(ValueError, match=r"parameter 'model.embed_tokens.weight' of shape \(106, 32\) differs"):
        build(resized, tmp_path, letters, PROMPTS, processing_class=tokenizer())


def test_1_1_another_reference_is_refused_on_resume_and_can_be_named(folder, tmp_path):
    """A run saved at update 2 of 4, resumed by a trainer whose model is that checkpoint."""
    out = tmp_path / "out"
    build(folder, tmp_path, letters, PROMPTS, max_steps=4, save_strategy="steps", save_steps=2).train()
    checkpoint = out / "checkpoint-2"
    same = dict(max_steps=4, save_strategy="steps", save_steps=2)
    resumed = build(str(checkpoint), tmp_path, letters, PROMPTS, **same)
    with pytest.raises(ValueError, match="belongs to another run: the reference's weights was"):
        resumed.train(resume_from_checkpoint=str(checkpoint))
    named = build(str(checkpoint), tmp_path, letters, PROMPTS, reference_model=folder, **same)
    named.train(resume_from_checkpoint=str(checkpoint))
    uninterrupted = AutoModelForCausalLM.from_pretrained(out / "checkpoint-4").state_dict()
    assert all(torch.equal(uninterrupted[name], value) for name, value in named.model.state_dict().items())


def test_1_1_a_checkpoint_of_an_earlier_version_resumes(folder, tmp_path):
    out = tmp_path / "out"
    same = dict(max_steps=4, save_strategy="steps", save_steps=2)
    build(folder, tmp_path, letters, PROMPTS, **same).train()
    marker = out / "checkpoint-2/tbrm/complete.json"
    written = json.loads(marker.read_text())
    key = "the reference's weights, tokenizer, temperature and precision"
    first = {name: value for name, value in written["identity"].items() if not name.startswith("the ")} | {"step": 2}
    second = first | {key: written["settings"]["reference key"]}
    for saved in (first, second):
        marker.write_text(json.dumps(saved))
        build(folder, tmp_path, letters, PROMPTS, **same).train(resume_from_checkpoint=str(out / "checkpoint-2"))
    marker.write_text(json.dumps(second | {key: "another"}))
    with pytest.raises(ValueError, match=f"belongs to another run: {key} was 'another'"):
        build(folder, tmp_path, letters, PROMPTS, **same).train(resume_from_checkpoint=str(out / "checkpoint-2"))
    marker.write_text(json.dumps(second))
    (out / "checkpoint-2/optimizer.pt").unlink()  # 4.7
    with pytest.raises(ValueError, match=r"File optimizer.pt of checkpoint-2 is damaged \(it is missing\)"):
        build(folder, tmp_path, letters, PROMPTS, **same).train(resume_from_checkpoint=str(out / "checkpoint-2"))


@pytest.mark.parametrize("given", ["folder", "model"])
def test_1_4_a_run_keeps_the_reference_that_is_named(given, folder, tmp_path):
    """From other weights, the log-ratio before any update is that to the named reference, in closed form."""
    other = save(tmp_path / "other", "llama", seed=3)
    reference = folder if given == "folder" else AutoModelForCausalLM.from_pretrained(folder)
    logged = Dataset.from_list(
        [{"prompt_ids": [5, 6 + i], "completion_ids": [20 + i, 30, 1], "reward": i / 8} for i in range(8)]
    )
    trainer = build(other, tmp_path / "out", None, logged, reference_model=reference, max_steps=1)
    trainer.train()
    expected = []
    for row in logged.select(range(8)):
        ids = torch.tensor([row["prompt_ids"] + row["completion_ids"]])
        sums = []
        for path in (other, folder):
            loaded = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
            with torch.no_grad():
                log_probs = loaded(ids).logits[0, 1:-1].log_softmax(-1)
            sums.append(log_probs.gather(1, ids[0, 2:, None]).sum().item())
        expected.append(sums[0] - sums[1])
    scored = {tuple(row["completion_ids"]): value for row, value in zip(logged, expected, strict=True)}
    seen = [scored[tuple(row.trajectory.completion_ids.tolist())] for part in trainer._microbatches for row in part]
    beta = trainer.args.beta
    assert trainer.state.log_history[0]["log_ratio"] == pytest.approx(beta * sum(seen) / len(seen), rel=1e-4)


def test_1_4_a_named_reference_beside_adapters_is_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="`reference_model` with adapters is refused"):
        build(folder, tmp_path, letters, PROMPTS, peft_config=LoraConfig(**ADAPTER), reference_model=folder)
    with pytest.raises(ValueError, match='`reference_model` with `reference="previous"` is refused'):
        build(folder, tmp_path, letters, PROMPTS, reference_model=folder, reference="previous")
    for soft_value in ("optimal", "quantile"):
        with pytest.raises(ValueError, match="samples before training are drawn from the model that is trained"):
            build(folder, tmp_path, letters, PROMPTS, reference_model=folder, soft_value=soft_value)


def test_1_5_padding_takes_no_more_positions_than_there_are(tmp_path):
    """GPT-2 has a trained vector for each of its 256 positions, and none for the next."""
    trainer = build(save(tmp_path / "gpt2", "gpt2"), tmp_path, letters, PROMPTS, pad_to_multiple_of=300, max_steps=1)
    batches = runs.kept_returns(trainer, "_collate")
    trainer.train()
    assert {batch.input_ids.shape[1] for batch in batches} == {256}


ROPES = {
    "default": ({"rope_type": "default", "rope_theta": 1e4}, None),
    "linear": ({"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}, None),
    "dynamic": ({"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}, 32),
    "yarn": ({"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4, "original_max_position_embeddings": 32}, None),
    "longrope": (
        {
            "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4,
            "factor": 2.0, "original_max_position_embeddings": 16,
        },
        16,
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", ROPES)
def test_1_5_rows_that_depend_on_the_batch_are_found_by_asking(kind):
    parameters, limit = ROPES[kind]
    built = model("llama", rope_parameters=parameters, max_position_embeddings=32)
    assert rotary_limit(built) == limit
    if limit is not None:  # the limit determines what the model does
        row = torch.arange(3, 3 + limit)[None]
        with torch.no_grad():
            alone = built(row).logits
            beside = built(
                torch.cat([torch.nn.functional.pad(row, (0, 1)), torch.ones_like(torch.nn.functional.pad(row, (0, 1)))])
            ).logits[:1, :limit]
        assert (alone - beside).abs().max() > 1e-3


def test_1_5_only_lengths_past_the_limit_are_refused(tmp_path):
    parameters = {**ROPES["longrope"][0], "original_max_position_embeddings": 32}
    path = save(tmp_path / "model", "llama", rope_parameters=parameters, max_position_embeddings=64)
    with pytest.raises(ValueError, match="A trajectory of 33 tokens is longer than 32"):
        build(path, tmp_path / "out", letters, PROMPTS, max_completion_length=32)
    build(path, tmp_path / "out", letters, PROMPTS, max_completion_length=8, max_steps=1).train()


def test_1_6_continuous_batching_may_not_cast_what_is_trained(folder, tmp_path):
    with pytest.raises(ValueError, match=r"TRL casts the trained weights to torch\.bfloat16 for good"):
        build(folder, tmp_path, letters, PROMPTS, use_transformers_continuous_batching=True, bf16=True)


def test_1_7_weights_too_large_for_a_step_are_counted():
    """bfloat16 has neighbours at 2^-8 of a power of two: a step of 2.5e-6 moves no weight above 2.5e-6 · 2^9."""
    layer = torch.nn.Linear(10, 10, bias=False).bfloat16()
    with torch.no_grad():
        layer.weight.fill_(0.5)
        layer.weight[:4] = 1e-5
    with pytest.warns(UserWarning, match="60% of the trained weights"):
        warn_of_half_precision(layer, 2.5e-6, samples=10_000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_half_precision(layer, 0.01, samples=10_000)
        warn_of_half_precision(layer.float(), 2.5e-6, samples=10_000)


def test_1_9_a_4_bit_base_is_not_repacked_when_it_is_evaluated():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    layer = bitsandbytes.nn.Linear4bit(64, 64, quant_type="nf4", compute_dtype=torch.float32).to("cpu")
    layer.support_avx512bf16_for_cpu = True  # as on a processor that has it
    keep_weights_unpacked(layer)
    before = layer.weight.data.clone()
    with torch.no_grad():
        layer.eval()(torch.randn(2, 64))
    assert torch.equal(layer.weight.data, before)


def test_3_1_nothing_to_train_is_refused(folder, tmp_path):
    get_peft_model(AutoModelForCausalLM.from_pretrained(folder), LoraConfig(**ADAPTER)).save_pretrained(tmp_path / "a")
    frozen = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "a")
    with pytest.raises(ValueError, match="is_trainable=True"):
        build(frozen, tmp_path / "out", letters, PROMPTS, processing_class=tokenizer())


def test_2_1_end_tokens_are_set_in_one_place(folder, tmp_path):
    with pytest.raises(ValueError, match="`generation_kwargs` with eos_token_id is refused"):
        build(folder, tmp_path, letters, PROMPTS, generation_kwargs={"eos_token_id": [1, 7]})
    with pytest.raises(ValueError, match="`generation_kwargs` with stop_strings is refused"):
        build(folder, tmp_path, letters, PROMPTS, generation_kwargs={"stop_strings": ["x"]})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"forced_eos_token_id": 1}, "with forced_eos_token_id is refused: completions would end"),
        ({"ignore_eos": True}, "with ignore_eos is refused: completions would end"),
        ({"num_return_sequences": 2}, "with num_return_sequences is refused: each prompt of a window gets one"),
        ({"return_dict_in_generate": True, "output_scores": True}, "with return_dict_in_generate, output_scores is"),
        ({"top_q": 0.9}, "with top_q is refused: transformers' GenerationConfig has no such field"),
    ],
)
def test_2_1_options_that_change_what_generation_returns(given, message):
    with pytest.raises(ValueError, match=f"`generation_kwargs` {message}"):
        runs.config(generation_kwargs=given)


def test_2_1_stop_strings_that_a_model_ships_with(folder, tmp_path):
    shipped = AutoModelForCausalLM.from_pretrained(folder)
    shipped.generation_config.stop_strings = ["ab"]
    with pytest.raises(ValueError, match=r"generation_config has stop_strings=\['ab'\].*`eos_token_id`"):
        build(shipped, tmp_path, letters, PROMPTS, processing_class=tokenizer())


def rolled_out(ids, mask=None):
    def rollout(prompts, trainer):
        n = len(prompts)
        masks = {} if mask is None else {"env_mask": [mask] * n}
        return {"prompt_ids": [[5, 6]] * n, "completion_ids": [ids] * n, "logprobs": [[0.0] * len(ids)] * n, **masks}

    return rollout


@pytest.mark.parametrize(
    ("ids", "mask", "message"),
    [
        ([57, 1, 0, 0], None, "the end token 1 at 1 of 4, and an action after it. Cut padding off"),
        ([57, 1, 58, 1], [1, 1, 1, 1], "the end token 1 at 1 of 4"),
        ([], None, "no token in `completion_ids`"),
        ([57, 103], None, "the token 103, outside of the policy's vocabulary of 103"),
        ([57, -1], None, "the token -1, outside"),
        ([57, 58, 1], [1, 0], "2 entries of `env_mask` for 3 completion ids"),
    ],
)
def test_2_2_rollouts_that_no_policy_drew(ids, mask, message, folder, tmp_path):
    with pytest.raises(ValueError, match=f"`rollout_func` returned for row 0 of 2 {message}"):
        build(folder, tmp_path, letters, PROMPTS, rollout_func=rolled_out(ids, mask)).train()


def test_2_2_turns_of_an_environment_are_taken(folder, tmp_path):
    trainer = runs.build(
        folder, tmp_path, letters, PROMPTS, max_steps=1,
        rollout_func=rolled_out([57, 1, 30, 31, 58, 1], [1, 1, 0, 0, 1, 1]),
    )  # fmt: skip
    trainer.train()
    assert trainer.windows[0][0].loss_mask.tolist() == [True, True, False, False, True, True]


def test_3_1_an_update_in_which_nothing_counts_is_said(folder, tmp_path):
    trainer = build(folder, tmp_path, letters, PROMPTS, truncation="mask", max_completion_length=1, max_steps=1)
    with pytest.warns(UserWarning, match=r"No trajectory of this update counts in the loss \(truncated\)"):
        trainer.train()


def test_3_1_rewards_without_weight_are_refused():
    with pytest.raises(ValueError, match=r"`reward_weights=\[0.0, 0.0\]` is refused: every reward would be 0"):
        runs.config(reward_weights=[0.0, 0.0])


@pytest.mark.parametrize(
    "change",
    [
        lambda model: setattr(model.model.layers[0].self_attn, "scaling", 1.0),
        lambda model: model.model.rotary_emb.inv_freq.mul_(2),
    ],
)
def test_1_3_what_differs_besides_parameters_is_seen_by_the_start(change, folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folder)
    change(model)
    trainer = build(model, tmp_path, letters, PROMPTS, max_steps=1, processing_class=tokenizer())
    with pytest.raises(ValueError, match="The policy is not its reference before anything is trained"):
        trainer.train()


def test_1_3_a_configuration_that_the_models_code_does_not_follow(folder, tmp_path):
    """Llama's forward knows no soft cap, and scores would have one."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.config.final_logit_softcapping = 1.0
    with pytest.raises(ValueError, match="are not those of its own logits"):
        build(model, tmp_path, letters, PROMPTS, processing_class=tokenizer())


@pytest.mark.parametrize(
    ("config", "sound"),
    [
        (LoHaConfig(target_modules=["q_proj"], init_weights=False), False),
        (LoHaConfig(target_modules=["q_proj"]), True),
        (OFTConfig(target_modules=["q_proj"], oft_block_size=8, r=0), True),
        (IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]), True),
        (LoraConfig(**ADAPTER, use_dora=True), True),
    ],
)
def test_1_2_adapters_of_other_kinds(config, sound, folder, tmp_path):
    trainer = build(folder, tmp_path, letters, PROMPTS, peft_config=config, max_steps=1)
    if sound:
        trainer.train()
        assert trainer.state.log_history[0]["log_ratio"] == pytest.approx(0, abs=1e-5)
    else:
        with pytest.raises(ValueError, match="before anything is trained"):
            trainer.train()


def test_4_1_sampling_fields_that_a_model_ships_with_are_warned_of(folder, tmp_path):
    shipped = AutoModelForCausalLM.from_pretrained(folder)
    shipped.generation_config.typical_p = 0.9
    shipped.generation_config.do_sample = True
    with pytest.warns(UserWarning, match=r"\{'typical_p': 0.9\} of the model's own generation_config"):
        build(shipped, tmp_path, letters, PROMPTS, processing_class=tokenizer())


def test_4_1_vllm_is_sent_every_sampling_field(monkeypatch):
    """vLLM fills fields that a request leaves out from the model's file. TRL leaves none of those out."""
    sent = {}

    def post(url, json):
        sent.update(json)
        return {"choices": [{"prompt_token_ids": [5, 6], "token_ids": [7], "logprobs": None}]}

    client = VLLMClient.__new__(VLLMClient)
    client.model, client.base_url, client._post = "a/model", "", post
    client.generate([[5, 6]])
    # What vLLM's `ModelConfig.get_diff_sampling_param` takes from the file; `max_new_tokens` is `max_tokens` there.
    from_the_file = {"repetition_penalty", "temperature", "top_k", "top_p", "min_p", "max_tokens"}
    assert all(sent[name] is not None for name in from_the_file)


def test_4_6_options_that_continuous_batching_ignores_are_refused(folder, tmp_path):
    batching = dict(use_transformers_continuous_batching=True)
    for options in (dict(repetition_penalty=1.2), dict(generation_kwargs={"min_new_tokens": 3})):
        with pytest.raises(ValueError, match="transformers ignores these"):
            build(folder, tmp_path, letters, PROMPTS, **batching, **options)


def test_4_8_a_schedule_that_has_ended_is_said(folder, tmp_path):
    same = dict(save_strategy="steps", save_steps=2, lr_scheduler_type="linear")
    build(folder, tmp_path, letters, PROMPTS, max_steps=2, **same).train()
    longer = build(folder, tmp_path, letters, PROMPTS, max_steps=4, **same)
    with pytest.warns(UserWarning, match="the next update has a learning rate of 0, though 2 updates are left"):
        longer.train(resume_from_checkpoint="true")  # as a word, like on a command line


def test_a_vocabulary_of_another_size_is_refused(folder, tmp_path):
    config = AutoConfig.from_pretrained(folder)
    config.vocab_size += 8
    with pytest.raises(ValueError, match=r"`reference_model` has a vocabulary of \d+ tokens"):
        build(folder, tmp_path, letters, PROMPTS, reference_model=AutoModelForCausalLM.from_config(config))


# ---- evaluation ------------------------------------------------------------------------------------------------------

NUMBERED = Dataset.from_list([{"prompt": f"{i}:", "number": i} for i in range(5)])


def number(completions, number, **kwargs):
    return [float(one) for one in number]


def evaluated(folder, tmp_path, evaluation, reward_funcs=number, **options):
    return runs.build(
        folder, tmp_path, reward_funcs, Dataset.from_list([{"prompt": f"{i}:", "number": i} for i in range(8)]),
        eval_dataset=evaluation, **options,
    )  # fmt: skip


def advantages_and_expected(folder, out, step, reward="letters") -> list[tuple[float, float]]:
    """The table's column `advantage`, and its value at the reference, `β V(s_1) − R`, computed from the model alone."""
    table = pandas.read_parquet(f"{out}/completions/completions_{step:05d}.parquet")
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    with torch.no_grad():
        logits = [plain(**tokenizer()(prompt, return_tensors="pt")).logits[0, -1] for prompt in table["prompt"]]
    expected = [0.1 * one.logsumexp(-1).item() - r for one, r in zip(logits, table[reward], strict=True)]
    return list(zip(table["advantage"].tolist(), expected, strict=True))


def is_right(advantage: float, expected: float) -> bool:
    return advantage == pytest.approx(expected, abs=1e-5)


def test_4_5_the_advantage_of_logged_completions_is_the_residual(folder, tmp_path):
    """It is `β δ` once the row has been in an update. The two updates of a window come one after the other."""
    trainer = evaluated(
        folder, tmp_path, NUMBERED, reward_funcs=letters, log_completions=True, max_steps=4, steps_per_generation=2,
        per_device_eval_batch_size=2, learning_rate=0.0,
    )  # fmt: skip
    trainer.train()
    for step in (1, 3):
        rows = advantages_and_expected(folder, tmp_path / "out", step)
        assert sum(is_right(*row) for row in rows) == 2 and sum(math.isnan(row[0]) for row in rows) == 2
    for step in (2, 4):
        rows = advantages_and_expected(folder, tmp_path / "out", step)
        assert len(rows) == 4 and all(is_right(*row) for row in rows)
    trainer.evaluate()
    rows = advantages_and_expected(folder, tmp_path / "out", 4)
    assert len(rows) == 4 and all(is_right(*row) for row in rows)


def test_4_5_rows_that_do_not_count_have_none(folder, tmp_path):
    trainer = evaluated(folder, tmp_path, NUMBERED, log_completions=True, max_steps=1, truncation="mask",
                        max_completion_length=1)  # fmt: skip
    trainer.train()
    rows = advantages_and_expected(folder, tmp_path / "out", 1, "number")
    assert [math.isnan(advantage) for advantage, _ in rows] == [True, True]


@pytest.mark.parametrize("form", ["text", "messages", "extra"])
def test_6_control_characters_of_completions_do_not_reach_the_terminal(form, folder, tmp_path, capsys):
    """They are printed escaped. The table on disk keeps them."""
    clear = "\x1b[2J\x9b31m\x07 a\r\x00"

    trainer = evaluated(folder, tmp_path, NUMBERED, log_completions=True, max_steps=1)
    trainer._logs["prompt"].extend(["a", "b"])
    trainer._logs["rewards"]["number"].extend([0.0, 0.0])
    shown = {"text": clear, "messages": [{"role": "assistant", "content": clear}], "extra": "a"}[form]
    trainer._logs["completion"].extend([shown] * 2)
    if form == "extra":
        trainer._logs["extra"]["said"].extend([clear] * 2)
    trainer.log({})
    printed = capsys.readouterr().out
    assert r"\x1b[2J\x9b31m\x07" in printed.replace("\n", "") and "\x9b" not in printed and "\x07" not in printed
    assert "\x1b[2J" not in printed and "\r" not in printed
    (file,) = (tmp_path / "out/completions").iterdir()
    kept = pandas.read_parquet(file).to_dict("list")
    assert clear in (kept.get("said") or kept["completion"])[0] or kept["completion"][0][0]["content"] == clear


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8])
def test_4_2_every_row_of_an_evaluation_counts_once(rows, folder, tmp_path):
    """Means, standard deviations (√2.5, of a sample) and extremes: over all rows, not means over batches."""
    trainer = evaluated(folder, tmp_path, NUMBERED, per_device_eval_batch_size=rows, max_completion_length=40)
    metrics = trainer.evaluate()
    assert metrics["eval_reward"] == metrics["eval_rewards/number/mean"] == 2.0
    assert metrics["eval_reward_std"] == metrics["eval_rewards/number/std"] == pytest.approx(math.sqrt(2.5))
    drawn = [t for window in trainer.windows for t in window]
    lengths, ended = [len(t.completion_ids) for t in drawn], [t.completion_ids[-1] == 1 for t in drawn]
    whole = [length for length, has_ended in zip(lengths, ended, strict=True) if has_ended]
    assert len(drawn) == 5 and len(set(lengths)) > 1 and 0 < len(whole) < 5
    for name, those in (("", lengths), ("_terminated", whole)):
        seen = [metrics[f"eval_completions/{how}{name}_length"] for how in ("mean", "min", "max")]
        assert seen == [pytest.approx(sum(those) / len(those)), min(those), max(those)]
    assert metrics["eval_completions/clipped_ratio"] == pytest.approx(1 - len(whole) / 5)


def test_4_2_pessimism_is_not_in_the_logged_reward(folder, tmp_path):
    """`reward` is the weighted sum of what the functions returned, in training and in evaluation alike."""

    def zero(completions, **kwargs):
        return [0.0] * len(completions)

    options = dict(reward_pessimism=1.0, reward_weights=[2.0, 1.0], per_device_eval_batch_size=2)
    metrics = evaluated(folder, tmp_path, NUMBERED, reward_funcs=[number, zero], **options).evaluate()
    assert metrics["eval_reward"] == 4.0 and metrics["eval_reward_std"] == pytest.approx(2 * math.sqrt(2.5))


def mean_over_two(folder: str, out: str) -> tuple[float, float]:
    """In each of two processes: 5 rows in batches of 2 are 3 batches, so one process repeats rows."""
    from pathlib import Path

    metrics = evaluated(
        folder, Path(out), NUMBERED, per_device_eval_batch_size=2, per_device_train_batch_size=4, log_completions=True
    ).evaluate()
    return metrics["eval_reward"], round(metrics["eval_reward_std"] ** 2, 5)


def test_4_2_and_4_5_over_two_processes(folder, tmp_path):
    assert launch("test_faults_start:mean_over_two", folder=folder, out=str(tmp_path)) == [(2.0, 2.5)] * 2
    rows = advantages_and_expected(folder, tmp_path / "out", 0, "number")
    assert len(rows) == 8 and sum(is_right(*row) for row in rows) == 5


def test_4_3_several_sets_log_under_their_own_names(folder, tmp_path):
    sets = {"easy": NUMBERED.select([0, 1]), "hard": NUMBERED.select([3, 4])}
    trainer = evaluated(
        folder, tmp_path, sets, per_device_eval_batch_size=2, eval_strategy="steps", eval_steps=1,
        save_strategy="steps", save_steps=1, max_steps=2, load_best_model_at_end=True,
        metric_for_best_model="eval_hard_reward",
    )  # fmt: skip
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "eval_easy_reward" in entry]
    assert len(logged) == 2 and all(entry["eval_easy_reward"] == 0.5 for entry in logged)
    assert [e["eval_hard_reward"] for e in trainer.state.log_history if "eval_hard_reward" in e] == [3.5, 3.5]
    assert not any("eval_reward" in entry for entry in trainer.state.log_history)
    assert trainer.state.best_metric == 3.5


def test_4_3_an_evaluation_without_a_value_chooses_no_checkpoint(folder, tmp_path, caplog):
    """A judge that is down during one evaluation, the second."""

    def judge(completions, trainer_state, **kwargs):
        if not trainer.model.training and trainer_state.global_step == 2:
            raise ConnectionError("the judge is down")
        return [float(trainer_state.global_step)] * len(completions)

    trainer = runs.build(
        folder, tmp_path, judge, max_steps=3, eval_dataset=runs.DATA.select([0, 1]), eval_strategy="steps",
        eval_steps=1, save_strategy="steps", save_steps=1, load_best_model_at_end=True, reward_on_error="skip",
        metric_for_best_model="reward", per_device_eval_batch_size=2,
    )  # fmt: skip
    trainer.train()
    evaluated = {e["step"]: e["eval_reward"] for e in trainer.state.log_history if "eval_reward" in e}
    assert evaluated == {1: 1.0, 3: 3.0} and trainer.state.best_global_step == 3
    assert "eval_reward has no value in this evaluation" in caplog.text


@pytest.mark.parametrize("options", [dict(truncation="mask", max_completion_length=1), dict(soft_value="optimal")])
def test_4_3_no_loss_where_nothing_counts(options, folder, tmp_path):
    """Not 0, which would be the best of all."""
    options = dict(soft_value_samples=2) | options if "soft_value" in options else options
    trainer = runs.build(
        folder, tmp_path, eval_dataset=runs.DATA.select([0, 1]), per_device_eval_batch_size=2, **options
    )
    assert not {"eval_loss", "eval_residual/rms"} & trainer.evaluate().keys()


def test_4_3_metrics_that_no_evaluation_has(tmp_path):
    """They are refused before anything is loaded, not after the first evaluation."""
    benchmark = TrainerCallback()
    benchmark.evaluates, benchmark.metric_names = True, ["eval_letters/avg@1", "eval_letters/truncated"]
    chosen = dict(load_best_model_at_end=True, eval_strategy="steps", save_strategy="steps")
    message = "only the metrics of the benchmarks; name one of eval_letters/avg@1, eval_letters/truncated"
    for metric in ({}, {"metric_for_best_model": "lettres/avg@1"}, {"metric_for_best_model": "eval_letters/avg@2"}):
        with pytest.raises(ValueError, match=message):
            build("no/such/model", tmp_path, callbacks=[benchmark], **chosen, **metric)
    chosen["metric_for_best_model"] = "letters/avg@2"
    with pytest.raises(ValueError, match="its benchmark has no such metric; name one of eval_letters/avg@1"):
        build("no/such/model", tmp_path, callbacks=[benchmark], eval_dataset=runs.DATA, **chosen)
    del chosen["metric_for_best_model"]
    with pytest.raises(ValueError, match="'loss'` with `soft_value=\"quantile\"` is refused: no evaluation set has"):
        build("no/such/model", tmp_path, eval_dataset=runs.DATA, soft_value="quantile", **chosen)


class EvaluateInside(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        self.trainer.evaluate()


def test_4_4_evaluation_in_a_callback_leaves_training_as_it_was(folder, tmp_path):
    plain = evaluated(folder, tmp_path / "plain", NUMBERED, max_steps=3, logging_steps=1)
    plain.train()
    callback = EvaluateInside()
    inside = evaluated(folder, tmp_path / "inside", NUMBERED, max_steps=3, logging_steps=1)
    inside.add_callback(callback)
    callback.trainer = inside
    inside.train()
    steps = [[e for e in t.state.log_history if "residual/mean" in e] for t in (plain, inside)]
    assert [len(entries) for entries in steps] == [3, 3]
    assert all({"reward", "kl", "loss"} <= set(entry) for entry in steps[1])


class EvaluateBetween(TrainerCallback):
    """Evaluate in the middle of an update, and put the random state back."""

    def on_substep_end(self, args, state, control, **kwargs):
        random = torch.get_rng_state()
        self.trainer.evaluate()
        torch.set_rng_state(random)


def test_4_4_evaluation_within_an_update_leaves_its_loss_as_it_was(folder, tmp_path):
    """The evaluation has 5 rows in batches of 5, so its denominator differs from the update's, which has 4 rows."""
    options = dict(max_steps=1, gradient_accumulation_steps=2, per_device_eval_batch_size=5, logging_steps=1)
    plain = evaluated(folder, tmp_path / "plain", NUMBERED, **options)
    plain.train()
    callback = EvaluateBetween()
    between = evaluated(folder, tmp_path / "between", NUMBERED, **options)
    between.add_callback(callback)
    callback.trainer = between
    between.train()
    assert between.losses == plain.losses and len(plain.losses) == 2
    weights = zip(plain.model.parameters(), between.model.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in weights)


def test_4_2_predict_and_streams_count_each_row_once(folder, tmp_path):
    trainer = evaluated(folder, tmp_path, NUMBERED.to_iterable_dataset(), per_device_eval_batch_size=2)
    assert trainer.predict(NUMBERED).metrics["test_reward"] == 2.0
    assert trainer.evaluate()["eval_reward"] == 2.0


def test_3_4_evaluation_by_continuous_batching_reaches_neither_window_nor_metrics(folder, tmp_path):
    # By default it takes most of the memory for its cache, and fills it with zeros each time.
    small = dict(max_batch_tokens=256, num_blocks=64)
    batching = dict(
        use_transformers_continuous_batching=True, transformers_continuous_batching_config=small,
        per_device_eval_batch_size=2, max_steps=2,
    )  # fmt: skip
    trainer = evaluated(
        folder, tmp_path, NUMBERED, **batching, num_iterations=2, replay_buffer_size=8, logging_steps=1,
        eval_strategy="steps", eval_steps=1,
    )  # fmt: skip
    trainer.train()
    assert len(trainer._window) == 2 and [len(window) for window in trainer.windows] == [2] + [2, 2, 1] * 2
    assert len(trainer._replay) == 2
    evaluations = [entry for entry in trainer.state.log_history if "eval_reward" in entry]
    assert [entry["eval_reward"] for entry in evaluations] == [2.0, 2.0]
    training = [entry for entry in trainer.state.log_history if "residual/mean" in entry]
    assert len(training) == 2


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("kind", ["modernbert-decoder", "roberta"])  # layers after the backbone; not causal
def test_scores_that_the_models_own_logits_do_not_give(kind, bf16, tmp_path):
    """From rules that the configuration does not tell, 2 to 77 nats per token were wrong in silence."""
    folder = _saved(kind, tmp_path / "model")
    with pytest.raises(ValueError, match=r"are not those of its own logits: .* differ by"):
        build(folder, tmp_path, letters, PROMPTS, bf16=bf16)


def test_a_soft_cap_that_the_head_does_not_know(tmp_path):
    """RecurrentGemma's soft cap has a name of its own. It shows where the logits are as large as a trained model's."""
    folder = _saved("recurrent_gemma", tmp_path / "model", lru_width=32, attention_window_size=64, logits_soft_cap=5.0)
    with pytest.raises(ValueError, match="are not those of its own logits"):
        build(folder, tmp_path, letters, PROMPTS)


def test_a_model_that_names_no_backbone(tmp_path):
    folder = _saved("llama4_text", tmp_path / "model")
    with pytest.raises(ValueError, match="base_model_prefix='language_model'"):
        build(folder, tmp_path, letters, PROMPTS)


@pytest.mark.parametrize("given", ["folder", "object"])
def test_embeddings_that_trl_does_not_find_beside_a_float32_head(given, tmp_path):
    """TRL would fail with an AttributeError, after the model is loaded."""
    folder = save(tmp_path / "model", "gpt2")
    policy = folder if given == "folder" else AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(ValueError, match="`cast_lm_head_to_fp32=True` is refused for GPT"):
        build(policy, tmp_path, letters, PROMPTS, cast_lm_head_to_fp32=True)


def _saved(kind, folder, **changes):
    """Save a tiny model of a kind whose scores cannot be trusted, and a tokenizer."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**ARCHITECTURES["qwen2"], **changes})
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)
