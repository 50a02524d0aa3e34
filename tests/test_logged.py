"""Logged trajectories: tokenized as the policy would have produced them, mixed with rollouts, scored once."""

from __future__ import annotations

import math
import os
from collections import Counter
from functools import partial
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import tokenizers
import torch
from accelerate import Accelerator
from common.tiny import VOCABULARY, perturb, save
from datasets import Dataset
from helpers.forked import launch
from helpers.oracle import TOLERANCE, distance, plain, solve
from helpers.runs import CHATS, DATA, TOKENIZER, build, completion, differ, kept_returns, letters, logged, prompt, train
from helpers.two_processes import in_each_of
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tbrm_trl import TBRMTrainer, load_rollouts
from tbrm_trl.resume.folder_lock import FolderLock
from tbrm_trl.sources.logged import CompletionTokenizer
from tbrm_trl.sources.reference_scores import precompute_scores
from tbrm_trl.trajectory import End, Source

IDS = [{"prompt_ids": [5, 6 + i], "completion_ids": [20 + i, 30, 1], "reward": i / 8} for i in range(8)]


def never(*args, **kwargs):
    raise AssertionError("nothing is to be generated")


CLOSING = (
    "{% for m in messages %}{{ '<' + m['role'][0] + '>' + m['content'] }}"
    "{{ '<eos>' if m['role'] == 'assistant' else '' }}{{ '\n' }}{% endfor %}"
    "{{ '<a>' if add_generation_prompt else '' }}"
)


def closing(folder, template: str = CLOSING):
    """The tokenizer with a template that closes the assistant's turn, as real ones do."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template
    return tokenizer


def on(trainer):
    trainer.model.generate = never
    return trainer


def windows_of(trainer) -> list:
    """Train, and return the trajectories of every window as they went into the loss."""
    windows = kept_returns(trainer, "_new_window")
    trainer.train()
    return windows


# ---- rows to trajectories --------------------------------------------------------------------------------------------


def test_ids_as_they_are(llama, tmp_path):
    """Ids, mask and reward are kept, loss and gradient are the oracle's, and nothing calls generate."""
    rows = [{**row, "loss_mask": [1, 0, 1] if i % 2 else None} for i, row in enumerate(IDS)]
    trainer = on(build(llama, tmp_path, None, Dataset.from_list(rows), per_device_train_batch_size=8, max_steps=1,
                       max_grad_norm=0.0, precompute_ref_log_probs=False, shuffle_dataset=False))  # fmt: skip
    perturb(trainer.model)
    policy, reference = plain(trainer.model), plain(trainer.ref_model)
    (window,) = windows_of(trainer)
    window = sorted(window, key=lambda t: int(t.prompt_ids[1]))
    for i, (trajectory, row) in enumerate(zip(window, rows, strict=True)):
        assert trajectory.prompt_ids.tolist() == row["prompt_ids"]
        assert trajectory.completion_ids.tolist() == row["completion_ids"]
        assert trajectory.loss_mask.tolist() == ([True, False, True] if i % 2 else [True] * 3)
        assert (trajectory.reward, trajectory.end, trajectory.source) == (i / 8, End.EOS, Source.LOGGED)
    answer = solve(policy, reference, window, beta=0.1)
    assert trainer.losses[0] == pytest.approx(answer.loss, rel=TOLERANCE)
    assert distance(trainer.recorder.gradients[0], answer.gradient) <= TOLERANCE


