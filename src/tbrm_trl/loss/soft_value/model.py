"""DVPO: a frozen value model."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any, ClassVar

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.integrations import deepspeed as hf_deepspeed
from transformers.integrations import is_deepspeed_zero3_enabled

from ...context import loading
from ...options import TBRMOptions
from ...trajectory import Trajectory
from .base import ConstantValue
from .run import Run


class ModelValue(ConstantValue):
    """`V = v(s_1)/β`: a frozen value model scores the tokens up to s_1, in reward units (after DVPO, arXiv 2502.16944).

    `soft_value_model` is a sequence classifier with one label and the policy's vocabulary. Every process holds a whole
    copy. Its score replaces `β log E_ref exp(R/β)`. If it is wrong, the target depends on the data.
    """

    name = "model"
    options: ClassVar = frozenset({"soft_value_model"})

    @classmethod
    def _problems(cls, args: TBRMOptions) -> Iterator[str]:
        if not args.soft_value_model:
            yield (
                '`soft_value="model"` needs `soft_value_model`: the folder or id of a sequence classifier with one '
                "label."
            )

    def attach(self, run: Run) -> None:
        trusted = dict(trust_remote_code=self.args.trust_remote_code)
        with loading("`soft_value_model`", self.args.soft_value_model):
            tokenizer = AutoTokenizer.from_pretrained(self.args.soft_value_model, **trusted)
        if tokenizer.get_vocab() != run.tokenizer.get_vocab():
            raise ValueError(
                f"`soft_value_model={self.args.soft_value_model!r}` has another vocabulary than the policy, whose "
                "tokens it is to score. Use a value model of the same family."
            )
        with _whole(), loading("`soft_value_model`", self.args.soft_value_model):
            model = AutoModelForSequenceClassification.from_pretrained(
                self.args.soft_value_model,
                dtype=torch.float32,  # V is the value over β: a step of bfloat16 near 1 is nats
                **trusted,
            )
        if model.config.num_labels != 1:
            raise ValueError(
                f"`soft_value_model={self.args.soft_value_model!r}` has {model.config.num_labels} labels. A value "
                "model has one."
            )
        model.config.pad_token_id = -1  # nothing is padded: the classifier scores the last token, whatever it is
        self.model = model.to(run.accelerator.device).eval().requires_grad_(False)

    @torch.no_grad()
    def on_window(self, trajectories: Sequence[Trajectory], rows: Sequence[Mapping[str, Any]], group_size: int) -> None:
        states = [tuple(_until_first_action(trajectory)) for trajectory in trajectories]
        values: dict[tuple[int, ...], float] = {}
        # Prompts of equal length need no padding. The side to pad on would depend on the architecture.
        for _, same_length in groupby(sorted(set(states), key=len), key=len):
            for alike in self.args.microbatch_size.split(list(same_length)):
                scores = self.model(torch.tensor(alike, device=self.model.device)).logits.flatten()  # (B,)
                values |= dict(zip(alike, scores.float().tolist(), strict=True))
        for trajectory, state in zip(trajectories, states, strict=True):
            trajectory.value = values[state]


@contextmanager
def _whole() -> Iterator[None]:
    """Load whole models inside the block, also under DeepSpeed ZeRO-3, which would partition them."""
    if not is_deepspeed_zero3_enabled():
        yield
        return
    config = hf_deepspeed._hf_deepspeed_config_weak_ref()
    hf_deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        hf_deepspeed.set_hf_deepspeed_config(config)


def _until_first_action(trajectory: Trajectory) -> list[int]:
    """The tokens of s_1: the prompt, and what was inserted before the policy first acted."""
    inserted = int(trajectory.loss_mask.int().argmax()) if trajectory.loss_mask.any() else 0
    return [*trajectory.prompt_ids.tolist(), *trajectory.completion_ids[:inserted].tolist()]
