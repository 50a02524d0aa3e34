"""inspect-ai and `tbrm eval` on the same problems and checkpoint give the same completions and numbers."""

import asyncio
from concurrent.futures import Future
from types import SimpleNamespace

import pytest
from common.tiny import tokenizer
from helpers.examples import sums

from tbrm_trl.cli import main
from tbrm_trl.evaluation.results import read_result
from tbrm_trl.evaluation.sampling import Completion, Request, Sampling

inspect_ai = pytest.importorskip("inspect_ai")
LETTERS = "helpers.reward_functions.letters"  # the untrained model's completions differ in it


def judged(model: str, name: str, folder, temperature: float, samples: int, tokens: int = 16):
    """Evaluate one benchmark by `tbrm eval` and by inspect-ai. Returns the first one's result and the other's log."""
    from tbrm_trl.evaluation.inspect_adapter import benchmark

    given = f"--samples {samples} --temperature {temperature} --max_new_tokens {tokens} --use_cpu true".split()
    given += ["--reward_funcs", LETTERS]
    main(["eval", "--model_name_or_path", model, "--benchmarks", name, "--output_dir", str(folder / "tbrm"), *given])
    (file,) = (folder / "tbrm").glob("*.jsonl")
    (log,) = inspect_ai.eval(
        benchmark(name, samples=samples, reward=LETTERS), model=f"tbrm/{model}", model_args={"use_cpu": True},
        display="none", temperature=temperature, max_tokens=tokens, log_dir=str(folder / "inspect"),
    )  # fmt: skip
    assert log.status == "success", log.error
    return read_result(file), log


def test_the_same_completions_and_numbers(llama, tmp_path):
    result, log = judged(llama, str(sums(tmp_path / "sums.json")), tmp_path, temperature=0.0, samples=1)
    assert len(log.samples) == result.problems > 4
    for sample in log.samples:
        row = result.rows[sample.id, 0]
        score = sample.scores["verdict"]
        assert (sample.output.completion, score.value, score.answer) == (row.completion, row.score, row.answer)
        assert sample.output.usage.output_tokens == len(row.ids)
        assert sample.output.stop_reason == ("max_tokens" if row.truncated else "stop")
    numbers = {name: metric.value for name, metric in log.results.scores[0].metrics.items()}
    metrics = result.metrics()
    assert numbers["accuracy"] == pytest.approx(metrics["avg@1"]) and 0 < metrics["avg@1"] < 1
    assert numbers["stderr"] == pytest.approx(metrics["avg@1_error"])


def test_samples_of_a_problem_differ(llama, tmp_path):
    """Each has a seed of its own, as in `tbrm eval`; the seeds are not the same ones."""
    _, log = judged(llama, str(sums(tmp_path / "sums.json")), tmp_path, temperature=1.0, samples=3)
    by_problem: dict = {}
    for sample in log.samples:
        by_problem.setdefault(sample.id, []).append(sample.output.completion)
    assert all(len(set(texts)) == 3 for texts in by_problem.values())


@pytest.mark.parametrize(
    ("given", "said"), [({"stop_seqs": ["."]}, "samples without stop_seqs"), ({"temperature": -1.0}, "must be 0")]
)
def test_what_the_sampler_has_not_is_refused(given, said, llama, tmp_path):
    from tbrm_trl.evaluation.inspect_adapter import benchmark

    name = str(sums(tmp_path / "sums.json"))
    (log,) = inspect_ai.eval(
        benchmark(name, limit=1), model=f"tbrm/{llama}", model_args={"use_cpu": True}, display="none",
        log_dir=str(tmp_path), **given,
    )  # fmt: skip
    assert log.status == "error" and said in log.error.message


def test_another_model_has_no_token_ids(tmp_path):
    """The length of its completion is then that of the text, not 0."""
    from tbrm_trl.evaluation.inspect_adapter import benchmark

    name = str(sums(tmp_path / "sums.json"))
    (log,) = inspect_ai.eval(
        benchmark(name, limit=1, reward="length(limit=1000)"), model="mockllm/model", display="none",
        log_dir=str(tmp_path),
    )  # fmt: skip
    assert log.status == "success", log.error
    (sample,) = log.samples
    assert sample.output.completion
    assert sample.scores["verdict"].value == pytest.approx(-len(sample.output.completion) / 1000)


def test_a_chat_template_is_given_its_variables(monkeypatch):
    from tbrm_trl.evaluation.inspect_adapter import ModelPolicy

    words, asked = tokenizer(), []
    words.chat_template = "{{ name }}:{{ messages[-1].content }}"

    def generate(requests, sampling):
        asked.extend(words.decode(request.prompt_ids) for request in requests)
        yield from (Completion(number, [1], False) for number in range(len(requests)))

    policy = SimpleNamespace(tokenizer=words, generate=generate)
    monkeypatch.setattr(ModelPolicy, "load", lambda name, **options: policy)
    model = inspect_ai.model.get_model("tbrm/m", chat_template_kwargs={"name": "n"}).api
    question = inspect_ai.model.ChatMessageUser(content="ab")
    asyncio.run(model.generate([question], [], "none", inspect_ai.model.GenerateConfig()))
    assert asked == ["n:ab"]


def test_a_cancelled_sample_leaves_the_others_alone(monkeypatch):
    """It is cancelled before or while it is drawn. The others that wait get their completions."""
    from tbrm_trl.evaluation.inspect_adapter import ModelPolicy

    futures: list[Future] = [Future() for _ in range(3)]
    drawn = []

    def generate(requests, sampling):
        drawn.extend(request.seed for request in requests)
        futures[1].cancel()
        yield from (Completion(number, [request.seed], False) for number, request in enumerate(requests))

    monkeypatch.setattr(ModelPolicy, "load", lambda name, **options: SimpleNamespace(generate=generate))
    model = inspect_ai.model.get_model("tbrm/m").api
    futures[0].cancel()
    for seed, future in enumerate(futures):
        model.waiting.put((Request([], seed), Sampling(), future))
    assert futures[2].result(timeout=10).ids == [2]
    assert drawn == [1, 2] and futures[0].cancelled()
