"""Faults of data, by their number in the list of faults: what is refused by row, warned about, or handled right."""

import copy
import functools
import json
import os
import re
import subprocess
import sys
import warnings
from datetime import date
from decimal import Decimal
from enum import Enum
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from common.tiny import VOCABULARY, save, tokenizer
from datasets import Dataset, DatasetDict, Features, IterableDataset, Json, load_dataset
from datasets.distributed import split_dataset_by_node
from helpers.forked import launch
from helpers.runs import TOKENIZER

from tbrm_trl import TBRMConfig, TBRMTrainer, load_rollouts
from tbrm_trl.checks.advice import warn_of_double_bos
from tbrm_trl.checks.data import check_evaluation_sets
from tbrm_trl.files import _is_installed, source_of
from tbrm_trl.rewards.returned import rewards_of
from tbrm_trl.sources.parquet import to_row
from tbrm_trl.sources.readers import read_verifiers_traces, read_verl_dump
from tbrm_trl.sources.returns import unique_names
from tbrm_trl.sources.saved_rollouts import ROLLOUTS_VERSION
from tbrm_trl.trajectory import End

PAD, EOS, BOS = 0, 1, 2  # of `common.tiny.tokenizer`
DATA = Path(__file__).parent / "data"
PROMPTS = Dataset.from_list([{"prompt": text, "answer": i} for i, text in enumerate(["1+1=", "ab", "c", "What? "])])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save(tmp_path_factory.mktemp("llama"), "llama")


def letters(completions, **kwargs) -> list[float]:
    """The share of lower-case letters."""
    texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    return [sum(map(str.islower, text)) / 8 for text in texts]


def build(model, output_dir, reward_funcs=letters, train_dataset=PROMPTS, **kwargs) -> TBRMTrainer:
    """A trainer of one tiny update; keyword arguments are options of TBRMConfig or else of the trainer."""
    options = dict(
        output_dir=str(output_dir / "out"), beta=0.1, learning_rate=0.01, max_steps=1, max_completion_length=8,
        per_device_train_batch_size=2, gradient_checkpointing=False, bf16=False, use_cpu=True, logging_steps=1,
        save_strategy="no", report_to="none", disable_tqdm=True, shuffle_dataset=False,
    )  # fmt: skip
    options |= {name: kwargs.pop(name) for name in list(kwargs) if name in TBRMConfig.__dataclass_fields__}
    return TBRMTrainer(model, reward_funcs, args=TBRMConfig(**options), train_dataset=train_dataset, **kwargs)


def windows_of(trainer) -> list:
    """Train, and return the trajectories of every window as they went into the loss."""
    windows, fill = [], trainer._new_window
    trainer._new_window = lambda rows: windows.append(fill(rows)) or windows[-1]
    trainer.train()
    return windows


def refused(folder, tmp_path, rows, message, reward_funcs=None, **kwargs):
    """Expect a refusal of rows behind two good ones, so that the refused row has number 2 or a later one."""
    good = [{"prompt_ids": [5], "completion_ids": [6, EOS], "reward": 0.0}] * 2
    if "prompt" in rows[0] and "prompt_ids" not in rows[0]:
        good = [{"prompt": "a", "completion": "b", "reward": 0.0}] * 2
        if not isinstance(rows[0]["prompt"], str):
            good = [{**good[0], "prompt": [{"role": "user", "content": "a"}]}] * 2
        if not isinstance(rows[0].get("completion"), (str, type(None))):
            good = [{**good[0], "completion": [{"role": "assistant", "content": "b"}]}] * 2
    good = [{**dict.fromkeys(rows[0]), **row} for row in good]  # `from_list` takes the columns of the first row
    data = Dataset.from_list([*good, *rows], on_mixed_types="use_json")
    with pytest.raises(ValueError, match=message):
        build(folder, tmp_path, reward_funcs, data, **kwargs)


# ---- 2.2, 2.6: ids that no policy could have produced ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt_ids": [PAD, PAD, 5]}, "`prompt_ids` begins with 2 × the padding token '<pad>' .*strip the padding"),
        ({"prompt_ids": [5, PAD]}, "`prompt_ids` ends with 1 × the padding token"),
        ({"prompt_ids": [PAD, PAD]}, "`prompt_ids` begins with 2 × the padding"),
        ({"completion_ids": [6, EOS, PAD, PAD]}, r"token 1 of 4 .*'<eos>' .*ends a completion.*'<pad>' .*after it"),
        ({"completion_ids": [6, 7, PAD]}, "completion ends with 1 × the padding token"),
        ({"completion_ids": [6, EOS, PAD], "loss_mask": [1, 1, 0]}, "completion ends with 1 × the padding token"),
        ({"completion_ids": [6, PAD, 7, EOS]}, "token 1 of 4 in the completion is the padding token"),
        ({"completion_ids": [PAD, 7, EOS], "loss_mask": [0, 1, 1]}, "token 0 of 3 in the completion is the padding"),
        ({"completion_ids": [6, EOS, PAD, PAD, 7, EOS], "loss_mask": [1, 1, 0, 0, 1, 1]}, "token 3 of 6 .*padding"),
        ({"completion_ids": [6, EOS, 7]}, r"token 1 of 3 .*ends a completion.*`loss_mask`"),
        ({"completion_ids": [EOS, EOS]}, r"token 0 of 2 .*ends a completion"),
        ({"completion_ids": [6, EOS], "end": "length"}, '`end` is "length", but the completion ends with'),
    ],
)
def test_2_2_and_2_6_impossible_ids_are_refused(row, message, folder, tmp_path):
    whole = {"prompt_ids": [5], "completion_ids": [6, EOS], "loss_mask": None, "end": None, "reward": 0.0, **row}
    refused(folder, tmp_path, [whole], f"Row 2 of the training set: .*{message}")


def test_2_6_an_end_token_in_the_text_of_a_completion(folder, tmp_path):
    row = {"prompt": "a", "completion": "b<eos>c", "reward": 0.0}
    refused(folder, tmp_path, [row], "Row 2 .*token 1 of 4 .*'<eos>'")


def test_2_2_what_a_policy_can_produce_is_taken(folder, tmp_path):
    """A tool's turn after an end token, a cut completion, and BOS at the beginning."""
    rows = [
        {"prompt_ids": [BOS, 5], "completion_ids": [6, EOS, 7, 8, 9, EOS], "loss_mask": [1, 1, 0, 0, 1, 1]},
        {"prompt_ids": [5, EOS], "completion_ids": [6, 7, 8], "loss_mask": None},
    ]
    trainer = build(folder, tmp_path, None, Dataset.from_list([{**row, "reward": 0.0} for row in rows]))
    ((first, second),) = windows_of(trainer)
    assert {first.end, second.end} == {End.EOS, End.LENGTH}


def test_2_2_padding_token_that_is_also_the_end_token(tmp_path):
    """Several at the end are padding, a single one is the end. No prompt may begin with it: BOS is another token."""
    model = save(tmp_path / "model", "llama", pad_is_eos=True)
    good = [{"prompt_ids": [5], "completion_ids": [6, EOS], "loss_mask": None, "reward": 0.0}] * 2
    assert build(model, tmp_path, None, Dataset.from_list(good)).train_dataset["end"] == ["eos", "eos"]
    for row, message in [
        ({"completion_ids": [6, EOS, EOS]}, "token 1 of 3 .*ends a completion"),
        ({"completion_ids": [6, EOS, EOS], "loss_mask": [1, 1, 0]}, "ends with 2 × the padding token"),
        ({"prompt_ids": [EOS, 5]}, "begins with 1 × the padding token"),
    ]:
        refused(model, tmp_path, [{**good[0], **row}], f"Row 2 .*{message}")


