"""Roll out and reward one row of a data set with TRL's own code, drawing from a server instead of a model."""

import copy
import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

import xxhash
from transformers import LlamaConfig, LlamaForCausalLM
from trl import GRPOTrainer

from ..config import TBRMConfig
from ..context import temporarily
from ..sources.records import EXTRA_PREFIX, METRIC_PREFIX
from ..sources.returns import lacking_number, unique_names
from ..sources.reward_calls import REASONS, RewardCalls
from ..sources.rollout import Rewards, trajectories_from_trl
from ..sources.tool_calls import exits_raise
from ..trajectory import Trajectory
from .plan import Plan
from .server import Drawn, Places, Server


@dataclass
class Finished:
    """A drawn and rewarded row.

    Attributes:
        trajectory: its tokens, rewards and versions.
        log_probs: the server's log-probability of each completion token; 0 for tokens a tool or environment inserted.
        prompt: text or messages, as the reward functions got it.
        completion: text or messages, as the reward functions got it.
        logged: its metrics and its extra columns for the table of completions, by column of a record.
    """

    trajectory: Trajectory
    log_probs: list[float]
    prompt: Any
    completion: Any
    logged: dict[str, Any]


class RowDrawer(GRPOTrainer):
    """TRL's trainer, used only to roll out: a row becomes a trajectory as in a run that draws its own rollouts.

    Nothing is trained here. A tiny model stands in for the policy, since TRL reads only its vocabulary size and context
    length. The overridden methods are

    - `_tokenize_prompts`: refuses prompts that are too long, or cuts them;
    - `_generate_single_turn`: asks the server;
    - `_tool_call_loop`: has a tool's exit count as an error;
    - `_calculate_rewards`: keeps the raw rewards and the logged values, and fails as the run's options say;
    - `_get_per_token_logps_and_entropies`: returns nothing, so that no model is run.

    Args:
        plan: the run's plan.
        server: draws the completions.
        places: limits how many requests are at the server at once.
        workspace: folder for the Trainer's own output.
    """

    reward_func_names: list[str]
    _sync_tool_dicts: list[dict[str, Callable[..., Any]]]
    _async_tool_dicts: list[dict[str, Callable[..., Any]]]

    def __init__(self, plan: Plan, server: Server, places: Places, workspace: str):
        args = TBRMConfig(
            workspace, **plan.options, per_device_train_batch_size=1, use_cpu=True, bf16=False, report_to="none",
            disable_tqdm=True, save_strategy="no",
        )  # fmt: skip
        with temporarily(args, beta=0.0):
            super().__init__(
                model=_stand_in(plan),
                reward_funcs=plan.reward_funcs,
                args=args,
                train_dataset=plan.dataset,
                processing_class=plan.processing_class,
                reward_processing_classes=plan.reward_processing_classes,
                tools=plan.tools,
                environment_factory=plan.environment_factory,
            )
        self.reward_func_names = unique_names(self.reward_func_names)
        self.mask_truncated_completions = False
        self.beta = 0.0
        self.plan, self.server, self.places = plan, server, places
        self._drawn: list[Drawn] = []
        self._number = self._prompt_length = 0  # of the row under way
        self._logged: dict[str, Any] = {}
        self.state.max_steps = plan.updates

    def for_one_thread(self) -> "RowDrawer":
        """A drawer for one thread. It shares with this one what no row changes, and has its own copy of the rest."""
        own = copy.copy(self)
        own.state = copy.copy(self.state)
        own._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
        own._pending_metrics, own._pending_extra_logs = defaultdict(list), defaultdict(list)
        own._logs = copy.deepcopy(self._logs)
        own._reward_calls = RewardCalls(self.args.reward_timeout, self.args.reward_of_failure)
        if self.environment_factories is not None:
            own._environment_pool = {name: [] for name in self.environment_factories}
        return own

    def draw(self, number: int, row: Mapping[str, Any]) -> Finished:
        """Roll out and reward a row.

        Args:
            number: the row's number in the run.
            row: the columns of the data set's row that environments and reward functions get.
        """
        self._drawn, self._number = [], number
        self._metrics["train"].clear()
        output = self._generate_and_score_completions([dict(row)])
        first, last = self._drawn[0].version, self._drawn[-1].version
        (trajectory,) = trajectories_from_trl(
            output,
            self._rewards,
            {*self.plan.end_token_ids, self._tokenizer.pad_token_id},
            [number // self.plan.sampler.generations],
            [(first.step, last.step)],
        )
        trajectory.first_policy_version, trajectory.policy_version = first.name, last.name
        log_probs = output["sampling_per_token_logps"][0, : len(trajectory.completion_ids)].tolist()
        return Finished(trajectory, log_probs, self._rewards.prompts[0], self._rewards.completions[0], self._logged)

    def _tokenize_prompts(self, prompts: list[Any]) -> Any:
        prompt_ids, images, multimodal_fields = super()._tokenize_prompts(prompts)
        return self.plan.prompt_limit.applied(prompts, prompt_ids), images, multimodal_fields

    def _generate_single_turn(
        self, prompt_ids, images, multimodal_fields, num_generations, has_tool_images=False
    ) -> tuple[list[list[int]], list[list[float]]]:
        args, (ids,) = self.args, prompt_ids
        if not self._drawn:
            self._prompt_length = len(ids)
        room = args.max_completion_length - (len(ids) - self._prompt_length)  # earlier turns and tool output count too
        if not room:
            return [[]], [[]]
        sampling = {
            "max_tokens": room,
            "temperature": args.temperature,
            "top_p": args.top_p,
            "top_k": args.top_k,
            "min_p": args.min_p or 0.0,
            "repetition_penalty": args.repetition_penalty,
            # Only the run's own end tokens, and no others that the model may ship with.
            "stop_token_ids": self.plan.end_token_ids,
            "ignore_eos": True,
            **self.plan.generation_kwargs,
            # One seed for each turn of each row, so that a restarted actor repeats the same requests.
            "seed": _seed(args.seed, self._number, len(self._drawn)),
        }
        with self.places.held(self._number):
            drawn = self.server.draw(ids, sampling)
        self._drawn.append(drawn)
        self.state.global_step = drawn.version.step
        return [list(drawn.ids)], [list(drawn.log_probs)]

    def _tool_call_loop(self, *args, **kwargs):
        self._sync_tool_dicts = list(map(exits_raise, self._sync_tool_dicts))
        self._async_tool_dicts = list(map(exits_raise, self._async_tool_dicts))
        return super()._tool_call_loop(*args, **kwargs)

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        guarded = list(map(self._reward_calls.guarded, self.reward_funcs, self.reward_func_names))
        with temporarily(self, reward_funcs=guarded):
            rewards_per_func = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)  # (1, F)
        failures = self._reward_calls.taken()
        for failure in failures:
            if self.args.reward_on_error == "raise" or failure.reason == "wrong":
                raise failure.error
        unknown = self._reward_calls.unknown(1, self.reward_func_names, self.reward_weights.tolist())
        if any(unknown) or lacking_number(rewards_per_func, self.reward_weights, self.reward_funcs).any():
            rewards_per_func[:] = math.nan
        failed = {(failure.function, failure.reason) for failure in failures}
        if self.args.reward_on_error != "raise":
            for name, reason in product(self.reward_func_names, REASONS):
                self._pending_metrics[f"rewards/{name}/{reason}"].append(float((name, reason) in failed))
        metrics = {
            METRIC_PREFIX + name: float(sum(values)) / len(values) for name, values in self._pending_metrics.items()
        }
        extra = {EXTRA_PREFIX + name: values[0] for name, values in self._pending_extra_logs.items() if values}
        self._logged = {**metrics, **extra}
        self._rewards = Rewards.of(
            rewards_per_func, self.reward_weights, self.reward_func_names, self.args.reward_pessimism,
            bool(self.tools), inputs, prompts, completions,
        )  # fmt: skip
        return rewards_per_func

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        return None, None, None


def _seed(*numbers: int) -> int:
    return xxhash.xxh3_64_intdigest(str(numbers).encode()) >> 1


def _stand_in(plan: Plan) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=plan.vocabulary,
        hidden_size=2,
        intermediate_size=2,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=plan.context,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=plan.end_token_ids,
    )
    return LlamaForCausalLM(config)
