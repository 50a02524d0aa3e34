"""A trajectory, the one currency of the library, and its collation into a padded batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum

import torch
from torch import Tensor

# Vision inputs that have one entry per token; every other one has its rows per image, tile, patch or sample.
PER_TOKEN_INPUTS = ("token_type_ids", "mm_token_type_ids")


class End(Enum):
    """How a completion ended."""

    EOS = "eos"
    LENGTH = "length"


@dataclass
class Trajectory:
    """One prompt, one completion, its reward, and what the reference policy says of it. Unpadded, on the CPU.

    Attributes:
        prompt_ids: `(P,)` token ids, P ≥ 1.
        completion_ids: `(C,)` token ids, C ≥ 1, the end-of-sequence token included where it was produced.
        loss_mask: `(C,)` bool, m_h: true on tokens the policy chose, false on tokens a tool or environment inserted.
        reward: R(τ), the weighted sum of the raw rewards; NaN where no reward function could score it.
        end: how the completion ended.
        ref_log_probs: `(C,)` log π_ref of the completion tokens (0 where not chosen); None until scored.
        ref_soft_value: V_ref(s_1); None until scored.
        vision: the vision inputs of this trajectory alone, by the model's argument name; empty for text.
    """

    prompt_ids: Tensor
    completion_ids: Tensor
    loss_mask: Tensor
    reward: float
    end: End
    ref_log_probs: Tensor | None = None
    ref_soft_value: float | None = None
    vision: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.prompt_ids) == 0 or len(self.completion_ids) == 0:
            raise ValueError(
                f"A trajectory needs at least one prompt token and one completion token, got {len(self.prompt_ids)} "
                f"and {len(self.completion_ids)}. A prompt that tokenizes to nothing needs a BOS token or some text."
            )
        if self.loss_mask.shape != self.completion_ids.shape:
            raise ValueError(
                f"loss_mask has {len(self.loss_mask)} entries for {len(self.completion_ids)} completion tokens."
            )

    def __len__(self) -> int:
        """Number of tokens, prompt and completion together."""
        return len(self.prompt_ids) + len(self.completion_ids)


@dataclass
class Batch:
    """Trajectories padded on the right to the longest of them. T counts prompt and completion together.

    Causal attention never looks right, so padding there leaves every real token's computation alone, and the batch is
    as wide as its longest trajectory rather than its longest prompt plus its longest completion.
    """

    input_ids: Tensor  # (B, T)
    attention_mask: Tensor  # (B, T) 1 on real tokens
    action_mask: Tensor  # (B, T) bool, m_h at the column of the token that was chosen; never true in column 0
    reward: Tensor  # (B,) NaN where unscored
    ref_log_probs: Tensor  # (B, T) 0 where not an action; NaN until scored
    ref_soft_value: Tensor  # (B,) NaN until scored
    vision: dict[str, Tensor]

    @property
    def pad_fraction(self) -> float:
        """Share of the batch's positions that are padding."""
        return 1.0 - self.attention_mask.float().mean().item()


def collate(
    trajectories: Sequence[Trajectory],
    pad_token_id: int,
    device: torch.device | str = "cpu",
    pad_to_multiple_of: int | None = None,
) -> Batch:
    """Pad trajectories to one batch on `device`. Only this function lays trajectories out as tensors."""
    width = max(len(trajectory) for trajectory in trajectories)
    if pad_to_multiple_of is not None:
        width = -(-width // pad_to_multiple_of) * pad_to_multiple_of

    def padded(rows: Sequence[Tensor], fill: float | int | bool) -> Tensor:
        out = rows[0].new_full((len(rows), width), fill)  # (B, T)
        for out_row, row in zip(out, rows, strict=True):
            out_row[: len(row)] = row
        return out.to(device)

    def after_prompt(trajectory: Trajectory, completion_values: Tensor) -> Tensor:
        return torch.cat([completion_values.new_zeros(len(trajectory.prompt_ids)), completion_values])

    def reference(trajectory: Trajectory) -> Tensor:
        if trajectory.ref_log_probs is None:
            return torch.full(trajectory.completion_ids.shape, torch.nan)
        return trajectory.ref_log_probs

    vision: dict[str, Tensor] = {}
    for name in trajectories[0].vision:
        rows = [trajectory.vision[name] for trajectory in trajectories]
        value = padded(rows, 0) if name in PER_TOKEN_INPUTS else torch.cat(rows).to(device)
        if value.numel():  # a micro-batch without a single image is a text batch
            vision[name] = value

    return Batch(
        input_ids=padded([torch.cat([t.prompt_ids, t.completion_ids]) for t in trajectories], pad_token_id),
        attention_mask=padded([torch.ones(len(t), dtype=torch.long) for t in trajectories], 0),
        action_mask=padded([after_prompt(t, t.loss_mask) for t in trajectories], False),
        reward=torch.tensor([t.reward for t in trajectories], dtype=torch.float32, device=device),
        ref_log_probs=padded([after_prompt(t, reference(t)) for t in trajectories], 0.0),
        ref_soft_value=torch.tensor(
            [torch.nan if t.ref_soft_value is None else t.ref_soft_value for t in trajectories],
            dtype=torch.float32,
            device=device,
        ),
        vision=vision,
    )


def by_length(trajectories: Sequence[Trajectory], size: int) -> Iterator[list[Trajectory]]:
    """Chunks of at most `size` trajectories of similar length, so that little of a chunk is padding."""
    ordered = sorted(trajectories, key=len)
    for start in range(0, len(ordered), size):
        yield ordered[start : start + size]
