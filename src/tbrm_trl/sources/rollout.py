"""From TRL's generation dictionary to trajectories: the one place that reads TRL's keys."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from trl.trainer.utils import split_pixel_values_by_grid

from ..batch import PER_TOKEN_INPUTS
from ..trajectory import End, Trajectory

VISION_INPUTS = (
    "pixel_values",
    "image_grid_thw",
    "image_sizes",
    "pixel_attention_mask",
    *PER_TOKEN_INPUTS,
)


@dataclass
class Rewards:
    """The verdicts of the reward functions on this process's rows.

    Attributes:
        total: `(B,)` weighted sum over the functions that applied; NaN if none did.
        by_function: per row, the raw reward by function's name; NaN if it did not apply.
        tool_limit: per row, whether its last message calls a tool that was not run any more.
        rows: what the functions were given of the data set's rows.
        prompts: what they were given, text or messages.
        completions: what they were given, text or messages.
    """

    total: Tensor
    by_function: list[dict[str, float]]
    tool_limit: list[bool]
    rows: Sequence[dict[str, Any]]
    prompts: Sequence[Any]
    completions: Sequence[Any]


def trajectories_from_trl(
    output: dict[str, Any], rewards: Rewards, end_token_ids: Collection[int], group_ids: Sequence[int], policy_step: int
) -> list[Trajectory]:
    """Unpad what `GRPOTrainer._generate_and_score_completions` returned.

    Args:
        output: the dictionary that it returned, with prompts padded on the left and completions on the right.
        rewards: the rewards of these rows.
        end_token_ids: tokens that end a completion (TRL counts the padding token among them).
        group_ids: per row, the number that rollouts of one prompt share.
        policy_step: number of updates that the policy had made.
    """
    # Idefics pads images to one entry per sample. These need no split, but TRL would split them if there are as many
    # images as samples.
    if "pixel_attention_mask" not in output:
        output = split_pixel_values_by_grid(output)
    prompt_mask, completion_mask = output["prompt_mask"].bool().cpu(), output["completion_mask"].bool().cpu()
    prompt_ids, completion_ids = output["prompt_ids"].cpu(), output["completion_ids"].cpu()
    loss_mask = completion_mask if "tool_mask" not in output else completion_mask & output["tool_mask"].bool().cpu()

    def vision_of(row: int) -> dict[str, Tensor]:
        inputs = {}
        for name in VISION_INPUTS:
            if name not in output:
                continue
            value = output[name]
            if name in PER_TOKEN_INPUTS:
                value = value[row].cpu()[torch.cat([prompt_mask[row], completion_mask[row]])]
            elif isinstance(value, list):  # TRL split it by rows
                value = value[row].cpu()
            else:  # one entry per sample: only padding if the sample has no image
                value = value[[row] if output["num_images"][row] else []].cpu()
            inputs[name] = value
        return inputs

    trajectories = []
    for row, reward in enumerate(rewards.total.tolist()):
        completion = completion_ids[row][completion_mask[row]]
        end = End.EOS if int(completion[-1]) in end_token_ids else End.LENGTH
        trajectories.append(
            Trajectory(
                prompt_ids=prompt_ids[row][prompt_mask[row]],
                completion_ids=completion,
                loss_mask=loss_mask[row][completion_mask[row]],
                reward=reward,
                end=End.TOOL_LIMIT if end is End.EOS and rewards.tool_limit[row] else end,
                rewards=rewards.by_function[row],
                group_id=group_ids[row],
                policy_step=policy_step,
                vision=vision_of(row),
            )
        )
    return trajectories
