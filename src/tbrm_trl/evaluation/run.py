"""One benchmark, one policy: completions drawn, judged, and kept in a result that can be resumed."""

import asyncio
import inspect
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

import torch
import xxhash
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..files import first_line, plain, plain_value, source_of
from ..rewards import NAMES, InWorkers, RewardError, gym, reading, reward_function, with_arguments
from ..rewards.notation import normal, squeezed
from ..rewards.quantities import number
from . import sampling
from .benchmarks import BOXED, Benchmark, in_template, messages, require_question
from .results import Result, Row, append, open_result
from .sampling import Completion, Request, Sampling, prompt_ids_of, rendered, seed_of

AT_ONCE = 64  # completions that are judged together, and written
# The package that a reward has its verdicts from, and the extra that installs it.
VERIFIERS = {"math": ("math-verify", "math"), "reasoning_gym": ("reasoning-gym", "gym")}


class Policy(Protocol):
    """What an evaluation asks of a policy: completions of requests, as they finish."""

    name: str
    tokenizer: PreTrainedTokenizerBase
    backend: str

    def generate(self, requests: Sequence[Request], how: Sampling) -> Iterator[Completion]: ...

    def weights(self) -> str:
        """A digest of the weights."""
        ...

    def loaded(self) -> dict[str, Any]:
        """How the weights were loaded: `revision`, `dtype` and `quantization`, as values of JSON."""
        ...


@dataclass
class ModelPolicy:
    """A model that is in memory, by transformers."""

    name: str
    model: Any
    tokenizer: PreTrainedTokenizerBase
    batch_size: int = 64
    backend: str = "transformers"
    revision: str | None = None

    @classmethod
    def load(cls, name: str, *, batch_size: int = 64, use_cpu: bool = False, **options: Any) -> "ModelPolicy":
        """A checkpoint, or an adapter on its base, on the GPU if there is one.

        Args:
            name: id on the Hub, or a folder.
            batch_size: completions generated at once.
            use_cpu: whether to stay on the CPU.
            options: of `from_pretrained`.

        Raises:
            ValueError: in one line, if it cannot be loaded.
        """
        try:
            tokenizer = AutoTokenizer.from_pretrained(name, revision=options.get("revision"))
            if tokenizer.pad_token is None:
                tokenizer.pad_token = tokenizer.eos_token
            # It loads an adapter too, on its base. PEFT's own would give the base an embedding for each token of the
            # tokenizer, and new ones at random.
            model: Any = AutoModelForCausalLM.from_pretrained(name, **{"dtype": "auto", **options})
        except (OSError, ValueError, ImportError) as error:  # ImportError: of bitsandbytes or a kernel of attention
            raise ValueError(f"{name} cannot be loaded: {first_line(error)}") from error
        if torch.cuda.is_available() and not use_cpu and options.get("quantization_config") is None:
            model.to("cuda")
        return cls(name, model.eval(), tokenizer, batch_size, revision=options.get("revision"))

    def generate(self, requests: Sequence[Request], how: Sampling) -> Iterator[Completion]:
        return sampling.generate(self.model, self.tokenizer, requests, how, self.batch_size)

    def weights(self) -> str:
        """A digest of the weights: of each parameter, the sum of its bits, which needs no copy and has no rounding."""
        whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
        parts = [
            f"{name} {tuple(one.shape)} {int(one.detach().view(whole[one.element_size()]).sum(dtype=torch.int64))}"
            for name, one in self.model.named_parameters()
        ]
        return xxhash.xxh3_64_hexdigest("\n".join(parts).encode())

    def loaded(self) -> dict[str, Any]:
        quantization = getattr(self.model.config, "quantization_config", None)
        if isinstance(quantization, QuantizationConfigMixin):
            quantization = quantization.to_dict()
        return {
            "revision": self.revision,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "quantization": plain(quantization),
        }