def test_2_2_own_rollouts_may_hold_the_padding_token(folder, tmp_path):
    """A policy can draw any token. Rollouts that this library saved are not padded."""
    rows = [{"prompt_ids": [5], "completion_ids": [6, PAD, 7], "reward": 0.0, "policy_step": 0}] * 2
    assert build(folder, tmp_path, None, Dataset.from_list(rows)).train_dataset["end"] == ["length"] * 2


# ---- 2.3: all parts of a message -------------------------------------------------------------------------------------

# Writes only the content, and closes the assistant's turn with <eos>.
CONTENT = (
    "{% for m in messages %}{{ '<' + m['role'][0] + '>' + m['content'] }}"
    "{{ '<eos>' if m['role'] == 'assistant' else '' }}{{ '\n' }}{% endfor %}"
    "{{ '<a>' if add_generation_prompt else '' }}"
)
CALLS = CONTENT.replace("+ m['content'] }}", "+ m['content'] }}{{ m.get('tool_calls', [])|tojson }}")
FIRST_CALL = CONTENT.replace("+ m['content'] }}", "+ m['content'] }}{{ m.get('tool_calls', [''])[0]|tojson }}")
NO_TOOLS = CONTENT.replace("{% for m in messages %}", "{% for m in messages if m['role'] != 'tool' %}")
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
OTHER = {"type": "function", "function": {"name": "g", "arguments": {"y": "a"}}}


def with_template(template: str):
    processing_class = tokenizer()
    processing_class.chat_template = template
    return processing_class


@pytest.mark.parametrize(
    ("template", "completion", "message"),
    [
        (CONTENT, [{"content": "", "tool_calls": [CALL]}], "drops `tool_calls` of message 0"),
        (CONTENT, [{"content": None, "tool_calls": [CALL]}], "drops `tool_calls` of message 0"),
        (CONTENT, [{"content": "a", "reasoning_content": "b"}], "drops `reasoning_content` of message 0"),
        (CONTENT, [{"content": "a", "thinking": "b"}], "drops `thinking` of message 0"),
        (CONTENT, [{"content": "a", "name": "me"}], "drops `name` of message 0.*Remove it"),
        (FIRST_CALL, [{"content": "a", "tool_calls": [CALL, OTHER]}], r"drops `tool_calls\[1\]` of message 0"),
        (NO_TOOLS, [{"content": "a"}, {"role": "tool", "content": "4"}, {"content": "b"}], "drops message 1 of `comp"),
        (
            CALLS,
            [{"content": "a"}, {"role": "user", "content": "c"}, {"content": "b", "x": 1}],
            "drops `x` of mess.* 2",
        ),
    ],
)
def test_2_3_dropped_parts_are_refused(template, completion, message, folder, tmp_path):
    turns = [{"role": "assistant", **turn} for turn in completion]
    row = {"prompt": [{"role": "user", "content": "hi"}], "completion": turns, "reward": 0.0}
    refused(folder, tmp_path, [row], f"Row 2 .*{message}", processing_class=with_template(template))


def test_2_3_parts_that_the_template_writes_are_trained(folder, tmp_path):
    turn = {"role": "assistant", "content": "", "tool_calls": [CALL, OTHER]}
    data = Dataset.from_list([{"prompt": [{"role": "user", "content": "hi"}], "completion": [turn], "reward": 0.0}] * 2)
    ((one, _),) = windows_of(build(folder, tmp_path, None, data, processing_class=with_template(CALLS)))
    assert tokenizer().decode(one.completion_ids).count('"name"') == 2


# ---- 2.4: prompts that nothing continues -----------------------------------------------------------------------------

PREFILLED = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "I"}]
CHAT = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize("stored", ["structs", "json"])
@pytest.mark.parametrize("where", ["rolled out", "logged", "evaluated", "evaluated by name"])
def test_2_4_an_assistants_message_at_the_end(where, stored, folder, tmp_path):
    """It is refused by row, before a model is loaded, however messages are stored."""
    rows = [{"prompt": prompt, "completion": "a", "reward": 0.0} for prompt in [CHAT] * 3 + [PREFILLED]]
    data = Dataset.from_list(rows)
    if stored == "json":
        data = Dataset.from_list(rows, features=Features({**data.features, "prompt": Json()}))
    prompts = data.select_columns(["prompt"])
    sets = {
        "rolled out": (dict(train_dataset=prompts), "Row 3 of the training set"),
        "logged": (dict(train_dataset=data, reward_funcs=None), "Row 3 of the training set"),
        "evaluated": (dict(eval_dataset=prompts), "Row 3 of the evaluation set"),
        "evaluated by name": (dict(eval_dataset={"hard": prompts}), "Row 3 of the evaluation set 'hard'"),
    }
    given, title = sets[where]
    with pytest.raises(ValueError, match=f"{title}: its prompt ends in a message of the assistant.*Move the message"):
        build("no/such/model", tmp_path, **given)


def test_2_4_a_prompt_beside_ids_is_not_rendered(folder, tmp_path):
    rows = [{"prompt": PREFILLED, "prompt_ids": [5], "completion_ids": [6, EOS], "reward": 0.0}] * 2
    build(folder, tmp_path, None, Dataset.from_list(rows))


