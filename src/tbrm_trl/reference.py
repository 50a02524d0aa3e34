"""The reference policy π_ref: which module computes it, and the scores it leaves on trajectories."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from torch import nn
from trl.trainer.utils import use_adapter

from .scoring import TrajectoryScores
from .trajectory import Batch, Trajectory


@contextmanager
def reference_policy(policy: nn.Module, frozen_copy: nn.Module | None, accelerator: Accelerator) -> Iterator[nn.Module]:
    """Yield the module that computes π_ref.

    It is the frozen copy of a fully fine-tuned model. A PEFT policy needs none: its reference is the adapter named
    `ref` where TRL made one (the policy arrived with a trained adapter), else the base model, adapters disabled.
    """
    if frozen_copy is not None:
        yield frozen_copy
        return
    adapters = accelerator.unwrap_model(policy)
    with use_adapter(adapters, "ref" if "ref" in adapters.peft_config else None):
        yield policy


@torch.no_grad()
def score_reference(
    chunks: Iterator[list[Trajectory]],
    collate: Callable[[Sequence[Trajectory]], Batch],
    score: Callable[[Batch], TrajectoryScores],
) -> None:
    """Write log π_ref and V_ref(s_1) onto each trajectory: one forward per chunk, both numbers from the same one."""
    for chunk in chunks:
        scores = score(collate(chunk))
        log_probs, soft_values = scores.log_probs.cpu(), scores.soft_value.tolist()
        for trajectory, row, soft_value in zip(chunk, log_probs, soft_values, strict=True):
            trajectory.ref_log_probs = row[len(trajectory.prompt_ids) : len(trajectory)].clone()
            trajectory.ref_soft_value = soft_value


def require_equal_weights(policy: nn.Module, reference: nn.Module) -> None:
    """Raise unless the reference was loaded with the weights that the policy starts from.

    TRL loads the reference from the folder or id in the model's configuration. A model that was changed after loading,
    or never saved, would silently get another reference.
    """
    weights = dict(policy.named_parameters())
    for name, loaded in reference.named_parameters():
        start = weights.get(name)
        if start is None or start.shape != loaded.shape or start.is_meta:
            continue  # partitioned or renamed by a wrapper: not comparable here
        if not torch.equal(start.detach().to(loaded.device, loaded.dtype), loaded.detach()):
            raise ValueError(
                f"The reference policy is not the model you passed: parameter {name!r} differs between the model "
                f"object and what was loaded from {getattr(policy.config, '_name_or_path', '')!r}. Save the model with "
                "`save_pretrained(folder)` and its tokenizer beside it, and pass `model=folder`."
            )