@dataclass(frozen=True)
class Settings:
    """How a benchmark is asked.

    Attributes:
        samples: completions of each problem, n of avg@n.
        sampling: how they are drawn.
        seed: of the evaluation; each completion's own follows from it, its problem and its number.
        system_prompt: put before questions that are text.
        prompt_template: text with `{question}` in it, for models without a chat template; None asks in messages.
        chat_template_kwargs: variables of the chat template, such as `{"enable_thinking": False}`.
    """

    samples: int
    sampling: Sampling
    seed: int = 0
    system_prompt: str = BOXED
    prompt_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ValueError(f"samples={self.samples} must be at least 1.")
        self.sampling.require_distinct(self.samples)
        require_question(self.prompt_template)

    def prompts(self, benchmark: Benchmark, policy: Policy) -> list[Any]:
        """The prompts of a benchmark as they are asked."""
        if self.prompt_template is not None:
            return [in_template(self.prompt_template, prompt) for prompt in benchmark.prompts]
        if policy.tokenizer.chat_template is None:
            raise ValueError(
                f"{policy.name} has no chat template. Ask in plain text, such as "
                "--prompt_template 'Question: {question}\\nAnswer:'."
            )
        return [messages(prompt, self.system_prompt) for prompt in benchmark.prompts]


def evaluate(
    policy: Policy, benchmark: Benchmark, settings: Settings, path: Path, judge: "Judge | None" = None
) -> Result:
    """Evaluate a policy on a benchmark, or finish an evaluation that was interrupted.

    Args:
        policy: what is evaluated.
        benchmark: on what.
        settings: how it is asked.
        path: where the result is, or will be.
        judge: what judges completions; by default the benchmark's own reward.

    Raises:
        ValueError: if the policy has no chat template and no template is given, or the file holds something else.
    """
    judge = judge or Judge(benchmark)
    result = open_result(path, header(policy, benchmark, settings, policy.weights(), judge))
    places = result.missing
    total = len(places) + len(result.rows)
    with tqdm(total=total, initial=len(result.rows), desc=benchmark.name, unit="completion") as bar:
        for rows in drawn(policy, benchmark, settings, places, judge):
            append(result, rows)
            bar.update(len(rows))
    return result


def drawn(
    policy: Policy,
    benchmark: Benchmark,
    settings: Settings,
    places: Sequence[tuple[int, int]],
    judge: "Judge",
) -> Iterator[list[Row]]:
    """The completions of these places (problem, sample), drawn and judged, `AT_ONCE` together as they finish."""
    prompts = settings.prompts(benchmark, policy)
    variables = settings.chat_template_kwargs
    asked = {one: prompt_ids_of(policy.tokenizer, prompts[one], variables) for one in {p for p, _ in places}}
    requests = [Request(asked[p], seed_of(settings.seed, benchmark.name, p, s)) for p, s in places]
    finished: list[Completion] = []
    for one in policy.generate(requests, settings.sampling):
        finished.append(one)
        if len(finished) == AT_ONCE:
            yield judge.rows(finished, places, requests, prompts, policy.tokenizer)
            finished = []
    if finished:
        yield judge.rows(finished, places, requests, prompts, policy.tokenizer)