def test_2_4_in_a_stream_and_in_a_later_evaluation(folder, tmp_path):
    data = Dataset.from_list([{"prompt": PREFILLED}] * 4)
    with pytest.raises(ValueError, match=r"A prompt of this window.*ends in a message of the assistant"):
        build(folder, tmp_path, train_dataset=data.to_iterable_dataset()).train()
    with pytest.raises(ValueError, match=r"A prompt of this window.*ends in a message of the assistant"):
        build(folder, tmp_path).evaluate(data)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (None, "Row 1 of the training set: it has no `prompt`"),
        ([], "Row 1 of the training set: `prompt` has no message"),
        (
            [{"role": "user", "content": None, "text": "a"}],
            "Row 1 of the training set: message 0 of `prompt` has no `content`. It has `role`, `text`: rename",
        ),
    ],
)
def test_2_4_prompts_that_are_not_there(prompt, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        build("no/such/model", tmp_path, train_dataset=Dataset.from_list([{"prompt": CHAT}, {"prompt": prompt}] * 2))


# ---- 2.5: two BOS ----------------------------------------------------------------------------------------------------


class WithBOS:
    """A tokenizer that writes BOS before every text."""

    bos_token, bos_token_id = "<s>", 7

    def __init__(self, adds: bool):
        self.adds = adds

    def __call__(self, text):
        return {"input_ids": [7] * self.adds + [7] * text.count("<s>")}


def test_2_5_prompts_that_begin_with_bos_are_counted():
    texts = Dataset.from_list([{"prompt": "<s>a"}, {"prompt": "b"}, {"prompt": "<s>c"}, {"prompt": None}])
    chats = Dataset.from_list([{"prompt": CHAT}])
    with pytest.warns(UserWarning, match=r"4 of 8 prompts begin with '<s>'.*reads two"):
        warn_of_double_bos([texts, {"a": texts, "b": chats}, None, texts.to_iterable_dataset()], WithBOS(True))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_double_bos([texts], WithBOS(False))  # it adds none
        warn_of_double_bos([chats, Dataset.from_list([{"prompt": "a <s>"}])], WithBOS(True))


def test_2_5_the_trainer_warns(folder, tmp_path):
    adding = with_bos()
    with pytest.warns(UserWarning, match="4 of 4 prompts begin with '<bos>'"):
        build(folder, tmp_path, train_dataset=Dataset.from_list([{"prompt": "<bos>a"}] * 4), processing_class=adding)


def with_bos():
    """A tokenizer that writes BOS before every text, so that an empty text has only this token."""
    from tokenizers.processors import TemplateProcessing

    adding = tokenizer()
    adding._tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    return adding


@pytest.mark.parametrize("where", ["trained", "evaluated"])
def test_2_5_streams_are_looked_at_as_they_are_read(where, folder, tmp_path):
    """The warning comes with the first window that has such a prompt, and once."""
    texts = ["a", "b", "<bos>c", "d", "<bos>e", "f", "g", "h"]
    stream = Dataset.from_list([{"prompt": text} for text in texts]).to_iterable_dataset()
    sets = dict(train_dataset=stream) if where == "trained" else dict(eval_dataset=stream)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = build(
            folder, tmp_path, processing_class=with_bos(), max_steps=4, per_device_eval_batch_size=2, **sets
        )
        assert not any("begin with" in str(one.message) for one in caught)
        trainer.train() if where == "trained" else trainer.evaluate()
    assert sum("1 of 2 prompts begin with '<bos>'" in str(one.message) for one in caught) == 1


def test_streams_are_evaluated_by_one_process():
    """accelerate fills up the last batches of several, and nothing tells those rows from the others."""
    data = Dataset.from_list([{"prompt": "a"}] * 3)
    check_evaluation_sets({"rows": data}, needs_prompts=True, processes=2)
    check_evaluation_sets({"rows": data.to_iterable_dataset()}, needs_prompts=True, processes=1)
    with pytest.raises(ValueError, match="is a stream, which several processes do not evaluate"):
        check_evaluation_sets({"rows": data.to_iterable_dataset()}, needs_prompts=True, processes=2)


def test_a_node_s_part_of_a_stream_is_refused(tmp_path):
    stream = split_dataset_by_node(Dataset.from_list([{"prompt": "a"}] * 8).to_iterable_dataset(), 0, 2)
    with pytest.raises(ValueError, match=r"one node's part of a stream .*pass the whole stream"):
        build("no/such/model", tmp_path, train_dataset=stream)


@pytest.mark.parametrize("where", ["train_dataset", "eval_dataset"])
def test_formats_of_which_no_prompt_can_be_read(where, tmp_path):
    data = Dataset.from_list([{"prompt": "a", "answer": 1}] * 8)
    chats = Dataset.from_list([{"prompt": [{"role": "user", "content": "a"}]}] * 8)
    for given, problem in (
        (chats.with_format("numpy"), "has the format 'numpy', in which a prompt of messages is an array"),
        (data.with_format("arrow"), "has the format 'arrow', in which a row is a table"),
        (data.with_format("torch", columns=["answer"]), "a format without the column `prompt`, but with answer"),
    ):
        with pytest.raises(ValueError, match=problem):
            build("no/such/model", tmp_path, **{where: given})


def train_on_own_rows(folder: str, out: str) -> str:
    """What training says on a data set that each process shuffles for itself."""
    rows = [{"prompt": text} for text in "abcdefgh"]
    data = Dataset.from_list(rows).shuffle(seed=int(os.environ["RANK"]))
    try:
        build(folder, Path(out), train_dataset=data).train()
    except ValueError as error:
        return str(error)
    return "trained"


def test_processes_with_different_data_are_refused(folder, tmp_path):
    seen = launch("test_faults_data:train_on_own_rows", folder=folder, out=tmp_path)
    assert all("The processes differ in data set." in one and "with a `seed`" in one for one in seen)


@pytest.mark.parametrize("where", ["trained", "evaluated"])
def test_6_empty_prompts_of_streams(where, folder, tmp_path):
    stream = Dataset.from_list([{"prompt": text} for text in ("a", "", "b", "c")]).to_iterable_dataset()
    sets = dict(train_dataset=stream) if where == "trained" else dict(eval_dataset=stream)
    trainer = build(folder, tmp_path, per_device_eval_batch_size=2, **sets)
    with pytest.raises(ValueError, match="A prompt of this window, '': its prompt is empty"):
        trainer.train() if where == "trained" else trainer.evaluate()
    other = build(folder, tmp_path, per_device_eval_batch_size=2, processing_class=with_bos(), **sets)
    other.train() if where == "trained" else other.evaluate()


# ---- 3.2: streams of logged rows -------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", [{"prompt": "a", "completion": "b"}, {"prompt_ids": [5], "completion_ids": [6]}])
def test_3_2_a_stream_that_does_not_know_its_columns(row, tmp_path):
    stream = IterableDataset.from_generator(lambda: iter([{**row, "reward": 0.0}] * 8))
    assert stream.column_names is None
    with pytest.raises(ValueError, match="streamed training set has a column of completions"):
        build("no/such/model", tmp_path, train_dataset=stream)


def test_3_2_a_logged_row_later_in_the_stream(folder, tmp_path):
    rows = [{"prompt": "a"}, {"prompt": "a"}, {"prompt": "a", "completion": "b"}, {"prompt": "a"}]
    stream = IterableDataset.from_generator(lambda: iter(rows))
    with pytest.raises(ValueError, match="streamed training set has a column of completions"):
        build(folder, tmp_path, train_dataset=stream, max_steps=4).train()


def test_a_stream_that_fills_no_window(folder, tmp_path):
    stream = IterableDataset.from_generator(lambda: iter([{"prompt": "a"}] * 3))
    trainer = build(
        folder, tmp_path, train_dataset=stream, per_device_train_batch_size=8, num_generations=2, max_steps=4
    )
    with pytest.raises(ValueError, match="No update was made: the stream gave fewer than the 4 prompts"):
        trainer.train()


def test_batches_sent_from_process_to_process_are_refused(tmp_path):
    with pytest.raises(ValueError, match="`dispatch_batches=True` is refused"):
        build("no/such/model", tmp_path, accelerator_config={"dispatch_batches": True})


# ---- 3.3: prompts' own columns ---------------------------------------------------------------------------------------

OWN = {"reward": 3.0, "end": "e", "loss_mask": [1], "prompt_ids": [9], "ref_key": "k"}


@pytest.mark.parametrize("evaluated", [False, True])
def test_3_3_own_columns_of_prompts_reach_the_reward_functions(evaluated, folder, tmp_path):
    asked = []

    def reward(completions, reward, end, loss_mask, prompt_ids, ref_key, **kwargs):
        asked.append(dict(reward=reward, end=end, loss_mask=loss_mask, prompt_ids=prompt_ids, ref_key=ref_key))
        return [0.0] * len(completions)

    rows = Dataset.from_list([{"prompt": "a", **OWN}] * 2)
    if evaluated:
        logged = Dataset.from_list([{"prompt_ids": [5], "completion_ids": [6, EOS], "reward": 0.0}] * 2)
        build(folder, tmp_path, reward, logged, eval_dataset=rows, per_device_eval_batch_size=2).evaluate()
    else:
        build(folder, tmp_path, reward, rows).train()
    assert asked == [{name: [value] * 2 for name, value in OWN.items()}]


@pytest.mark.parametrize(("soft_value", "own"), [("calibrated", "reference_rewards"), ("quantile", "optimal_value")])
def test_3_3_only_the_column_that_the_estimator_reads_is_hidden(soft_value, own, folder, tmp_path):
    """Without `soft_value="optimal"` a column `optimal_value` is the user's own."""
    asked = []

    def reward(completions, **columns):
        asked.append({name: columns.get(name) for name in ("reference_rewards", "optimal_value")})
        return [0.0] * len(completions)

    row = {"prompt": "a", "reference_rewards": [0.0, 1.0], "optimal_value": 0.5}
    build(folder, tmp_path, reward, Dataset.from_list([row] * 2), soft_value=soft_value).train()
    hidden = {"reference_rewards": None} if soft_value == "quantile" else {}
    assert own in asked[0] and asked == [{name: [row[name]] * 2 for name in asked[0]} | hidden]


def test_3_3_a_column_of_completions_without_any(folder, tmp_path):
    """No row is logged, so the column `reward` is the prompts' own."""
    asked = []

    def reward(completions, reward, **kwargs):
        asked.extend(reward)
        return [0.0] * len(completions)

    build(folder, tmp_path, reward, Dataset.from_list([{"prompt": "a", "completion": None, "reward": 2.0}] * 2)).train()
    assert asked == [2.0, 2.0]


# ---- 3.5: baselines that cancel the reward ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(reward_baseline="batch_mean", per_device_train_batch_size=1), "batch_mean'` with one trajectory in a"),
        (dict(soft_value="group", num_generations=2, num_generations_eval=1), "eval=1` with `soft_value='group'"),
        (dict(soft_value="log_mean_exp", num_generations=2, num_generations_eval=1), "eval=1` with `soft_value='log"),
        (dict(reward_baseline="group_mean", num_generations=2, num_generations_eval=1), "eval=1` with `reward_base"),
    ],
)
def test_3_5_a_trajectory_compared_with_itself(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        build("no/such/model", tmp_path, **options)


def test_3_5_evaluation_batches_of_one(tmp_path):
    with pytest.raises(ValueError, match="batch_mean'` with evaluation batches of one trajectory"):
        build(
            "no/such/model", tmp_path, eval_dataset=PROMPTS, per_device_eval_batch_size=1, reward_baseline="batch_mean"
        )
    assert TBRMConfig(str(tmp_path), use_cpu=True, bf16=False, reward_baseline="batch_mean", num_generations_eval=1)


# ---- 3.6: what a reward function is ----------------------------------------------------------------------------------

THRESHOLD = 1


def helper(x):
    return x > THRESHOLD


def reward_of_globals(completions, **kwargs):
    return [helper(len(c)) for c in completions]


def reward_of_defaults(completions, scale=1.0, *, limit=(1, 2), **kwargs):
    return [scale * len(c) for c in completions]


def reward_of_closure(scale):
    def reward(completions, **kwargs):
        return [scale * len(c) for c in completions]

    return reward


class RewardObject:
    def __init__(self, scale):
        self.scale = scale

    def __call__(self, completions, **kwargs):
        return [self.scale * len(c) for c in completions]

    def method(self, completions, **kwargs):
        return self(completions)


def decorated(function):
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        return function(*args, **kwargs)

    return wrapper


def digest(thing) -> str:
    return json.dumps(source_of(thing), sort_keys=True)


def test_3_6_values_that_the_source_does_not_say(monkeypatch):
    for make in (
        reward_of_closure,
        RewardObject,
        lambda scale: RewardObject(scale).method,
        lambda scale: functools.partial(reward_of_defaults, scale=scale),
        lambda scale: decorated(reward_of_closure(scale)),
        lambda scale: reward_of_closure([{"a": scale}]),
        lambda scale: reward_of_closure(np.full(3, scale)),
        lambda scale: reward_of_closure(torch.full((3,), scale)),
        lambda scale: RewardObject(RewardObject(scale)),
        lambda scale: RewardObject({scale, 7}),
    ):
        assert digest(make(1)) == digest(make(1)) != digest(make(2))
    before = digest(reward_of_globals)
    monkeypatch.setitem(globals(), "THRESHOLD", 2)  # used by a function that the reward function calls
    assert before != digest(reward_of_globals)
    monkeypatch.setitem(globals(), "THRESHOLD", 1)
    assert before == digest(reward_of_globals)
    monkeypatch.setitem(globals(), "helper", lambda x: x > 1)
    assert before != digest(reward_of_globals)
    before = digest(reward_of_defaults)
    monkeypatch.setattr(reward_of_defaults, "__defaults__", (2.0,))
    assert before != digest(reward_of_defaults)


class Kind(Enum):
    ONE, TWO, THREE, FOUR = functools.partial(helper, 1), "two", 3, 4


class SlotObject:
    __slots__ = ("scale",)

    def __init__(self, scale):
        self.scale = scale

    def __call__(self, completions, **kwargs):
        return [self.scale * len(c) for c in completions]


class TupleObject(NamedTuple):
    scale: float

    def __call__(self, completions, **kwargs):
        return [self.scale * len(c) for c in completions]


class CachedObject(RewardObject):
    @functools.cached_property
    def doubled(self):
        return 2 * self.scale


def rewards_of_many_kinds():
    """Rewards whose values have an address, an order of hashes or this process's surroundings in them."""
    kinds = set(Kind)
    words = np.array([f"word {number}" for number in range(2000)], dtype=object)
    unnamed: dict = {}
    exec(
        "def reward(completions, **kwargs):\n    return [float(c in {'a', 'b', 'c', 'd'}) for c in completions]",
        unnamed,
    )
    variables = os.environ
    return [
        lambda completions, **kwargs: [Kind.ONE in kinds for _ in completions],
        lambda completions, **kwargs: [c in words for c in completions],
        lambda completions, **kwargs: [c == variables["HOME"] for c in completions],
        unnamed["reward"],
        lambda completions, **kwargs: [Kind.ONE.value(c) for c in completions],
        TOKENIZER,
    ]


def print_digests():
    print(json.dumps([digest(one) for one in rewards_of_many_kinds()]))


def test_3_6_every_process_has_the_same_digest():
    program = "import test_faults_data; test_faults_data.print_digests()"
    printed = [
        subprocess.run(
            [sys.executable, "-c", program], text=True, stdout=subprocess.PIPE, check=True,
            env=os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path), "LOCAL_RANK": seed},
        ).stdout.splitlines()[-1]
        for seed in ("1", "2")
    ]  # fmt: skip
    assert printed[0] == printed[1] and "HOME" not in json.loads(printed[0])[2].replace('"HOME', "")


