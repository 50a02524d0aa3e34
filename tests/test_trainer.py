"""GRPOTrainer's features keep working: real generation by tiny models, real reward functions, `train()`."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas
import pytest
import torch
from accelerate import PartialState
from common.launch import allow_fsdp_on_cpu
from common.tiny import VOCABULARY, perturb, save, tokenizer
from datasets import Dataset
from helpers.forked import launch
from helpers.runs import (
    CHATS,
    DATA,
    PROMPTS,
    TOKENIZER,
    build,
    completion,
    config,
    differ,
    digits,
    letters,
    logged,
    prompt,
    train,
)
from peft import LoraConfig, PromptTuningConfig, TaskType
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForSequenceClassification,
)
from trl import GRPOConfig
from trl.chat_template_utils import qwen3_chat_template
from trl.trainer import grpo_trainer

from tbrm_trl import TBRMConfig, TBRMTrainer
from tbrm_trl.model.randomness import disable_randomness
from tbrm_trl.trajectory import End, Source, Trajectory

ZERO = pytest.approx(0, abs=1e-5)


async def length(completion_ids, **kwargs) -> list[float]:
    return [float(len(ids)) for ids in completion_ids]


def trajectories(trainer) -> list[Trajectory]:
    return [trajectory for window in trainer.windows for trajectory in window]


# ---- models ----------------------------------------------------------------------------------------------------------


@dataclass
class OnCPU(TBRMConfig):
    """All defaults except the machine."""

    use_cpu: bool = True
    bf16: bool = False


def test_without_args(tmp_path, monkeypatch):
    """One rollout per prompt, in a folder named after the model, for three epochs; options of GRPO are refused."""
    llama = save(tmp_path / "model", "llama", max_position_embeddings=1024)  # the default completions have 512 tokens
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tbrm_trl.trainer.TBRMConfig", OnCPU)
    trainer = TBRMTrainer(llama, letters, train_dataset=DATA)
    trainer.train()
    assert trainer.args.output_dir == f"{Path(llama).name}-TBRM"
    assert trainer.state.global_step == 3 and trainer.num_generations == 1
    assert differ(trainer.model.parameters(), trainer.ref_model.parameters())
    with pytest.raises(TypeError, match="must be a TBRMConfig, got GRPOConfig"):
        TBRMTrainer(llama, letters, GRPOConfig(use_cpu=True, bf16=False), DATA)


def test_model_object(llama, tmp_path):
    """A loaded model trains. One that differs from its folder would get another reference."""
    model = AutoModelForCausalLM.from_pretrained(llama)
    assert train(model, tmp_path).model is model
    changed = AutoModelForCausalLM.from_pretrained(llama)
    perturb(changed)
    with pytest.raises(ValueError, match=r"The reference policy is not the model you passed.*save_pretrained"):
        build(changed, tmp_path)


@pytest.mark.parametrize("rollouts", [1, 2, 4])
def test_rollouts_per_prompt(rollouts, llama, tmp_path, recwarn):
    """Also a batch of a single trajectory. Rollouts are independent samples, each with its own raw reward."""
    trainer = train(llama, tmp_path, num_generations=rollouts, per_device_train_batch_size=rollouts)
    for window, mean in zip(trainer.windows, logged(trainer, "reward"), strict=True):
        assert len(window) == rollouts and len({prompt(t) for t in window}) == 1
        assert len({completion(t) for t in window}) == rollouts
        assert [t.reward for t in window] == letters([completion(t) for t in window])
        assert mean == pytest.approx(sum(t.reward for t in window) / rollouts)
    assert not any("another policy" in str(warning.message) for warning in recwarn)


def test_lm_head_in_float32(tmp_path):
    """An untied bfloat16 model: the option reaches policy and reference, which are then scored alike."""
    folder = save(tmp_path / "model", "llama", tie_word_embeddings=False)
    options = dict(cast_lm_head_to_fp32=True, bf16=True, model_init_kwargs={"dtype": torch.bfloat16})
    trainer = train(folder, tmp_path, **options)
    for model in (trainer.model, trainer.ref_model):
        assert model.lm_head.weight.dtype == torch.float32
        assert model.model.embed_tokens.weight.dtype == torch.bfloat16
        row = trainer.windows[0][0]
        batch = trainer._collate([row])
        with torch.no_grad(), trainer.accelerator.autocast():
            states = model.base_model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
        expected = (states[0, len(row.prompt_ids) - 1].float() @ model.lm_head.weight.T).logsumexp(dim=-1)
        assert trainer._score(model, batch).soft_value.item() == pytest.approx(expected.item(), rel=1e-5)
    assert logged(trainer, "log_ratio")[0] == ZERO


@pytest.mark.parametrize("mixed", [False, True], ids=["bfloat16", "mixed"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_given_references_head_in_float32(tied, mixed, tmp_path):
    """It scores as the policy does. With tied weights, embeddings go on in the dtype of the other layers."""
    folder = save(tmp_path / "model", "llama", tie_word_embeddings=tied)
    options = dict(cast_lm_head_to_fp32=True, bf16=mixed, model_init_kwargs={"dtype": torch.bfloat16})
    trainer = train(folder, tmp_path, max_steps=1, reference_model=folder, **options)
    assert trainer.ref_model.get_output_embeddings().weight.dtype == torch.float32
    assert logged(trainer, "log_ratio") == logged(trainer, "kl") == [0.0]
    with torch.no_grad(), trainer.accelerator.autocast():  # as where tokens are drawn
        head = trainer.model.get_output_embeddings()
        assert head(torch.ones(1, head.in_features, dtype=torch.bfloat16)).dtype == torch.float32


def test_a_float32_head_with_an_adapter_needs_weights_of_its_own(tmp_path):
    options = dict(cast_lm_head_to_fp32=True, peft_config=LoraConfig(r=2, target_modules=["q_proj"]), max_steps=1)
    with pytest.raises(ValueError, match=r"`cast_lm_head_to_fp32=True` with an adapter is refused"):
        build(save(tmp_path / "tied", "llama", tie_word_embeddings=True), tmp_path, **options)
    train(save(tmp_path / "untied", "llama", tie_word_embeddings=False), tmp_path, **options)


class CastsToBfloat16(TorchDispatchMode):
    """Counts how often each parameter is cast."""

    def __init__(self) -> None:
        super().__init__()
        self.of: Counter[int] = Counter()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator is torch.ops.aten._to_copy.default and (kwargs or {}).get("dtype") is torch.bfloat16:
            self.of[id(args[0])] += isinstance(args[0], torch.nn.Parameter)
        return operator(*args, **(kwargs or {}))


@pytest.mark.parametrize("adapted", [False, True], ids=["full", "lora"])
def test_generation_in_mixed_precision(adapted, llama, tmp_path, monkeypatch):
    """Each matrix, trained or frozen, is cast once for all tokens of a window, and the tokens stay the same."""
    lora = LoraConfig(r=4, target_modules="all-linear") if adapted else None
    trainer, casts = build(llama, tmp_path, max_steps=1, bf16=True, peft_config=lora), CastsToBfloat16()
    generate = trainer._generate_single_turn

    def counted(*args):
        with casts:
            return generate(*args)

    trainer._generate_single_turn = counted
    trainer.train()
    assert max(len(t.completion_ids) for t in trajectories(trainer)) > 4
    matrices = {id(p): name for name, p in trainer.model.named_parameters() if p.ndim == 2}
    counts = {matrices[one]: count for one, count in casts.of.items() if count}
    assert counts == dict.fromkeys(matrices.values(), 1)
    trained = [name for name, p in trainer.model.named_parameters() if p.requires_grad]
    assert all("lora_" in name for name in trained) == adapted

    if not adapted:
        monkeypatch.setattr(TBRMTrainer, "_autocast_of_generation", lambda self: nullcontext())
        anew = train(llama, tmp_path / "anew", max_steps=1, bf16=True)
        texts, of_anew = (list(map(completion, trajectories(one))) for one in (trainer, anew))
        assert texts == of_anew


@pytest.mark.parametrize(("architecture", "changes"), [("gpt2", {}), ("llama", {"attention_dropout": 0.5})])
def test_no_dropout_in_training(architecture, changes, tmp_path):
    """Dropout modules (GPT-2's default) and attention's own rate are off in training mode; the raw model is noisy."""
    folder = save(tmp_path / "model", architecture, **changes)
    trainer = build(folder, tmp_path)
    row = Trajectory(torch.arange(3, 9), torch.arange(20, 28), torch.ones(8, dtype=torch.bool), 1.0, End.LENGTH)
    batch = trainer._collate([row])
    first, second = (trainer._score(trainer.model.train(), batch) for _ in range(2))
    for other in (second, trainer._score(trainer.model.eval(), batch), trainer._score(trainer.ref_model, batch)):
        assert torch.equal(first.log_probs, other.log_probs) and torch.equal(first.soft_value, other.soft_value)
    noisy = AutoModelForCausalLM.from_pretrained(folder).train()
    assert not torch.equal(noisy(batch.input_ids).logits, noisy(batch.input_ids).logits)


def test_rates_that_are_no_dropout_module():
    """OPT skips whole layers at a rate of its own. Falcon reads its rate anew in each forward pass."""
    sizes = dict(vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    skipping = OPTForCausalLM(OPTConfig(**sizes, ffn_dim=16, word_embed_proj_dim=16, layerdrop=0.5))
    disable_randomness(skipping)
    assert skipping.model.decoder.layerdrop == 0
    with pytest.raises(ValueError, match=r"FalconDecoderLayer reads \{'hidden_dropout': 0.1\}"):
        disable_randomness(FalconForCausalLM(FalconConfig(**sizes, hidden_dropout=0.1)))
    disable_randomness(FalconForCausalLM(FalconConfig(**sizes, hidden_dropout=0.0, attention_dropout=0.0)))


def test_lora(llama, tmp_path):
    """Adapters move, the base does not, and no reference is loaded; adapters that bias the residual are refused."""
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type=TaskType.CAUSAL_LM)
    trainer = build(llama, tmp_path, peft_config=lora, max_steps=3)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    moved = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if "lora_" in name}
    assert trainer.ref_model is None
    assert logged(trainer, "log_ratio")[0] == ZERO != logged(trainer, "log_ratio")[-1]  # the reference stays the base
    with pytest.raises(ValueError, match=r"`lora_dropout=0\.1` is refused"):
        build(llama, tmp_path, peft_config=LoraConfig(lora_dropout=0.1))
    with pytest.raises(ValueError, match="PromptTuningConfig is refused"):
        build(llama, tmp_path, peft_config=PromptTuningConfig(num_virtual_tokens=2, task_type=TaskType.CAUSAL_LM))


# ---- rewards ---------------------------------------------------------------------------------------------------------


def test_several_rewards_are_weighted_and_raw(llama, tmp_path):
    """R is the weighted sum of what the functions returned, sync or async; None leaves one function out of one row."""
    options = dict(reward_weights=[2.0, 0.5, -3.0], per_device_train_batch_size=8)
    rows = trajectories(trainer := train(llama, tmp_path, [letters, length, digits], **options))
    counts = digits(map(completion, rows))
    assert None in counts and any(counts)
    for row, share, count in zip(rows, letters(map(completion, rows)), counts, strict=True):
        assert row.reward == pytest.approx(2.0 * share + 0.5 * len(row.completion_ids) - 3.0 * (count or 0))
    assert logged(trainer, "left_out/unscored") == [0, 0]


def test_unscored_rollouts_leave_the_loss(llama, tmp_path):
    """A row for which every function returned None has no reward, and is not in the mean; the metric says how many."""
    trainer = train(llama, tmp_path, digits, per_device_train_batch_size=4, gradient_accumulation_steps=2)
    for step, window in enumerate(trainer.windows):
        unscored = [count is None for count in digits(map(completion, window))]
        assert [math.isnan(t.reward) for t in window] == unscored
        assert 0 < logged(trainer, "left_out/unscored")[step] == sum(unscored) / 8 < 1
        assert logged(trainer, "loss")[step] == pytest.approx(logged(trainer, "residual/rms")[step] ** 2)


@pytest.mark.parametrize("value", [math.inf, -math.inf])
def test_infinite_reward_is_refused(value, llama, tmp_path):
    def broken(completions, **kwargs):
        return [0.0] * (len(completions) - 1) + [value]

    with pytest.raises(ValueError, match=rf"Reward function 'broken' returned {value} for rollout 1 of 2"):
        build(llama, tmp_path, [letters, broken]).train()


def reward_model() -> Qwen2ForSequenceClassification:
    config = Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_labels=1, pad_token_id=0, initializer_range=0.5,
    )  # fmt: skip
    return Qwen2ForSequenceClassification(config).eval()


@pytest.mark.parametrize("weight", [1.0, 0.0])
def test_a_reward_model_that_gives_no_number(weight, llama, tmp_path):
    """It has no None for what it does not judge, so its NaN is an unknown verdict, unless it only watches."""
    judge = reward_model()

    def lose_the_first(module, args, output):
        output.logits[0] = math.nan

    judge.register_forward_hook(lose_the_first)
    options = dict(reward_processing_classes=[tokenizer(), None], reward_weights=[weight, 1.0])
    trainer = train(llama, tmp_path, [judge, letters], per_device_train_batch_size=4, **options)
    assert [sum(math.isnan(t.reward) for t in window) for window in trainer.windows] == [int(weight)] * 2
    assert logged(trainer, "left_out/unscored") == [0.25 if weight else 0.0] * 2


@pytest.mark.parametrize("by_name", [True, False])
def test_reward_model(by_name, llama, tmp_path):
    """A sequence classifier, by its folder or as an object, scores prompt and completion together."""
    judge = reward_model()
    judge.save_pretrained(tmp_path / "judge")
    given = str(tmp_path / "judge") if by_name else judge
    trainer = train(llama, tmp_path, given, reward_processing_classes=tokenizer())
    for trajectory in trajectories(trainer):
        text = TOKENIZER(prompt(trajectory) + completion(trajectory), return_tensors="pt")
        assert trajectory.reward == pytest.approx(judge(**text).logits.item(), rel=1e-4)


def test_reward_functions_see_columns_and_training_and_can_log(llama, tmp_path):
    """Columns, `trainer_state`, `log_extra` and `log_metric`; and completions are logged with their rewards."""

    def reward(completions, answer, trainer_state, log_extra, log_metric, **kwargs):
        log_extra("twice", [2 * a for a in answer])
        log_metric("largest", max(answer))
        return [a + 100 * trainer_state.global_step for a in answer]

    trainer = train(llama, tmp_path, reward, log_completions=True)
    for step, window in enumerate(trainer.windows):
        answers = [PROMPTS.index(prompt(t)) for t in window]
        assert [t.reward for t in window] == [a + 100 * step for a in answers]
        assert logged(trainer, "largest")[step] == max(answers)
        table = pandas.read_parquet(tmp_path / "out" / "completions" / f"completions_{step + 1:05d}.parquet")
        columns = dict(prompt=map(prompt, window), completion=map(completion, window), twice=[2 * a for a in answers])
        for name, expected in {**columns, "reward": [t.reward for t in window]}.items():
            assert table[name].tolist() == list(expected)


# ---- data and generation ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dataset", "options"),
    [
        (DATA, {"dataloader_num_workers": 1}),
        (CHATS, {}),
        (DATA.to_iterable_dataset(), {}),
        (CHATS.to_iterable_dataset(), {"num_generations": 2}),
    ],
    ids=["workers", "chats", "stream", "stream of chats"],
)
def test_data_sets(dataset, options, llama, tmp_path):
    """Prompts arrive whole: rendered by the chat template where conversational, none of them twice."""
    trainer = train(llama, tmp_path, train_dataset=dataset, max_steps=3, **options)
    rows = trajectories(trainer)
    known = PROMPTS if "answer" in next(iter(dataset)) else [f"<u>{p}\n<a>" for p in PROMPTS]
    assert {prompt(t) for t in rows} <= set(known)
    assert len({prompt(t) for t in rows}) * trainer.num_generations == len(rows) == 6
    assert [t.reward for t in rows] == letters(map(completion, rows))


def test_a_tracker_that_is_not_installed_is_refused_before_a_model_is_loaded(tmp_path):
    with pytest.raises(ValueError, match="`report_to` names clearml, which is not installed"):
        build("no/such/model", tmp_path, report_to=["clearml"])
    assert config(report_to="clearml").report_to == ["clearml"]  # as for an estimate, made elsewhere


def test_chat_template_kwargs(llama, tmp_path):
    words = tokenizer()
    words.chat_template = "{{ mood }}:{{ messages[0]['content'] }}"
    trainer = train(llama, tmp_path, letters, CHATS, processing_class=words, chat_template_kwargs={"mood": "brief"})
    assert {prompt(t) for t in trajectories(trainer)} <= {f"brief:{p}" for p in PROMPTS}


@pytest.mark.parametrize("options", [{"top_k": 1}, {"generation_kwargs": {"top_k": 1}}])
def test_sampling_options_reach_generation_with_a_warning(options, llama, tmp_path):
    """top_k=1 makes both rollouts of a prompt the same, and is warned of by either route."""
    with pytest.warns(UserWarning, match=r"\{'top_k': 1\} makes the sampler another policy"):
        trainer = train(llama, tmp_path, num_generations=2, **options)
    assert all(completion(first) == completion(second) for first, second in trainer.windows)
    assert max(len(t.completion_ids) for t in trajectories(trainer)) == 8


def test_continuous_batching(llama, tmp_path):
    """Greedy, so that it must produce what ordinary generation does, in the same order."""
    options = dict(top_k=1, max_steps=1, per_device_train_batch_size=4)
    small = dict(num_blocks=8, max_batch_tokens=64)
    paged = dict(use_transformers_continuous_batching=True, transformers_continuous_batching_config=small)
    ordinary, batched = (trajectories(train(llama, tmp_path, **options, **extra)) for extra in ({}, paged))
    seen = [[(prompt(t), completion(t), t.reward) for t in rows] for rows in (ordinary, batched)]
    assert seen[0] == seen[1]


# ---- updates ---------------------------------------------------------------------------------------------------------


def test_windows_are_reused_and_nothing_is_scored_twice(llama, tmp_path, monkeypatch):
    """8 rollouts serve 4 updates (twice 2 steps' worth); one reference pass each, and no old-policy pass."""
    options = dict(gradient_accumulation_steps=2, steps_per_generation=4, num_iterations=2, max_steps=5)
    trainer = build(llama, tmp_path, **options)
    generated, policy, reference = [], [], []  # sequences in each call
    generate, generating = trainer.model.generate, False

    def counted_generate(*args, **kwargs):
        nonlocal generating
        generated.append(len(kwargs["input_ids"]))
        generating = True
        try:
            return generate(*args, **kwargs)
        finally:
            generating = False

    monkeypatch.setattr(trainer.model, "generate", counted_generate)
    for model, counts in ((trainer.model, policy), (trainer.ref_model, reference)):

        def count(module, args, kwargs, counts=counts):
            if not generating:
                counts.append(len(kwargs["input_ids"]))

        model.base_model.register_forward_pre_hook(count, with_kwargs=True)  # whoever calls it
    trainer.train()
    assert generated == [8, 8]  # for updates 1 to 4, and for update 5
    assert policy == [2] * 2 * 5  # two micro-batches per update
    assert reference == [2] * 4 * 2  # every trajectory of both windows once
    ratios = logged(trainer, "log_ratio")
    assert ratios[0] == ZERO and all(ratio != ZERO for ratio in ratios[1:])  # later updates see the moved policy
    assert len(set(logged(trainer, "residual/mean"))) == 5


@pytest.mark.parametrize("sync", [False, True])
def test_reference_follows_the_policy_when_asked(sync, llama, tmp_path):
    trainer = train(llama, tmp_path, sync_ref_model=sync, ref_model_sync_steps=1, ref_model_mixup_alpha=1.0)
    expected = trainer.model if sync else AutoModelForCausalLM.from_pretrained(llama)
    assert not differ(trainer.ref_model.parameters(), expected.parameters())
    assert (logged(trainer, "log_ratio")[1] == ZERO) is sync  # the second window has the reference of its time


@pytest.mark.parametrize("rollouts", [None, 2])
def test_evaluation(rollouts, llama, tmp_path):
    """Evaluation generates on its own prompts, and logs the loss, the reward and the residual of those rollouts."""
    prompts = ["held", "out", "!", "??"]
    options = dict(eval_strategy="steps", eval_steps=1, per_device_eval_batch_size=4, num_generations_eval=rollouts)
    trainer = train(llama, tmp_path, eval_dataset=Dataset.from_dict({"prompt": prompts}), **options)
    half = len(trainer.windows) // 2  # one window to train on, then the batches of its evaluation: one, or two
    for step, windows in enumerate((trainer.windows[1:half], trainer.windows[half + 1 :])):
        window = [trajectory for batch in windows for trajectory in batch]
        assert sorted(map(prompt, window)) == sorted(prompts * (rollouts or 1))
        assert logged(trainer, "eval_reward")[step] == pytest.approx(sum(t.reward for t in window) / len(window))
        mean_square = logged(trainer, "eval_residual/rms")[step] ** 2
        assert logged(trainer, "eval_loss")[step] == pytest.approx(mean_square, rel=1e-4) and mean_square > 0
        # The policy has moved, and is compared with the reference.
        assert logged(trainer, "eval_log_ratio")[step] != ZERO


# ---- tools and environments ------------------------------------------------------------------------------------------

CALL = '<tool_call>\n{"name": "double", "arguments": {"x": 21}}\n</tool_call>'
CALL_ID = VOCABULARY
# Each turn is that call and then the end of sequence; the loop stops after one round of calls.
CALLING = dict(
    generation_kwargs={"sequence_bias": [[[CALL_ID], 50.0], [[CALL_ID, 1], 100.0]]},
    max_tool_calling_iterations=1,
    max_completion_length=200,
    train_dataset=CHATS,
)
DESCRIPTION = "Double a number.\n\nArgs:\n    x: the number."


@pytest.fixture(scope="module")
def caller(tmp_path_factory):
    """A model whose chat template knows tools, and whose vocabulary has a whole tool call as one token."""
    folder = tmp_path_factory.mktemp("caller")
    save(folder, "llama", vocab_size=VOCABULARY + 1, max_position_embeddings=2048)
    words = tokenizer()
    words.chat_template = qwen3_chat_template
    words.add_tokens([CALL])
    words.save_pretrained(folder)
    return str(folder)


def doubling(later: bool):
    def double(x: int) -> int:
        return 2 * x

    async def double_later(x: int) -> int:
        return 2 * x

    tool = double_later if later else double
    tool.__name__, tool.__doc__ = "double", DESCRIPTION
    return tool


class Till:
    """An environment that owns its reward: its start plus what its tool added."""

    def reset(self, start: int, **kwargs) -> str:
        self.total = start
        return f" from {start}"

    def double(self, x: int) -> int:
        self.total += 2 * x
        return 2 * x

    double.__doc__ = DESCRIPTION

    def get_reward(self) -> float:
        return float(self.total)


def check_calls(trainer) -> None:
    """Assert that the policy's tokens are its calls and ends, with the tool's answer between them, out of the loss."""
    for row in trajectories(trainer):
        assert row.completion_ids[row.loss_mask].tolist() == [CALL_ID, 1, CALL_ID, 1]
        assert "<tool_response>\n42\n</tool_response>" in TOKENIZER.decode(row.completion_ids[~row.loss_mask])
        assert row.ref_log_probs.ne(0).tolist() == row.loss_mask.tolist()
        assert row.end is End.TOOL_LIMIT  # its last call is not made
    assert logged(trainer, "tools/call_frequency") == [1, 1] and logged(trainer, "tools/failure_frequency") == [0, 0]


@pytest.mark.parametrize("later", [False, True], ids=["sync", "async"])
def test_tools(later, caller, tmp_path):
    check_calls(train(caller, tmp_path, length, tools=[doubling(later)], **CALLING))


def test_environment_owns_the_reward(caller, tmp_path):
    """`reset` receives the columns and adds to the prompt, its methods are tools, `get_reward` is R."""
    trainer = train(caller, tmp_path, None, environment_factory=Till, **CALLING)
    check_calls(trainer)
    for row in trajectories(trainer):
        start = next(i for i, p in enumerate(PROMPTS) if f"{p} from {i}<" in prompt(row))
        assert row.reward == start + 42


def test_an_environment_that_brings_the_prompts(caller, tmp_path):
    class Own(Till):
        def reset(self, **kwargs) -> str:
            return super().reset(3)

    trainer = train(caller, tmp_path, None, environment_factory=Own, **{**CALLING, "train_dataset": None})
    assert all(" from 3<" in prompt(row) and row.reward == 45 for row in trajectories(trainer))


@pytest.mark.parametrize(
    ("logged_row", "problem"),
    [
        ({"prompt_ids": [5], "completion_ids": [6, 1]}, "it has no `reward`, and an environment rewards its own"),
        ({"completion": CHATS[0]["prompt"], "reward": 1.0}, "its messages would be written with the tools of another"),
        ({"prompt_ids": [5], "completion_ids": [6, 1], "reward": 0.25}, None),
    ],
)
def test_logged_rows_beside_environments(logged_row, problem, caller, tmp_path):
    """TRL would reward a logged row by the environment of the rollout at its place."""
    names = ("prompt_ids", "completion_ids", "completion", "reward")
    rows = [{**row, **dict.fromkeys(names)} for row in CHATS.select(range(4))]
    data = Dataset.from_list(rows + [{**row, **logged_row} for row in rows])
    options = {**CALLING, "train_dataset": data, "logged_fraction": 0.5, "environment_factory": Till, "max_steps": 1}
    if problem is not None:
        with pytest.raises(ValueError, match=f"Row 4 of the training set: {problem}"):
            build(caller, tmp_path, None, **options)
        return
    trainer = train(caller, tmp_path, None, **options)
    drawn = trajectories(trainer)
    assert sorted(one.reward for one in drawn if one.source is Source.LOGGED) == [0.25] * (len(drawn) // 2)


@pytest.mark.parametrize("soft_value", ["group", "log_mean_exp", "calibrated"])
def test_an_environment_that_draws_another_task_for_each_rollout(soft_value, caller, tmp_path):
    """Rollouts of different prompts are no group."""
    starts = itertools.count()

    class Random(Till):
        def reset(self, **kwargs) -> str:
            return super().reset(10 * next(starts))

    trainer = build(caller, tmp_path, None, environment_factory=Random, soft_value=soft_value, num_generations=2,
                    **CALLING)  # fmt: skip
    refused = pytest.raises(ValueError, match="Rollouts of one row of the data set have different prompts")
    with nullcontext() if soft_value == "calibrated" else refused:
        trainer.train()


def test_environments_by_name(caller, tmp_path):
    """The column `environment` chooses. One environment adds what its tool returns, the other's reward is 0."""

    class Nothing(Till):
        def get_reward(self) -> float:
            return 0.0

    names = ["till", "nothing"] * (len(CHATS) // 2)
    rows = CHATS.add_column("environment", names)
    factories = {"till": Till, "nothing": Nothing}
    trainer = train(caller, tmp_path, None, environment_factory=factories, **{**CALLING, "train_dataset": rows})
    for row in trajectories(trainer):
        start = next(i for i, p in enumerate(PROMPTS) if f"{p} from {i}<" in prompt(row))
        assert row.reward == (start + 42 if names[start] == "till" else 0.0)


@pytest.mark.parametrize("later", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize(("error", "said"), [(RuntimeError("no"), "no"), (SystemExit(3), "it called sys.exit(3)")])
def test_a_tool_that_fails(error, said, later, caller, tmp_path):
    """The error is the tool's answer, which is no action, and it is counted. A tool may execute the policy's code."""

    def double(x: int) -> int:
        raise error

    async def double_later(x: int) -> int:
        raise error

    tool = double_later if later else double
    tool.__name__, tool.__doc__ = "double", DESCRIPTION
    trainer = train(caller, tmp_path, length, tools=[tool], **CALLING)
    for row in trajectories(trainer):
        assert f"{{'error': '{said}'}}" in TOKENIZER.decode(row.completion_ids[~row.loss_mask])
    assert logged(trainer, "tools/failure_frequency") == [1, 1]


def call_on_one_process(folder: str, out: str) -> list[tuple[list[int], list[bool]]]:
    """Two updates in which rank 0 calls the tool twice for each row, and rank 1 not at all. Token ids and masks."""
    allow_fsdp_on_cpu()
    if PartialState(cpu=True).process_index == 1:
        read = grpo_trainer.parse_response
        grpo_trainer.parse_response = lambda *args, **kwargs: read(*args, **kwargs) | {"tool_calls": None}
    options = CALLING | dict(max_tool_calling_iterations=2, max_completion_length=400, per_device_train_batch_size=2)
    trainer = build(folder, Path(out), length, tools=[doubling(later=False)], **options)
    trainer.train()
    return [(row.completion_ids.tolist(), row.loss_mask.tolist()) for row in trajectories(trainer)]


@pytest.mark.parametrize("file", ["ddp", "zero3", pytest.param("fsdp2", marks=pytest.mark.launch)])
def test_one_of_two_processes_calls_tools(file, caller, tmp_path):
    """Where weights are sharded, a turn takes all processes, also those whose rows have ended."""
    calls, none = launch("test_trainer:call_on_one_process", file, folder=caller, out=tmp_path)
    assert len(calls) == len(none) == 4
    for ids, mask in calls:
        assert [token for token, counts in zip(ids, mask, strict=True) if counts] == 3 * [CALL_ID, 1]
    assert none == 4 * [([CALL_ID, 1], [True, True])]


def turns_of_process(turns: list[list[list[int]]]) -> dict[str, Any]:
    """The answers to this process's rows, by turn, and how many rows it drew for. Row [n] is answered by [10 n]."""
    process, drawn = PartialState(cpu=True).process_index, []

    class Trainer(TBRMTrainer):
        def __init__(self):
            self.accelerator, self._shares_turns = PartialState(), True

        def _generate_single_turn(self, prompt_ids, *given, **named):
            if self._shares_turns:
                return super()._generate_single_turn(prompt_ids, *given, **named)
            drawn.append(len(prompt_ids))
            return [[10 * n] for (n,) in prompt_ids], [[n / 10] for (n,) in prompt_ids]

    trainer, answers = Trainer(), []
    for turn in turns[process]:
        answers.append(trainer._generate_single_turn([[n] for n in turn], None, {}, 1))
    while trainer._shared_turn([]) is not None:
        pass
    return {"answers": answers, "drawn": drawn}


def test_rows_of_a_turn_are_divided_over_processes():
    """Each row has its own answer, and each process draws for as many rows as the other, of those 3 and 1, 1 and 2."""
    turns = [[[1, 2, 3], [4], [5], [6]], [[7], [8, 9]]]
    seen = launch("test_trainer:turns_of_process", turns=turns)
    for of_process, given in zip(seen, turns, strict=True):
        assert of_process["answers"] == [([[10 * n] for n in turn], [[n / 10] for n in turn]) for turn in given]
        assert of_process["drawn"] == [2, 2, 1, 1]


# ---- saving ----------------------------------------------------------------------------------------------------------


def test_saved_model_and_card(llama, tmp_path):
    """The saved model is a plain one with the trained weights. Its card describes TBRM, not GRPO."""
    trainer = train(llama, tmp_path)
    trainer.save_model()
    trainer.create_model_card(model_name="tiny")
    loaded, ids = AutoModelForCausalLM.from_pretrained(tmp_path / "out"), torch.arange(3, 20)[None]
    assert torch.equal(loaded.eval()(ids).logits, trainer.model.eval()(ids).logits)
    card = (tmp_path / "out" / "README.md").read_text()
    assert all(part in card for part in ("TBRM", "2505.15311", "yuan2025trajectory", "- tbrm\n"))
    assert not any(part in card for part in ("2402.03300", "- grpo"))


def test_resume(llama, tmp_path):
    """A run goes on from its checkpoint: its steps, data and policy, with the reference where the first run began."""
    first = train(llama, tmp_path, max_steps=1, save_strategy="steps", save_steps=1)
    second = build(llama, tmp_path, max_steps=2)
    second.train(resume_from_checkpoint=True)
    assert second.state.global_step == 2 and len(second.windows) == 1
    assert logged(second, "loss")[0] == logged(first, "loss")[0] and len(logged(second, "loss")) == 2
    assert logged(first, "log_ratio")[0] == ZERO != logged(second, "log_ratio")[1]
    assert set(map(prompt, trajectories(first))).isdisjoint(map(prompt, trajectories(second)))
