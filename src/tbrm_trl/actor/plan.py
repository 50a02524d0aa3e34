"""What the actor needs to know about a run, in a file that the run writes."""

import copy
import io
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import dill
import torch

from ..context import temporarily
from ..files import appearing
from ..sources.bounds import Bounds
from ..sources.logged import columns_for_rewards
from ..sources.prompts import PromptLimit
from ..sources.sampler import WindowSampler

FOLDER = "actor"  # in the run's output directory
FILE = "plan.pkl"
# Options of the run that decide how a row is rolled out and rewarded.
OPTIONS = """
    max_completion_length temperature top_p top_k min_p repetition_penalty chat_template_kwargs
    max_tool_calling_iterations reward_weights reward_pessimism reward_timeout reward_on_error beta
    seed trust_remote_code
""".split()
# Those of them that a drawn row holds on to. The run applies the others to a record itself.
OF_A_ROW = [name for name in OPTIONS if name not in ("reward_weights", "reward_pessimism", "reward_timeout", "beta")]


@dataclass
class Plan:
    """The data, functions and options of a run on which its rollouts depend.

    Attributes:
        options: values of the options in `OPTIONS`, by name.
        generation_kwargs: more fields of a request, as the user gave them.
        dataset: the training set from which windows are drawn.
        sampler: says which rows of the data set make up a window.
        bounds: which rows may start under which policy.
        windows: numbers of the windows that the run has not yet taken.
        updates: number of updates of the whole run.
        hidden: columns of the data set that reward functions do not get.
        reward_funcs, reward_processing_classes, tools, environment_factory: as in the trainer.
        processing_class: the tokenizer.
        prompt_limit: how long a prompt may be.
        end_token_ids: tokens that end a completion.
        vocabulary: the model's vocabulary size.
        context: the model's context length in tokens.
        base: the model on which to start the server.
        records: folder of the windows.
        patience: seconds after which the run gives up waiting for a window.
        server: address of the server; None if the actor gets it on its command line.
        path: where Python looks for the modules of the user's functions.
    """

    options: dict[str, Any]
    generation_kwargs: dict[str, Any]
    dataset: Any
    sampler: WindowSampler
    bounds: Bounds
    windows: range
    updates: int
    hidden: frozenset[str]
    reward_funcs: Any
    reward_processing_classes: Any
    tools: Any
    environment_factory: Any
    processing_class: Any
    prompt_limit: PromptLimit
    end_token_ids: list[int]
    vocabulary: int
    context: int
    base: str
    records: Path
    patience: float
    server: str | None = None
    path: list[str] = field(default_factory=lambda: list(sys.path))

    def __post_init__(self) -> None:
        self.sampler = copy.copy(self.sampler)
        self.sampler.epoch = int  # the run's own `epoch` refers to its trainer, which is not sent

    @property
    def per_window(self) -> int:
        return self.sampler.mix.rollouts

    def rows(self, window: int) -> list[dict[str, Any]]:
        """The rows of the data set that a window rolls out, process by process."""
        indices = [i for process in range(self.sampler.processes) for i in self.sampler.rollouts(window, process)]
        return columns_for_rewards([self.dataset[index] for index in indices], self.hidden)

    def write(self, output_dir: Path) -> None:
        """Write the plan into the run's folder.

        Functions of `__main__` are pickled by value, functions of modules by name.

        Raises:
            TypeError: if something in the plan cannot be pickled.
        """
        try:
            content = dill.dumps(self, recurse=True)
        except Exception as error:
            raise TypeError(
                f"The actor runs in a process of its own and cannot be given what this run was: {error}. Make what "
                "reward functions, tools and environments hold (open files, connections, locks) where they are called."
            ) from error
        with appearing(output_dir / FOLDER / FILE) as partial:
            partial.write_bytes(dill.dumps(self.path) + content)

    @staticmethod
    def read(output_dir: Path) -> "Plan":
        """The plan of the run in this folder.

        Raises:
            FileNotFoundError: if the folder holds no plan.
        """
        file = output_dir / FOLDER / FILE
        if not file.is_file():
            raise FileNotFoundError(
                f"There is no {file}. A run with rollouts='async' (or publish_policy=True and follow_rollouts) writes "
                "it when it begins to train, if it has a training set: start the run first."
            )
        with file.open("rb") as opened:
            sys.path += [one for one in dill.load(opened) if one not in sys.path]
            with temporarily(torch.storage, _load_from_bytes=_load_on_cpu):  # the actor has no GPU
                return dill.load(opened)


def _load_on_cpu(content: bytes) -> Any:
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=False)
