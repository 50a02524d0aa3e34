"""Accuracy: its arithmetic by hand, and generation with a real model."""

from __future__ import annotations

import math

import pytest
import torch
from common.tiny import model, tokenizer
from peft import LoraConfig, get_peft_model

from tbrm_trl.evaluation import accuracy_from_scores, evaluate_accuracy


def test_by_hand():
    """Means per problem 0.5, 1, 0: mean 0.5, sample variance 0.25, standard error √(0.25/3)."""
    mean, error = accuracy_from_scores([[1, 0], [1, 1], [0, 0]])
    assert mean == 0.5
    assert error == pytest.approx(math.sqrt(0.25 / 3))


def test_one_problem_has_no_standard_error():
    mean, error = accuracy_from_scores([[1, 0, 0, 0]])
    assert mean == 0.25 and math.isnan(error)


@pytest.mark.parametrize("scores", [[], [[1.0], []]])
def test_no_scores(scores):
    with pytest.raises(ValueError, match="at least one"):
        accuracy_from_scores(scores)


PROMPTS = ["ab", [{"role": "user", "content": "a longer question"}], "abcdef"]


POLICY = model()


def evaluate(**options):
    return evaluate_accuracy(
        POLICY,
        tokenizer(),
        PROMPTS,
        lambda index, text: float(len(text) % 2),
        max_new_tokens=6,
        batch_size=4,
        **options,
    )


def test_sampling_is_seeded_and_leaves_the_global_state():
    state = torch.random.get_rng_state()
    first, again, other = (evaluate(samples=4, temperature=1.0, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(state, torch.random.get_rng_state())
    assert first == again
    assert first.completions != other.completions
    assert [len(row) for row in first.completions] == [4, 4, 4]
    assert first.mean == pytest.approx(sum(sum(row) / 4 for row in first.scores) / 3)


def test_greedy_does_not_depend_on_the_batch():
    """Batched, left-padded greedy decoding gives what each prompt gives alone."""
    together = evaluate().completions
    policy, tok = POLICY.eval(), tokenizer()
    for prompt, completions in zip(PROMPTS, together, strict=True):
        text = (
            prompt
            if isinstance(prompt, str)
            else tok.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        )
        inputs = tok(text, return_tensors="pt")
        ids = policy.generate(**inputs, do_sample=False, max_new_tokens=6)[0, inputs["input_ids"].shape[1] :]
        assert completions == [tok.decode(ids, skip_special_tokens=True)]


@pytest.mark.parametrize("shipped", [{"repetition_penalty": 3.0}, {"min_p": 0.9}, {"typical_p": 0.2}])
def test_what_a_model_ships_with_changes_nothing(shipped):
    """Accuracy is that of the trained policy softmax(logits / T), not of a penalised or filtered one."""
    biased = model()
    biased.generation_config.update(**shipped)
    options = dict(max_new_tokens=6, batch_size=4, samples=4, temperature=1.0)
    plain, other = (
        evaluate_accuracy(policy, tokenizer(), PROMPTS, lambda i, t: 1.0, **options) for policy in (POLICY, biased)
    )
    assert other.completions == plain.completions
    assert biased.generation_config.to_dict().items() >= shipped.items()  # and it is put back


def test_nor_under_an_adapter():
    """PEFT passes `generate` to the model inside, and that model's settings apply."""
    inside = model()
    inside.generation_config.update(repetition_penalty=3.0, max_new_tokens=9)
    shipped = inside.generation_config
    adapted = get_peft_model(
        inside, LoraConfig(target_modules="all-linear", lora_dropout=0.0)
    )  # B = 0: the same policy
    options = dict(max_new_tokens=6, batch_size=4, samples=4, temperature=1.0)
    plain, other = (
        evaluate_accuracy(one, tokenizer(), PROMPTS, lambda i, t: 1.0, **options) for one in (POLICY, adapted)
    )
    assert other.completions == plain.completions
    assert inside.generation_config is shipped


def test_an_interrupted_evaluation_leaves_the_model_as_it_was():
    policy = model().train()
    shipped = policy.generation_config

    def interrupt(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate_accuracy(policy, tokenizer(), ["ab"], lambda i, t: 1.0, progress=interrupt)
    assert policy.training and policy.generation_config is shipped


def test_mode_and_truncation():
    policy = model().train()
    result = evaluate_accuracy(policy, tokenizer(), ["ab"], lambda i, t: 1.0, max_new_tokens=1)
    assert policy.training
    assert result.truncated == 1.0  # a single token that is not EOS
    assert str(result).startswith("greedy: 1.000")


def test_several_greedy_samples_are_refused():
    with pytest.raises(ValueError, match="all the same"):
        evaluate(samples=2)
