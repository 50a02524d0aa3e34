"""Prompts that are too long or have unknown characters: found before a model is loaded, and how they are handled."""

import re
import string
from typing import Any

import numpy as np
import pytest
from common.tiny import save, tokenizer
from datasets import Dataset, IterableDataset
from helpers.runs import PROMPTS, build, log, prompt
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer
from trl.trainer import grpo_trainer

from tbrm_trl import TBRMConfig
from tbrm_trl.sources.prompts import PromptLimit, PromptRenderer, _bytes_of, fitting_prompts, unknown_tokens

LONG = "abcdefghijklmnopqrstuvwx"  # 24 tokens, more than any of the others
ROWS = [*PROMPTS, LONG]


def data(prompts=ROWS) -> Dataset:
    return Dataset.from_list([{"prompt": one, "answer": i} for i, one in enumerate(prompts)])


def chat(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


@pytest.fixture
def no_model(monkeypatch):
    def load(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(grpo_trainer, "create_model_from_path", load)


@pytest.mark.parametrize("messages", [False, True], ids=["text", "messages"])
@pytest.mark.parametrize("where", ["train_dataset", "eval_dataset", "one of several"])
def test_a_long_prompt_is_refused_before_a_model_is_loaded(where, messages, tmp_path, no_model):
    folder = save(tmp_path / "model")
    make = chat if messages else str
    long, short = data([make(one) for one in ROWS]), data([make(one) for one in PROMPTS])
    rendered = AutoTokenizer.from_pretrained(folder).apply_chat_template(chat(LONG), add_generation_prompt=True)
    length = len(rendered["input_ids"]) if messages else len(LONG)
    limit = length - 1
    sets: dict[str, Any] = {
        "train_dataset": {"train_dataset": long},
        "eval_dataset": {"train_dataset": short, "eval_dataset": long},
        "one of several": {"train_dataset": short, "eval_dataset": {"easy": short, "hard": long}},
    }[where]
    title = {"train_dataset": "training set", "eval_dataset": "evaluation set"}.get(where, "evaluation set 'hard'")
    error = (
        rf"Row 8 of the {title}: its prompt has {length} tokens, more than {limit}, which is max_prompt_length\. 1 of 9"
    )
    with pytest.raises(ValueError, match=error):
        build(folder, tmp_path, max_prompt_length=limit, **sets)
    with pytest.raises(AssertionError, match="a model was loaded"):
        build(folder, tmp_path, max_prompt_length=length, **sets)


def test_the_context_is_a_limit_too(tmp_path, no_model):
    folder = save(tmp_path / "model", max_position_embeddings=40)
    error = r"Row 8 .* has 24 tokens, more than 20, which is the model's context of 40 less max_completion_length=20"
    for options in ({}, {"max_prompt_length": 30}):
        with pytest.raises(ValueError, match=error):
            build(folder, tmp_path, train_dataset=data(), max_completion_length=20, **options)
    with pytest.raises(
        ValueError, match=r"`max_completion_length=40` leaves no room for a prompt in the model's context"
    ):
        build(folder, tmp_path, train_dataset=data(), max_completion_length=40)
    with pytest.raises(AssertionError, match="a model was loaded"):  # a log generates nothing
        build(folder, tmp_path, None, Dataset.from_list(log()), max_completion_length=40, per_device_train_batch_size=4)
    with pytest.raises(ValueError, match="leaves no room"):
        build(folder, tmp_path, train_dataset=Dataset.from_list(log()), eval_dataset=data(), max_completion_length=40)


def test_long_prompts_are_dropped_and_counted(tmp_path):
    with pytest.warns(
        UserWarning,
        match=r"2 of 10 rows of the training set are dropped: .* more than 20 tokens.* They are rows 8, 9\.",
    ):
        trainer = build(save(tmp_path / "model"), tmp_path, train_dataset=data([*ROWS, LONG + "!"]), max_steps=4,
                        max_prompt_length=20, long_prompts="drop")  # fmt: skip
    assert list(trainer.train_dataset["answer"]) == list(range(8))
    with pytest.raises(ValueError, match=r"more than 20, .* Give its data set to the trainer at construction, where"):
        trainer.evaluate(data([LONG]))
    trainer.train()
    drawn = sorted(prompt(one) for window in trainer.windows for one in window)
    assert drawn == sorted(one.replace(" ", "") for one in PROMPTS)  # which the tokenizer leaves out
    with pytest.raises(ValueError, match=r"No row of the training set is left"), pytest.warns(UserWarning):
        build(save(tmp_path / "model"), tmp_path, train_dataset=data([LONG] * 8), max_prompt_length=20,
              long_prompts="drop", per_device_train_batch_size=8)  # fmt: skip


@pytest.mark.parametrize("stream", [False, True])
def test_long_prompts_are_cut_on_the_left(stream, tmp_path):
    dataset: Any = data(["1+1=", "a", "ab", LONG])
    if stream:
        rows = dataset.to_list()
        dataset = IterableDataset.from_generator(lambda: iter(rows * 4))
    trainer = build(save(tmp_path / "model"), tmp_path, train_dataset=dataset, max_prompt_length=8, long_prompts="cut",
                    per_device_train_batch_size=4, max_steps=4)  # fmt: skip
    trainer.train()
    drawn = [prompt(one) for window in trainer.windows for one in window]
    assert set(drawn) == {"1+1=", "a", "ab", LONG[-8:]}


def test_a_stream_is_looked_at_as_it_is_read(tmp_path):
    stream = IterableDataset.from_generator(lambda: iter([{"prompt": LONG, "answer": 0}] * 8))
    trainer = build(save(tmp_path / "model"), tmp_path, train_dataset=stream, max_prompt_length=20)
    with pytest.raises(
        ValueError, match=r"The prompt 'abcdefghijklmnopqrstuvwx' of this window has 24 tokens, more than 20"
    ):
        trainer.train()
    for sets in ({"train_dataset": stream}, {"eval_dataset": {"one": data(), "other": stream}}):
        with pytest.raises(ValueError, match=r"`long_prompts='drop'` needs data sets, not a stream"):
            build(save(tmp_path / "model"), tmp_path, **sets, max_prompt_length=20, long_prompts="drop")


@pytest.mark.parametrize("policy", ["drop", "cut"])
def test_prompts_of_a_rollout_function_are_neither_dropped_nor_cut(policy, tmp_path, no_model):
    with pytest.raises(ValueError, match=rf"`long_prompts='{policy}'` with images, `rollout_func` or .* Use 'refuse'"):
        build(save(tmp_path / "model"), tmp_path, rollout_func=lambda prompts, trainer: {}, max_prompt_length=20,
              long_prompts=policy)  # fmt: skip


def test_prompts_of_unknown_characters_are_refused(tmp_path, no_model):
    folder = save(tmp_path / "model")
    for make in (str, chat):
        rows = [make(one) for one in (*PROMPTS[:5], "日本語", *PROMPTS[5:])]
        with pytest.raises(
            ValueError, match=r"Row 5 of the training set: the tokenizer knows none of the characters of its"
        ):
            build(folder, tmp_path, train_dataset=data(rows))
        with pytest.raises(AssertionError, match="a model was loaded"):  # one known character is enough
            build(folder, tmp_path, train_dataset=data([make(one) for one in (*PROMPTS, "日本語a")]))


def test_the_tokens_of_unknown_characters(tmp_path):
    """The first tokenizer has a token for them, the second drops them silently, and the last knows the tested one."""
    assert unknown_tokens(tokenizer()) == {0}
    assert unknown_tokens(AutoTokenizer.from_pretrained(save(tmp_path / "model"))) == set()
    assert unknown_tokens(tokenizer(alphabet=string.printable + "\U0010fffd")) is None


def test_prompts_are_rendered_without_the_keys_that_arrow_adds():
    """Two prompts have a tool call each, so Arrow gives every message `tool_calls`, and both calls both arguments.

    The template writes the number of calls and the names of the first one's arguments. "abc" has 3 tokens, "1xab" and
    "1yab" have 4.
    """

    def calling(argument: str) -> list[dict[str, Any]]:
        call = {"type": "function", "function": {"name": "f", "arguments": {argument: 1}}}
        return [{"role": "assistant", "content": "ab", "tool_calls": [call]}]

    letters = tokenizer()
    letters.chat_template = (
        "{% for m in messages %}{% if 'tool_calls' in m %}{{ m.tool_calls|length }}"
        "{{ m.tool_calls[0].function.arguments|join }}{% endif %}{{ m.content }}{% endfor %}"
    )
    renderer = PromptRenderer(None, letters, TBRMConfig("unused", use_cpu=True), None, None)
    prompts = [chat("abc"), calling("x"), calling("y")]
    rows = Dataset.from_list([{"prompt": one, "row": i} for i, one in enumerate(prompts)])
    assert rows[0]["prompt"][0]["tool_calls"] is None
    assert rows[1]["prompt"][0]["tool_calls"][0]["function"]["arguments"] == {"x": 1, "y": None}
    fitting = fitting_prompts(rows, "it", np.ones(3, bool), PromptLimit(4, "a limit", "drop"), renderer)
    assert list(fitting["row"]) == [0, 1, 2]
    with pytest.warns(UserWarning, match="They are rows 1, 2"):
        fitting = fitting_prompts(rows, "it", np.ones(3, bool), PromptLimit(3, "a limit", "drop"), renderer)
    assert list(fitting["row"]) == [0]


def test_a_message_without_content_is_rendered_as_in_a_rollout():
    """It is rendered with the content "". The template puts one token before it: that makes 1, and 3 for "ab"."""
    letters = tokenizer()
    letters.chat_template = "{% for m in messages %}{{ '<' + m['content'] }}{% endfor %}"
    renderer = PromptRenderer(None, letters, TBRMConfig("unused", use_cpu=True), None, None)
    rows = Dataset.from_list([{"prompt": [{"role": "user", "content": None}]}, {"prompt": chat("ab")}])
    with pytest.raises(ValueError, match=r"Row 1 of it: its prompt has 3 tokens, more than 2, .* 1 of 2 rows"):
        fitting_prompts(rows, "it", np.ones(2, bool), PromptLimit(2, "a limit", "refuse"), renderer)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_prompt_length": 0}, "`max_prompt_length=0` must be at least 1"),
        ({"long_prompts": "truncate"}, "`long_prompts='truncate'` is unknown. Choose one of refuse, drop, cut"),
    ],
)
def test_misuse(options, message, tmp_path):
    with pytest.raises(ValueError, match=re.escape(message)):
        TBRMConfig(str(tmp_path), use_cpu=True, **options)


