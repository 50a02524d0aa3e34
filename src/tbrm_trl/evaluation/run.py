"""Evaluate one policy on one benchmark: draw completions, judge them and keep them in a resumable result."""

import asyncio
import inspect
import json
import math
from collections.abc import Coroutine, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

import torch
import xxhash
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..files import first_line, in_one_line, plain, plain_value, source_of
from ..rewards import NAMES, InWorkers, RewardError, gym, reading, reward_function, with_arguments
from ..rewards.arguments import NOT_GIVEN, check_arguments, check_columns
from ..rewards.notation import normal, squeezed
from ..rewards.quantities import number
from ..rewards.returned import rewards_of
from ..rewards.workers import WorkerError
from . import sampling
from .benchmarks import BOXED, Benchmark, in_template, messages, require_question
from .results import Result, Row, append, open_result
from .sampling import Completion, Request, Sampling, prompt_ids_of, rendered, seed_of

AT_ONCE = 64  # completions judged and written together
_GIVEN = ("prompts", "completions", "completion_ids")  # arguments of every reward, besides the benchmark's columns
# For each reward, the package that computes its verdicts and the extra that installs it.
VERIFIERS = {"math": ("math-verify", "math"), "reasoning_gym": ("reasoning-gym", "gym")}


class Policy(Protocol):
    """The interface of a policy under evaluation: it yields completions of requests as they finish."""

    name: str
    tokenizer: PreTrainedTokenizerBase
    backend: str

    def generate(self, requests: Sequence[Request], how: Sampling) -> Iterator[Completion]: ...

    def weights(self) -> str:
        """A digest of the weights."""
        ...

    def loaded(self) -> dict[str, Any]:
        """How the weights were loaded: `revision`, `dtype` and `quantization`, as JSON values."""
        ...


@dataclass
class ModelPolicy:
    """A transformers model in memory."""

    name: str
    model: Any
    tokenizer: PreTrainedTokenizerBase
    batch_size: int = 64
    backend: str = "transformers"
    revision: str | None = None
    autocast: torch.dtype | None = None  # mixed precision of the forward passes

    @classmethod
    def load(cls, name: str, *, batch_size: int = 64, use_cpu: bool = False, **options: Any) -> "ModelPolicy":
        """Load a checkpoint, or an adapter on its base, onto the GPU if there is one.

        Args:
            name: id on the Hub, or a folder.
            batch_size: completions generated at once.
            use_cpu: whether to stay on the CPU.
            options: keyword arguments for `from_pretrained`.

        Raises:
            ValueError: in one line, if it cannot be loaded.
        """
        try:
            of_files = {name: options[name] for name in ("revision", "trust_remote_code") if name in options}
            tokenizer = AutoTokenizer.from_pretrained(name, **of_files)
            if tokenizer.pad_token is None:
                tokenizer.pad_token = tokenizer.eos_token
            # This also loads an adapter on its base. PEFT's own class would resize the base's embeddings to the
            # tokenizer, with random values for new tokens.
            model: Any = AutoModelForCausalLM.from_pretrained(name, **{"dtype": "auto", **options})
        except (OSError, ValueError, ImportError) as error:  # ImportError: no bitsandbytes or attention kernel
            raise ValueError(f"{name} cannot be loaded: {in_one_line(error)}") from error
        if torch.cuda.is_available() and not use_cpu and options.get("quantization_config") is None:
            model.to("cuda")
        return cls(name, model.eval(), tokenizer, batch_size, revision=options.get("revision"))

    def generate(self, requests: Sequence[Request], how: Sampling) -> Iterator[Completion]:
        return sampling.generate(self.model, self.tokenizer, requests, how, self.batch_size, self.autocast)

    def weights(self) -> str:
        """A digest of the weights from the sum of each parameter's bits, which needs no copy and has no rounding."""
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
    """How a benchmark's problems are asked.

    Attributes:
        samples: completions of each problem, n of avg@n.
        sampling: how completions are drawn.
        seed: seed of the evaluation; with benchmark, problem and sample number it gives each completion's own seed.
        system_prompt: put before questions that are text.
        prompt_template: text with `{question}` in it, for models without a chat template; None asks in messages.
        chat_template_kwargs: variables of the chat template, such as `{"enable_thinking": False}`.

    Raises:
        ValueError: if `samples` is less than 1, or more than 1 with greedy decoding, or the template lacks
            `{question}`.
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
        """The benchmark's prompts as the policy gets them: text with a template, else messages.

        Raises:
            ValueError: if neither a template is given nor the policy has a chat template.
        """
        if self.prompt_template is not None:
            return [in_template(self.prompt_template, prompt) for prompt in benchmark.prompts]
        if policy.tokenizer.chat_template is None:
            raise ValueError(
                f"{policy.name} has no chat template. Ask in plain text, such as "
                "--prompt_template 'Question: {question}\\nAnswer:'."
            )
        return [messages(prompt, self.system_prompt) for prompt in benchmark.prompts]


def evaluate(
    policy: Policy,
    benchmark: Benchmark,
    settings: Settings,
    path: Path,
    judge: "Judge | None" = None,
    weights: str | None = None,
) -> Result:
    """Evaluate a policy on a benchmark, or finish an interrupted evaluation.

    Args:
        policy: the policy to evaluate.
        benchmark: the problems to evaluate on.
        settings: how problems are asked.
        path: the result's file, new or unfinished.
        judge: judges completions; by default the benchmark's own reward.
        weights: the digest of the policy's weights, if it is known; computing it reads all of them.

    Raises:
        ValueError: if the policy has no chat template and no template is given, or the file holds another evaluation.
    """
    judge = judge or Judge(benchmark)
    digest = policy.weights() if weights is None else weights
    result = open_result(path, header(policy, benchmark, settings, digest, judge))
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
    """Draw and judge the completions of these places (problem, sample); yield `AT_ONCE` at a time as they finish."""
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


def require_positions(policy: Policy, benchmark: Benchmark, settings: Settings) -> None:
    """Raise ValueError if a completion could exceed the model's number of positions."""
    model = getattr(policy, "model", None)
    positions = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    variables, tokens = settings.chat_template_kwargs, settings.sampling.max_new_tokens
    longest = max(len(prompt_ids_of(policy.tokenizer, one, variables)) for one in settings.prompts(benchmark, policy))
    if positions is not None and longest + tokens > positions:
        raise ValueError(
            f"{benchmark.name}: its longest prompt of {longest} tokens and max_new_tokens {tokens} pass the model's "
            f"{positions} positions. Give {max(1, positions - longest)} new tokens or less (--max_new_tokens of "
            "`tbrm eval`, --eval_max_new_tokens of `tbrm train`)."
        )