@pytest.mark.parametrize("data", ["text", "messages", "text answers to messages"])
def test_tokenized_as_the_policy_would_have(data, llama, tmp_path):
    """Generated text that is decoded and logged gets the generated ids again: prompt, completion, <eos>."""
    chats = data != "text"
    tokenizer = closing(llama)
    texts = [f"{i}: ab?" for i in range(32)]
    dataset = Dataset.from_list([{"prompt": [{"role": "user", "content": p}] if chats else p} for p in texts])
    first = train(llama, tmp_path, train_dataset=dataset, max_completion_length=32, per_device_train_batch_size=16,
                  processing_class=tokenizer)  # fmt: skip
    made, rows = {}, []
    for trajectory in (t for window in first.windows for t in window):
        ids = trajectory.completion_ids.tolist()
        # A tokenizer cannot give special tokens in the middle back from text, and templates strip white space.
        if (
            {0, 1, 2} & set(ids[:-1])
            or ids[-1] in (0, 2)
            or len(ids) == 1
            or completion(trajectory).strip() != completion(trajectory)
        ):
            continue
        made[prompt(trajectory)] = trajectory
        content, text = prompt(trajectory).removeprefix("<u>").removesuffix("\n<a>"), completion(trajectory)
        rows.append(
            {
                "prompt": [{"role": "user", "content": content}] if chats else content,
                "completion": [{"role": "assistant", "content": text}] if data == "messages" else text,
                "reward": 0.5,
                "end": None if trajectory.end is End.EOS else "length",
            }
        )
    assert len(rows) >= 6 and {t.end for t in made.values()} == {End.EOS, End.LENGTH}
    second = on(build(llama, tmp_path / "2", None, Dataset.from_list(rows), per_device_train_batch_size=1,
                      max_steps=len(rows), processing_class=tokenizer))  # fmt: skip
    again = {prompt(t): t for window in windows_of(second) for t in window}
    assert again.keys() == made.keys()
    for text, trajectory in again.items():
        assert trajectory.completion_ids.tolist() == made[text].completion_ids.tolist()
        assert trajectory.loss_mask.all() and trajectory.end is made[text].end


def test_turns_of_a_conversation(llama, tmp_path):
    """Only the assistant's own tokens are actions; the tool's turn, and the opening of the next, are not.

    The template writes `<u>hi\n<a>` for the prompt, and closes each of the assistant's turns with <eos>.
    """
    rows = [{
        "prompt": [{"role": "user", "content": "hi"}],
        "completion": [
            {"role": "assistant", "content": "call"}, {"role": "tool", "content": "42"},
            {"role": "assistant", "content": "it is 42"},
        ],
        "reward": 1.0,
    }]  # fmt: skip
    trainer = on(build(llama, tmp_path, None, Dataset.from_list(rows), per_device_train_batch_size=1, max_steps=1,
                       processing_class=closing(llama)))  # fmt: skip
    ((trajectory,),) = windows_of(trainer)
    said = [TOKENIZER.decode(int(t)) for t, m in zip(trajectory.completion_ids, trajectory.loss_mask, strict=True) if m]
    assert prompt(trajectory) == "<u>hi\n<a>"
    assert TOKENIZER.decode(trajectory.completion_ids) == "call<eos>\n<t>42\n<a>it is 42<eos>"
    assert "".join(said) == "call<eos>it is 42<eos>"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"completion": ""}], "Row 8 .*`completion` is empty"),
        ([{"prompt_ids": [5], "completion_ids": []}], "Row 8 .*`completion_ids` is empty"),
        ([{"prompt_ids": [], "completion_ids": [5]}], "Row 8 .*without `prompt_ids`"),
        ([{"prompt_ids": [5], "completion_ids": [6], "reward": None}], "Row 8 .*no `reward`, and there is no reward"),
        ([{"prompt_ids": [5], "completion_ids": [6], "reward": float("nan")}], "Row 8 .*`reward` is nan"),
        ([{"prompt_ids": [5], "completion_ids": [6], "reward": float("inf")}], "Row 8 .*`reward` is inf"),
        ([{"prompt_ids": [5], "completion_ids": [6, VOCABULARY]}], f"Row 8 .*id {VOCABULARY} is outside"),
        ([{"prompt_ids": [-1], "completion_ids": [6]}], "Row 8 .*id -1 is outside"),
        ([{"prompt_ids": [5], "completion_ids": [6, 7], "loss_mask": [1]}], "Row 8 .*`loss_mask` has 1 entries for 2"),
        ([{"prompt_ids": [5], "completion_ids": [6], "loss_mask": [2]}], "Row 8 .*other than 0 and 1"),
        ([{"completion": "a", "prompt": None}], "Row 8 .*`completion` without `prompt`"),
        ([{"completion": "a", "loss_mask": [1]}], "Row 8 .*needs `prompt_ids` and `completion_ids`"),
        ([{"prompt_ids": [5] * 200, "completion_ids": [6] * 57}], "Row 8 .*200 prompt and 57 .*context of 256"),
        ([{"prompt_ids": [5], "completion_ids": [6], "end": "stop"}], "Row 8 .*`end` is 'stop'"),
        ([{"completion": "ünknown"}], "Row 8 .*does not give the completion 'ünknown' back"),
    ],
)  # fmt: skip
def test_bad_rows_are_named(rows, message, llama, tmp_path):
    empty = dict.fromkeys(("prompt_ids", "completion_ids", "loss_mask", "end", "completion"))
    good = [{**empty, **row, "prompt": "a"} for row in IDS]
    bad = [{**empty, "prompt": "a", "reward": 0.0, **row} for row in rows]
    with pytest.raises(ValueError, match=message):
        build(llama, tmp_path, None, Dataset.from_list(good + bad))


