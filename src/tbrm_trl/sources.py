"""`TrajectorySources`: a GRPOTrainer that makes trajectories of the rows of its data set, rolled out or logged."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel
from trl import GRPOTrainer

from .logged import (
    CompletionTokenizer,
    columns_for_rewards,
    completion_of,
    logged_trajectory,
    row_index,
    tokenize_logged_rows,
)
from .rewards import total_reward
from .rollout import Rewards, trajectories_from_trl
from .sampler import Window, WindowSampler
from .storage import write_trajectories
from .trajectory import Trajectory


class TrajectorySources(GRPOTrainer):
    """Where trajectories come from: rows to roll out, with TRL's generation and rewards, and logged rows.

    The overridden methods are

    - `_get_train_sampler`: two streams of rows, prompts to roll out and logged trajectories;
    - `_calculate_rewards`: keeps the raw rewards, of which TRL only returns normalised advantages;
    - `_get_per_token_logps_and_entropies`: returns nothing, so that TRL runs no old-policy pass.
    """

    train_dataset: Any
    _metrics: Any
    _logs: Any
    _logged: np.ndarray  # (N,) bool, which rows of the training set are logged
    _window_parts: Window
    _prompt_numbers: np.ndarray | None  # (N,) equal for logged rows of one prompt, where these are compared
    _logged_by_row: dict[int, Trajectory]  # those seen so far, with their reference scores
    _logged_bring_scores: bool  # whether the rows themselves hold those

    def _get_train_sampler(self, dataset: Any = None) -> WindowSampler:
        args = self.args
        return WindowSampler(
            self._logged,
            self._window_parts,
            args.num_generations,
            args.world_size,
            args.num_iterations * args.steps_per_generation,
            epoch=lambda: int(self.state.epoch or 0),
            seed=args.seed if self.shuffle_dataset else None,
            together=args.drawn_together,
            prompts=self._prompt_numbers,
        )

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        rewards_per_func = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)  # (N, F)
        if torch.isinf(rewards_per_func).any():
            row, column = torch.isinf(rewards_per_func).nonzero()[0].tolist()
            raise ValueError(
                f"Reward function {self.reward_func_names[column]!r} returned {rewards_per_func[row, column].item()} "
                f"for rollout {row} of {len(rewards_per_func)}. Return a finite number, or None to leave it out."
            )
        mine = slice(self.accelerator.process_index * len(prompts), (self.accelerator.process_index + 1) * len(prompts))
        local = rewards_per_func[mine]  # (B, F) NaN where a function did not apply
        self._rewards = Rewards(
            total_reward(local, self.reward_weights.to(local.device), self.args.reward_pessimism),
            [dict(zip(self.reward_func_names, row, strict=True)) for row in local.tolist()],
            [bool(self.tools and isinstance(one, list) and one[-1].get("tool_calls")) for one in completions],
        )
        return rewards_per_func

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        return None, None, None  # TBRM has no old policy, and scores the reference on trajectories

    def _roll_out(self, rows: list[dict[str, Any]]) -> list[Trajectory]:
        """Generate a completion for every row, and reward it. Only here TRL's dictionary is read."""
        rows = columns_for_rewards(rows)
        output = self._generate_and_score_completions(rows)
        per_prompt = self.num_generations if self.model.training else self.num_generations_eval
        first = self.accelerator.process_index * len(rows)
        step = self.state.global_step
        groups = [step * self.args.generation_batch_size + (first + i) // per_prompt for i in range(len(rows))]
        return trajectories_from_trl(output, self._rewards, self._end_token_ids(), groups, step)

    def sample(self, rows: list[dict[str, Any]]) -> list[Trajectory]:
        """Roll out rows of the training set before training, on every process equally many; nothing of it is logged."""
        kept = copy.deepcopy((self._metrics, self._logs, self.state.num_input_tokens_seen))
        self.model.train()
        try:
            return self._roll_out(rows)
        finally:
            self._metrics, self._logs, self.state.num_input_tokens_seen = kept

    def _save_rollouts(self, trajectories: list[Trajectory]) -> None:
        def texts(ids: str) -> list[str]:
            return self._tokenizer.batch_decode([getattr(t, ids) for t in trajectories], skip_special_tokens=True)

        name = f"step-{self.state.global_step:08d}-process-{self.accelerator.process_index}.parquet"
        write_trajectories(
            Path(self.args.output_dir) / "rollouts" / name,
            trajectories,
            {"prompt": texts("prompt_ids"), "completion": texts("completion_ids")},
        )

    def _take_logged(self, rows: list[dict[str, Any]]) -> list[Trajectory]:
        """The logged trajectories of these rows, each the same object whenever its row comes up again."""
        if self._logged_bring_scores:  # the data set holds all there is to know
            trajectories = [logged_trajectory(row) for row in rows]
        else:
            for row in rows:
                if row_index(row) not in self._logged_by_row:
                    self._logged_by_row[row_index(row)] = logged_trajectory(row)
            trajectories = [self._logged_by_row[row_index(row)] for row in rows]
            # Where the stream begins anew within a window, a row may stand in it twice, in two groups.
            first = {id(one): place for place, one in reversed(list(enumerate(trajectories)))}
            trajectories = [one if first[id(one)] == i else replace(one) for i, one in enumerate(trajectories)]
        if self._some_logged_unrewarded:
            prompts, completions = zip(*(completion_of(row, self._tokenizer) for row in rows), strict=True)
            ids = [t.completion_ids.tolist() for t in trajectories]
            self._calculate_rewards(columns_for_rewards(rows), list(prompts), list(completions), ids)
            # What the functions log is of rollouts: TRL would count this among the next ones.
            self._pending_metrics.clear()
            self._pending_extra_logs.clear()
            for row, trajectory, reward in zip(rows, trajectories, self._rewards.total.tolist(), strict=True):
                if row.get("reward") is None:
                    trajectory.reward = reward
        return trajectories

    def _tokenize_logged_rows(self, policy: PreTrainedModel) -> None:
        """Give the logged rows of the training set the columns of their trajectories."""
        text_config = policy.config.get_text_config()
        tokenize = CompletionTokenizer(
            self._tokenizer,
            self._end_token_ids(),
            prompt_ids=lambda prompt: list(self._tokenize_prompts([prompt])[0][0]),
            template=self._render_messages,
        )
        self.train_dataset = tokenize_logged_rows(
            self.train_dataset,
            self._logged,
            tokenize,
            text_config.vocab_size,
            getattr(text_config, "max_position_embeddings", None),
        )
        given = self.train_dataset["reward"] if "reward" in self.train_dataset.column_names else [None]
        self._some_logged_unrewarded = any(
            reward is None for reward, logged in zip(itertools.cycle(given), self._logged, strict=False) if logged
        )

    def _render_messages(self, messages: list[dict[str, Any]], open_turn: bool) -> list[int]:
        rendered = self.processing_class.apply_chat_template(
            conversation=[messages],
            tools=self.tools or None,
            chat_template=self.chat_template,
            add_generation_prompt=open_turn,
            tokenize=True,
            return_dict=True,
            **self.chat_template_kwargs,
        )
        return list(rendered["input_ids"][0])

    def _end_token_ids(self) -> set[int]:
        return {*self.eos_token_ids, self._tokenizer.pad_token_id}


def no_reward(**kwargs: Any) -> list[float]:
    """Stands in where every trajectory brings its reward, since TRL wants a function."""
    raise RuntimeError("There is no reward function to reward a rollout: pass `reward_funcs`.")
