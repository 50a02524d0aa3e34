"""What practitioners ran into: a policy, a reference or an evaluation that is silently another one."""

import functools
import json
import warnings

import pytest
import torch
from common.tiny import model, save, tokenizer
from datasets import Dataset
from helpers import runs
from helpers.launch import launch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, TrainerCallback

from tbrm_trl import TBRMTrainer
from tbrm_trl.checks.model import check_start, rotary_limit, warn_of_half_precision
from tbrm_trl.model.randomness import keep_weights_unpacked

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
    """The adapter `ref` is made without the initialisation that rewrote the base: the policy stays what it was."""
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


def test_the_start_has_a_tolerance():
    check_start(9e-4, dtype_is_half=False, of_adapter=False)
    check_start(0.09, dtype_is_half=True, of_adapter=False)
    with pytest.raises(ValueError, match=r"differ by 0.0011 nats per token \(allowed: 0.001\)"):
        check_start(1.1e-3, dtype_is_half=False, of_adapter=False)
    with pytest.raises(ValueError, match=r"allowed: 0.1"):
        check_start(0.11, dtype_is_half=True, of_adapter=True)


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
    if limit is not None:  # what the limit says is what the model does
        row = torch.arange(3, 3 + limit)[None]
        with torch.no_grad():
            alone = built(row).logits
            beside = built(
                torch.cat([torch.nn.functional.pad(row, (0, 1)), torch.ones_like(torch.nn.functional.pad(row, (0, 1)))])
            ).logits[:1, :limit]
        assert (alone - beside).abs().max() > 1e-3


def test_1_5_only_lengths_past_the_limit_are_refused(tmp_path):
    parameters, _ = ROPES["dynamic"]
    path = save(tmp_path / "model", "llama", rope_parameters=parameters, max_position_embeddings=32)
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


def test_4_1_sampling_fields_that_a_model_ships_with_are_warned_of(folder, tmp_path):
    shipped = AutoModelForCausalLM.from_pretrained(folder)
    shipped.generation_config.typical_p = 0.9
    shipped.generation_config.do_sample = True
    with pytest.warns(UserWarning, match=r"\{'typical_p': 0.9\} of the model's own generation_config"):
        build(shipped, tmp_path, letters, PROMPTS, processing_class=tokenizer())


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
        longer.train(resume_from_checkpoint="true")  # the word, as a command line gives it


def test_a_vocabulary_of_another_size_is_refused(folder, tmp_path):
    config = AutoConfig.from_pretrained(folder)
    config.vocab_size += 8
    with pytest.raises(ValueError, match=r"`reference_model` has a vocabulary of \d+ tokens"):
        build(folder, tmp_path, letters, PROMPTS, reference_model=AutoModelForCausalLM.from_config(config))


# ---- evaluation ------------------------------------------------------------------------------------------------------

NUMBERED = Dataset.from_list([{"prompt": f"{i}:", "number": i} for i in range(5)])


def number(completions, number, **kwargs):
    return [float(one) for one in number]


def evaluated(folder, tmp_path, evaluation, **options):
    return runs.build(
        folder, tmp_path, number, Dataset.from_list([{"prompt": f"{i}:", "number": i} for i in range(8)]),
        eval_dataset=evaluation, **options,
    )  # fmt: skip


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8])
def test_4_2_every_row_of_an_evaluation_counts_once(rows, folder, tmp_path):
    metrics = evaluated(folder, tmp_path, NUMBERED, per_device_eval_batch_size=rows).evaluate()
    assert metrics["eval_reward"] == metrics["eval_rewards/number/mean"] == 2.0


def mean_over_two(folder: str, out: str) -> float:
    """Run in each of two processes: 5 rows in batches of 2 are 3 batches, so one process fills up with rows again."""
    from pathlib import Path

    metrics = evaluated(folder, Path(out), NUMBERED, per_device_eval_batch_size=2).evaluate()
    return metrics["eval_reward"]


def test_4_2_over_two_processes(folder, tmp_path):
    assert launch("test_faults_start:mean_over_two", folder=folder, out=str(tmp_path)) == [2.0, 2.0]


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


def test_3_4_evaluation_by_continuous_batching_reaches_neither_window_nor_metrics(folder, tmp_path):
    batching = dict(use_transformers_continuous_batching=True, per_device_eval_batch_size=2, max_steps=2)
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