def test_3_6_what_a_description_tells_apart(monkeypatch):
    long = "x" * 300
    for first, second in (
        (SlotObject(1.0), SlotObject(2.0)),
        (TupleObject(1.0), TupleObject(2.0)),
        (reward_of_closure(re.compile(long + "1")), reward_of_closure(re.compile(long + "2"))),
        (reward_of_closure(re.compile("a")), reward_of_closure(re.compile("a", re.IGNORECASE))),
        (reward_of_closure(Decimal("0.5")), reward_of_closure(Decimal("0.25"))),
        (reward_of_closure(date(2026, 1, 1)), reward_of_closure(date(2026, 1, 2))),
        *(
            tuple(reward_of_closure(np.arange(start, start + size).astype("datetime64[D]")) for start in (0, 1))
            for size in (3, 3000)
        ),
    ):
        assert digest(first) != digest(second)
    before = digest(TupleObject(1.0)), digest(CachedObject(1))
    monkeypatch.setattr(TupleObject, "__call__", RewardObject.method)
    monkeypatch.setattr(CachedObject.doubled, "func", RewardObject.method)
    assert before[0] != digest(TupleObject(1.0)) and before[1] != digest(CachedObject(1))


def test_3_6_a_package_in_a_users_folder_is_named_and_not_read():
    """With every constant of sympy in it, the description of a verifier took longer than a test may."""
    assert _is_installed("/home/me/.local/lib/python3.11/site-packages/sympy/core.py")
    assert _is_installed("/usr/lib/python3/dist-packages/sympy/core.py")
    assert not _is_installed("/home/me/rewards/mine.py")