@pytest.mark.parametrize(
    ("prompt", "completion", "tokens"),
    [("a:", " yes", ["▁yes"]), ("a: ", "yes", ["yes"]), ("a:", "yes", ["yes"])],
)
def test_a_tokenizer_that_puts_a_space_before_any_text(prompt, completion, tokens):
    """As Llama 2's and Mistral's do. A completion on its own would begin with a space that the log does not have."""
    vocabulary = {token: i for i, token in enumerate(["<eos>", "▁", *"a:yes\n", "ye", "yes", "▁yes", "▁a"])}
    merges = [("y", "e"), ("ye", "s"), ("▁", "yes"), ("▁", "a")]
    model = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="always")
    model.decoder = tokenizers.decoders.Metaspace(prepend_scheme="always")
    words = PreTrainedTokenizerFast(tokenizer_object=model, eos_token="<eos>")
    read = CompletionTokenizer(words, {0}, lambda text: words(text=text)["input_ids"], lambda messages, opens: [])
    prompt_ids, ids, _ = read(prompt, completion, End.EOS)
    assert words.convert_ids_to_tokens(ids) == [*tokens, "<eos>"]
    assert words.decode([*prompt_ids, *ids[:-1]]) == prompt + completion


def test_structure_is_checked_before_anything_is_loaded(tmp_path):
    with pytest.raises(ValueError, match=r"Row 0 .*`completion_ids` is empty"):
        build(
            "no/such/model",
            tmp_path,
            None,
            Dataset.from_list([{"prompt_ids": [5], "completion_ids": [], "reward": 0.0}] * 4),
        )


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (CLOSING.replace("'<eos>' if", "'' if"), "does not close the assistant's turn"),
        (CLOSING.replace("'<a>' if", "'<a>think' if"), "opens the assistant's turn differently"),
        (CLOSING.replace("m['content']", "m['content'].upper()"), "drops or changes part"),
    ],
)
def test_templates_that_guarantee_nothing(template, message, llama, tmp_path):
    rows = [{"prompt": [{"role": "user", "content": "hi"}], "completion": "ab", "reward": 1.0}] * 2
    with pytest.raises(ValueError, match=f"Row 0 .*{message}"):
        build(llama, tmp_path, None, Dataset.from_list(rows), processing_class=closing(llama, template))


# ---- two streams -----------------------------------------------------------------------------------------------------