texts = st.text(st.sampled_from(string.ascii_letters + " é日"), max_size=40)


@settings(max_examples=60, deadline=None)
@given(st.lists(texts, min_size=1, max_size=12), st.booleans(), st.integers(1, 60), st.data())
def test_bulk_and_row_by_row_agree(prompts, as_messages, limit, drawn):
    """Among the selected rows, those are dropped that are too long when rendered alone."""
    prompts = [*prompts, "one that is not asked for"]
    given = [chat(one) if as_messages else one for one in prompts]
    asked = np.array([*drawn.draw(st.lists(st.booleans(), min_size=len(given) - 1, max_size=len(given) - 1)), False])
    letters = tokenizer(alphabet=string.ascii_letters + " é日")
    renderer = PromptRenderer(None, letters, TBRMConfig("unused", use_cpu=True), None, None)
    rows = Dataset.from_list([{"prompt": one, "row": i} for i, one in enumerate(given)])
    kept = fitting_prompts(rows, "it", asked, PromptLimit(limit, "a limit", "drop"), renderer)["row"]
    expected = [i for i, one in enumerate(given) if not asked[i] or len(renderer([one])[0]) <= limit]
    assert list(kept) == expected
    if as_messages:  # what else a template may write counts as well
        more = Dataset.from_list([{"prompt": [{**m, "reasoning_content": "r" * 99} for m in one]} for one in given])
        assert (_bytes_of(more.with_format("arrow")[:]["prompt"].combine_chunks()) >= 99).all()
    sizes = _bytes_of(rows.with_format("arrow")[:]["prompt"].combine_chunks())
    assert (sizes >= [len(one.encode()) for one in prompts]).all()
