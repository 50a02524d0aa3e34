"""inspect-ai beside `tbrm eval`: it draws from a checkpoint with this sampler, and runs these benchmarks as tasks.

    inspect eval inspect_evals/gsm8k --model tbrm/outputs/run        # a task of inspect-evals, a checkpoint or adapter
    inspect eval tbrm_trl/benchmark -T name=gsm8k --model tbrm/outputs/run
    inspect eval tbrm_trl/benchmark -T name=gsm8k --model openai/gpt-5  # a benchmark of this library, any model

inspect-ai finds both through this package's entry point.
"""

import asyncio
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future
from queue import Empty, Queue
from threading import Thread
from typing import Any

from inspect_ai import Epochs, Task, task
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.model import (
    ChatMessageAssistant,
    ChatMessageSystem,
    ChatMessageUser,
    GenerateConfig,
    ModelAPI,
    ModelOutput,
    ModelUsage,
    modelapi,
)
from inspect_ai.scorer import Score, accuracy, scorer, stderr
from inspect_ai.solver import generate

from .benchmarks import BOXED, load_benchmark, messages
from .run import Judge, ModelPolicy
from .sampling import Completion, Request, Sampling, prompt_ids_of, seed_of

MESSAGES = {"system": ChatMessageSystem, "user": ChatMessageUser, "assistant": ChatMessageAssistant}
# Settings of inspect-ai that change what is drawn but that this sampler does not support.
REFUSED = (
    "stop_seqs", "best_of", "frequency_penalty", "presence_penalty", "logit_bias", "num_choices", "logprobs",
    "top_logprobs", "prompt_logprobs", "response_schema",
)  # fmt: skip


@modelapi(name="tbrm")
class TBRMModel(ModelAPI):
    """A checkpoint or adapter folder as an inspect-ai model, with completions drawn as in `tbrm eval`.

    inspect-ai sets temperature, top_p, top_k, max_tokens and seed. Their defaults are 1, 1, 0 (all), 2048 and 0; the
    model's own generation settings are not applied. Waiting requests are drawn together.
    """

    def __init__(
        self,
        model_name: str,
        base_url: str | None = None,
        api_key: str | None = None,
        config: Any = None,
        batch_size: int = 64,
        use_cpu: bool = False,
        chat_template_kwargs: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(model_name, base_url, api_key, [], config or GenerateConfig())
        self.policy = ModelPolicy.load(model_name, batch_size=batch_size, use_cpu=use_cpu, **options)
        self.variables = chat_template_kwargs
        self.asked: Counter[str] = Counter()  # number of requests by prompt: each sample gets its own seed
        self.waiting: Queue[tuple[Request, Sampling, Future[Completion]]] = Queue()
        Thread(target=self._draw, daemon=True).start()

    def max_connections(self) -> int:
        return self.policy.batch_size

    async def generate(self, input: Sequence[Any], tools: Any, tool_choice: Any, config: Any) -> ModelOutput:
        if tools:
            raise ValueError("tbrm/ draws text alone: it calls no tools. Use inspect-ai's own hf/ or vllm/.")
        if given := [name for name in REFUSED if getattr(config, name, None) is not None]:
            raise ValueError(f"tbrm/ samples without {', '.join(given)}. Leave it out, or use inspect-ai's own hf/.")
        set_ones = {
            "temperature": config.temperature,
            "top_p": config.top_p,
            "top_k": config.top_k,
            "max_new_tokens": config.max_tokens,
        }
        sampling = Sampling(**{name: value for name, value in set_ones.items() if value is not None})
        tokenizer = self.policy.tokenizer
        ids = prompt_ids_of(tokenizer, [{"role": one.role, "content": one.text} for one in input], self.variables)
        number = self.asked[str(ids)]
        self.asked[str(ids)] += 1
        future: Future[Completion] = Future()
        self.waiting.put((Request(ids, seed_of(config.seed or 0, ids, number)), sampling, future))
        drawn = await asyncio.wrap_future(future)
        text = tokenizer.decode(drawn.ids, skip_special_tokens=True)
        output = ModelOutput.from_content(self.model_name, text, "max_tokens" if drawn.truncated else "stop")
        output.usage = ModelUsage(
            input_tokens=len(ids), output_tokens=len(drawn.ids), total_tokens=len(ids) + len(drawn.ids)
        )
        output.metadata = {"completion_ids": drawn.ids}
        return output

    def _draw(self) -> None:
        """Draw waiting requests for ever, all requests with the same settings together."""
        while True:
            some = [self.waiting.get()]
            try:
                while True:
                    some.append(self.waiting.get(timeout=0.05))  # until no more arrive
            except Empty:
                pass
            # A request cancelled while it waited is not drawn. From here on a request cannot be cancelled.
            some = [one for one in some if one[2].set_running_or_notify_cancel()]
            for sampling in {how for _, how, _ in some}:
                futures = [future for _, how, future in some if how == sampling]
                try:
                    for one in self.policy.generate([asked for asked, how, _ in some if how == sampling], sampling):
                        futures[one.request].set_result(one)
                except Exception as error:  # raised where the request is awaited
                    for future in futures:
                        if not future.done():
                            future.set_exception(error)


@task
def benchmark(
    name: str | list[str],
    system_prompt: str = BOXED,
    samples: int | None = None,
    reward: str | None = None,
    answer_column: str | None = None,
    limit: int | None = None,
) -> Task:
    """A benchmark of `tbrm eval` as an inspect-ai task: questions asked in messages, judged by its reward.

    Args:
        name: the benchmark's name, as `tbrm eval --benchmarks` takes it. A list is joined by commas, since inspect-ai's
            command line splits a name with commas.
        system_prompt: put before questions that are text.
        samples: completions of each problem, inspect-ai's epochs; by default the benchmark's own number.
        reward: reward to use instead of the benchmark's own.
        answer_column: column of the answers in a file.
        limit: evaluate only the first `limit` problems.
    """
    name = name if isinstance(name, str) else ", ".join(name)
    problems = load_benchmark(name, reward=reward, answer_column=answer_column)
    problems = problems.first(limit) if limit is not None else problems
    asked = [messages(prompt, system_prompt) for prompt in problems.prompts]
    golds = problems.columns.get("solution") or [""] * len(problems)
    rows = [
        Sample(
            input=[MESSAGES[message["role"]](content=message["content"]) for message in prompt],
            target=str(gold),
            id=number,
        )
        for number, (prompt, gold) in enumerate(zip(asked, golds, strict=True))
    ]
    return Task(
        dataset=MemoryDataset(rows, name=problems.name),
        solver=generate(),
        scorer=verdict(Judge(problems), asked),
        epochs=Epochs(samples or problems.samples, "mean"),
    )


@scorer(metrics=[accuracy(), stderr()])
def verdict(judge: Judge, prompts: Sequence[Any]) -> Any:
    """The benchmark's own judge as a scorer. A completion without a verdict scores 0, as in `tbrm eval`."""

    async def score(state: Any, target: Any) -> Score:
        text, problem = state.output.completion, state.sample_id
        drawn = (state.output.metadata or {}).get("completion_ids")  # only TBRMModel returns ids
        ids = None if drawn is None else [drawn]
        (value,) = await asyncio.to_thread(judge.verdicts, [prompts[problem]], [text], ids, [problem])
        return Score(
            value=0.0 if value is None else value,
            answer=judge.answer(text, problem),
            metadata={"judged": value is not None},
        )

    return score
