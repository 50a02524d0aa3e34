"""Benchmarks, results that can be resumed and compared, and completions that do not depend on their batch."""

from __future__ import annotations

import errno
import json
import math
import sys
import weakref
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from common.tiny import model, tokenizer
from datasets import Dataset
from transformers import BitsAndBytesConfig

from tbrm_trl.cli.evaluate import main, show_comparison
from tbrm_trl.evaluation import benchmarks, sampling
from tbrm_trl.evaluation.benchmarks import BENCHMARKS, SUITES, Benchmark, load_benchmark
from tbrm_trl.evaluation.results import (
    Result,
    Row,
    append,
    file_of,
    open_result,
    paired_results,
    read_result,
    results_of,
)
from tbrm_trl.evaluation.run import Judge, ModelPolicy, Settings, evaluate
from tbrm_trl.evaluation.sampling import Completion, Request, Sampling, draw, generate, prompt_ids_of
from tbrm_trl.evaluation.statistics import Comparison, compare
from tbrm_trl.evaluation.vllm import VllmPolicy, digest_of_files
from tbrm_trl.rewards import RewardError, gym
from tbrm_trl.rewards.returned import NotRewardsError

# ---- sampling --------------------------------------------------------------------------------------------------------


def requests_of(words) -> list[Request]:
    return [Request(words(text)["input_ids"], seed) for seed, text in enumerate(["ab", "a longer one", "abcdef"] * 2)]


@pytest.mark.parametrize("selectable", [True, False])
def test_a_completion_depends_on_its_seed_alone(selectable, monkeypatch):
    """A request gives the same ids alone and in any batch, with refilled places or not. Another seed gives others."""
    policy, words = model(), tokenizer()
    requests = requests_of(words)
    expected = [one.ids for one in sorted(generate(policy, words, requests, Sampling(max_new_tokens=8), 6))]
    if not selectable:
        monkeypatch.setattr("tbrm_trl.evaluation.sampling.can_select_rows", lambda cache: False)
    how = Sampling(max_new_tokens=8)

    def ids(batch_size: int, of: list[Request]) -> list[list[int]]:
        return [one.ids for one in sorted(generate(policy, words, of, how, batch_size))]

    together = ids(6, requests)
    assert ids(1, requests) == ids(4, requests) == together == expected
    assert ids(2, requests[::-1]) == together[::-1]
    assert ids(6, [Request(one.prompt_ids, one.seed + 100) for one in requests]) != together


def test_a_judge_is_given_no_logged_completion():
    """A file of saved rollouts has such columns. `letters` counts the policy's own."""
    columns = {"prompt": ["x"], "completion": ["zzz"], "completion_ids": [[5]], "solution": ["4"]}
    for reward, score in (("format", 1.0), ("math", 1.0)):
        judge = Judge(Benchmark("rollouts", ["2+2="], columns, reward))
        assert judge.verdicts(["2+2="], [r"\boxed{4}"], [[7]], [0]) == [score]


def test_a_template_takes_the_text_of_messages():
    parts = [{"type": "text", "text": "2+"}, {"type": "image"}, {"type": "text", "text": "2"}]
    asked = [{"role": "system", "content": None}, {"role": "user", "content": parts}]
    assert benchmarks.in_template("Q: {question} A:", asked) == "Q: \n2+2 A:"


def test_rows_do_not_rescale_one_another():
    """With `longrope` a row beyond the original context changes the embeddings of the whole batch."""
    rope = dict(rope_type="longrope", rope_theta=1e4, short_factor=[1.0] * 4, long_factor=[2.0] * 4, factor=2.0)
    rope["original_max_position_embeddings"] = 16
    policy = ModelPolicy("m", model("llama", rope_parameters=rope, max_position_embeddings=64), tokenizer())
    requests, how = requests_of(policy.tokenizer), Sampling(max_new_tokens=8)
    long = Request(policy.tokenizer("a" * 28)["input_ids"], 9)
    alone = [one.ids for request in requests for one in policy.generate([request], how)]
    together = sorted(policy.generate([*requests, long], how))
    assert [one.ids for one in together[:-1]] == alone


