"""How a completion cut at the length limit counts: as an end, not at all, or as a state with a soft value."""

from __future__ import annotations

import pytest
from common.tiny import perturb, save
from helpers.oracle import (
    TOLERANCE,
    check,
    copy_of_adapter,
    distance,
    merged,
    options_of,
    perturb_adapter,
    plain,
    solve,
)
from helpers.runs import config, log, one_update
from helpers.scripted import script, scripted_trainer
from peft import LoraConfig

from tbrm_trl.loss import trajectory_loss
from tbrm_trl.trajectory import End

# ---- bootstrap -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("soft_value", ["policy", "calibrated"])
@pytest.mark.parametrize(("truncated_reward", "temperature"), [(0.0, 1.0), (0.3, 0.6)])
def test_bootstrap(soft_value, truncated_reward, temperature, qwen2, tmp_path):
    """Rows 2 and 5 of 8 are cut. Their verdicts do not matter: row 2 has none and counts, row 3 leaves the loss."""
    options = dict(truncation="bootstrap", truncated_reward=truncated_reward)
    trainer = scripted_trainer(
        qwen2, script(unscored=(2, 3)), tmp_path, soft_value=soft_value, temperature=temperature, **options
    )
    answer, trajectories = check(trainer)
    assert [t.end for t in trajectories].count(End.LENGTH) == 2
    assert len(answer.residuals) == 7
    assert trainer.state.log_history[0]["left_out/unscored"] == 1 / 8


@pytest.mark.parametrize("architecture", ["gemma2", "granite", "phi"])
def test_bootstrap_of_transformed_logits(architecture, tmp_path):
    """The value after the cut is of soft-capped, scaled and biased logits, as the one before is."""
    folder = save(tmp_path / "model", architecture)
    trainer = scripted_trainer(
        folder, script(), tmp_path, truncation="bootstrap", soft_value="calibrated", pad_to_multiple_of=16
    )
    check(trainer)


@pytest.mark.parametrize("accumulation", [1, 2, 4])
@pytest.mark.parametrize("truncation", ["bootstrap", "mask"])
def test_accumulation_changes_nothing(truncation, accumulation, qwen2, tmp_path):
    trainer = scripted_trainer(
        qwen2, script(unscored=(0, 2)), tmp_path, truncation=truncation, per_device_train_batch_size=8 // accumulation,
        gradient_accumulation_steps=accumulation,
    )  # fmt: skip
    answer, _ = check(trainer)
    assert len(answer.residuals) == {"bootstrap": 7, "mask": 5}[truncation]


@pytest.mark.parametrize("reward_baseline", ["none", "batch_mean"])
@pytest.mark.parametrize("soft_value", ["policy", "calibrated"])
def test_a_trajectory_is_the_sum_of_its_parts(soft_value, reward_baseline, qwen2, tmp_path, monkeypatch):
    """`V(s_1) − V(s_m) + Σ_{h<m}` of the first part and `V(s_m) + Σ_{h≥m} − R/β` of the rest make up the whole's δ.

    A baseline makes V* − b/β of every V: it is taken off once, where R is.
    """
    prompt, first, rest = [2, 10, 11, 12], [20, 21, 22], [30, 31, 1]
    rows = [
        {"prompt_ids": prompt, "completion_ids": [*first, *rest], "end": "eos", "reward": 0.7},
        {"prompt_ids": prompt, "completion_ids": first, "end": "length", "reward": 0.4},
        {"prompt_ids": [*prompt, *first], "completion_ids": rest, "end": "eos", "reward": 0.7},
    ]
    original, seen = trajectory_loss.bellman_residual, []
    monkeypatch.setattr(
        trajectory_loss,
        "bellman_residual",
        lambda *args: seen.append(original(*args).tolist()) or original(*args),
    )
    update = one_update(
        qwen2, tmp_path, rows, soft_value=soft_value, truncation="bootstrap", per_device_train_batch_size=3,
        reward_baseline=reward_baseline,
    )  # fmt: skip
    in_order = [row.trajectory for row in sorted(update.rows, key=len, reverse=True)]  # of the micro-batch
    by_length = dict(zip([len(t.completion_ids) for t in in_order], seen[0], strict=True))
    residuals = {(t.end, len(t.prompt_ids)): r for t, r in zip(in_order, seen[0], strict=True)}
    whole, cut, remainder = by_length[6], residuals[End.LENGTH, 4], residuals[End.EOS, 7]
    assert whole == pytest.approx(cut + remainder, rel=1e-4)
    assert abs(cut) > 0.1 and abs(remainder) > 0.1


@pytest.mark.parametrize(("soft_value", "precompute"), [("policy", True), ("calibrated", True), ("calibrated", False)])
def test_logged_rows(soft_value, precompute, qwen2, tmp_path):
    """The trajectory carries the reference's value after the cut, scored beforehand or during training.

    Rows 0 and 1 have no verdict: the first of them ended and leaves the loss, the other was cut and needs no verdict.
    """
    seen = one_update(
        qwen2, tmp_path, log(unscored=(0, 1)), lambda prompts, **kwargs: [None] * len(prompts), soft_value=soft_value,
        truncation="bootstrap", truncated_reward=0.2, precompute_ref_log_probs=precompute,
    )  # fmt: skip
    assert len(seen.counted) == 7
    window = [row.trajectory for row in seen.rows]
    answer = solve(seen.policy, seen.reference, window, **options_of(seen.trainer))
    assert sum(t.end is End.LENGTH for t in window) == 4
    assert seen.loss == pytest.approx(answer.loss, rel=TOLERANCE)
    assert distance(seen.gradient, answer.gradient) <= TOLERANCE