def test_mixed(llama, tmp_path):
    """Groups of 4 rollouts beside logged rows. A logged row's own reward counts, or else the function's."""
    rows = [{"prompt": f"{i}", "completion": None, "reward": None} for i in range(8)]
    rows += [{"prompt": f"{i}!", "completion": "abc", "reward": 7.0 if i % 2 else None} for i in range(8)]
    trainer = build(llama, tmp_path, train_dataset=Dataset.from_list(rows), per_device_train_batch_size=8,
                    num_generations=4, logged_fraction=0.5, max_steps=3)  # fmt: skip
    for window in windows_of(trainer):
        rollouts = [t for t in window if t.source is Source.ROLLOUT]
        logs = [t for t in window if t.source is Source.LOGGED]
        assert len(rollouts) == len(logs) == 4 and len({t.group_id for t in rollouts}) == 1
        assert len({prompt(t) for t in rollouts}) == 1
        assert all(t.reward == (7.0 if int(prompt(t)[:-1]) % 2 else 3 / 8) for t in logs)
    assert logged(trainer, "residual/logged_rms") and logged(trainer, "residual/fresh_rms")
    assert logged(trainer, "left_out/unscored") == [0.0] * 3


def test_columns_of_the_user_reach_the_reward_functions(llama, tmp_path):
    """They do also if a trajectory has a field of the name, such as `source` and `group`."""
    asked = []

    def reward(completions, source, group, **kwargs):
        asked.append((source, group))
        return [0.0] * len(completions)

    rows = [{"prompt": "a", "completion": "b" if i % 2 else None, "source": "web", "group": 7} for i in range(8)]
    train(llama, tmp_path, reward, Dataset.from_list(rows), per_device_train_batch_size=4, max_steps=1)
    assert asked == [(["web"] * 2, [7] * 2)] * 2


def mix_in_each_process(folder: str, out: str) -> list[list[tuple[str, str]]]:
    """Messages to roll out, n = 4, beside logged text. Returns source and prompt of this process's trajectories."""
    rows = [{"prompt": [{"role": "user", "content": f"{i}!"}], "completion": "abc", "reward": 1.0} for i in range(16)]
    rows += [{"prompt": [{"role": "user", "content": f"{i}"}], "completion": None, "reward": None} for i in range(8)]
    trainer = build(
        folder, Path(out), train_dataset=Dataset.from_list(rows), per_device_train_batch_size=8,
        num_generations=4, logged_fraction=0.5, max_steps=3, shuffle_dataset=False,
        processing_class=closing(folder),
    )  # fmt: skip
    return [[(t.source.value, prompt(t)) for t in window] for window in windows_of(trainer)]


def test_two_processes(llama, tmp_path):
    """The same data on two processes, n = 4, messages beside logged text, the logged rows first in the data set."""
    shares = launch("test_logged:mix_in_each_process", folder=llama, out=tmp_path)
    assert len(shares[0]) == 3
    for windows in zip(*shares, strict=True):
        for window in windows:
            assert Counter(source for source, _ in window) == {"rollout": 4, "logged": 4}
        together = Counter(text for window in windows for source, text in window if source == "logged")
        assert len(together) == 8  # each logged row once
        assert len({text for window in windows for source, text in window if source == "rollout"}) == 2


JUDGED = [{"prompt": "a", "completion": "bcd", "reward": None, "answer": "b"}] + [
    {"prompt": "a", "completion": "xyz", "reward": 0.25, "answer": None} for _ in range(3)
]


def judged_in_each_process(folder: str, out: str) -> list:
    """The rewards of three windows, and what the function was asked for."""
    asked = []

    def judge(completions, answer, **kwargs):
        asked.append(list(completions))
        return [float(text.startswith(one.lower())) for text, one in zip(completions, answer, strict=True)]

    trainer = build(
        folder, Path(out), judge, Dataset.from_list(JUDGED), max_steps=3, shuffle_dataset=False, save_strategy="no",
        per_device_train_batch_size=len(JUDGED) // int(os.environ.get("WORLD_SIZE", "1")),
    )  # fmt: skip
    return [[[(completion(t), t.reward) for t in window] for window in windows_of(trainer)], asked]


