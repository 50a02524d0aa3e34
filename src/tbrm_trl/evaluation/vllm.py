"""Draw completions with vLLM, if it is installed."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash
from huggingface_hub import snapshot_download
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..files import first_line, in_one_line, sizes_and_digests
from .sampling import Completion, Request, Sampling

AT_ONCE = 1024  # requests given to vLLM together; an interrupted evaluation loses at most this many completions
# Endings of weight files, in the order in which vLLM looks for them, and files with such endings but without weights.
WEIGHTS = (".safetensors", ".bin", ".pt", ".gguf")
NO_WEIGHTS = ("training_args.bin", "optimizer.bin", "scheduler.bin", "optimizer.pt", "scheduler.pt", "scaler.pt")


@dataclass
class VllmPolicy:
    """A model in vLLM's engine, without the model's own sampling settings.

    Attributes:
        digest: digest of the files from which the weights were read.
        revision: the requested revision.
        dtype: the requested dtype. "auto" takes the files' dtype.
    """

    name: str
    engine: Any
    tokenizer: PreTrainedTokenizerBase
    digest: str
    revision: str | None = None
    dtype: str | None = None
    backend: str = "vllm"

    @classmethod
    def load(
        cls,
        name: str,
        *,
        revision: str | None = None,
        dtype: str | None = "auto",
        trust_remote_code: bool = False,
        **options: Any,
    ) -> "VllmPolicy":
        """Load a checkpoint from the Hub or a folder.

        Args:
            name: id on the Hub, or a folder.
            revision: revision on the Hub.
            dtype: the dtype to compute in. "auto" takes the files' dtype.
            trust_remote_code: whether code beside the model may be run.
            options: keyword arguments for vLLM's `LLM`.

        Raises:
            ValueError: in one line, if vLLM is not installed, or the tokenizer or the weight files are not found.
        """
        of_files = {"revision": revision, "trust_remote_code": trust_remote_code}
        try:
            from vllm import LLM
        except ImportError as error:
            raise ValueError(f'--backend vllm needs vLLM ({error}): pip install "tbrm-trl[vllm]"') from None
        try:
            tokenizer = AutoTokenizer.from_pretrained(name, **of_files)
        except (OSError, ValueError, ImportError) as error:
            raise ValueError(f"{name} cannot be loaded: {in_one_line(error)}") from error
        engine = LLM(model=name, generation_config="vllm", dtype=dtype, **of_files, **options)
        return cls(name, engine, tokenizer, digest_of_files(name, revision), revision, dtype)

    def weights(self) -> str:
        """A digest of the weights' files, since vLLM changes the layout of weights in its engine."""
        return self.digest

    def loaded(self) -> dict[str, Any]:
        # No quantization is requested from vLLM. A quantized checkpoint carries it in its weights.
        return {"revision": self.revision, "dtype": self.dtype, "quantization": None}

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


def digest_of_files(name: str, revision: str | None = None) -> str:
    """One digest of the names, sizes and contents of a model's weight files.

    Args:
        name: a folder, a file, or an id on the Hub with a snapshot on this machine.
        revision: the snapshot's revision.

    Raises:
        ValueError: in one line, if there are no weight files.
    """
    place = Path(name)
    if not place.exists():
        try:
            place = Path(snapshot_download(name, revision=revision, local_files_only=True))
        except (OSError, ValueError) as error:
            raise ValueError(f"The files of {name} are not found: {first_line(error)}") from error
    by_ending = ([one for one in sorted(place.glob(f"*{end}")) if one.name not in NO_WEIGHTS] for end in WEIGHTS)
    files = [place] if place.is_file() else next(filter(None, by_ending), [])
    if not files:
        raise ValueError(f"{place} holds no weights ({', '.join(WEIGHTS)}), so a result could not say what it is of.")
    digest = xxhash.xxh3_64()
    names = [file.name for file in files]
    for name_of_file, (size, content) in zip(names, sizes_and_digests(files[0].parent, names), strict=True):
        digest.update(f"{name_of_file} {size} {content}\n".encode())
    return digest.hexdigest()