def test_replayed_trajectories_keep_the_value_after_the_cut(qwen2, tmp_path):
    """At learning rate 0 an update from the buffer, which holds all of the window, has the fresh one's gradient."""
    trainer = scripted_trainer(
        qwen2, script(), tmp_path, truncation="bootstrap", soft_value="calibrated", num_iterations=2, max_steps=2,
        replay_buffer_size=8,
    )  # fmt: skip
    perturb(trainer.ref_model)
    trainer.train()
    fresh, replayed = trainer.recorder.gradients
    assert trainer.state.log_history[1]["residual/replayed_rms"] > 0.1
    assert distance(replayed, fresh) <= TOLERANCE


def test_lora(qwen2, tmp_path):
    """The reference is the base model under the adapter: its value after the cut is the base's."""
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], lora_dropout=0.0)
    trainer = scripted_trainer(
        qwen2, script(), tmp_path, peft_config=lora, truncation="bootstrap", soft_value="calibrated",
        truncated_reward=0.3, sft_coef=0.2, sft_threshold=0.2, entropy_advantage_coef=0.05,
        reward_baseline="batch_mean",
    )  # fmt: skip
    reference = merged(trainer.model)
    perturb_adapter(trainer.model, seed=4)
    policy = copy_of_adapter(trainer.model).double().eval()
    trainer.train()
    answer = solve(policy, reference, trainer.windows[0], **options_of(trainer))
    assert sum(trainer.losses) == pytest.approx(answer.loss, rel=TOLERANCE)
    assert distance(trainer.recorder.gradients[0], answer.gradient) <= TOLERANCE


def test_evaluation(qwen2, tmp_path):
    """The evaluation loss is the same function of the evaluation's own rollouts, over all tokens."""
    trainer = scripted_trainer(
        qwen2, script(), tmp_path, truncation="bootstrap", soft_value="calibrated", token_fraction=0.5
    )
    perturb(trainer.ref_model)
    metrics = trainer.evaluate(trainer.train_dataset)
    answer = solve(plain(trainer.model), plain(trainer.ref_model), trainer.windows[0], **options_of(trainer))
    assert metrics["eval_loss"] == pytest.approx(answer.loss, rel=TOLERANCE)


# ---- mask ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"truncation": "mask"}, {"mask_truncated_completions": True}])
def test_mask(options, qwen2, tmp_path):
    trainer = scripted_trainer(qwen2, script(unscored=(0,)), tmp_path, **options)
    assert trainer.args.truncation == "mask" and trainer.args.mask_truncated_completions
    answer, _ = check(trainer)
    assert len(answer.residuals) == 5
    assert trainer.state.log_history[0]["left_out/truncated"] == 2 / 8


# ---- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"truncation": "drop"}, "`truncation='drop'` is unknown. Choose one of terminal, mask, bootstrap"),
        ({"truncation": "terminal", "mask_truncated_completions": True}, "is truncation='mask', but `truncation='term"),
        ({"truncation": "bootstrap", "mask_truncated_completions": True}, "is truncation='mask', but `truncation='boo"),
        ({"truncated_reward": 0.5}, "`truncated_reward=0.5` has no effect with `truncation='terminal'`"),
        ({"truncated_reward": 0.5, "truncation": "mask"}, "has no effect with `truncation='mask'`"),
        ({"truncation": "bootstrap", "soft_value": "zero"},
         "with `soft_value='zero'` is refused: .*policy, or truncation='mask'"),
        ({"truncation": "bootstrap", "soft_value": "group", "num_generations": 2}, "Use calibrated or policy"),
        ({"truncation": "bootstrap", "residual": "token"}, "it needs `soft_value=\"policy\"`, and no bootstrap"),
        ({"truncation": "bootstrap", "token_fraction": 0.5, "token_selection": "cut"},
         "`token_fraction=0.5` with `truncation='bootstrap'` is refused"),
    ],
)  # fmt: skip
def test_options_that_do_not_go_together(options, message):
    with pytest.raises(ValueError, match=message):
        config(**options)


def test_the_default_and_the_alias():
    assert config().truncation == "terminal" and not config().mask_truncated_completions
    assert config(truncation="mask", mask_truncated_completions=True).truncation == "mask"


def test_logs_of_the_previous_policy_bring_no_value_after_the_cut(qwen2, tmp_path):
    rows = [{**row, "ref_log_probs": [-1.0] * len(row["completion_ids"]), "ref_soft_value": 1.0} for row in log()]
    with pytest.raises(ValueError, match="they do not bring the value of their last state"):
        one_update(qwen2, tmp_path, rows, reference="previous", truncation="bootstrap")