class Judge:
    """The reward of a benchmark, and the answers that it reads.

    Args:
        benchmark: whose completions are judged.
        time_limit: seconds that a reward in workers may take for one completion.

    Raises:
        ValueError: in one line, if there is no such reward, or it needs a package that is not installed.
    """

    def __init__(self, benchmark: Benchmark, time_limit: float = 5.0) -> None:
        self.benchmark = benchmark
        self.reward = reward_function(benchmark.reward, time_limit=time_limit)
        self.identity = _identity(benchmark.reward, self.reward)

    def rows(
        self,
        finished: Sequence[Completion],
        places: Sequence[tuple[int, int]],
        requests: Sequence[Request],
        prompts: Sequence[Any],
        tokenizer: PreTrainedTokenizerBase,
    ) -> list[Row]:
        """A row for each completion, with its verdict."""
        texts = [tokenizer.decode(one.ids, skip_special_tokens=True) for one in finished]
        problems = [places[one.request][0] for one in finished]
        asked, ids = [prompts[problem] for problem in problems], [one.ids for one in finished]
        return [
            Row(
                problem=problem,
                sample=places[one.request][1],
                seed=requests[one.request].seed,
                ids=one.ids,
                completion=text,
                truncated=one.truncated,
                answer=self.answer(text, problem),
                score=0.0 if score is None else score,
                judged=score is not None,
            )
            for one, text, problem, score in zip(
                finished, texts, problems, self.verdicts(asked, texts, ids, problems), strict=True
            )
        ]

    def verdicts(
        self, prompts: Sequence[Any], texts: Sequence[str], ids: Sequence[list[int]] | None, problems: Sequence[int]
    ) -> list[float | None]:
        """The score of each completion; None without a verdict, which NaN is too.

        Args:
            prompts: as they were asked. To a prompt of text the completion is text, to messages it is a message.
            texts: of the completions.
            ids: of the completions. None if they are not known: the reward is then not given any.
            problems: the number of each one's problem.

        Raises:
            RewardError: if the reward is the user's own and raises, or its worker cannot start.
        """
        try:
            found: Any = self.reward(
                prompts=list(prompts),
                completions=[
                    text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
                    for prompt, text in zip(prompts, texts, strict=True)
                ],
                **({} if ids is None else {"completion_ids": list(ids)}),
                **{name: [values[p] for p in problems] for name, values in self.benchmark.columns.items()},
            )
        except (RuntimeError, TypeError) as error:
            # What the function itself raises comes from a worker as a RewardError: this is the worker that cannot
            # start, or the function that cannot be sent to it.
            if isinstance(error, RewardError) or not isinstance(self.reward, InWorkers):
                raise
            raise RewardError(f"The reward {self.benchmark.reward!r} cannot judge. {error}") from error
        if inspect.iscoroutine(found):
            found = asyncio.run(found)
        return [None if one is None or math.isnan(one) else float(one) for one in found]

    def answer(self, text: str, problem: int) -> str | None:
        """The answer that a completion gives, in one spelling; None if none can be read."""
        if self.benchmark.reward == "reasoning_gym":
            _, entry = gym.decode(self.benchmark.columns[gym.COLUMN][problem])
            return next(iter(gym.readings(text, entry.get("answer"))), None)
        if self.benchmark.reward in NAMES:
            return spelled(reading.final_answer(text))
        return text.strip() or None


def _identity(name: str, reward: Any) -> Any:
    """What the verdicts of a reward depend on: of a user's own a digest of its source, else versions of packages."""
    known = with_arguments(name, "length(limit=2048)")[0]
    if known not in NAMES:
        function = reward.function if isinstance(reward, InWorkers) else reward
        return xxhash.xxh3_64_hexdigest(json.dumps(source_of(function), default=plain_value).encode())
    versions = {"tbrm-trl": version("tbrm-trl")}
    if known in VERIFIERS:
        package, extra = VERIFIERS[known]
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            raise ValueError(f'The reward {known} needs {package}: pip install "tbrm-trl[{extra}]"') from None
    return versions


def spelled(answer: str | None) -> str | None:
    """An answer as votes are counted: a number by its value, everything else by its spelling without spaces."""
    if answer is None:
        return None
    text = normal(answer[:2000])
    value = number(text)
    try:
        return squeezed(text) if value is None else str(value.value)
    except ValueError:  # Python writes out no number of more than 4300 digits
        return squeezed(text)


def header(policy: Policy, benchmark: Benchmark, settings: Settings, weights: str, judge: "Judge") -> dict[str, Any]:
    """What is evaluated, and how: two runs of the same header are one evaluation. `weights` is the policy's digest."""
    variables = settings.chat_template_kwargs
    return {
        "benchmark": benchmark.name,
        "model": policy.name,
        "weights": weights,
        **policy.loaded(),
        "problems": len(benchmark),
        "samples": settings.samples,
        "sampling": asdict(settings.sampling),
        "seed": settings.seed,
        "system_prompt": settings.system_prompt,
        # Only where they are rendered with, so that it does not part results of before there was this field.
        **({"chat_template_kwargs": plain(variables)} if variables and settings.prompt_template is None else {}),
        "template": rendered(policy.tokenizer, settings.prompts(benchmark, policy)[0], variables),
        "data": benchmark.digest,
        "reward": benchmark.reward,
        "judge": judge.identity,
        "backend": policy.backend,
        "versions": {name: version(name) for name in ("tbrm-trl", "transformers", "torch")},
    }