def test_3_6_a_tokenizer_that_was_used():
    used = copy.deepcopy(TOKENIZER)
    before = digest(used)
    used("a" * (used.model_max_length + 1) if used.model_max_length < 10**6 else "a")
    assert digest(used) == before


def test_3_6_what_refers_to_itself_and_what_is_installed():
    one = RewardObject(1)
    one.scale = one
    assert digest(one)
    from trl.rewards import accuracy_reward

    assert "def accuracy_reward" in digest(accuracy_reward) and len(digest(accuracy_reward)) < 20_000
    model = torch.nn.Linear(2, 2)
    model.config = type("Config", (), {"_name_or_path": "some/model"})()
    assert source_of(model) == "some/model"


# ---- 3.7: two reward functions of one name ---------------------------------------------------------------------------


def test_3_7_both_are_kept(folder, tmp_path):
    ones, twos = (reward_of_closure(scale) for scale in (1.0, 2.0))
    trainer = build(folder, tmp_path, [ones, twos, letters], save_rollouts=True, log_completions=True)
    trainer.train()
    saved = load_rollouts(tmp_path / "out")
    assert saved["rewards/reward_2"] == [2 * value for value in saved["rewards/reward"]] != [0.0] * 2
    entry = trainer.state.log_history[0]
    assert entry["rewards/reward_2/mean"] == pytest.approx(2 * entry["rewards/reward/mean"])
    assert {"reward", "reward_2", "letters"} <= set(trainer._logs["rewards"])


def test_3_7_names():
    assert unique_names(["f", "g", "f", "f"]) == ["f", "g", "f_2", "f_3"]
    assert unique_names(["f", "f", "f_2"]) == ["f", "f_3", "f_2"]


# ---- 4.9: dictionaries of different keys -----------------------------------------------------------------------------


def test_4_9_rows_are_the_same_however_they_were_stored(folder, tmp_path):
    """Arrow adds missing keys with None, JSON keeps each row's own. Trajectories and reward arguments are the same."""
    calls = [CALL, OTHER]
    rows = [
        {
            "prompt": [{"role": "user", "content": "hi"}],
            "completion": [
                {"role": "assistant", "tool_calls": [calls[i % 2]]},
                {"role": "tool", "content": "4", **({"name": "f"} if i % 2 else {})},
                {"role": "assistant", "content": "ab"},
            ],
            "facts": {"a": 1, "deep": [{"b": 2}]} if i % 2 else {"c": "x", "deep": [{"d": {"e": 1}}]},
            "number": i,
        }
        for i in range(4)
    ]  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made, asked = {}, {}
    for name, data in {
        "filled": Dataset.from_list(rows),
        "json": load_dataset("json", data_files=str(tmp_path / "rows.jsonl"), split="train", cache_dir=str(tmp_path)),
    }.items():

        def reward(completions, prompts, facts, number, _name=name, **kwargs):
            asked.setdefault(_name, []).append((completions, prompts, facts, number))
            return [0.0] * len(completions)

        trainer = build(folder, tmp_path / name, reward, data, processing_class=with_template(CALLS),
                        per_device_train_batch_size=4)  # fmt: skip
        made[name] = sorted(t.completion_ids.tolist() for (window) in windows_of(trainer) for t in window)
    assert made["filled"] == made["json"] and asked["filled"] == asked["json"]
    ((completions, _, facts, number),) = asked["json"]
    order = sorted(range(4), key=lambda place: number[place])
    assert [facts[place] for place in order] == [row["facts"] for row in rows]
    assert completions[order[0]][0] == {"role": "assistant", "content": "", "tool_calls": [CALL]}
    text = tokenizer().decode(made["json"][0])
    assert "null" not in text and '"arguments"' in text


def test_4_9_columns_of_prompts(folder, tmp_path):
    """Rolled out prompts and evaluation sets have them in the same form."""
    asked = []

    def reward(completions, facts, **kwargs):
        asked.append(facts)
        return [0.0] * len(completions)

    rows = [{"prompt": "a", "facts": {"a": 1}}, {"prompt": "b", "facts": {"b": None, "c": [None, {"d": None}]}}]
    for data in (Dataset.from_list(rows), Dataset.from_list(rows, features=Features(
        {"prompt": Dataset.from_list(rows).features["prompt"], "facts": Json()}
    ))):  # fmt: skip
        build(folder, tmp_path, reward, data).train()
    assert asked[0] == asked[1] == [{"a": 1}, {"c": [None, {}]}]


# ---- section 6: unclear errors of data -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"reward": "1.0"}, "Row 2 .*`reward` is '1.0', a str.*cast_column"),
        ({"completion": {"role": "assistant", "content": "b"}}, "Row 2 .*`completion` is a single message"),
        ({"completion": ["b"]}, "Row 2 .*message 0 of `completion` is 'b'"),
        ({"completion": [{"content": "b"}]}, "Row 2 .*message 0 of `completion` is .*a `role`"),
        (
            {"completion": [{"role": "assistant", "content": ""}]},
            "Row 2 .*no message of the assistant .* holds anything",
        ),
        ({"completion": [{"role": "assistant", "content": None}]}, "Row 2 .*no message of the assistant"),
        ({"prompt": {"role": "user", "content": "a"}}, "Row 2 .*`prompt` is a single message"),
        ({"prompt": ["a"]}, "Row 2 .*message 0 of `prompt` is 'a'"),
        ({"prompt": ""}, "Row 2 .*its prompt has no token.*BOS"),
        ({"prompt": 3}, "Row 2 .*`prompt` is 3, a int"),
        ({"prompt": CHAT}, "Row 2 .*its prompt is text and others are messages"),
    ],
)
def test_6_rows_of_another_form(row, message, folder, tmp_path):
    whole = {"prompt": "a", "completion": "b", "reward": 0.0, **row}
    good = {"prompt": "a", "completion": "b", "reward": "0" if isinstance(whole["reward"], str) else 0.0}
    features = Features({**Dataset.from_list([good]).features, **{name: Json() for name in row if name != "reward"}})
    with pytest.raises(ValueError, match=message if not isinstance(whole["reward"], str) else "`reward` is '0', a str"):
        build(folder, tmp_path, None, Dataset.from_list([good, good, whole], features=features))


