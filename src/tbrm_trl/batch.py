"""Batches of trajectories for one forward pass, their scores, and the sizes of micro-batches."""

from collections.abc import Sequence, Sized
from dataclasses import dataclass, replace
from typing import Self, TypeVar

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from .trajectory import Trajectory

# Vision inputs with one entry per token. The others have one row per image, tile, patch or sample.
PER_TOKEN_INPUTS = ("token_type_ids", "mm_token_type_ids")


@dataclass
class Batch:
    """Trajectories padded on the right to the longest one. T counts prompt and completion tokens.

    Causal attention never looks right, so padding on the right changes no real token. The batch is as wide as its
    longest trajectory; padding prompts on the left would add the longest prompt to the longest completion.
    """

    input_ids: Tensor  # (B, T)
    attention_mask: Tensor  # (B, T) 1 on real tokens
    action_mask: Tensor  # (B, T) bool, m_h in the column of the chosen token; never true in column 0
    ref_log_probs: Tensor  # (B, T) 0 where not an action; NaN until scored
    ref_soft_value: Tensor  # (B,) NaN until scored
    ref_end_value: Tensor  # (B,) NaN until scored
    vision: dict[str, Tensor]
    packed: bool = False  # whether models read only the real tokens, as one row (`model.scoring.score`)
    pad_fraction: float = 0.0  # share of padding among the positions that models read

    def until(self, width: int) -> Self:
        """The first `width` columns."""
        per_token = {n: v[:, :width] if n in PER_TOKEN_INPUTS else v for n, v in self.vision.items()}
        cut = {n: getattr(self, n)[:, :width] for n in ("input_ids", "attention_mask", "action_mask", "ref_log_probs")}
        return replace(self, **cut, vision=per_token)


@dataclass
class TrajectoryScores(ModelOutput):
    """A model's scores of a batch of trajectories. All but `hidden` are in float32 or wider.

    Attributes:
        log_probs: `(B, T)` log π of the token in each column; 0 where `action_mask` is false.
        soft_value: `(B,)` V(s_1): logsumexp of the temperature-scaled logits at the state of the first action.
        hidden: `(B, H)` last hidden state at the first action, without gradient.
        end_value: `(B,)` V of the state after the last token; None unless requested.
        state_values: `(B, T)` V of the state in which each column's token was chosen; None unless requested.
        entropy: `(B, T)` entropy of the distribution that each action was drawn from; None from the reference.
        aux_loss: load-balancing loss of a mixture-of-experts model; None unless router logits are requested.
    """

    # `ModelOutput` needs a default for every field but one.
    log_probs: Tensor = None  # type: ignore[assignment]
    soft_value: Tensor = None  # type: ignore[assignment]
    hidden: Tensor = None  # type: ignore[assignment]
    end_value: Tensor | None = None
    state_values: Tensor | None = None
    entropy: Tensor | None = None
    aux_loss: Tensor | None = None


