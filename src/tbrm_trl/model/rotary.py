"""From which length on rotary embeddings depend on the batch."""

import copy
from typing import Any

import torch
from transformers import PreTrainedModel


def rotary_limit(model: PreTrainedModel, longest: int | None = None, shortest: int = 8) -> int | None:
    """The longest row for which rotary embeddings do not depend on the batch's length; None if they never depend on it.

    Some rotary embeddings (`dynamic`, `longrope`) rescale every position once a batch is longer than the original
    context. A row's log-probabilities then depend on the rows beside it. The rotary modules are run to find this: the
    embedding of the first positions must be the same for every length up to `longest`, by default twice the model's
    number of positions.
    """
    limits = []
    for module in model.modules():
        frequencies = [buffer for name, buffer in module.named_buffers(recurse=False) if name.endswith("inv_freq")]
        if not frequencies or not hasattr(module, "rope_type"):
            continue
        rotary = copy.deepcopy(module)  # running changes some of them
        states = torch.zeros(1, 1, 1, device=frequencies[0].device)
        kinds: list[tuple] = [(kind,) for kind in set(getattr(module, "layer_types", ()))] or [()]

        def first_positions(
            length: int, rotary: Any = rotary, states: Any = states, kinds: Any = kinds
        ) -> torch.Tensor:
            positions = torch.arange(length, device=states.device)[None]  # (1, length)
            parts = [part[..., :shortest, :] for kind in kinds for part in rotary(states, positions, *kind)]
            return torch.cat(parts, dim=-1)

        most = max(shortest, longest or 2 * int(model.config.get_text_config().max_position_embeddings))
        try:
            expected = first_positions(shortest)
            if torch.equal(first_positions(most), expected):
                continue
        except (TypeError, IndexError, KeyError, ValueError):
            continue  # it takes positions of another form, such as those of images
        low, high = shortest, most  # the embedding is the usual one at `low`, and another one at `high`
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if torch.equal(first_positions(middle), expected) else (low, middle)
        limits.append(low)
    return min(limits, default=None)