class Judge:
    """Judges completions with a benchmark's reward, and reads their answers.

    Args:
        benchmark: the benchmark whose completions are judged.
        time_limit: seconds that a reward in workers may take for one completion.

    Raises:
        ValueError: in one line, if the reward does not exist, needs a package that is not installed, or cannot be
            called with the benchmark's columns.
    """

    def __init__(self, benchmark: Benchmark, time_limit: float = 5.0) -> None:
        self.benchmark = benchmark
        self.reward = reward_function(benchmark.reward, time_limit=time_limit)
        title = f"the benchmark {benchmark.name}"
        self.columns = {name: of for name, of in benchmark.columns.items() if name not in NOT_GIVEN}
        check_columns(title, self.columns, _GIVEN)
        check_arguments(self.reward, title, self.columns, _GIVEN)
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
        """The score of each completion; None if there is no verdict. NaN counts as no verdict.

        Args:
            prompts: the prompts as asked. The reward gets a completion as text if its prompt is text, else as messages.
            texts: the completions' texts.
            ids: the completions' token ids. None if unknown; the reward then gets no ids.
            problems: the problem's number for each completion.

        Raises:
            RewardError: if the user's own reward raises, or a worker cannot start.
            NotRewardsError: if it returns something other than rewards.
        """
        try:
            found: Any = self.reward(
                prompts=list(prompts),
                completions=[
                    text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
                    for prompt, text in zip(prompts, texts, strict=True)
                ],
                **({} if ids is None else {"completion_ids": list(ids)}),
                **{name: [values[p] for p in problems] for name, values in self.columns.items()},
            )
        except WorkerError as error:
            raise RewardError(f"The reward {self.benchmark.reward!r} cannot judge. {error}") from error
        if inspect.iscoroutine(found):
            found = self._awaited(found, len(texts))
        return [None if one is None or math.isnan(one) else float(one) for one in found]

    def _awaited(self, coroutine: Coroutine[Any, Any, Any], completions: int) -> list[float | None]:
        """The rewards of a coroutine function, held to what the workers demand of other functions."""
        try:
            returned = asyncio.run(coroutine)
        except Exception as error:  # a user's own code may raise anything
            described = f"{type(error).__name__}: {first_line(error)}"
            raise RewardError(f"The reward {self.benchmark.reward!r} raised {described}") from error
        found = rewards_of(returned, completions, self.benchmark.reward)
        if any(one is not None and math.isinf(one) for one in found):
            raise RewardError(f"The reward {self.benchmark.reward!r} returned an infinite number: {found[:8]}.")
        return found

    def answer(self, text: str, problem: int) -> str | None:
        """The completion's answer in a normal spelling; None if no answer can be read."""
        if self.benchmark.reward == "reasoning_gym":
            _, entry = gym.decode(self.benchmark.columns[gym.COLUMN][problem])
            return next(iter(gym.readings(text, entry.get("answer"))), None)
        if self.benchmark.reward in NAMES:
            return spelled(reading.final_answer(text))
        return text.strip() or None


def _identity(name: str, reward: Any) -> Any:
    """What a reward's verdicts depend on: package versions, or for a user's own reward a digest of its source."""
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
    """The spelling under which an answer's votes are counted: a number's value, or other text without spaces."""
    if answer is None:
        return None
    text = normal(answer[:2000])
    value = number(text)
    try:
        return squeezed(text) if value is None else str(value.value)
    except ValueError:  # Python does not convert numbers of more than 4300 digits to text
        return squeezed(text)


def header(policy: Policy, benchmark: Benchmark, settings: Settings, weights: str, judge: "Judge") -> dict[str, Any]:
    """What is evaluated and how. Two runs with the same header are one evaluation. `weights` is the policy's digest."""
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
        # Only if they are used for rendering, so that results from before this field existed still match.
        **({"chat_template_kwargs": plain(variables)} if variables and settings.prompt_template is None else {}),
        "template": rendered(policy.tokenizer, settings.prompts(benchmark, policy)[0], variables),
        "data": benchmark.digest,
        "reward": benchmark.reward,
        "judge": judge.identity,
        "backend": policy.backend,
        "versions": {name: version(name) for name in ("tbrm-trl", "transformers", "torch")},
    }