@pytest.mark.parametrize("processes", [1, 2])
def test_only_rows_without_a_reward_are_judged(processes, llama, tmp_path):
    """The function would fail on the others. Of two processes one has no row to be judged in any window."""
    shares = in_each_of(processes, judged_in_each_process, folder=llama, out=str(tmp_path))
    for windows in zip(*(windows for windows, _ in shares), strict=True):
        rewards = sorted(tuple(one) for share in windows for one in share)
        assert rewards == [("bcd", 1.0)] + [("xyz", 0.25)] * 3
    assert all(asked == [["bcd"]] * 3 for _, asked in shares)


# ---- scored once -----------------------------------------------------------------------------------------------------


def reference_rows(trainer) -> list[int]:
    rows = []
    trainer.ref_model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    return rows


def test_precomputed_and_freed(llama, tmp_path, monkeypatch):
    """The reference scores every row once, is gone before training, and the run is the one that keeps it."""
    from tbrm_trl.model import reference as module

    scored, score_reference = [], module.score_reference
    monkeypatch.setattr(
        "tbrm_trl.trainer.score_reference",
        lambda batches, *rest: scored.extend(t for one in batches for t in one) or score_reference(batches, *rest),
    )
    data = Dataset.from_list(IDS)
    first = on(build(llama, tmp_path, None, data, max_steps=12, per_device_train_batch_size=2))
    assert len(scored) == 8 and first.ref_model is None
    first.train()
    assert len(scored) == 8
    kept = on(build(llama, tmp_path / "2", None, data, max_steps=12, precompute_ref_log_probs=False))
    kept.train()
    assert kept.ref_model is not None and len(scored) == 16  # in training, and three epochs score each row once too
    assert kept.losses == pytest.approx(first.losses, rel=1e-4)

    again = on(build(llama, tmp_path, None, data, max_steps=12))
    assert len(scored) == 16  # cached
    again.train()
    assert again.losses == first.losses
    build(llama, tmp_path, None, Dataset.from_list([{**row, "prompt_ids": [9, 9]} for row in IDS]))
    assert len(scored) == 24  # other data
    build(save(tmp_path / "other", "llama", seed=3), tmp_path, None, data)
    assert len(scored) == 32  # another model
    build(llama, tmp_path, None, data, temperature=0.5)
    assert len(scored) == 40  # another temperature


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precompute_ref_log_probs": True, "sync_ref_model": True}, "would go stale at the first sync"),
        ({"precompute_ref_log_probs": True, "reference": "previous"}, 'with `reference="initial"`'),
        ({"replay_buffer_size": 8, "num_iterations": 2}, "nothing is rolled out"),
        ({"save_rollouts": True}, "Leave it False"),
        ({"remove_unused_columns": True}, "would drop the columns"),
        ({"reference": "previous"}, "Row 0 .*must bring what the policy that produced it said"),
        ({"per_device_train_batch_size": 9}, "has 8 logged trajectories, fewer than the 9"),
        ({"logged_fraction": 0.5}, "has only logged trajectories"),
    ],
)
def test_options_that_do_not_go_with_logs(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        build("no/such/model", tmp_path, None, Dataset.from_list(IDS), **options)


def test_evaluation_needs_a_reward(tmp_path):
    with pytest.raises(ValueError, match="`eval_dataset` are to be rolled out, but no `reward_funcs`"):
        build("no/such/model", tmp_path, None, Dataset.from_list(IDS), eval_dataset=CHATS)


def test_given_scores_of_the_producing_policy_are_kept(llama, tmp_path):
    """With `reference="previous"` the user's own scores are kept. Those of another reference are refused."""
    rows = [{**row, "ref_log_probs": [-1.0, -2.0, -3.0], "ref_soft_value": 4.0} for row in IDS]
    trainer = on(build(llama, tmp_path, None, Dataset.from_list(rows), reference="previous"))
    windows = windows_of(trainer)
    assert len(windows) == 2
    for window in windows:
        assert all(t.ref_log_probs.tolist() == [-1, -2, -3] and t.ref_soft_value == 4 for t in window)
    trained = build(llama, tmp_path, None, Dataset.from_list(rows), reference="previous", trainer_class=TBRMTrainer)
    trained.train()  # nothing checks whether the policy is these scores' reference
    assert trained.state.global_step == 2
    with pytest.raises(ValueError, match=r"Row 0 .*these are another reference's"):
        rows = [{**row, "ref_key": "0123"} for row in rows]
        build(llama, tmp_path, None, Dataset.from_list(rows), reference="previous")


def test_scores_of_a_log_are_kept_block_by_block(tmp_path):
    """After an interruption in the third of four blocks, the next run scores two. Each row has its own score."""
    scored: list[int] = []

    def score(trajectories, filler, last=math.inf) -> None:
        for one in trajectories:
            if len(scored) == last:
                raise KeyboardInterrupt
            scored.append(int(one.prompt_ids[1]))
            one.ref_log_probs, one.ref_soft_value = -0.1 * one.completion_ids, float(one.prompt_ids[1])
            one.ref_key = "key"

    def scores(score) -> Dataset:
        data = Dataset.from_list([{**row, "loss_mask": [1, 1, 1], "end": "eos"} for row in IDS])
        return precompute_scores(data, tmp_path, "key", Accelerator(cpu=True), score, block=2)

    with pytest.raises(KeyboardInterrupt):
        scores(partial(score, last=5))
    del scored[:]
    result = scores(score)
    assert scored == [10, 11, 12, 13]
    assert result["ref_soft_value"][:] == [row["prompt_ids"][1] for row in IDS]
    assert {path.suffix for path in tmp_path.iterdir()} == {".parquet", ".arrow"}  # the blocks are gone
    (file,) = tmp_path.glob("*.parquet")
    assert pq.ParquetFile(file).num_row_groups == 4  # one for each block: Arrow reads a group's list as one array
    assert result.cache_files[-1]["filename"] == str(file.with_suffix(".arrow"))  # mapped, and not in memory
    assert scores(score)["ref_soft_value"][:] == result["ref_soft_value"][:] and scored == [10, 11, 12, 13]


def test_two_runs_do_not_score_one_log_at_once(llama, tmp_path):
    """They would write and remove the same files."""
    lock = FolderLock(tmp_path / "out")
    lock.acquire()
    with pytest.raises(RuntimeError, match="belongs to a run that is under way"):
        build(llama, tmp_path, train_dataset=Dataset.from_list(IDS))
    lock.release()
    build(llama, tmp_path, train_dataset=Dataset.from_list(IDS))


def test_streams_cannot_be_divided(tmp_path):
    with pytest.raises(ValueError, match="streamed training set has a column of completions"):
        build("no/such/model", tmp_path, None, Dataset.from_list(IDS).to_iterable_dataset())


def test_evaluation_keeps_the_reference(llama, tmp_path):
    """With an evaluation set the scores are also precomputed, but the reference stays for the set's rollouts."""
    trainer = build(llama, tmp_path, train_dataset=Dataset.from_list(IDS), eval_dataset=DATA)
    assert trainer.ref_model is not None and trainer.train_dataset["ref_key"] == [trainer._reference.key] * 8


# ---- saved rollouts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reference", ["initial", "previous"])
def test_a_run_can_be_replayed_into_another(reference, llama, tmp_path):
    """Saved rollouts are the trajectories of the run; another run on them never generates nor scores, and learns."""

    def second(completions, **kwargs):
        return [None if len(text) % 2 else 1.0 for text in completions]

    first = train(llama, tmp_path, [letters, second], max_steps=4, save_rollouts=True, reference=reference,
                  num_generations=2, per_device_train_batch_size=4)  # fmt: skip
    made = [t for window in first.windows for t in window]
    saved = load_rollouts(tmp_path / "out")
    assert len(saved) == len(made) == 16
    for row, trajectory in zip(saved, made, strict=True):
        assert row["prompt_ids"] == trajectory.prompt_ids.tolist() and row["prompt"] == prompt(trajectory)
        assert row["completion_ids"] == trajectory.completion_ids.tolist()
        assert row["completion"] == completion(trajectory)
        assert (row["reward"], row["end"], row["policy_step"]) == (
            trajectory.reward, trajectory.end.value, trajectory.policy_step,
        )  # fmt: skip
        assert row["rewards/letters"] == pytest.approx(trajectory.rewards["letters"])
        assert torch.tensor(row["ref_log_probs"]).equal(trajectory.ref_log_probs)
        assert row["ref_soft_value"] == trajectory.ref_soft_value
    assert saved["policy_step"] == [step for step in range(4) for _ in range(4)]

    changes = {"precompute_ref_log_probs": False} if reference == "initial" else {}
    other = on(build(llama, tmp_path / "2", None, saved, max_steps=4, reference=reference, shuffle_dataset=False,
                     per_device_train_batch_size=4, **changes))  # fmt: skip
    scored = reference_rows(other) if reference == "initial" else []
    windows = windows_of(other)
    assert not scored  # the stored scores are those of this reference
    assert [sorted(prompt(t) for t in w) for w in windows] == [sorted(prompt(t) for t in w) for w in first.windows]
    assert other.losses == pytest.approx(first.losses, rel=1e-4)
    assert not any(
        differ([a], [b]) and not torch.allclose(a, b, atol=1e-5)
        for a, b in zip(other.model.parameters(), first.model.parameters(), strict=True)
    )


def test_unrewarded_rollouts_are_left_out_aloud(llama, tmp_path):
    train(llama, tmp_path, lambda completions, **kwargs: [1.0, None], save_rollouts=True)
    with pytest.warns(UserWarning, match="2 of 4 saved rollouts have no reward"):
        assert load_rollouts([tmp_path / "out"])["reward"] == [1.0, 1.0]
    with pytest.raises(ValueError, match="holds rollouts of another run, and no checkpoint to go on from"):
        train(llama, tmp_path, save_rollouts=True)
    with pytest.raises(ValueError, match="holds rollouts of another run"):
        train(llama, tmp_path)  # whose report would show them
    with pytest.raises(FileNotFoundError, match="save_rollouts=True"):
        load_rollouts(tmp_path)


def test_previous_policy_is_the_reference(llama, tmp_path):
    """log π_θ − log π_ref is 0 at a window's first update, and not at its second; no reference model is loaded."""
    trainer = train(llama, tmp_path, reference="previous", num_iterations=2, max_steps=4, soft_value="calibrated")
    assert trainer.ref_model is None
    ratios = logged(trainer, "log_ratio")
    assert max(map(abs, (ratios[0], ratios[2]))) < 1e-5 and min(map(abs, (ratios[1], ratios[3]))) > 1e-4
    assert logged(trainer, "soft_value")[2] == pytest.approx(0, abs=1e-5)


def test_verdicts_as_rewards(llama, tmp_path):
    """True and False are 1 and 0, also for what the run says of its first window."""
    rows = [{"prompt": "a", "completion": word, "reward": word == "b"} for word in ("b", "c")] * 8
    trainer = build(llama, tmp_path, None, Dataset.from_list(rows))
    windows = kept_returns(trainer, "_new_window")
    trainer.train()
    assert {type(one.reward) for window in windows for one in window} == {float}
