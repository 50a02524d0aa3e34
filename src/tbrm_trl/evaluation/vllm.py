"""Completions by vLLM, where it is installed."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from .sampling import Completion, Request, Sampling

AT_ONCE = 1024  # requests handed over together; an interrupted evaluation loses at most these


@dataclass
class VllmPolicy:
    """A model in vLLM's engine, with nothing of the sampling that it ships with."""

    name: str
    engine: Any
    tokenizer: PreTrainedTokenizerBase
    backend: str = "vllm"

    @classmethod
    def load(cls, name: str, tokenizer: PreTrainedTokenizerBase, **options: Any) -> "VllmPolicy":
        try:
            from vllm import LLM
        except ImportError as error:
            raise ValueError(f'--backend vllm needs vLLM ({error}): pip install "tbrm-trl[vllm]"') from None
        return cls(name, LLM(model=name, generation_config="vllm", **options), tokenizer)

    def weights(self) -> None:
        """Not known: vLLM lays weights out in its own way."""

    def generate(self, requests: Sequence[Request], how: Sampling) -> Iterator[Completion]:
        from vllm import SamplingParams

        for first in range(0, len(requests), AT_ONCE):
            some = requests[first : first + AT_ONCE]
            asked = [
                SamplingParams(
                    temperature=how.temperature,
                    top_p=how.top_p,
                    top_k=how.top_k or -1,
                    max_tokens=how.max_new_tokens,
                    seed=one.seed,
                )
                for one in some
            ]
            prompts = [{"prompt_token_ids": one.prompt_ids} for one in some]
            for number, output in enumerate(self.engine.generate(prompts, asked, use_tqdm=False), start=first):
                given = output.outputs[0]
                yield Completion(number, list(given.token_ids), given.finish_reason == "length")