def test_6_messages_that_the_template_cannot_write(folder, tmp_path):
    turn = {"role": "assistant", "content": [{"type": "text", "text": "b"}]}
    row = {"prompt": CHAT, "completion": [turn], "reward": 0.0}
    message = "Row 2 .*cannot write message 0 of `completion` .TypeError"
    refused(folder, tmp_path, [row], message, processing_class=with_template(CONTENT))


def test_6_prompts_that_the_template_cannot_write(folder, tmp_path):
    good, parts = [{"role": "user", "content": "a"}], [{"role": "user", "content": [{"type": "text", "text": "b"}]}]
    data = Dataset.from_list([{"prompt": good}, {"prompt": parts}], on_mixed_types="use_json")
    with pytest.raises(ValueError, match=r"template cannot write the prompt .*'text': 'b'.* .TypeError: "):
        build(folder, tmp_path, train_dataset=data, processing_class=with_template(CONTENT))


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (["6"], "The column `completion_ids` of the training set holds list<.*string>.*cast_column"),
        ([[6, 1]], "The column `completion_ids` of the training set holds list"),
        ([6.5], "The column `completion_ids` of the training set holds list<.*double>"),
        (6, "The column `completion_ids` of the training set holds int64"),
        ([6, None], "Row 0 of the training set: `completion_ids` holds None"),
    ],
)
def test_6_ids_of_another_type(ids, message, tmp_path):
    data = Dataset.from_list([{"prompt_ids": [5], "completion_ids": ids, "reward": 0.0}] * 2)
    with pytest.raises(ValueError, match=message):
        build("no/such/model", tmp_path, None, data)


def test_6_an_empty_prompt_that_is_rolled_out(folder, tmp_path):
    with pytest.raises(ValueError, match="Row 1 of the training set: its prompt is empty"):
        build(folder, tmp_path, train_dataset=Dataset.from_list([{"prompt": "a"}, {"prompt": ""}]))


def test_6_an_empty_prompt_beside_logged_rows(folder, tmp_path):
    """Only rows to roll out need one. A logged row may have ids in place of text."""
    ids = {"prompt_ids": [5], "completion_ids": [7, EOS], "reward": 1.0}
    none = {"prompt_ids": None, "completion_ids": None, "reward": None}
    rows = [{"prompt": "", **ids}, {"prompt": "a", **none}, {"prompt": "", **ids}, {"prompt": "", **none}]
    with pytest.raises(ValueError, match="Row 3 of the training set: its prompt is empty"):
        build(folder, tmp_path, letters, train_dataset=Dataset.from_list(rows))
    build(folder, tmp_path, letters, train_dataset=Dataset.from_list([*rows[:3], {"prompt": "b", **none}]))


@pytest.mark.parametrize("kind", ["torch", "numpy", "pandas"])
def test_6_formatted_data_sets(kind, folder, tmp_path):
    rows = [{"prompt_ids": [5, 6], "completion_ids": [7 + i, EOS], "loss_mask": [1, 1]} for i in range(2)]
    plain = Dataset.from_list([{**row, "reward": 0.5 * i} for i, row in enumerate(rows)])
    ((first, second),) = windows_of(build(folder, tmp_path, None, plain.with_format(kind)))
    assert sorted([first.reward, second.reward]) == [0.0, 0.5]
    prompts = [{"prompt": "a", "answer": 1.0}] * 2
    build(folder, tmp_path, letters, Dataset.from_list(prompts).with_format("torch")).train()


def test_6_a_transform_on_logged_rows(tmp_path):
    data = Dataset.from_list([{"prompt_ids": [5], "completion_ids": [6], "reward": 0.0}] * 2)
    with pytest.raises(ValueError, match=r"a transform.*dataset.map"):
        build("no/such/model", tmp_path, None, data.with_transform(lambda batch: batch))


def test_6_what_is_no_single_data_set(tmp_path):
    with pytest.raises(ValueError, match=r"is a DatasetDict of several.*'train', 'test'.*train_dataset\['train'\]"):
        build("no/such/model", tmp_path, train_dataset=DatasetDict({"train": PROMPTS, "test": PROMPTS}))
    with pytest.raises(ValueError, match="is a dict of several"):
        build("no/such/model", tmp_path, train_dataset={"train": PROMPTS})
    with pytest.raises(TypeError, match=r"is a list.*Dataset.from_list"):
        build("no/such/model", tmp_path, train_dataset=[{"prompt": "a"}] * 4)


def test_6_no_column_of_prompts(tmp_path):
    questions = PROMPTS.rename_column("prompt", "question")
    with pytest.raises(ValueError, match=r"The training set has no column `prompt`.*question, answer.*rename"):
        build("no/such/model", tmp_path, train_dataset=questions)
    with pytest.raises(ValueError, match="The evaluation set has no column `prompt`"):
        build("no/such/model", tmp_path, eval_dataset=questions)


def no_kwargs(prompts, completions):
    return [0.0] * len(completions)


