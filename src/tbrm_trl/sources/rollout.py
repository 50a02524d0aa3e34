"""Turns TRL's generation dictionary into trajectories. No other module reads TRL's keys."""

import functools
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from trl.trainer.utils import split_pixel_values_by_grid

from ..batch import PER_TOKEN_INPUTS
from ..trajectory import End, Trajectory
from .returns import total_reward

VISION_INPUTS = (
    "pixel_values",
    "image_grid_thw",
    "image_sizes",
    "pixel_attention_mask",
    *PER_TOKEN_INPUTS,
)


@dataclass
class Rewards:
    """What the reward functions were given for this process's rows, and what they returned.

    Attributes:
        total: `(B,)` weighted sum over the functions that applied; NaN if none did.
        by_function: per row, each function's raw reward by name; NaN if it did not apply.
        tool_limit: per row, whether its last message calls a tool that was not run.
        rows: the data set's rows, as the functions were given them.
        prompts: text or messages, as the functions were given them.
        completions: text or messages, as the functions were given them.
    """

    total: Tensor
    by_function: list[dict[str, float]]
    tool_limit: list[bool]
    rows: Sequence[dict[str, Any]]
    prompts: Sequence[Any]
    completions: Sequence[Any]

    @classmethod
    def of(
        cls,
        raw: Tensor,
        weights: Tensor,
        names: Sequence[str],
        pessimism: float,
        has_tools: bool,
        rows: Sequence[dict[str, Any]],
        prompts: Sequence[Any],
        completions: Sequence[Any],
    ) -> "Rewards":
        """Build it from the raw rewards `(B, F)` and the functions' weights `(F,)` and names."""
        return cls(
            total_reward(raw, weights.to(raw.device), pessimism),
            [dict(zip(names, row, strict=True)) for row in raw.tolist()],
            [bool(has_tools and isinstance(one, list) and one[-1].get("tool_calls")) for one in completions],
            rows,
            prompts,
            completions,
        )


def checked_rollouts(rollout_func: Callable[[list[Any], Any], dict[str, Any]]) -> Callable:
    """Wrap a user's rollout function so that it refuses rows that no policy could have produced.

    Raises:
        ValueError: for a row without tokens, with a token outside the vocabulary, with a mask of another length, or
            with an action after an action that ended the completion. The message names the row.
    """

    @functools.wraps(rollout_func)
    def rollout(prompts: list[Any], trainer: Any) -> dict[str, Any]:
        output = rollout_func(prompts, trainer)
        vocabulary, ends = trainer.model.config.get_text_config().vocab_size, set(trainer.eos_token_ids)
        rows = zip(output["prompt_ids"], output["completion_ids"], strict=True)
        for row, (prompt_ids, ids) in enumerate(rows):
            mask = output["env_mask"][row] if output.get("env_mask") is not None else [1] * len(ids)
            if problem := _problem_of_rollout(prompt_ids, ids, mask, vocabulary, ends):
                raise ValueError(f"`rollout_func` returned for row {row} of {len(prompts)} {problem}")
        return output

    return rollout


def _problem_of_rollout(
    prompt_ids: Sequence[int], ids: Sequence[int], mask: Sequence[int], vocabulary: int, ends: Collection[int]
) -> str | None:
    if not (len(prompt_ids) and len(ids)):
        return f"no token in `{'completion_ids' if len(prompt_ids) else 'prompt_ids'}`. A policy draws at least one."
    if (outside := next((int(one) for one in (*prompt_ids, *ids) if not 0 <= one < vocabulary), None)) is not None:
        return f"the token {outside}, outside of the policy's vocabulary of {vocabulary}."
    if len(mask) != len(ids):
        return f"{len(mask)} entries of `env_mask` for {len(ids)} completion ids. It needs one per id."
    for place in range(len(ids) - 1):
        if int(ids[place]) in ends and mask[place] and mask[place + 1]:
            return (
                f"the end token {int(ids[place])} at {place} of {len(ids)}, and an action after it. Cut padding off, "
                "and set `env_mask` to 0 where a tool or environment inserted tokens."
            )
    return None


def trajectories_from_trl(
    output: dict[str, Any],
    rewards: Rewards,
    end_token_ids: Collection[int],
    group_ids: Sequence[int],
    policy_steps: Sequence[tuple[int, int]],
) -> list[Trajectory]:
    """Unpad what `GRPOTrainer._generate_and_score_completions` returned.

    Args:
        output: that dictionary, with prompts padded on the left and completions on the right.
        rewards: the rewards of these rows.
        end_token_ids: tokens that end a completion (TRL counts the padding token among them).
        group_ids: per row, the number that rollouts of one prompt share.
        policy_steps: per row, the number of updates the policy had made at its first token and at its last.
    """
    # Idefics pads images to one entry per sample. They need no split, but TRL would split them if there are as many
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
                policy_step=policy_steps[row][1],
                first_policy_step=policy_steps[row][0],
                vision=vision_of(row),
            )
        )
    return trajectories