def test_the_batch_stays_full():
    """While requests wait, less than an eighth of the places is free on average; no pass is wider than a row."""
    policy, words = model(), tokenizer()
    with torch.no_grad():  # the end token's logit is like any other's, so that lengths differ
        policy.lm_head.weight[words.eos_token_id] *= 2
    passes: list[tuple[int, int]] = []

    def record(module, args, kwargs):
        rows, width = kwargs["attention_mask"].shape
        if kwargs["input_ids"].shape[1] == 1:
            passes.append((rows, width))

    policy.register_forward_pre_hook(record, with_kwargs=True)
    requests = [Request(words("ab")["input_ids"], seed) for seed in range(60)]
    completions = list(generate(policy, words, requests, Sampling(max_new_tokens=40), 16))
    assert sorted(one.request for one in completions) == list(range(60))
    lengths = [len(one.ids) for one in completions]
    assert min(lengths) < 10 and max(lengths) == 40
    assert sum(rows for rows, _ in passes) == sum(lengths) - 60  # the first token follows the prompt's own pass
    assert max(width for _, width in passes) <= 2 + 40
    waiting = [rows for rows, _ in passes[: len(passes) // 2]]
    assert sum(waiting) / len(waiting) > 16 * 7 / 8


def test_random_numbers_go_with_their_row(monkeypatch):
    """Only rows under way, at most one for each place, and rows that have just ended have them."""
    drawn: list[weakref.ref] = []
    numbers_of = sampling._numbers

    def numbers(seed, count):
        found = numbers_of(seed, count)
        drawn.append(weakref.ref(found))
        return found

    monkeypatch.setattr(sampling, "_numbers", numbers)
    requests = requests_of(tokenizer()) * 4
    there = []
    for _ in generate(model(), tokenizer(), requests, Sampling(max_new_tokens=8), 3):
        there.append(sum(one() is not None for one in drawn))
    assert len(drawn) == len(there) == 24 and max(there) <= 2 * 3
    assert not any(one() is not None for one in drawn)


def test_draws_follow_the_distribution():
    """χ² of 20,000 draws over five tokens, at a temperature and with each filter, against shares computed by hand."""
    logits = torch.tensor([0.5, 0.3, 0.1, 0.06, 0.04]).log()
    numbers = torch.rand(20000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    cold = [p**2 / 0.3552 for p in (0.5, 0.3, 0.1, 0.06, 0.04)]
    for how, shares in {
        Sampling(): [0.5, 0.3, 0.1, 0.06, 0.04],
        Sampling(temperature=0.5): cold,
        Sampling(top_k=2): [0.625, 0.375, 0, 0, 0],
        Sampling(top_p=0.85): [5 / 9, 3 / 9, 1 / 9, 0, 0],
    }.items():
        drawn = draw(logits.expand(20000, 5), numbers, how).bincount(minlength=5)
        expected = 20000 * torch.tensor(shares)
        kept = expected > 0
        assert not drawn[~kept].any()
        assert ((drawn - expected)[kept] ** 2 / expected[kept]).sum() < 18.5  # p = 0.001 at four degrees of freedom


def test_a_template_that_refuses_a_role_is_one_line():
    words = tokenizer()
    refusal = "{% if messages[0].role == 'system' %}{{ raise_exception('No system\\nhere') }}{% endif %}"
    words.chat_template = refusal + "{{ messages[0].content }}"
    user = {"role": "user", "content": "ab"}
    with pytest.raises(ValueError, match=r"refuses the prompt \(No system\)\. .* give --system_prompt ''") as error:
        prompt_ids_of(words, [{"role": "system", "content": "s"}, user])
    assert "\n" not in str(error.value)
    assert prompt_ids_of(words, [user]) == words("ab", add_special_tokens=False)["input_ids"]


def test_a_chat_template_is_given_its_variables():
    words = tokenizer()
    words.chat_template = "{{ name }}:{{ messages[0].content }}"
    user = [{"role": "user", "content": "ab"}]
    assert words.decode(prompt_ids_of(words, user, {"name": "n"})) == "n:ab"
    assert words.decode(prompt_ids_of(words, user)) == ":ab"
    assert words.decode(prompt_ids_of(words, "ab", {"name": "n"})) == "ab"  # text is asked as it is


# ---- results ---------------------------------------------------------------------------------------------------------

SUMS = Benchmark("sums", ["1+1=", "2+2=", "3+3="], {"solution": ["2", "4", "6"]}, "math")
SETTINGS = Settings(samples=2, sampling=Sampling(max_new_tokens=4))


class Scripted:
    """A policy whose completions are written down; it can be interrupted."""

    name, backend, tokenizer = "scripted", "none", tokenizer()

    def __init__(self, answers: list[str], interrupted_after: int = 10**9):
        self.answers, self.left, self.asked = answers, interrupted_after, 0

    def weights(self) -> str:
        return "w"

    def loaded(self) -> dict:
        return {"revision": None, "dtype": "float32", "quantization": None}

    def generate(self, requests, how):
        self.prompts = [self.tokenizer.decode(one.prompt_ids) for one in requests]
        for number, request in enumerate(requests):
            if self.left == 0:
                raise KeyboardInterrupt
            self.left -= 1
            self.asked += 1
            question = self.tokenizer.decode(request.prompt_ids)
            text = self.answers[next(i for i, asked in enumerate(SUMS.prompts) if asked in question)]
            yield Completion(number, [*self.tokenizer(text)["input_ids"], 1], truncated=len(text) > 8)


@pytest.fixture(scope="module")
def judge():
    return Judge(SUMS)


def test_a_result_by_hand(tmp_path, judge):
    """One right, one wrong, one without an answer: a third right. One is cut. Lengths with end token: 10, 10, 1."""
    result = evaluate(Scripted(["\\boxed{2}", "\\boxed{5}", ""]), SUMS, SETTINGS, tmp_path / "a.jsonl", judge)
    assert result.metrics() == pytest.approx(
        {
            "avg@2": 1 / 3, "avg@2_error": 1 / 3, "pass@2": 1 / 3, "maj@2": 1 / 3, "truncated": 2 / 3,
            "unparseable": 1 / 3, "unjudged": 0, "mean_length": 7, "mean_length_error": 3,
        }
    )  # fmt: skip
    read = read_result(tmp_path / "a.jsonl")
    assert read == result
    assert len({row.seed for row in read.rows.values()}) == 6
    assert "avg@2 0.3333 ± 0.3333 (3 problems, T=1)" in str(read)


def test_a_verdict_of_nan_is_none(tmp_path):
    """It is None as in training. NaN would make the mean of all NaN."""
    answers = Scripted(["2", "5", "6"])
    by_value = Benchmark("sums", SUMS.prompts, {}, "helpers.reward_functions.value_below_six")
    result = evaluate(answers, by_value, SETTINGS, tmp_path / "a.jsonl")
    assert result.metrics()["avg@2"] == pytest.approx((2 + 5 + 0) / 3) and result.metrics()["unjudged"] == 1 / 3


def test_an_interrupted_evaluation_goes_on(tmp_path, judge, monkeypatch):
    """Finished completions are kept, one with a cut line is drawn again, and no other is drawn twice."""
    monkeypatch.setattr("tbrm_trl.evaluation.run.AT_ONCE", 1)
    path, answers = tmp_path / "a.jsonl", ["\\boxed{2}", "\\boxed{5}", ""]
    with pytest.raises(KeyboardInterrupt):
        evaluate(Scripted(answers, interrupted_after=4), SUMS, SETTINGS, path, judge)
    with pytest.raises(ValueError, match="holds 4 of 6 completions"):
        read_result(path)
    path.write_text(path.read_text()[:-20])
    again = Scripted(answers)
    evaluate(again, SUMS, SETTINGS, path, judge)
    assert again.asked == 3
    evaluate(Scripted(answers), SUMS, SETTINGS, tmp_path / "whole.jsonl", judge)
    assert read_result(path).rows == read_result(tmp_path / "whole.jsonl").rows


def test_a_full_disk_leaves_no_result(tmp_path, monkeypatch):
    """A file whose header is cut short would be taken for no result from then on."""

    def cut(path, text, **options):
        path.write_bytes(text.encode()[:10])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", cut)
        with pytest.raises(OSError, match=r"Cannot write to .*r\.jsonl"):
            open_result(tmp_path / "r.jsonl", {"name": "r"})
    assert open_result(tmp_path / "r.jsonl", {"name": "r"}).header == {"name": "r"}


def test_another_evaluation_is_not_mixed_in(tmp_path, judge):
    evaluate(Scripted(["", "", ""]), SUMS, SETTINGS, tmp_path / "a.jsonl", judge)
    other = Settings(samples=2, sampling=Sampling(temperature=0.6, max_new_tokens=4))
    with pytest.raises(ValueError, match=r"differs in sampling\.temperature \(there 1\.0, here 0\.6\)\. Give"):
        evaluate(Scripted(["", "", ""]), SUMS, other, tmp_path / "a.jsonl", judge)


def test_completions_hold_any_character(tmp_path):
    """Some characters that JSON does not escape end a line for `str.splitlines`."""
    row = Row(
        0, 0, seed=1, ids=[1], completion="é\u2028\u2029\x85\x0b\x0c\x1c", truncated=False, answer=None, score=0.0
    )
    append(open_result(tmp_path / "a.jsonl", {"problems": 1, "samples": 1, "template": "\u2028"}), [row])
    read = read_result(tmp_path / "a.jsonl")
    assert list(read.rows.values()) == [row] and read.header["template"] == "\u2028"


def test_variables_of_the_template_are_drawn_with_and_written(tmp_path, judge):
    """Without them the header is as before, so older results can be resumed. Other variables are another evaluation."""
    policy = Scripted(["2", "4", "6"])
    policy.tokenizer = tokenizer()
    policy.tokenizer.chat_template = "{{ name }}:{{ messages[-1].content }}"
    plain = evaluate(policy, SUMS, SETTINGS, tmp_path / "plain.jsonl", judge)
    assert policy.prompts[0] == ":1+1=" and "chat_template_kwargs" not in plain.header
    given = replace(SETTINGS, chat_template_kwargs={"name": "n"})
    result = evaluate(policy, SUMS, given, tmp_path / "given.jsonl", judge)
    assert policy.prompts == ["n:1+1="] * 2 + ["n:2+2="] * 2 + ["n:3+3="] * 2
    assert (result.header["template"], result.header["chat_template_kwargs"]) == ("n:1+1=", {"name": "n"})
    unread = replace(SETTINGS, chat_template_kwargs={"other": 1})  # which the template does not print
    with pytest.raises(ValueError, match=r"differs in chat_template_kwargs \(there None, here"):
        evaluate(policy, SUMS, unread, tmp_path / "plain.jsonl", judge)
    with pytest.raises(ValueError, match=r"differs in chat_template_kwargs .*, here None"):
        evaluate(policy, SUMS, SETTINGS, tmp_path / "given.jsonl", judge)
    as_text = replace(given, prompt_template="{question}")  # which no chat template renders
    header = evaluate(policy, SUMS, as_text, tmp_path / "text.jsonl", judge).header
    assert header["template"] == "1+1=" and "chat_template_kwargs" not in header


@pytest.mark.parametrize(("template", "score"), [(None, 0.0), ("{question}", 1.0)])
def test_a_judge_is_given_what_it_is_in_training(template, score, tmp_path, monkeypatch):
    """It gets text for a text prompt, and messages for messages."""
    own = ModuleType("own_judge")
    code = "async def judge(completions, **columns):\n    return [float(isinstance(one, str)) for one in completions]\n"
    exec(compile(code, "own_judge.py", "exec"), own.__dict__)
    monkeypatch.setitem(sys.modules, "own_judge", own)
    problems = Benchmark("sums", SUMS.prompts, {}, "own_judge.judge")
    result = evaluate(Scripted(["2", "4", "6"]), problems, replace(SETTINGS, prompt_template=template), tmp_path / "a")
    assert {row.score for row in result.rows.values()} == {score}


def test_a_length_without_token_ids_is_of_characters():
    """Other models of inspect-ai give no ids. Four characters of at most eight earn −½, two tokens −¼."""
    judge = Judge(Benchmark("sums", SUMS.prompts, {}, "length(limit=8)"))
    assert judge.verdicts(["1+1="], ["abcd"], None, [0]) == [-0.5]
    assert judge.verdicts(["1+1="], ["abcd"], [[7, 1]], [0]) == [-0.25]


def without(path, *fields: str) -> None:
    """Remove fields from a result's header, as in older results."""
    first, *lines = path.read_text().split("\n")
    header = {name: value for name, value in json.loads(first).items() if name not in fields}
    path.write_text("\n".join([json.dumps(header), *lines]))


def compared(first, second) -> dict[str, Comparison]:
    return {name: compare(one.scores, other.scores) for name, (one, other) in paired_results(first, second).items()}


def test_a_judge_that_changed_is_noticed(tmp_path, monkeypatch):
    """A user's function is identified by what it does, when a result is opened again and when two are compared."""
    own = ModuleType("own_judge")
    code = "RIGHT = 1.0\nasync def judge(completions, **columns):\n    return [RIGHT] * len(completions)\n"
    exec(compile(code, "own_judge.py", "exec"), own.__dict__)
    monkeypatch.setitem(sys.modules, "own_judge", own)
    problems = Benchmark("sums", SUMS.prompts, {}, "own_judge.judge")
    paths, answers = (tmp_path / "a.jsonl", tmp_path / "b.jsonl"), ["", "", ""]
    evaluate(Scripted(answers), problems, SETTINGS, paths[0])
    evaluate(Scripted(answers, interrupted_after=0), problems, SETTINGS, paths[0])  # it is complete
    monkeypatch.setattr(own, "RIGHT", 0.5)
    with pytest.raises(ValueError, match="differs in judge"):
        evaluate(Scripted(answers), problems, SETTINGS, paths[0])
    evaluate(Scripted(answers), problems, SETTINGS, paths[1])
    with pytest.raises(ValueError, match="differ in their judge"):
        compared(*paths)
    without(paths[0], "judge")
    evaluate(Scripted(answers, interrupted_after=0), problems, SETTINGS, paths[0])
    (comparison,) = compared(*paths).values()
    assert comparison.difference == -0.5


def test_a_judge_that_ships_is_known_by_versions(judge):
    ours = {"tbrm-trl": version("tbrm-trl")}
    assert judge.identity == {**ours, "math-verify": version("math-verify")}
    by_length = Judge(Benchmark("sums", SUMS.prompts, {}, "length(limit=8)"))
    assert by_length.identity == ours


def test_a_worker_that_cannot_start_says_why():
    judge = Judge(Benchmark("sums", SUMS.prompts, {}, "helpers.reward_functions.Unloadable"))
    with pytest.raises(RewardError, match=r"Unloadable' cannot judge\. A reward worker could not start: .*not here"):
        judge.verdicts(["1+1="], ["2"], [[1]], [0])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("inf", r"returned an infinite number: \[inf\]"),
        ("short", r"returned 0 rewards for 1 completions"),
        ("raise", "raised KeyError: 'no judge'"),
        ("a", "raised ValueError: could not convert"),
    ],
)
def test_a_judge_that_is_a_coroutine_function(given, message):
    """It is held to what other functions are."""

    def judged(what: str) -> list[float | None]:
        judge = Judge(Benchmark("sums", ["1+1="], {"given": [what]}, "helpers.reward_functions.later_in"))
        return judge.verdicts(["1+1="], ["2"], None, [0])

    assert judged("0.5") == [0.5] and judged("nan") == [None]
    with pytest.raises((RewardError, NotRewardsError), match=message):
        judged(given)


@pytest.mark.parametrize(
    ("reward", "columns", "message"),
    [
        ("helpers.reward_functions.weighted_column", {}, "'weighted_column' needs 'weight', but the benchmark sums "),
        ("helpers.reward_functions.of_completions_alone", {"solution": ["2"]}, "does not take 'prompts', .*'solution'"),
        ("length(limit=8)", {"completions": ["2"]}, "column 'completions' of the benchmark sums has the name of"),
        ("reasoning_gym", {}, "needs 'gym', but the benchmark sums has no such column"),
    ],
)
def test_a_judge_that_cannot_be_called_is_refused_before_anything_is_drawn(reward, columns, message):
    with pytest.raises(ValueError, match=message):
        Judge(Benchmark("sums", ["1+1="], columns, reward))


@pytest.mark.parametrize("text", ["10^{5000}", "1e5000", "1e-5000", "-1e5000"])
def test_numbers_that_python_does_not_write_out(text, judge):
    """With 5000 digits, or beyond a float's range: the answer is the given text, and not 0."""
    assert judge.answer(rf"\boxed{{{text}}}", 0) == text
    for stored in ("4", "0"):
        task = Benchmark("task", [""], {"gym": [gym.encode("chain_sum", {"answer": stored})]}, "reasoning_gym")
        assert Judge(task).answer(rf"\boxed{{{text}}}", 0) == text


def test_results_are_compared_problem_by_problem(tmp_path, judge):
    """One of three right becomes three: +2/3. Of the four sign flips of two problems two are as far from 0: p = ½."""
    evaluate(Scripted(["\\boxed{2}", "", ""]), SUMS, SETTINGS, tmp_path / "before.jsonl", judge)
    evaluate(Scripted(["2", "4", "6"]), SUMS, SETTINGS, tmp_path / "after.jsonl", judge)
    (comparison,) = compared(tmp_path / "before.jsonl", tmp_path / "after.jsonl").values()
    assert (comparison.difference, comparison.p_value) == (pytest.approx(2 / 3), 0.5)
    other = Benchmark("sums", ["1+1=", "2+2=", "3+3="], {"solution": ["2", "4", "7"]}, "math")
    evaluate(Scripted(["", "", ""]), other, SETTINGS, tmp_path / "other.jsonl", Judge(other))
    with pytest.raises(ValueError, match="differ in their data"):
        compared(tmp_path / "before.jsonl", tmp_path / "other.jsonl")
    judged = Benchmark("sums", other.prompts, {}, "format")  # its digest differs too, without those answers
    evaluate(Scripted(["", "", ""]), judged, SETTINGS, tmp_path / "judged.jsonl", Judge(judged))
    with pytest.raises(ValueError, match="differ in their reward"):
        compared(tmp_path / "other.jsonl", tmp_path / "judged.jsonl")


def result_at(path, benchmark="sums", samples=2, temperature=1.0) -> Result:
    """A complete result of one problem, as `tbrm eval` or a training step would write it to a path of its choice."""
    header = {"benchmark": benchmark, "problems": 1, "samples": samples, "sampling": {"temperature": temperature}}
    result = open_result(path, header)
    append(result, [Row(0, sample, 0, [1], "2", False, "2", 1.0) for sample in range(samples)])
    return result


def test_results_are_known_by_what_they_are_of(tmp_path):
    """A file, a folder of `tbrm eval` and a training step's can be compared, whatever their files are called."""
    step, evaluated, file = tmp_path / "evaluations/step-1", tmp_path / "out", tmp_path / "renamed.jsonl"
    result_at(step / "sums.jsonl")
    result_at(step / "other.jsonl", "other", 1, 0.0)
    result_at(evaluated / "sums-avg2.jsonl")
    result_at(evaluated / "other-avg4.jsonl", "other", 4)
    result_at(file)

    def pairs(first, second) -> dict:
        return {name: [one.path, other.path] for name, (one, other) in paired_results(first, second).items()}

    assert pairs(step, evaluated) == {"sums-avg2": [step / "sums.jsonl", evaluated / "sums-avg2.jsonl"]}
    assert pairs(file, evaluated) == {"sums-avg2": [file, evaluated / "sums-avg2.jsonl"]}
    assert pairs(step, file) == {"sums-avg2": [step / "sums.jsonl", file]}
    single, greedy = evaluated / "other-avg4.jsonl", step / "other.jsonl"
    assert pairs(greedy, single) == {"other": [greedy, single]}  # one each: other sampling is reported, not refused
    with pytest.raises(ValueError, match="alike: other-greedy, sums-avg2 there, other-avg4 here"):
        pairs(step, single)
    with pytest.raises(ValueError, match="alike: sums-avg2 there, other-avg4 here"):
        pairs(file, single)
    result_at(evaluated / "again.jsonl")
    with pytest.raises(ValueError, match=r"again\.jsonl and .*sums-avg2\.jsonl are both sums-avg2\. Name the file"):
        pairs(evaluated, file)


def test_every_file_is_compared_before_anything_is_drawn(tmp_path, capsys, monkeypatch):
    """The second benchmark's file is of another evaluation, and the error says in which setting."""
    lines = [
        json.dumps({"question": prompt, "answer": answer})
        for prompt, answer in zip(SUMS.prompts, SUMS.columns["solution"], strict=True)
    ]
    for name in ("first", "second"):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    policy = Scripted(["2", "4", "6"])
    monkeypatch.setattr("tbrm_trl.cli.evaluate.policy_of", lambda *given: policy)
    words = ["--model_name_or_path", "m", "--output_dir", str(tmp_path / "out"), "--prompt_template", "{question}"]
    main([*words, "--benchmarks", str(tmp_path / "second.jsonl"), "--max_new_tokens", "4"])
    asked = policy.asked
    both = [str(tmp_path / f"{name}.jsonl") for name in ("first", "second")]
    with pytest.raises(SystemExit):
        main([*words, "--benchmarks", *both, "--max_new_tokens", "5"])
    assert policy.asked == asked and not (tmp_path / "out/first-greedy.jsonl").exists()
    said = capsys.readouterr().err
    assert "differs in sampling.max_new_tokens (there 4, here 5). Give another --output_dir" in said


def test_results_that_only_one_folder_holds(tmp_path, capsys):
    first, second = tmp_path / "a", tmp_path / "b"
    for folder in (first, second):
        result_at(folder / "sums-avg2.jsonl")
    result_at(first / "other-avg2.jsonl", "other")
    show_comparison(str(first), str(second))
    shown = capsys.readouterr().out
    assert f"Not compared, since only {first} holds it: other-avg2." in shown and f"only {second}" not in shown


def test_files_of_benchmarks_with_long_names_and_slashes(tmp_path):
    """They stay in their folder, apart from each other, and are found by the name in their header."""
    names = [f"gym:basic_arithmetic(operators=('+','{sign}'))" for sign in "/_\\"] + ["ä" * 200, "ä" * 201, "math500"]
    files = [file_of(name) for name in names]
    assert len(set(files)) == len(names) and all(len(file.encode()) < 255 for file in files)
    assert files[-1] == "math500.jsonl" and not any("/" in file for file in files)
    for name, file in zip(names, files, strict=True):
        result_at(tmp_path / file, name)
    assert set(results_of(tmp_path)) == {f"{name}-avg2" for name in names}


@pytest.mark.parametrize("text", ["", "{}", "[1]\n", '{"format": "other"}\n', '{"format": "tbrm-evaluation-1"}\nx\n'])
def test_what_is_no_result(text, tmp_path):
    (tmp_path / "a.jsonl").write_text(text)
    with pytest.raises(ValueError, match="is not a result"):
        read_result(tmp_path / "a.jsonl")


def test_weights_are_known_by_their_bits():
    one, same, other = (ModelPolicy("m", model(seed=seed), tokenizer()) for seed in (0, 0, 1))
    assert one.weights() == same.weights() != other.weights()
    with torch.no_grad():
        same.model.model.norm.weight[3] = math.nextafter(1.0, 2.0) + 1e-6
    assert one.weights() != same.weights()


def test_how_weights_were_loaded_is_said():
    policy = ModelPolicy("m", model().bfloat16(), tokenizer(), revision="r")
    assert policy.loaded() == {"revision": "r", "dtype": "bfloat16", "quantization": None}
    policy.model.config.quantization_config = BitsAndBytesConfig(load_in_4bit=True)
    loaded = policy.loaded()
    assert loaded["quantization"]["load_in_4bit"] and json.loads(json.dumps(loaded)) == loaded


def test_vllm_knows_weights_by_their_files(tmp_path, judge, monkeypatch):
    """More training into the same folder makes it another model. Files other than weights change nothing."""
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=lambda **options: None))
    monkeypatch.setattr("tbrm_trl.evaluation.vllm.AutoTokenizer.from_pretrained", lambda name, **options: tokenizer())
    monkeypatch.setattr(VllmPolicy, "generate", lambda self, asked, how: Scripted(["2", "4", "6"]).generate(asked, how))
    folder, path = tmp_path / "model", tmp_path / "a.jsonl"
    folder.mkdir()

    def run() -> dict:
        policy = VllmPolicy.load(str(folder), revision="main", dtype="auto")
        return evaluate(policy, SUMS, SETTINGS, path, judge).header

    with pytest.raises(ValueError, match="holds no weights"):
        run()
    for name in ("model.safetensors", "training_args.bin"):
        (folder / name).write_bytes(b"one")
    header = run()
    assert (header["revision"], header["dtype"], header["quantization"]) == ("main", "auto", None)
    for name in ("training_args.bin", "optimizer.pt"):
        (folder / name).write_bytes(b"two")
    assert run() == header
    without(path, "revision", "dtype", "quantization")
    run()
    (folder / "model.safetensors").write_bytes(b"two")
    with pytest.raises(ValueError, match="differs in weights"):
        run()
    monkeypatch.setattr("tbrm_trl.evaluation.vllm.snapshot_download", lambda name, **options: str(folder))
    assert digest_of_files("an/id") == digest_of_files(str(folder))