def needs_gold(completions, gold, **kwargs):
    return [0.0] * len(completions)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (no_kwargs, r"'no_kwargs' does not take 'completion_ids', .*'answer'.*with the training set. Add `\*\*kwargs`"),
        (lambda completions: [], r"'<lambda>' does not take"),
        (needs_gold, "'needs_gold' needs 'gold', but the training set has no such column .its columns: prompt, answer"),
        (functools.partial(needs_gold, completions=[]), "'needs_gold' needs 'gold'"),
        ((letters, letters), "holds .<function letters .*which is no function. Pass a list"),
        (RewardObject, "holds <class .*RewardObject'>, which is no function.*an instance"),
    ],
)
def test_6_reward_functions_that_cannot_be_called(function, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        build("no/such/model", tmp_path, [letters, function])


@pytest.mark.parametrize("name", ["prompts", "completions", "trainer_state", "log_extra", "log_metric"])
def test_6_columns_with_the_name_of_an_argument(name, tmp_path):
    data = PROMPTS.add_column(name, ["a"] * 4)
    with pytest.raises(
        ValueError, match=f"The column '{name}' of the training set has the name of an argument.*Rename"
    ):
        build("no/such/model", tmp_path, train_dataset=data)
    with pytest.raises(ValueError, match=f"The column '{name}' of the evaluation set has the name of an argument"):
        build("no/such/model", tmp_path, eval_dataset=data)


def test_6_no_row_at_all(tmp_path):
    with pytest.raises(ValueError, match=r"`train_dataset` has no row. Was everything filtered out\?"):
        build("no/such/model", tmp_path, train_dataset=PROMPTS.select([]))


@pytest.mark.parametrize("where", ["train_dataset", "eval_dataset"])
def test_6_messages_without_a_chat_template(where, folder, tmp_path):
    chats = Dataset.from_list([{"prompt": CHAT}] * 4)
    message = "are messages, and the tokenizer has no chat template.*as text"
    for data in [chats] if where == "train_dataset" else [chats, {"a": PROMPTS, "b": chats}]:
        with pytest.raises(ValueError, match=f"set{' .b. ' if isinstance(data, dict) else ' '}{message}"):
            build(folder, tmp_path, processing_class=with_template(None), **{where: data})


def test_6_a_path_is_a_model(folder, tmp_path):
    build(Path(folder), tmp_path)


@pytest.mark.parametrize(
    ("data", "options"),
    [(PROMPTS, dict(remove_unused_columns=True)), (PROMPTS.with_format("torch", columns=["prompt"]), {})],
    ids=["dropped", "not in the format"],
)
def test_6_arguments_that_the_data_set_has_and_does_not_give(data, options, tmp_path):
    def needs_answer(completions, answer, **kwargs):
        return [0.0] * len(completions)

    build_with = dict(train_dataset=data.add_column("gold", [1] * 4) if not options else data, **options)
    with pytest.raises(ValueError, match="'needs_answer' needs 'answer', but the training set has no such column"):
        build("no/such/model", tmp_path, needs_answer, **build_with)


def test_6_a_function_that_does_not_take_the_environments(tmp_path):
    def strict(prompts, completions, completion_ids, trainer_state, log_extra, log_metric, answer):
        return [0.0] * len(completions)

    with pytest.raises(ValueError, match="'strict' does not take 'environments'"):
        build("no/such/model", tmp_path, strict, environment_factory=object)


def test_6_arguments_that_the_evaluation_set_lacks(tmp_path):
    prompts = PROMPTS.add_column("gold", [1] * 4)
    with pytest.raises(ValueError, match="'needs_gold' needs 'gold', but the evaluation set 'b' has no such column"):
        build("no/such/model", tmp_path, needs_gold, prompts, eval_dataset={"a": prompts, "b": PROMPTS})


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (torch.zeros(2, 1), r"array of shape \(2, 1\)"),
        (np.zeros((2, 2)), r"array of shape \(2, 2\)"),
        (torch.tensor(1.0), r"array of shape \(\)"),
        ([[0.0], [0.0]], r"returned \[0.0\] \(a list\) for completion 0"),
        ({"a": 1.0, "b": 2.0}, r"returned {'a': 1.0, 'b': 2.0} \(a dict\)"),
        ({1.0, 2.0}, r"\(a set\)"),
        (1.0, r"returned 1.0 \(a float\)"),
        (None, r"returned None \(a NoneType\)"),
        ("ab", r"returned 'ab' \(a str\)"),
        ([0.0], "returned 1 rewards for 2 completions"),
        ([0.0, "1"], r"returned '1' \(a str\) for completion 1"),
        ([0.0, 1j], r"returned 1j \(a complex\) for completion 1"),
        ([0.0, torch.zeros(1)], r"for completion 1"),
    ],
)
@pytest.mark.parametrize("kind", ["function", "async", "logged"])
def test_6_what_reward_functions_return(returned, message, kind, folder, tmp_path):
    def judge(completions, **kwargs):
        return returned

    async def judge_async(completions, **kwargs):
        return returned

    if kind != "function" and not isinstance(returned, (dict, float)):
        return  # the same check
    data = PROMPTS
    if kind == "logged":
        data = Dataset.from_list([{"prompt": "a", "completion": "b"}] * 2)
    name = "judge_async" if kind == "async" else "judge"
    with pytest.raises(ValueError, match=f"Reward function '{name}' .*{message}.*Return a list of 2 numbers"):
        build(folder, tmp_path, judge_async if kind == "async" else judge, data).train()


def test_6_what_counts_as_numbers():
    given = [1, True, 0.5, None, np.float32(2), np.bool_(True), torch.tensor(3.0)]
    assert rewards_of(given, 7, "f") == [1.0, 1.0, 0.5, None, 2.0, 1.0, 3.0]
    for one in (torch.tensor([1.0, 2.0]), np.array([1.0, 2.0]), (1.0, 2.0), iter([1.0, 2.0])):
        assert rewards_of(one, 2, "f") == [1.0, 2.0]


def test_6_no_file_is_left_in_the_cache_of_the_data_set(folder, tmp_path):
    rows = [{"prompt": "a", "completion": "b", "reward": 0.0}] * 4
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    cache = tmp_path / "cache"
    data = load_dataset("json", data_files=str(tmp_path / "rows.jsonl"), split="train", cache_dir=str(cache))
    before = sorted(cache.rglob("*"))
    trainer = build(folder, tmp_path, None, data)
    trainer.train()
    assert sorted(cache.rglob("*")) != before  # while the trainer lives
    trainer._scratch.cleanup()
    assert sorted(cache.rglob("*")) == before
    assert trainer.train_dataset[3]["completion"] == "b"  # mapped files outlive their names


# ---- saved rollouts --------------------------------------------------------------------------------------------------


def chat_rows():
    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": f"{i}?"}],
                "answer": i,
                "facts": {"a": i} if i % 2 else {"b": str(i)},
                "source": "web",
                "reward": 7.0,
            }
            for i in range(4)
        ]
    )


def test_saved_rollouts_are_scored_anew(folder, tmp_path):
    """They keep messages and the rows' columns, even with a trajectory's names. Another function scores them alike."""
    asked = []

    def reward(completions, prompts, answer, facts, source, **kwargs):
        asked.append((prompts, completions, answer, facts, source))
        return [a + len(c[0]["content"]) / 8 for a, c in zip(answer, completions, strict=True)]

    first = build(folder, tmp_path, reward, chat_rows(), max_steps=2, save_rollouts=True)
    first.train()
    saved = load_rollouts(tmp_path / "out")
    assert saved["answer"] == [0, 1, 2, 3] and saved["source"] == ["web"] * 4 and saved["row/reward"] == [7.0] * 4
    assert saved["facts"] == [{"b": "0"}, {"a": 1}, {"b": "2"}, {"a": 3}]
    assert saved[1]["prompt"] == [{"role": "user", "content": "1?"}]
    assert saved[1]["completion"][0]["role"] == "assistant"
    rewards, before = saved["reward"], asked.copy()
    asked.clear()
    again = build(folder, tmp_path / "2", reward, saved.remove_columns("reward"), max_steps=2)
    windows = windows_of(again)
    assert asked == before
    assert sorted(t.reward for w in windows for t in w) == pytest.approx(sorted(rewards))


def test_saved_rollouts_of_text_and_without_reward(folder, tmp_path):
    build(folder, tmp_path, lambda completions, **kwargs: [1.0, None], save_rollouts=True).train()
    assert load_rollouts(tmp_path / "out", unrewarded=True)["reward"] == [1.0, None]
    with pytest.warns(UserWarning, match="1 of 2 saved rollouts have no reward"):
        saved = load_rollouts(tmp_path / "out")
    assert saved[0]["prompt"] == "1+1=" and isinstance(saved[0]["completion"], str)
    assert tokenizer().decode(saved[0]["completion_ids"], skip_special_tokens=True) == saved[0]["completion"]
    metadata = pq.read_schema(next((tmp_path / "out/rollouts").iterdir())).metadata
    assert metadata[b"tbrm_trl.rollouts.version"] == str(ROLLOUTS_VERSION).encode()


