"""What an estimator may use of the run that it is part of."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

from accelerate import Accelerator
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ...trajectory import Trajectory


class Run(Protocol):
    """The run as a soft value estimator sees it. `TBRMTrainer` is one; a test needs only these names.

    Attributes:
        accelerator: gives the device, and exchanges data between processes.
        train_dataset: the training set. Logged rows have the columns of their trajectories.
        evaluating: whether an evaluation is running. Nothing may be learned from its trajectories.
    """

    accelerator: Accelerator
    train_dataset: Any
    evaluating: bool

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The policy's tokenizer."""

    @property
    def reference_key(self) -> str | None:
        """Digest of π_ref and of how it scores; None if each trajectory has its own reference."""

    @property
    def rollout_settings(self) -> dict[str, Any]:
        """What rollouts and rewards depend on besides policy, data, options: functions, template, tools, end tokens."""

    def counts(self, trajectory: Trajectory) -> bool:
        """Whether the trajectory would enter the loss if it had a soft value."""

    def logged_trajectories(self) -> Iterable[Trajectory]:
        """The logged rows of the training set with their reference scores.

        Raises:
            ValueError: if the reference does not score them before training.
        """

    def sample(self, rows: Sequence[Mapping[str, Any]]) -> list[Trajectory]:
        """Roll out rows of the training set before training, equally many on every process. Nothing is logged.

        Raises:
            ValueError: if DeepSpeed or FSDP shards the model once training starts.
        """

    def replace_prompts(self, dataset: Dataset) -> None:
        """Continue with another training set of prompts, before any is drawn."""

    def train_module(self, module: nn.Module, learning_rate: float) -> None:
        """Train a module beside the policy, on the same loss.

        Every process holds the whole module. Its gradients are averaged over processes, AdamW updates it in every
        optimizer step at this constant learning rate, and checkpoints hold the module and AdamW's state.
        """

    def value_head(self, learning_rate: float) -> Callable[[Tensor], Tensor]:
        """A trained function of `ValueInputs.hidden`: `(B, H)` → `(B,)` in reward units, 0 before training.

        It is trained as `train_module` trains a module.
        """