def padded_width(rows: Sequence[Sized], multiple: int | None = None, most: int | None = None) -> int:
    """Columns of a padded batch of these rows: a multiple of `multiple`, unless that is more than `most`."""
    longest, multiple = max(map(len, rows)), multiple or 1
    width = -(-longest // multiple) * multiple
    return width if most is None else max(longest, min(width, most))


def collate(
    trajectories: Sequence[Trajectory],
    pad_token_id: int,
    device: torch.device | str = "cpu",
    pad_to_multiple_of: int | None = None,
    packed: bool = False,
    positions: int | None = None,
) -> Batch:
    """Pad trajectories to one batch on `device`. Only this function turns trajectories into batched tensors.

    With `positions`, rows are padded to at most so many columns: a model may have no more positions, or rescale all of
    them if there are more.
    """
    width = padded_width(trajectories, pad_to_multiple_of, positions)

    columns = torch.arange(width)  # (T,)
    at_start = torch.zeros(len(trajectories), dtype=torch.long)  # (B,)
    after_prompt = torch.tensor([len(t.prompt_ids) for t in trajectories])  # (B,)

    def padded(rows: Sequence[Tensor], fill: float | int | bool, first: Tensor = at_start) -> Tensor:
        """Put each row at its first column, and `fill` around it. Uses few operations, however many rows there are."""
        ends = first + torch.tensor([len(row) for row in rows])  # (B,)
        is_theirs = (columns >= first[:, None]) & (columns < ends[:, None])  # (B, T)
        joined = torch.cat(list(rows))
        return joined.new_full(is_theirs.shape, fill).masked_scatter_(is_theirs, joined).to(device)

    def reference(trajectory: Trajectory) -> Tensor:
        if trajectory.ref_log_probs is None:
            return torch.full(trajectory.completion_ids.shape, torch.nan)
        return trajectory.ref_log_probs

    vision: dict[str, Tensor] = {}
    for name in trajectories[0].vision:
        rows = [trajectory.vision[name] for trajectory in trajectories]
        value = padded(rows, 0) if name in PER_TOKEN_INPUTS else torch.cat(rows).to(device)
        if value.numel():  # a micro-batch without images is a text batch
            vision[name] = value

    return Batch(
        input_ids=padded([torch.cat([t.prompt_ids, t.completion_ids]) for t in trajectories], pad_token_id),
        attention_mask=(columns < torch.tensor([len(t) for t in trajectories])[:, None]).long().to(device),
        action_mask=padded([t.loss_mask for t in trajectories], False, after_prompt),
        ref_log_probs=padded([reference(t) for t in trajectories], 0.0, after_prompt),
        ref_soft_value=float_tensor([t.ref_soft_value for t in trajectories], device),
        ref_end_value=float_tensor([t.ref_end_value for t in trajectories], device),
        vision=vision,
        packed=packed,
        pad_fraction=0.0 if packed else 1 - sum(map(len, trajectories)) / (len(trajectories) * width),
    )


def at_least_float32(tensor: Tensor) -> Tensor:
    """Widen half-precision to float32; leave float32 and float64 as they are."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def float_tensor(values: Sequence[float | None], device: torch.device | str = "cpu") -> Tensor:
    """`(B,)` float32, with NaN for None."""
    return torch.tensor([torch.nan if v is None else v for v in values], dtype=torch.float32, device=device)


Item = TypeVar("Item")
Row = TypeVar("Row", bound=Sized)


def chunks(items: Sequence[Item], size: int) -> list[Sequence[Item]]:
    """Split items into chunks of `size` neighbours; the last chunk may be smaller."""
    return [items[first : first + size] for first in range(0, len(items), size)]


@dataclass(frozen=True)
class MicrobatchSize:
    """The largest batch of one forward pass: a number of rows, or a number of tokens including padding.

    Attributes:
        rows: the largest number of rows. If `tokens` is given, it replaces this limit.
        tokens: the largest number of tokens. A longer row gets a micro-batch of its own.
        packed: whether rows are concatenated without padding.
        multiple: the width of a padded batch is a multiple of this; None allows any width.
    """

    rows: int
    tokens: int | None = None
    packed: bool = False
    multiple: int | None = None

    def holds(self, rows: Sequence[Sized]) -> bool:
        """Whether all these rows fit into one forward pass."""
        if self.tokens is None:
            return len(rows) <= self.rows
        return len(rows) == 1 or self._tokens_of(rows) <= self.tokens

    def keeps_whole(self, rows: Sequence[Sized], group_size: int) -> bool:
        """Whether micro-batches can be filled without splitting a group of `group_size` neighbours."""
        if self.tokens is None:
            return self.rows % group_size == 0
        return all(self.holds(block) for block in chunks(rows, group_size))

    def split(self, rows: Sequence[Row], group_size: int = 1) -> list[list[Row]]:
        """Divide rows into micro-batches, filled one after another, the longest rows first.

        Rows of similar length share a micro-batch, which keeps padding small. The longest rows come first, so that a
        run that does not fit into memory fails at once. Groups of `group_size` neighbours stay whole.
        """
        blocks = sorted(chunks(rows, group_size), key=lambda block: max(map(len, block)), reverse=True)
        batches: list[list[Row]] = []
        for block in blocks:
            if batches and self.holds(longer := [*batches[-1], *block]):
                batches[-1] = longer
            else:
                batches.append(list(block))
        return batches

    def spread(self, batches: Sequence[list[Row]], count: int, group_size: int = 1) -> list[list[Row]]:
        """Halve the largest micro-batches until there are `count`, the number that another process needs."""
        batches = list(batches)
        while len(batches) < count:
            divisible = [place for place, batch in enumerate(batches) if len(batch) > group_size]
            place = max(divisible, key=lambda place: self._tokens_of(batches[place]))
            middle = len(batches[place]) // group_size // 2 * group_size
            batches[place : place + 1] = [batches[place][:middle], batches[place][middle:]]
        return batches

    def _tokens_of(self, rows: Sequence[Sized]) -> int:
        return sum(map(len, rows)) if self.packed else len(rows) * padded_width(rows, self.multiple)


def random_order(count: int, group_size: int = 1) -> list[int]:
    """A random permutation of `count` places that keeps each group of `group_size` neighbours together."""
    blocks = torch.randperm(count // group_size) * group_size  # (count / group_size,)
    return (blocks[:, None] + torch.arange(group_size)).flatten().tolist()