def test_saved_rollouts_of_several_types(folder, tmp_path):
    """A column may have values of another type in each window."""
    rows = [{"prompt": "a", "x": value} for value in ({"a": 1}, {"a": None}, "1.0", None, [{"b": 1}], 2)]
    features = Features({"prompt": Dataset.from_list([{"prompt": "a"}]).features["prompt"], "x": Json()})
    texts = [row["x"] if not isinstance(row["x"], str) else f'"{row["x"]}"' for row in rows]
    data = Dataset.from_list([{"prompt": "a", "x": value} for value in texts], features=features)
    build(folder, tmp_path, letters, data, per_device_train_batch_size=1, max_steps=6, save_rollouts=True).train()
    assert load_rollouts(tmp_path / "out")["x"] == [{"a": 1}, {}, "1.0", None, [{"b": 1}], 2]


def test_saved_rollouts_of_the_first_version_still_load(folder, tmp_path):
    """Files without metadata, with texts and none of the data set's columns."""
    trainer = build(folder, tmp_path, None, Dataset.from_list(
        [{"prompt_ids": [5], "completion_ids": [6, EOS], "reward": 0.5}] * 2
    ))  # fmt: skip
    ((one, two),) = windows_of(trainer)
    plain = {"prompt_ids": [5], "completion_ids": [6, EOS], "loss_mask": [True] * 2, "ref_log_probs": None}
    table = pa.Table.from_pylist([{**to_row(t), **plain, "prompt": "2", "completion": "3"} for t in (one, two)])
    (tmp_path / "old/rollouts").mkdir(parents=True)
    pq.write_table(table, tmp_path / "old/rollouts/step-00000000-process-0.parquet")
    old = load_rollouts(tmp_path / "old")
    assert old["completion"] == ["3", "3"] and old["reward"] == [0.5, 0.5]
    build(folder, tmp_path / "2", None, old).train()
    later = table.replace_schema_metadata({"tbrm_trl.rollouts.version": str(ROLLOUTS_VERSION + 1)})
    pq.write_table(later, tmp_path / "old/rollouts/step-00000001-process-0.parquet")
    with pytest.raises(ValueError, match="written by a later version of tbrm-trl"):
        load_rollouts(tmp_path / "old")


# ---- readers ---------------------------------------------------------------------------------------------------------


def test_reader_of_verl_dumps(folder, tmp_path):
    """The keys that verl 0.9.1 writes in `_write_generations`; steps in the order of their numbers."""
    for step in (2, 10):
        entry = {"output": "12", "score": 1.0, "step": step, "acc": True, "end": "x"}
        entries = [{"input": f"{step}+{i}=", "gts": str(i), **entry} for i in range(2)]
        (tmp_path / f"{step}.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    rows = read_verl_dump(tmp_path)
    assert rows["prompt"] == ["2+0=", "2+1=", "10+0=", "10+1="] and rows["completion"] == ["12"] * 4
    assert rows["reward"] == [1.0] * 4 and rows["gts"] == ["0", "1"] * 2 and rows["verl/end"] == ["x"] * 4
    ((one, _),) = windows_of(build(folder, tmp_path, None, rows))
    assert tokenizer().decode(one.completion_ids) == "12<eos>" and one.reward == 1.0
    chats = read_verl_dump([tmp_path / "2.jsonl"], prompt=lambda entry: [{"role": "user", "content": entry["input"]}])
    assert chats["prompt"][1] == [{"role": "user", "content": "2+1="}] and len(chats) == 2
    (tmp_path / "11.jsonl").write_text('{"input": "a", "output": "b"}\n')
    with pytest.raises(ValueError, match=r"11.jsonl, line 1: no score"):
        read_verl_dump(tmp_path)
    (tmp_path / "11.jsonl").write_text('{"input": "a", "output": "b')
    with pytest.raises(ValueError, match=r"11.jsonl, line 1: no whole JSON .*cut short"):
        read_verl_dump(tmp_path)
    with pytest.raises(ValueError, match=r"2.jsonl, line 1: no `traces`"):
        read_verifiers_traces(tmp_path / "2.jsonl")
    with pytest.raises(FileNotFoundError, match="rollout_data_dir"):
        read_verl_dump(tmp_path / "none")


def test_reader_of_verifiers_traces(folder, tmp_path):
    """A file that verifiers 0.4.0 wrote: tests/data/make_verifiers_traces.py."""
    with pytest.warns(UserWarning, match=r"3 of 7 traces .*1 failed, 1 with several branches, 1 of an agent"):
        rows = read_verifiers_traces(DATA / "verifiers")
    assert rows["trace"] == ["trace-0", "trace-1", "trace-2", "trace-5"]
    assert rows["reward"] == [1.25, 1.0, 0.0, None] and rows["end"] == ["eos", "eos", "length", "eos"]
    plain, tools, cut, _ = rows
    assert plain["prompt"] == [{"role": "user", "content": "2+2"}] and plain["task"]["answer"] == "4"
    text = tokenizer()
    assert text.decode(plain["prompt_ids"]) == "<u>2+2\n<a>" and text.decode(plain["completion_ids"]) == "it is 4<eos>"
    assert text.decode(tools["completion_ids"]) == "[add 2 2]<eos>\n<t>4\n<a>it is 4<eos>"
    chosen = [token for token, mine in zip(tools["completion_ids"], tools["loss_mask"], strict=True) if mine]
    assert text.decode(chosen) == "[add 2 2]<eos>it is 4<eos>"
    assert tools["completion"][0]["tool_calls"][0]["function"] == {"name": "add", "arguments": {"a": 2, "b": 2}}
    assert cut["completion_ids"] is None and cut["completion"][0]["reasoning_content"] == "hm"

    asked = []

    def reward(completions, task, **kwargs):
        asked.extend(one["answer"] for one in task)
        return [float(one["answer"] in c[-1]["content"]) for one, c in zip(task, completions, strict=True)]

    template = CONTENT.replace("+ m['content'] }}", "+ m.get('reasoning_content', '') + m['content'] }}")
    (window,) = windows_of(
        build(folder, tmp_path, reward, rows, per_device_train_batch_size=4, processing_class=with_template(template))
    )
    assert sorted(t.reward for t in window) == [0.0, 1.0, 1.0, 1.25] and asked
    assert {text.decode(t.completion_ids) for t in window} == {
        "it is 4<eos>", "[add 2 2]<eos>\n<t>4\n<a>it is 4<eos>", "hmit is",
    }  # fmt: skip


def test_integers_beyond_64_bits_are_text_in_json(folder, tmp_path):
    """`datasets` could not read them back, and would say in no file or row."""
    (trace, *_) = (json.loads(line) for line in (DATA / "verifiers/traces.jsonl").read_text().splitlines())
    trace["traces"][0]["task"]["data"] |= {"factors": [2**64 - 1, -(2**63), 2**64, -(2**63) - 1, True]}
    (tmp_path / "traces.jsonl").write_text(json.dumps(trace))
    (row,) = read_verifiers_traces(tmp_path)
    read = [18446744073709551615, -9223372036854775808, "18446744073709551616", "-9223372036854775809", True]
    assert row["task"]["factors"] == read


def test_reader_of_verifiers_traces_of_another_schema(tmp_path):
    (tmp_path / "traces.jsonl").write_text(json.dumps({"traces": [{"version": 2}]}) + "\n")
    with pytest.raises(ValueError, match="line 1: a trace of schema 2"):
        read_verifiers_traces(tmp_path)
    assert VOCABULARY > 100  # the ids of the other test's file fit the tiny model
