"""One forward pass that scores a batch of trajectories, padded or packed."""

from typing import Any

import torch
from torch import Tensor, nn

from ..batch import Batch, TrajectoryScores
from .head import at_mask


def score(
    model: nn.Module,
    batch: Batch,
    *,
    masked: bool = False,
    router_logits: bool = False,
    scored: Tensor | None = None,
    end_value: bool = False,
    every_value: bool = False,
) -> TrajectoryScores:
    """Score a batch in one forward pass of a model that has the trajectory head, wrapped or not.

    A packed batch goes through the model as one row: the real tokens of all trajectories end to end, with positions
    that start at 0 for each trajectory and no attention mask. That tells transformers to keep the trajectories apart.
    The scores of a packed batch are `(B, T)` too.

    Args:
        model: the policy or the reference, as prepared for training.
        batch: from `collate`.
        masked: give the model the attention mask. Causal attention does not need it, since no real token looks at the
            padding on its right, and without a mask the kernels are faster and keep less. Vision-language models take
            positions from it, and a mixture of experts uses it to leave padding out of its load-balancing loss.
        router_logits: ask a mixture-of-experts model for its load-balancing loss.
        scored: `(B, T)` tokens that get a log-probability and an entropy; None means all actions. s_1 is always the
            state of the first action.
        end_value: ask for V of the state after the last token.
        every_value: ask for V of every state in which the policy acted.
    """
    real = batch.attention_mask.bool()  # (B, T)
    lengths = real.sum(dim=1)  # (B,)
    per_token = {
        "input_ids": batch.input_ids,
        "action_mask": batch.action_mask,
        "scored": batch.action_mask if scored is None else scored,
    }
    if batch.packed:
        per_token["position_ids"] = batch.attention_mask.cumsum(dim=1) - 1
        per_token = {name: values[real].unsqueeze(0) for name, values in per_token.items()}  # (1, N) each
        starts = lengths.cumsum(dim=0) - lengths  # (B,) the place of each trajectory's first token
    else:
        if masked:
            per_token["attention_mask"] = batch.attention_mask
        starts = torch.arange(len(real), device=real.device) * real.shape[1]  # (B,)
    wanted: dict[str, Any] = {"every_value": every_value}
    if end_value:
        wanted["last_state"] = starts + lengths - 1  # (B,)
    if router_logits:
        wanted["output_router_logits"] = True
    first_state = starts + batch.action_mask[:, 1:].int().argmax(dim=1)  # (B,)
    scores = model(**per_token, **batch.vision, first_state=first_state, **wanted)
    if batch.packed:
        for name in ("log_probs", "entropy", "state_values"):
            if name in scores:  # a `ModelOutput` omits fields that are None
                scores[name] = at_mask(scores[name], real)  # (B, T)
    return scores