# ---- benchmarks ------------------------------------------------------------------------------------------------------

# Two cells of each published answer column, and the answers in them.
CELLS = {
    "aime24": (["33", "023"], ["33", "023"]),
    "aime25": (["70", "588"], ["70", "588"]),
    "amc23": ([27.0, 142.0], ["27", "142"]),
    "math500": (["\\frac{14}{3}", "p - q"], ["\\frac{14}{3}", "p - q"]),
    "minerva": (["4.5e33", "\\arcsin{1.3}"], ["4.5e33", "\\arcsin{1.3}"]),
    "olympiadbench": ([["2"], ["$(1,2)$"]], ["2", "$(1,2)$"]),
    "gsm8k": (["9 * 2 = <<9*2=18>>18\n#### 18", "So.\n#### 1,234"], ["18", "1,234"]),
}


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_benchmark_reads_its_published_columns(name, tmp_path):
    known, (cells, golds) = BENCHMARKS[name], CELLS[name]
    rows = [
        {known.question: f"Question {i}?", known.answer: cells[i % 2], "solution": "A way. " * 40}
        for i in range(known.problems)
    ]
    Dataset.from_list(rows).to_parquet(tmp_path / "copy.parquet")
    benchmark = load_benchmark(f"{name}={tmp_path / 'copy.parquet'}")
    assert (len(benchmark), benchmark.name, benchmark.reward) == (known.problems, name, "math")
    assert benchmark.columns["solution"][:2] == golds
    (tmp_path / "part.jsonl").write_text("\n".join(map(json.dumps, rows[:7])))
    with pytest.raises(ValueError, match=rf"{name} is {known.problems} problems, and these are 7"):
        load_benchmark(f"{name}={tmp_path / 'part.jsonl'}")


def test_a_hub_out_of_reach_is_one_line():
    with pytest.raises(ValueError, match=r"aime24: HuggingFaceH4/aime_2024 cannot be loaded") as error:
        load_benchmark("aime24")
    assert "\n" not in str(error.value) and "aime24=FILE.parquet" in str(error.value)


def test_a_file_of_ones_own(tmp_path):
    file = tmp_path / "mine.jsonl"
    file.write_text('{"question": "6·7?", "answer": "42", "note": "n"}\n')
    mine = load_benchmark(str(file))
    assert (mine.name, mine.prompts, mine.columns["solution"]) == ("mine", ["6·7?"], ["42"])
    own = load_benchmark(str(file), reward="my.reward")
    assert own.reward == "my.reward" and own.columns == {"question": ["6·7?"], "answer": ["42"], "note": ["n"]}
    assert own.digest != mine.digest
    file.write_text('{"question": "6·7?", "note": "n"}\n')
    with pytest.raises(ValueError, match=r"no column holds answers.*Columns: question, note"):
        load_benchmark(str(file))
    with pytest.raises(ValueError, match="no column 'answr'"):
        load_benchmark(str(file), answer_column="answr")
    file.write_text('{"task": "6·7?"}\n')
    with pytest.raises(ValueError, match="none of the columns task is called"):
        load_benchmark(str(file))
    file.write_text('{"question": "6·7?", "gym": "{}", "answer": "42"}\n')
    assert load_benchmark(str(file)).reward == "reasoning_gym"
    with pytest.raises(ValueError, match=r"judged by what stands in the column gym.*Leave --answer_column out"):
        load_benchmark(str(file), answer_column="answer")


def test_a_task_of_reasoning_gym():
    """Its own answers are judged right, and a wrong one is not."""
    task = load_benchmark("gym:chain_sum(size=5, min_terms=2, max_terms=2)")
    assert len(task) == 5 and task.reward == "reasoning_gym"
    answers = [json.loads(cell)["entry"]["answer"] for cell in task.columns["gym"]]
    verdicts = Judge(task).reward(completions=[*answers[:4], "none"], **task.columns)
    assert verdicts == [1, 1, 1, 1, 0]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("math-50", "Did you mean math500"),
        ("gym:chain_summ", "gym:chain_summ: "),
        ("gym:chain_sum(size)", "is written as gym:chain_sum"),
        ("gym:chain_sum(size=2.5)", "size=2.5 must be a whole number of problems"),
        ("gym:chain_sum(size=0)", "size=0 must be a whole number of problems"),
        ("aime24=none.parquet", "There is no file 'none.parquet'"),
        ("none.jsonl", "There is no file 'none.jsonl'"),
    ],
)
def test_what_is_no_benchmark(name, said):
    with pytest.raises(ValueError, match=said) as error:
        load_benchmark(name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("question", [0, 1, 2.5, {"a": "b"}, True])
def test_questions_that_are_no_text(question):
    rows = [{"question": "1+1=", "answer": "2"}, {"question": question, "answer": "3"}]
    with pytest.raises(ValueError, match=r"mine: row 1: `question` is .* It must be text, or a list of messages"):
        benchmarks.of_rows("mine", rows)


@pytest.mark.parametrize("question", [None, "", []])
def test_rows_without_a_question(question):
    rows = [{"question": "1+1=", "answer": "2"}, {"question": question, "answer": "3"}]
    with pytest.raises(ValueError, match=r"mine: row 1 has no `question`. Drop the row"):
        benchmarks.of_rows("mine", rows)


def test_a_reward_gets_the_columns_that_it_gets_in_training():
    rows = [{"question": "1+1=", "answer": "2", "weight": 0.5}]
    mine = benchmarks.of_rows("mine", rows, reward="helpers.reward_functions.weighted_column")
    assert mine.columns == {"question": ["1+1="], "answer": ["2"], "weight": [0.5]}
    by_math = benchmarks.of_rows("mine", [{"prompt": "1+1=", "answer": "2"}])
    assert by_math.columns == {"answer": ["2"], "solution": ["2"]}


def test_the_papers_protocol():
    """arXiv 2505.15311: avg@32 at T = 1 on AIME and AMC, one greedy completion on the others."""
    assert [(one.benchmark, one.samples, one.temperature) for one in SUITES["tbrm-paper"]] == [
        ("aime24", 32, 1), ("aime25", 32, 1), ("amc23", 32, 1), ("math500", 1, 0), ("minerva", 1, 0),
        ("olympiadbench", 1, 0),
    ]  # fmt: skip
    assert benchmarks.BENCHMARKS["amc23"].problems == 40
