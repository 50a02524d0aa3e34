"""`TBRMTrainer`: collect trajectories, score them, take a step on their squared Bellman residual.

One update, in order; each name is a method here, or of the object it is called on:

    _prepare_inputs            called for each micro-step of the Trainer; at the first of an update:
        _collect                   the update's rows: the next part of the window, or a sample of the replay buffer
            _new_window                rows become trajectories: `_roll_out` or `_follow`, and `LoggedRows.take`
            _score_stale               π_ref scores those that it has not scored: log π_ref(τ) and V_ref(s_1)
        _microbatches_of           rows of similar length share a forward pass, equally many of them on every process
    _compute_loss              for each micro-batch:
        _score                     one forward pass of the policy: log π_θ(τ), V_θ(s_1), entropies
        TrajectoryLoss             soft value → residual → squared, plus the added terms
    _get_grad_norm             takes the update, or skips one that is not finite
    log                        the means of `microbatch_totals` over the updates since the last log
"""

import copy
import json
import math
import sys
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property, partial
from importlib.metadata import version
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import xxhash
from accelerate.logging import get_logger
from accelerate.utils import DistributedType, broadcast_object_list, gather_object, is_peft_model, set_seed
from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_utils import has_length
from transformers.utils import is_rich_available
from trl import GRPOTrainer
from trl.models import prepare_deepspeed
from trl.trainer import grpo_trainer
from trl.trainer.grpo_trainer import RolloutFunc
from trl.trainer.utils import (
    add_fused_lm_head,
    create_model_from_path,
    get_config_model_id,
    nanstd,
    print_prompt_completions_sample,
)

from .actor.child import ActorProcess
from .actor.plan import OF_A_ROW, OPTIONS, Plan
from .batch import Batch, MicrobatchSize, TrajectoryScores, chunks, collate, float_tensor, random_order
from .checks.advice import (
    startup_line,
    warn_of_double_bos,
    warn_of_empty_update,
    warn_of_finished_schedule,
    warn_of_shipped_sampling,
)
from .checks.data import (
    best_metric,
    check_best_metric,
    check_chat_template,
    check_dataset,
    check_empty_prompts,
    check_evaluation_batches,
    check_evaluation_sets,
    check_evaluation_stream,
    check_followed,
    check_sources_of_vision,
    check_training_set,
    columns_read,
    is_logged,
    logged_stream,
    problem_of_logged_row,
    problem_of_prompt,
    titled_sets,
)
from .checks.first_window import FirstWindow, Seen, advice
from .checks.launch import check_devices, check_sharding
from .checks.model import (
    check_adapters,
    check_backend,
    check_float32_head,
    check_head,
    check_length,
    check_logits,
    check_packing,
    check_pool,
    check_quantization,
    check_reference_model,
    check_shipped_ends,
    check_start,
    check_trainable,
    check_vision,
    computes_in_half,
    require_equal_weights,
    rows_of_text,
    warn_of_half_precision,
    warn_of_merging,
)
from .checks.options import check_report_to
from .checks.rewards import check_reward_arguments, start_workers
from .completions_table import CompletionsTable
from .config import TBRMConfig
from .context import loading, temporarily
from .files import dataset_digest, plain, require_writable, source_of
from .loss.finite import voided_unless
from .loss.metrics import (
    Recorder,
    Totals,
    evaluated_numbers,
    evaluation_loss,
    evaluation_metrics,
    microbatch_totals,
)
from .loss.residual import mean_over_counted
from .loss.soft_value import Run, SoftValue
from .loss.soft_value.sampled import SampledValue
from .loss.trajectory_loss import TrajectoryLoss
from .model import publisher
from .model.decoding import Slots, draws_one_token, frozen_casts_kept, sample
from .model.head import add_trajectory_head, keep_head_in_float32
from .model.publisher import Publisher, Version, say_base, write_base
from .model.randomness import disable_randomness, keep_weights_unpacked
from .model.reference import (
    ADAPTER,
    PreviousPolicy,
    Reference,
    SyncReference,
    adapter_settings,
    add_reference_adapter,
    in_use,
    keep_precision_of_scores,
    score_reference,
    shard_by_layer,
    tokenizer_digest,
)
from .model.replicated import ReplicatedModules
from .model.rotary import rotary_limit
from .model.scoring import score
from .model.value_head import Offset, ValueHead
from .options import refuse
from .printing import printable
from .processes import failing_together
from .publishing import CardFacts, keep_at_home, model_card
from .resume import ExactResume, RunState, complete_checkpoints
from .resume.checkpoint import load_values, process_folder, read_mark, updates_before
from .resume.finite import tensors_of_model
from .run_log import LOG, SKIPPED, Stopwatch, append_line, append_update, go_back
from .skipped_updates import SkippedUpdates, write_culprits
from .sources.baselines import Baselines
from .sources.bounds import Bounds
from .sources.logged import (
    CompletionTokenizer,
    LoggedRows,
    as_messages,
    columns_for_rewards,
    completion_of,
    logged_trajectory,
    own_columns,
    scratch_folder,
    some_unrewarded,
    tokenize_logged_rows,
    trajectory_columns,
)
from .sources.pool import PoolRow, RolloutPool
from .sources.prompts import PromptRenderer, fitting_prompts, text_of
from .sources.records import EXTRA_PREFIX, METRIC_PREFIX, Record, RecordFolder, Taken
from .sources.reference_scores import precompute_scores
from .sources.replay import ReplayBuffer
from .sources.returns import check_magnitude, lacking_number, total_reward, unique_names
from .sources.reward_calls import REASONS, Failure, RewardCalls
from .sources.rollout import Rewards, checked_rollouts, trajectories_from_trl
from .sources.sampler import DataPlan, WholeStream, WindowSampler
from .sources.saved_rollouts import merge_rollouts, rewind_rollouts, rollout_files, rollouts_file, save_rollouts
from .sources.tool_calls import exits_raise
from .trajectory import End, Source, Trajectory, UpdateRow, check_groups, check_scores, largest_return

logger = get_logger(__name__)

_SHORT_TEXT = "The sum of 12 and 30 is 42, and what is left of it after 2 is taken away is 40."  # without a prompt
# What TRL keeps in order to log completions; images are not saved.
_COMPLETIONS = ("prompt", "completion", "rewards", "extra")


class TBRMTrainer(ExactResume, GRPOTrainer):
    """
    Trainer for Trajectory Bellman Residual Minimization (TBRM, arXiv 2505.15311).

    The model's logits are Q-values, `V_θ(s) = logsumexp(logits)`, and each trajectory gives one residual

        δ = V_θ(s_1) + Σ_h m_h (log π_θ − log π_ref) − R/β,        loss = mean of (β δ)².

    Another `soft_value` in place of V_θ(s_1) gives another published method. There is no critic, importance ratio,
    clipping or group. One rollout per prompt suffices, and trajectories may come from anywhere: rollouts of this
    policy, a replay buffer of them, or rows of the data set with a completion. The trainer inherits everything else
    from `GRPOTrainer` (models, reward functions, prompts, tools, environments, vision, vLLM, logging, evaluation). The
    overridden methods are

    - `_get_train_sampler`: samples two streams of rows, prompts to roll out and logged trajectories;
    - `_get_dataloader`: has every process read a training stream whole, also one of several files;
    - `_tokenize_prompts`: refuses prompts that are too long, or cuts them;
    - `_generate_single_turn`: decodes no row that has ended, and with a `rollout_pool` decodes others in its place;
    - `_tool_call_loop`: has a tool's exit count as an error, and all processes take part in every turn where one cannot
      generate alone;
    - `_calculate_rewards`: keeps the raw rewards, since TRL only returns normalised advantages;
    - `_get_per_token_logps_and_entropies`: returns nothing, so that TRL runs no old-policy pass;
    - `_prepare_inputs`: collects the trajectories of an optimizer step, and scores them with the reference;
    - `_compute_loss`: computes the residual, one micro-batch after the other;
    - `_get_grad_norm`: takes the update, or skips it if its loss or gradient is not finite;
    - `_finalize_training`: refuses to end a run whose stream filled no window;
    - `evaluate`, `predict`: mark that an evaluation is under way;
    - `evaluation_loop`: averages metrics over the rows of the set, under the set's own name;
    - `_load_best_model`: has vLLM take the weights anew;
    - `log`: adds the residual's metrics to TRL's, and `β δ` to its table of completions;
    - `create_model_card`: writes the card of `publishing.py`, and lists what is not pushed;
    - the methods of [`~resume.ExactResume`].

    Example:

    ```python
    from datasets import Dataset
    from tbrm_trl import TBRMConfig, TBRMTrainer

    def reward(completions, answer, **kwargs):
        return [float(a in c) for c, a in zip(completions, answer)]

    trainer = TBRMTrainer(
        model="Qwen/Qwen2.5-0.5B",
        reward_funcs=reward,
        args=TBRMConfig(output_dir="out"),
        train_dataset=Dataset.from_list([{"prompt": "2 + 2 =", "answer": "4"}] * 64),
    )
    trainer.train()
    ```

    Args:
        model: id, folder, `PreTrainedModel` or `PeftModel` of the policy. The reference is the model as it is given.
        reward_funcs: as in `GRPOTrainer`; R is the weighted sum of the raw rewards. It may be omitted if every row of
            the training set has a completion and a reward.
        args: [`TBRMConfig`]; its defaults when omitted.
        train_dataset: as in `GRPOTrainer`, with a column `prompt`. A row with a `completion` (text or messages), or
            with `prompt_ids` and `completion_ids` (and `loss_mask`), is a logged trajectory. It is trained on without
            being generated again. Its return is its `reward`; if that is None, the reward functions compute it. The
            data set may be omitted with `follow_rollouts`.
        reference_model: id, folder or `PreTrainedModel` of the reference π_ref of a full model. By default π_ref is
            `model` as it is given. With this argument, a run that continues from another run's weights keeps that run's
            reference.
        eval_dataset, processing_class, reward_processing_classes, callbacks, optimizers, quantization_config,
            peft_config, tools, rollout_func, environment_factory: as in `GRPOTrainer`.

    Raises:
        TypeError: if `args` is not a `TBRMConfig`.
        ValueError: for a data set smaller than one generation, a logged row that cannot be trained on, an adapter with
            dropout, and options that do not go together.
        RuntimeError: if logged rows are to be scored while another run is under way in `output_dir`.
    """

    _tag_names: ClassVar = ["trl", "tbrm"]
    _name = "TBRM"
    _paper: ClassVar = {
        "title": "Trajectory Bellman Residual Minimization: A Simple Value-Based Method for LLM Reasoning",
        "id": "2505.15311",
        "citation": textwrap.dedent("""\
            @inproceedings{yuan2025trajectory,
                title        = {{Trajectory Bellman Residual Minimization}: A Simple Value-Based Method for {LLM}
                                Reasoning},
                author       = {Yurun Yuan and Fan Chen and Zeyu Jia and Alexander Rakhlin and Tengyang Xie},
                booktitle    = {Advances in Neural Information Processing Systems},
                year         = 2025,
                eprint       = {arXiv:2505.15311},
            }"""),
    }

    args: TBRMConfig
    control: Any
    ref_model: nn.Module | None
    train_dataset: Any
    reward_func_names: list[str]
    _metrics: Any
    _logs: Any
    _sync_tool_dicts: list[dict[str, Callable[..., Any]]]
    _async_tool_dicts: list[dict[str, Callable[..., Any]]]

    def __init__(
        self,
        model: str | PreTrainedModel | Any,
        reward_funcs: Any = None,
        args: TBRMConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        reward_processing_classes: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
        tools: list[Callable] | None = None,
        rollout_func: RolloutFunc | None = None,
        environment_factory: Any = None,
        reference_model: str | PreTrainedModel | None = None,
    ):
        if isinstance(model, PathLike):
            model = str(model)
        if isinstance(reference_model, PathLike):
            reference_model = str(reference_model)
        if args is None:
            name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = TBRMConfig(f"{name.split('/')[-1]}-TBRM")
        if not isinstance(args, TBRMConfig):
            raise TypeError(f"`args` must be a TBRMConfig, got {type(args).__name__}.")
        if train_dataset is None and args.draws_prompts and callable(environment_factory) and args.max_steps > 0:
            # The environment gives the prompts, as with TRL's placeholder.
            empty = [{"role": "user", "content": ""}]
            train_dataset = Dataset.from_dict({"prompt": [empty] * args.generation_batch_size})
        self._has_prompts = isinstance(train_dataset, Dataset)
        if train_dataset is None and not args.draws_prompts:
            # TRL's loader counts windows by this data set. Its rows are not used.
            train_dataset = Dataset.from_dict({"prompt": ["followed"] * args.generation_batch_size})

        # Check the arguments before anything is loaded.
        planned = partial(
            check_training_set,
            args=args,
            group_size=args.window_group_size,
            rewarded=bool(reward_funcs or environment_factory),
            evaluated=eval_dataset is not None,
            environment=environment_factory is not None,
        )
        self._plan = planned(train_dataset)
        check_evaluation_sets(eval_dataset, environment_factory is None, args.world_size)
        self._check_reward_functions(reward_funcs, train_dataset, eval_dataset, args, environment_factory, rollout_func)
        if args.followed_folder is not None:
            check_followed(args, train_dataset, self._plan.mix, rollout_func)
        if isinstance(train_dataset, Dataset) and self._plan.mix.logged:
            train_dataset = train_dataset.with_format(None)  # rows are read as plain values, not as tensors
        self._soft_value = SoftValue.registry[args.soft_value](args)
        self._soft_value.check_data(train_dataset, self._plan.logged)
        check_best_metric(args, eval_dataset, callbacks, getattr(self._soft_value, "column", None))
        check_adapters(model, peft_config, args)
        check_float32_head(model, args)
        check_quantization(model, peft_config, quantization_config, args)
        samples = isinstance(self._soft_value, SampledValue) and self._soft_value.samples(train_dataset)
        check_reference_model(reference_model, model, peft_config, args, samples)
        refuse([*check_devices(args), *check_report_to(args)])
        if args.should_save:
            require_writable(Path(args.output_dir), "`output_dir`")
        if isinstance(train_dataset, Dataset) and self._plan.mix.logged:
            self._scratch = scratch_folder(train_dataset)
        renderer = PromptRenderer(model, processing_class, args, tools, environment_factory or rollout_func)
        sets = [train_dataset, *titled_sets(eval_dataset).values()]
        generates = (args.draws_prompts and bool(self._plan.mix.rollouts)) or eval_dataset is not None
        self._prompt_limit = renderer.limit(sets, generates)
        fitted = self._with_fitting_prompts(train_dataset, "the training set", ~self._plan.logged, renderer)
        if fitted is not train_dataset:
            train_dataset, self._plan = fitted, planned(fitted)
        eval_dataset = self._with_fitting_evaluation(eval_dataset, renderer)

        # Build.
        evaluates_itself = eval_dataset is None and _evaluates(callbacks)
        with (
            _what_trl_sees(model, args, reference_model, evaluates_itself),
            temporarily(grpo_trainer, prepare_fsdp=shard_by_layer),
            self._adapter_served(model, peft_config, args),
        ):
            super().__init__(
                model=model,
                reward_funcs=_own(reward_funcs) if generates else reward_funcs or _no_reward,
                args=args,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=renderer.processing_class,
                reward_processing_classes=_own(reward_processing_classes),
                callbacks=callbacks,
                optimizers=optimizers,
                quantization_config=quantization_config,
                peft_config=peft_config,
                tools=tools,
                rollout_func=rollout_func and checked_rollouts(rollout_func),
                environment_factory=environment_factory,
            )
        self._undo_trl()
        self._has_new_adapter = peft_config is not None
        if reference_model is not None:
            self.ref_model = self._load_reference(reference_model)

        policy = self.model.get_base_model() if is_peft_model(self.model) else self.model
        self._check_what_was_built(model if reference_model is None else None, policy)
        self._teach_to_score(policy)

        # What a run is made of.
        self.evaluating = self._prompts_are_rolled_out = self._judges_log = False
        self._evaluated: list[Tensor] = []  # the rows' numbers for metrics, by batch of the current evaluation
        self._rows_to_evaluate: int | None = None
        self._given_dataset = train_dataset
        self._offset = Offset() if args.soft_value_offset else None
        self._loss = TrajectoryLoss(args, self._soft_value, self._offset, router_loss=self.aux_loss_enabled)
        self._recorder, self._stopwatch = Recorder(), Stopwatch()
        self._reward_calls = RewardCalls(args.reward_timeout, args.reward_of_failure)
        self._completions = CompletionsTable(args.generation_batch_size // args.world_size)
        self._baselines = Baselines(args.baseline, args.rewards_that_count, args.replay_buffer_size)
        self._replay = self._make_replay_buffer()
        self._reference = self._make_reference()
        self._logged_rows = self._make_logged_rows(policy) if self._plan.mix.logged else None
        self._trained_modules: ReplicatedModules | None = None
        self._pool: RolloutPool | None = None
        self._shares_turns = False  # whether the rows of a turn are divided among all processes
        self._drawn: list[PoolRow] | None = None  # rows that the pool drew for the window; None if it does not draw
        self._followed = self._make_followed(policy) if args.followed_folder is not None else None
        self._given_rewards: Tensor | None = None  # (B, F) rewards of followed rollouts
        self._reward_totals = torch.zeros(0)  # (N,) of the rollouts that TRL scored last, on all processes
        served = args.publishes_policy or (args.draws_from_server and is_peft_model(self.model))
        self._publisher = self._make_publisher() if served else None
        self._window_version: str | None = None  # `_policy_version` when the followed window was taken

        # Where it stands.
        self._window: list[Trajectory] = []  # of the current generation window, on this process
        self._microbatches: list[list[UpdateRow]] = []  # of the current update, on this process
        self._denominator = 0  # of the loss: trajectories that count in the current update, over all processes
        self._scored: list[tuple[list[UpdateRow], Tensor, Tensor, Tensor]] = []  # rows; loss, β δ, β V: (B,)
        self._totals = Totals()  # of the current update, over all processes
        self._loss_before = 0.0  # the Trainer's sum of losses since the last log, before the current update
        self._skipped = SkippedUpdates(args.max_skipped_updates)
        self._skipped_before = 0  # updates skipped before this call of `train`
        self._rows_drawn = self._rows_trained = 0  # this process's rows: drawn into windows, trained on in updates
        self._was_advised = False
        given = (train_dataset, *titled_sets(eval_dataset).values())
        self._streams_may_double_bos = any(isinstance(one, IterableDataset) for one in given)
        # True until the first update has checked it. With "previous", logged rows may have another policy's scores.
        self._starts_at_reference = reference_model is None and args.reference == "initial"

        # What may already draw: the estimator its samples, the actor the first window.
        run: Run = self
        self._soft_value.attach(run)
        if self._offset is not None:
            self.train_module(self._offset, args.soft_value_learning_rate)
        self._check_pool(policy)
        given_functions = dict(
            reward_funcs=reward_funcs,
            reward_processing_classes=reward_processing_classes,
            tools=tools,
            environment_factory=environment_factory,
        )
        self._actor = self._make_actor(policy, given_functions)
        sampler = self._get_train_sampler() if isinstance(train_dataset, Sized) else None
        self.accelerator.print(startup_line(self._plan.mix, args, sampler))

    def _adapter_served(self, model: Any, peft_config: Any, args: TBRMConfig) -> AbstractContextManager[None]:
        """Inside the block, let TRL build a `ServedAdapter` if a vLLM server generates for a policy with an adapter."""
        has_adapter = peft_config is not None or (not isinstance(model, str) and is_peft_model(model))
        if not (has_adapter and args.draws_from_server):
            return nullcontext()
        from .model.served_adapter import ServedAdapter  # TRL's client needs vLLM

        folder = Path(args.output_dir) / publisher.FOLDER

        def publish() -> Version:
            assert self._publisher is not None
            if args.publishes_policy and self._publisher.latest is not None:
                return self._publisher.latest
            return self._publisher.publish(self.state.global_step)

        def write(policy: Any) -> None:
            if getattr(policy, "is_loaded_in_4bit", False):
                say_base(write_base(folder, policy, self.processing_class))

        made = partial(ServedAdapter, publish=publish, folder=folder, before=write)
        return temporarily(grpo_trainer, VLLMGeneration=made)

    def _make_publisher(self) -> Publisher:
        args = self.args
        folder, kept = Path(args.output_dir) / publisher.FOLDER, args.max_staleness + 1
        published = Publisher(folder, lambda: self.model_wrapped, self.accelerator, kept, self._probe_ids())
        if args.publishes_policy:
            self.add_callback(published)
        return published

    def _redraw_what_changed(self, checkpoint: str, folder: RecordFolder) -> None:
        """Drop the rollouts that this run's actor drew ahead under other rewards or options. They are drawn again."""
        if self._actor is None:
            return
        before, now = read_mark(Path(checkpoint)).get("settings", {}), plain(self._described["settings"])
        rollouts = (name for name in self.rollout_settings if name != "rewards")
        decisive = ("reward functions", *rollouts, *OF_A_ROW, "generation_kwargs", "max_prompt_length", "long_prompts")
        changed = [name for name in decisive if name in before and name in now and before[name] != now[name]]
        windows, unfinished = folder.untaken(), self._actor.unfinished
        if not changed or not (windows or unfinished):
            return
        ahead = (
            f"Since {Path(checkpoint).name} was written, {', '.join(changed)} changed. {len(windows)} windows in "
            f"{folder.folder}, and rows of {len(unfinished)} others, had been drawn ahead: they "
        )
        if self._actor.starts:
            logger.warning(ahead + "are dropped and drawn anew.")
            self._actor.drop(windows)
        else:
            logger.warning(
                ahead + "are trained on as they are. To have them drawn anew, stop the run and the actor, remove the "
                f"windows from {windows[0].name if windows else 'the next one'} on and "
                f"{self._actor.unfinished_folder}, and start both again."
            )

    def _make_actor(self, policy: PreTrainedModel, functions: Mapping[str, Any]) -> ActorProcess | None:
        """Make the callback that writes an actor's plan, and starts the actor with `rollouts="async"`."""
        args, output_dir = self.args, Path(self.args.output_dir)
        folder = output_dir / publisher.FOLDER
        records = args.followed_folder
        if not args.publishes_policy or records is None or not self._has_prompts:
            return None
        quantized = getattr(policy, "is_loaded_in_4bit", False)
        base = str((folder / publisher.BASE).absolute()) if quantized else get_config_model_id(policy.config)
        with failing_together():
            if quantized and self.accelerator.is_main_process:  # now, before the policy is sharded
                say_base(write_base(folder, policy, self._tokenizer))

        def plan(updates: int, made: int) -> Plan:
            sampler, per_window = self._get_train_sampler(), args.fresh_updates * args.num_iterations
            return Plan(
                options={name: getattr(args, name) for name in OPTIONS},
                generation_kwargs=args.generation_kwargs or {},
                dataset=self.train_dataset,
                sampler=sampler,
                bounds=Bounds(sampler.mix.rollouts, args.fresh_updates, per_window, args.max_staleness),
                windows=range(-(-made // per_window), -(-updates // per_window)),
                updates=updates,
                hidden=self._hidden_columns(bool(self._plan.mix.logged)),
                processing_class=self.processing_class,
                prompt_limit=self._prompt_limit,
                end_token_ids=list(self.eos_token_ids),
                vocabulary=policy.config.get_text_config().vocab_size,
                context=getattr(policy.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize,
                base=base,
                records=records.absolute(),
                patience=args.follow_timeout,
                server=args.async_server,
                **functions,
            )

        actor = ActorProcess(output_dir, records, plan, starts=args.rollouts == "async")
        self.add_callback(actor)
        return actor

    def _probe_ids(self) -> list[int]:
        """A short text as token ids, from this run's data if possible.

        A server's answer to it shows whether the server serves this policy.
        """
        texts = [_SHORT_TEXT]
        if isinstance(self.train_dataset, Dataset) and "prompt" in self.train_dataset.column_names:
            texts = [text_of(self.train_dataset[0]["prompt"]), *texts]
        some = (self._tokenizer(text=text, add_special_tokens=False)["input_ids"][:32] for text in texts)
        return next((ids for ids in some if len(ids) > 1), [])

    def _with_fitting_prompts(self, dataset: Any, title: str, asked: np.ndarray, renderer: PromptRenderer) -> Any:
        """Check a data set's prompts, and return it. Prompts that are too long are dropped, refused or left to be cut.

        Streams, and prompts with images or from environments, are checked when they are drawn.
        """
        if not isinstance(dataset, Dataset) or "prompt" not in dataset.column_names:
            return dataset
        check_chat_template(dataset, title, getattr(renderer.processing_class, "chat_template", None))
        asked = np.broadcast_to(asked, len(dataset))  # logged rows are checked when they are tokenized
        check_empty_prompts(dataset, title, asked, renderer.tokenizer)
        if not renderer.is_exact:
            return dataset
        return fitting_prompts(dataset, title, asked, self._prompt_limit, renderer)

    def _with_fitting_evaluation(self, eval_dataset: Any, renderer: PromptRenderer) -> Any:
        """Check the prompts of the evaluation set, or of each in a mapping of sets, and return what was given."""
        fitted = [
            self._with_fitting_prompts(one, title, np.ones(1, bool), renderer)
            for title, one in titled_sets(eval_dataset).items()
        ]
        if isinstance(eval_dataset, Mapping):
            return dict(zip(eval_dataset, fitted, strict=True))
        return fitted[0] if fitted else eval_dataset

    def _check_reward_functions(
        self,
        reward_funcs: Any,
        train_dataset: Any,
        eval_dataset: Any,
        args: TBRMConfig,
        environment_factory: Any,
        rollout_func: Any,
    ) -> None:
        """Check that each function accepts each data set's columns. A stream without known columns is skipped."""
        more = bool(environment_factory or rollout_func)  # either may add arguments
        asked = (args.draws_prompts and self._plan.mix.rollouts) or some_unrewarded(train_dataset, self._plan.logged)
        sets = ({"the training set": train_dataset} if asked else {}) | titled_sets(eval_dataset)
        for title, dataset in sets.items():
            has_logs = bool(self._plan.mix.logged) and dataset is train_dataset
            columns = columns_read(dataset, args.remove_unused_columns, is_formatted=not has_logs)
            if reward_funcs is not None and columns is not None:
                hidden = own_columns(has_logs, SoftValue.registry[args.soft_value].column)
                given = [name for name in columns if name not in hidden]
                environments = bool(environment_factory)
                check_reward_arguments(reward_funcs, title, given, more, environments, args.hub_options)
        if sets:
            start_workers(reward_funcs)

    def _hidden_columns(self, some_logged: bool) -> frozenset[str]:
        return own_columns(some_logged, self._soft_value.column)

    def _undo_trl(self) -> None:
        """Take back what TRL and vLLM set while they were built, where it is wrong for this trainer."""
        args = self.args
        if args.draws_from_own_engine:  # the engine has set every seed to its own, 0
            set_seed(args.seed + args.process_index // args.vllm_tensor_parallel_size)
        if self.is_fsdp_enabled:
            keep_precision_of_scores(self.accelerator)
        if getattr(self.model, "is_loaded_in_4bit", False) or getattr(self.model, "is_loaded_in_8bit", False):
            for parameter in self.model.parameters():
                if parameter.requires_grad and parameter.is_floating_point():
                    parameter.data = parameter.data.float()  # TRL's bfloat16 would round most small updates away
        self.reward_func_names = unique_names(self.reward_func_names)
        self.beta = 0.0  # TRL's own reference pass stays off
        self.mask_truncated_completions = False  # TRL would hide them from attention too; here they leave the loss

    def _teach_to_score(self, policy: PreTrainedModel) -> None:
        """Give the policy and a reference model of its own the trajectory head, and check its scores if possible."""
        disable_randomness(self.model)
        keep_weights_unpacked(self.model)
        for scored in (policy, self.ref_model):
            if scored is not None:
                bare = self.accelerator.unwrap_model(scored, keep_torch_compile=False)
                add_trajectory_head(bare, self.temperature, self.args.cast_lm_head_to_fp32)
        # ZeRO-3 allows one order of modules alone. FSDP2 leaves weights whole after a forward alone, which a sync
        # with vLLM does not expect.
        self._logits_are_checked = self._dist.is_zero3 or self.is_fsdp_enabled
        if not self.is_sharded:  # otherwise before the first window, when the model is prepared
            self._check_logits()

    def _check_what_was_built(self, given: Any, policy: PreTrainedModel) -> None:
        args = self.args
        if args.reward_pessimism and len(self.reward_funcs) == 1:
            raise ValueError(
                f"`reward_pessimism={args.reward_pessimism}` has no effect with one reward function: nothing can "
                "disagree. Pass several, or list one several times."
            )
        check_sharding(args, self.accelerator)
        check_trainable(self.model)
        adapter_is_reference = args.sync_ref_model or not self._has_new_adapter
        check_backend(self.model, args, adapter_is_reference and args.reference == "initial")
        check_head(policy)
        warn_of_half_precision(self.model, args.learning_rate)
        self._rotary_limit = rotary_limit(policy)
        context = getattr(policy.config.get_text_config(), "max_position_embeddings", None)
        self._positions = min((one for one in (self._rotary_limit, context) if one is not None), default=None)
        if self._plan.mix.rollouts and args.draws_prompts:
            check_length(args.max_completion_length + 1, self._rotary_limit)
        check_quantization(self.model, None, None, args)  # a checkpoint may itself be quantized, which only shows now
        warn_of_merging(self.model, args)
        check_vision(policy, self._is_vlm)
        if self._is_vlm:
            check_sources_of_vision(args, self._plan.mix)
            if self.tools and self._turns_take_all_processes:
                raise ValueError(
                    "Tools of a model with images need a process that can generate alone: processes call tools "
                    "different numbers of times. Use DDP or ZeRO-2, without vLLM or with one for each process "
                    '(vllm_mode="colocate", vllm_tensor_parallel_size=1).'
                )
        if args.padding_free:
            check_packing(policy)
        if not args.use_vllm:
            check_shipped_ends(policy.generation_config)
            warn_of_shipped_sampling(policy.generation_config, self.generation_config)
        if self.accelerator.is_main_process:
            warn_of_double_bos([self.train_dataset, self.eval_dataset], self._tokenizer)
        if isinstance(given, PreTrainedModel) and self.ref_model is not None:
            require_equal_weights(policy, self.accelerator.unwrap_model(self.ref_model, keep_torch_compile=False))

    def _load_reference(self, given: str | PreTrainedModel) -> nn.Module:
        """Load the user's reference if it is not a model yet, and prepare it as TRL prepares its own."""
        model: Any = given
        if isinstance(given, str):
            settings: dict[str, Any] = {
                "dtype": self.model.dtype,
                "attn_implementation": self.model.config._attn_implementation,
                "trust_remote_code": self.args.trust_remote_code,
            }
            if self.accelerator.distributed_type != DistributedType.NO:
                settings["device_map"] = None  # TRL's default spreads a model over all GPUs
            of_policy = {name: v for name, v in (self.args.model_init_kwargs or {}).items() if name != "revision"}
            with loading("`reference_model`", given):
                model = create_model_from_path(given, **settings | of_policy)
        theirs, ours = (one.config.get_text_config().vocab_size for one in (model, self.model))
        if theirs != ours:
            raise ValueError(
                f"`reference_model` has a vocabulary of {theirs} tokens, the policy one of {ours}. Name a reference "
                "with the policy's tokenizer."
            )
        disable_randomness(model)
        if self.args.cast_lm_head_to_fp32:
            keep_head_in_float32(model)
        add_fused_lm_head(model, self.temperature, self.args.cast_lm_head_to_fp32)
        if self.is_deepspeed_enabled:
            return prepare_deepspeed(model, self.accelerator)
        if self.is_fsdp_enabled:
            return shard_by_layer(model, self.accelerator)
        return self.accelerator.prepare_model(model, evaluation_mode=True)

    def _make_replay_buffer(self) -> ReplayBuffer | None:
        args = self.args
        if not args.replay_buffer_size:
            return None
        return ReplayBuffer(
            args.replay_buffer_size // args.world_size,
            args.replay_max_age,
            args.replay_sampling == "prioritized",
            args.replay_priority_exponent,
            args.replay_priority_correction,
            args.update_group_size,
        )

    def _make_reference(self) -> Reference | PreviousPolicy | None:
        args = self.args
        self._initial_reference_key: str | None = None
        self._initial_reference_weights: str | None = None
        if args.reference == "previous":
            return PreviousPolicy(lambda: self.model, lambda: self.state.global_step)
        if self.ref_model is None and (args.sync_ref_model or not self._has_new_adapter):
            add_reference_adapter(self.model)
        settings = {
            "temperature": self.temperature,
            "precision": self.accelerator.mixed_precision,
            "tokenizer": tokenizer_digest(self._tokenizer),
            **({"end_value": True} if args.truncation == "bootstrap" else {}),
        }
        reference = Reference(lambda: self.model, self.ref_model, self.accelerator, settings)
        self._initial_reference_key, self._initial_reference_weights = reference.key, reference.weights
        if args.sync_ref_model:
            self.add_callback(SyncReference(reference))
        return reference

    def _completion_reader(self, policy: PreTrainedModel) -> tuple[CompletionTokenizer, int, int | None]:
        """The completion tokenizer, the vocabulary size and the context length, None if the model states none.

        They decide which completions the policy could have produced.
        """
        tokenizer = CompletionTokenizer(
            self._tokenizer,
            set(self.eos_token_ids),
            prompt_ids=lambda prompt: list(self._tokenize_prompts([prompt])[0][0]),
            template=self._render_messages,
        )
        text_config = policy.config.get_text_config()
        return tokenizer, text_config.vocab_size, getattr(text_config, "max_position_embeddings", None)

    def _make_logged_rows(self, policy: PreTrainedModel) -> LoggedRows:
        """Tokenize the logged rows of the training set. Score them now if `_precompute_reference` does."""
        reader = self._completion_reader(policy)
        self.train_dataset = tokenize_logged_rows(self.train_dataset, self._plan.logged, *reader, self._scratch)
        scored = self._precompute_reference() or self.args.reference == "previous"
        return LoggedRows(self.train_dataset, self._plan.logged, scored, self._reward_logged)

    def _precompute_reference(self) -> bool:
        """Score all logged rows now, and free the reference if nothing else needs it; return whether it was done.

        By default this is done if every training row is logged and the reference does not move.
        `precompute_ref_log_probs` decides otherwise. An evaluation keeps the reference.

        Raises:
            ValueError: if it is asked for where the policy, which is its own reference, is sharded later.
        """
        # A policy with adapters is its own reference, and is not yet wrapped here.
        wrapped_later = self.ref_model is None and self.is_sharded
        wanted = self.args.precompute_ref_log_probs
        if wanted and wrapped_later:
            raise ValueError(
                "`precompute_ref_log_probs=True` with adapters under DeepSpeed or FSDP is refused: the policy, whose "
                "base is the reference, is only sharded when training starts. Leave it at None."
            )
        if wanted is None:
            wanted = not (self._plan.mix.rollouts or self.args.sync_ref_model or wrapped_later)
        if not (wanted and isinstance(self._reference, Reference)):
            return False
        with self._folder_held(self.args.output_dir):
            self.train_dataset = precompute_scores(
                self.train_dataset,
                Path(self.args.output_dir) / "reference_scores",
                self._reference.key,
                self.accelerator,
                self._score_stale,
                show_progress=not self.args.disable_tqdm,
            )
        if self.eval_dataset is None and self.ref_model is not None:
            self._reference = self.ref_model = None
            self.accelerator.free_memory()  # the accelerator lists the models it prepared
        return True

    def _make_followed(self, policy: PreTrainedModel) -> RecordFolder:
        args, reader = self.args, self._completion_reader(policy)
        assert args.followed_folder is not None

        def columns_of(row: Mapping[str, Any]) -> dict[str, Any]:
            if problem := problem_of_logged_row(row, True, largest_return(args.beta)):
                raise ValueError(problem)
            return trajectory_columns(row, *reader)

        return RecordFolder(
            args.followed_folder,
            columns_of,
            [] if _no_reward in self.reward_funcs else self.reward_func_names,
            1 if self.environment_factories is not None else args.num_generations,  # a reset may be random
            needs_steps=bool(args.replay_buffer_size),
            timeout=args.follow_timeout,
            watch=lambda: self._actor.check() if self._actor is not None else None,
            last_words=lambda: self._actor.last_words() if self._actor is not None else "",
        )

    @property
    def _policy_version(self) -> str | None:
        """Name under which the current policy was published; None if it was not."""
        return self._publisher.latest.name if self._publisher is not None and self._publisher.latest else None

    def _check_pool(self, policy: PreTrainedModel) -> None:
        if not self.args.rollout_pool:
            return
        uses = {
            "tools": self.tools,
            "environment_factory": self.environment_factories,
            "rollout_func": self.rollout_func,
        }
        check_pool(policy, self.generation_config, self._is_vlm, self.train_dataset, self._plan.mix, uses)

    # ---- collect -----------------------------------------------------------------------------------------------

    def _get_dataloader(self, dataset: Any, *args: Any, is_training: bool = False, **kwargs: Any) -> Any:
        divided = is_training and self.args.world_size > 1 and isinstance(dataset, IterableDataset)
        rows = WholeStream(dataset) if divided else dataset
        return super()._get_dataloader(rows, *args, is_training=is_training, **kwargs)

    def _get_train_sampler(self, dataset: Any = None) -> WindowSampler:
        args = self.args
        return WindowSampler(
            self._plan.logged,
            self._plan.mix,
            args.num_generations,
            args.world_size,
            args.num_iterations * args.steps_per_generation,
            epoch=lambda: self._pass[0],
            seed=args.data_order_seed if self.shuffle_dataset else None,
            group_size=args.window_group_size,
            prompt_numbers=self._plan.prompt_numbers,
        )

    def _prepare_inputs(self, generation_batch: list[dict[str, Any]]) -> dict[str, list[list[UpdateRow]]]:
        if self.evaluating:
            return {"microbatches": [self._evaluation_rows(generation_batch)]}
        micro_step = self._step % self.args.gradient_accumulation_steps
        if micro_step == 0:
            if not self._logits_are_checked:
                self._check_logits()
            self._scored, self._loss_before = [], self._tr_loss.clone()
            self._microbatches = self._microbatches_of(self._collect(generation_batch))
            if self._starts_at_reference and self._has_new_adapter and ADAPTER in self.model.peft_config:
                self._check_new_adapter(self._microbatches[0])
        # A micro-step of the Trainer has one micro-batch. If micro-batches are sized by tokens, it has all of them.
        by_tokens = self.args.max_tokens_per_microbatch is not None
        return {"microbatches": self._microbatches if by_tokens else [self._microbatches[micro_step]]}

    def _evaluation_rows(self, rows: list[dict[str, Any]]) -> list[UpdateRow]:
        """The rows of an evaluation batch. Rows that only fill up the last batches do not count."""
        trajectories = self._roll_out(rows)
        if self.log_completions:
            self._completions.add(trajectories, "eval")
        process, processes = self.accelerator.process_index, self.accelerator.num_processes
        first = (len(self._evaluated) * processes + process) * self.args.per_device_eval_batch_size
        repeated = [
            self._rows_to_evaluate is not None and first + i >= self._rows_to_evaluate for i in range(len(rows))
        ]
        self._score_stale(trajectories)
        self._give_values(trajectories, rows, self.num_generations_eval)
        compared = self.num_generations_eval if self._soft_value.compares == "ratios" else 1
        evaluated = _numbered_by_group([UpdateRow(t, "fresh") for t in trajectories], compared)
        self._loss.mark_left_out(evaluated)
        for row, is_repeated in zip(evaluated, repeated, strict=True):
            row.left_out = "repeated" if is_repeated else row.left_out
        numbers = evaluated_numbers(evaluated, self.reward_func_names)
        self._evaluated.append(self.accelerator.gather(numbers.to(self.accelerator.device)))
        self._denominator = int(self._gather([sum(row.left_out is None for row in evaluated)]).sum())
        return evaluated

    def _collect(self, rows: list[dict[str, Any]]) -> list[UpdateRow]:
        """The trajectories of one update on this process: the next part of the window, or replayed ones."""
        args, metrics = self.args, self._metrics["train"]
        rows_here = args.rows_per_device
        update = self._step // args.gradient_accumulation_steps % (args.fresh_updates * args.num_iterations)
        if update == 0:
            self._window = self._new_window(rows)

        sample = None
        if update >= args.fresh_updates and self._replay is not None:
            sample = self._replay.sample(rows_here, self.state.global_step, self._gather)
        if sample is None:
            first = update % args.fresh_updates * rows_here
            part = self._window[first : first + rows_here]
            update_rows = [self._row_of_window(trajectory, update) for trajectory in part]
        else:
            self._baselines.renew(sample.trajectories)
            drawn = zip(sample.trajectories, sample.weights, sample.ages, sample.numbers, strict=True)
            update_rows = [UpdateRow(t, "replayed", weight, age, number) for t, weight, age, number in drawn]
        update_rows = _numbered_by_group(update_rows, args.update_group_size)
        stale = {row.number: row.trajectory for row in update_rows if self._is_stale(row.trajectory)}
        self._score_stale([row.trajectory for row in update_rows])
        for number, trajectory in stale.items():
            if self._replay is not None and number is not None:
                self._replay.stored.keep_scores(number, trajectory)

        oldest = max((row.age for row in update_rows if row.age is not None), default=0)
        self._soft_value.on_update([row.trajectory for row in update_rows])
        stalest = max((row.staleness for row in update_rows if row.staleness is not None), default=-1)
        counts = self._gather(
            [self._loss.mark_left_out(update_rows), oldest, len(self._replay or ()), stalest]
        )  # (P, 4)
        self._denominator = int(counts[:, 0].sum())
        if not self._denominator:
            warn_of_empty_update({row.left_out for row in update_rows})
        self._rows_trained += rows_here
        if counts[:, 3].max() >= 0:
            _keep_largest(metrics["staleness/max"], counts[:, 3].max().item())
        if sample is not None:
            _keep_largest(metrics["replay/age_max"], counts[:, 1].max().item())
        if self._replay is not None:
            metrics["replay/fill"].append(counts[:, 2].sum().item())
            metrics["replay/updates_per_trajectory"].append(self._rows_trained / self._rows_drawn)
        return update_rows

    def _row_of_window(self, trajectory: Trajectory, update: int) -> UpdateRow:
        """The row of a window's trajectory in the window's update of this number."""
        if trajectory.source is Source.LOGGED:
            return UpdateRow(trajectory, "logged")
        if update >= self.args.fresh_updates:
            return UpdateRow(trajectory, "reused")
        first, last = trajectory.first_policy_step, trajectory.policy_step
        if self._pool is None and self._followed is None:
            return UpdateRow(trajectory, "fresh")
        if first is None:  # it was not recorded
            return UpdateRow(trajectory, "ahead" if self._followed is not None else "fresh")
        step = self.state.global_step
        # A resumed run may reach a step again with a policy other than the one that drew these rows.
        versions = {trajectory.first_policy_version, self._window_version} - {None}
        is_fresh = first == last == step - update and len(versions) < 2
        return UpdateRow(trajectory, "fresh" if is_fresh else "ahead", staleness=max(step - first, 0))

    def _new_window(self, rows: list[dict[str, Any]]) -> list[Trajectory]:
        logged = [row for row in rows if self._plan.mix.logged and row["completion_ids"] is not None]
        fresh = [row for row in rows if not self._plan.mix.logged or row["completion_ids"] is None]
        if not isinstance(self.train_dataset, Sized) and any(map(is_logged, fresh)):
            raise logged_stream()
        with temporarily(self, _drawn=[] if self._pool is not None else None):
            rollouts = self._roll_out(fresh) if fresh and self._followed is None else []
        if fresh and self._followed is not None:
            rollouts = self._follow(self._followed)
            fresh = list(self._rewards.rows)  # the rows of the followed rollouts
        served = self.args.draws_from_server  # which draws all from the first prompt
        if (self._soft_value.compares or served) and fresh:
            taken_by = "the vLLM server" if served else f'soft_value="{self.args.soft_value}"'
            with failing_together():
                check_groups(rollouts, taken_by)
        if self.log_completions and rollouts:
            self._completions.add(rollouts, "train")
        rewards = self._rewards if rollouts else None  # kept here: rewarding logged rows replaces `_rewards`
        window = rollouts + (self._logged_rows.take(logged) if self._logged_rows is not None and logged else [])
        check_length(int(self._gather([max(map(len, window))]).max()), self._rotary_limit)
        self._rows_drawn += len(window)
        self._score_stale(window)
        self._give_values(window, fresh + logged, self.num_generations)
        if self.args.save_rollouts and rewards is not None:
            folder, process = Path(self.args.output_dir) / "rollouts", self.accelerator.process_index
            with failing_together():
                if self.accelerator.is_main_process:  # every process has written its earlier windows
                    merge_rollouts(folder, self.state.global_step)
                file = rollouts_file(folder, self.state.global_step, process)
                save_rollouts(file, rollouts, rewards.rows, rewards.prompts, rewards.completions)
        group_size = self.args.update_group_size
        if self._replay is not None:
            for group in chunks(rollouts, group_size):
                if all(self._loss.left_out(trajectory) is None for trajectory in group):
                    self._replay.add(group)
        return [window[i] for i in random_order(len(window), group_size)]

    def _follow(self, folder: RecordFolder) -> list[Trajectory]:
        """Take the next rollouts that others drew. TRL gets them in place of a generation and logs them as its own."""
        with self._timed("rollouts"):
            taken, records = self._take_records(folder)
        trajectories = [record.trajectory for record in records]
        texts = [completion_of(record.row, self._tokenizer) for record in records]
        if self._gather([any(not isinstance(prompt, str) for prompt, _ in texts)]).any():
            texts = [as_messages(*one) for one in texts]  # of several writers, in one form for tables
        prompts, completions = zip(*texts, strict=True)
        given = {
            "prompt_ids": [one.prompt_ids.tolist() for one in trajectories],
            "completion_ids": [one.completion_ids.tolist() for one in trajectories],
            "env_mask": [one.loss_mask.int().tolist() for one in trajectories],
            "logprobs": None,
        }
        names, by_row = folder.rewards_of(trajectories, taken.functions)
        rewards = torch.tensor(by_row, dtype=torch.float32, device=self.accelerator.device)  # (B, F)
        weights, total = torch.eye(len(names))[0].to(rewards), rewards[:, 0]  # (F,), (B,)
        if taken.functions and folder.functions:
            weights = self.reward_weights.to(rewards)
            check_magnitude(self.accelerator.gather(rewards), weights, names, self.args.beta)
            total = total_reward(rewards, weights, self.args.reward_pessimism)
        self._pend_logged(records)
        drawing = dict(rollout_func=lambda *_: given, tools=[], environments=None, environment_factories=None)
        with temporarily(
            self, use_vllm=False, reward_func_names=names, reward_weights=weights, _given_rewards=rewards, **drawing
        ):
            self._generate_and_score_completions([{"prompt": prompt} for prompt in prompts])
        self._log_reward_of_counted()
        rows = [record.columns for record in records]
        self._rewards = Rewards(total, [one.rewards for one in trajectories], [], rows, prompts, completions)
        group_ids = self._group_ids(len(records))
        for trajectory, reward, group_id in zip(trajectories, total.tolist(), group_ids, strict=True):
            trajectory.reward, trajectory.group_id = reward, group_id
        self._window_version = self._policy_version
        metrics = self._metrics["train"]
        metrics["rollouts/queue"].append(taken.rows // self._plan.mix.rollouts)
        metrics["rollouts/learner_wait_time"].append(taken.seconds)
        metrics["rollouts/versions"].append(taken.versions)
        return trajectories

    def _pend_logged(self, records: Sequence[Record]) -> None:
        """Hand TRL the metrics and extra columns of the records, so that it logs them with the rollouts."""
        for record in records:
            for name, value in record.logged(METRIC_PREFIX).items():
                if value is not None:
                    self._pending_metrics[name].append(value)
        extras = [record.logged(EXTRA_PREFIX) for record in records]
        for name in {name: None for one in extras for name in one}:
            self._pending_extra_logs[name] = [one.get(name) for one in extras]

    def _take_records(self, folder: RecordFolder) -> tuple[Taken, list[Record]]:
        """This process's share of the next rows. The main process waits for all and tells the others which they are."""
        rows, process = self._plan.mix.rollouts, self.accelerator.process_index
        share = rows // self.args.world_size
        taken: list[Any] = [None]
        records: list[Record] = []
        with failing_together():
            if process == 0:
                taken[0], records = folder.take(rows)
        (found,) = broadcast_object_list(taken)
        with failing_together():
            if process:
                records = folder.read(found.share(process * share, (process + 1) * share))
        return found, records[:share]

    def _group_ids(self, rows: int) -> list[int]:
        """A group number for each of this process's rows. Rollouts of one prompt have the same number."""
        per_prompt = self.num_generations_eval if self.evaluating else self.num_generations
        first, of_step = self.accelerator.process_index * rows, self.state.global_step * self.args.generation_batch_size
        return [of_step + (first + i) // per_prompt for i in range(rows)]

    def _roll_out(self, rows: Sequence[Mapping[str, Any]]) -> list[Trajectory]:
        """Generate and reward a completion for every row. `trajectories_from_trl` reads TRL's dictionary."""
        some_logged = bool(self._plan.mix.logged) and not self.evaluating
        given = columns_for_rewards(rows, self._hidden_columns(some_logged))
        was_checked = isinstance(self.train_dataset, Sized) and not self.evaluating  # `evaluate` accepts any set
        if not was_checked and self.environment_factories is None:
            with failing_together():
                for prompt in (row.get("prompt") for row in given):
                    if problem := problem_of_prompt(prompt, self._tokenizer):
                        raise ValueError(f"A prompt of this window, {str(prompt)[:60]!r}: {problem}")
        if self._streams_may_double_bos:
            texts = [row["prompt"] for row in given if isinstance(row.get("prompt"), str)]
            drawn = Dataset.from_dict({"prompt": texts})
            self._streams_may_double_bos = not warn_of_double_bos([drawn], self._tokenizer)
        with temporarily(self, _prompts_are_rolled_out=True), self._timed("generation"):
            output = self._generate_and_score_completions(given)
        self._log_reward_of_counted()
        step, group_ids = self.state.global_step, self._group_ids(len(rows))
        steps = [(row.steps[0], row.steps[-1]) for row in self._drawn or ()] or [(step, step)] * len(rows)
        return trajectories_from_trl(output, self._rewards, self._end_token_ids(), group_ids, steps)

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations, has_tool_images=False):
        given = prompt_ids, images, multimodal_fields, num_generations, has_tool_images
        if self._shares_turns:
            return self._shared_turn(prompt_ids)
        if self.use_vllm or self.use_transformers_continuous_batching:
            return super()._generate_single_turn(*given)
        policy = self.accelerator.unwrap_model(self.model_wrapped)
        with self._autocast_of_generation():
            if self._is_vlm or not draws_one_token(policy, self.generation_config):
                return super()._generate_single_turn(*given)
            synced = self._turns_take_all_processes
            loop = partial(sample, synced_gpus=synced)
            if self._drawn is not None:
                loop = partial(self._draw_from_pool, prompt_ids, synced)
            with temporarily(policy, generate=partial(policy.generate, custom_generate=loop)):
                return super()._generate_single_turn(*given)

    @property
    def _turns_take_all_processes(self) -> bool:
        """Whether no process can generate alone: weights are gathered, or one vLLM draws for several processes."""
        if self.args.use_vllm:
            together = self.args.draws_from_server or self.args.vllm_tensor_parallel_size > 1
        else:
            together = self._dist.is_zero3 or self._dist.is_fsdp
        return together and self.accelerator.num_processes > 1

    def _tool_call_loop(self, *args: Any, **kwargs: Any) -> Any:
        """TRL's loop, whose turns are as many and as large as this process's rows need."""
        self._sync_tool_dicts = list(map(exits_raise, self._sync_tool_dicts))
        self._async_tool_dicts = list(map(exits_raise, self._async_tool_dicts))
        if not self._turns_take_all_processes:
            return super()._tool_call_loop(*args, **kwargs)
        with temporarily(self, _shares_turns=True):
            finished = super()._tool_call_loop(*args, **kwargs)
            while self._shared_turn([]) is not None:
                pass  # rows of other processes still call tools
        return finished

    def _shared_turn(self, prompts: list[list[int]]) -> tuple[list[list[int]], list[list[float]] | None] | None:
        """Draw a completion for every row of all processes, of which each process takes as many.

        Every process calls this for every turn of any process.

        Args:
            prompts: token ids of this process's rows; none if it has no more turn.

        Returns:
            Token ids and log-probabilities of the completions of `prompts`. None if no process has a row.
        """
        counts, rows = gather_object([len(prompts)]), gather_object(prompts)
        if not rows:
            return None
        process, share = self.accelerator.process_index, -(-len(rows) // len(counts))
        mine = rows[process * share :][:share]
        mine += rows[:1] * (share - len(mine))  # drawn for nothing
        with temporarily(self, _shares_turns=False):
            drawn, log_probs = self._generate_single_turn(mine, None, {}, num_generations=1)
        begin = sum(counts[:process])
        own = slice(begin, begin + len(prompts))
        return gather_object(drawn)[own], None if log_probs is None else gather_object(log_probs)[own]

    @contextmanager
    def _autocast_of_generation(self) -> Iterator[None]:
        """Mixed precision from a window's first token to its last.

        accelerate enters autocast anew in each forward pass, which casts all weights again for every token. And an
        adapter's `generate` does not use that forward pass, so tokens would be drawn in another precision than they are
        scored in. Sharded weights are whole only in turn, so copies of all of them must not be kept.
        """
        if self.is_sharded:
            yield
        else:
            with self.accelerator.autocast(), frozen_casts_kept(self.model):
                yield

    def _draw_from_pool(
        self,
        prompts: list[list[int]],
        synced: bool,
        model: PreTrainedModel,
        input_ids: Tensor,
        generation_config: GenerationConfig,
        **prepared: Any,
    ) -> Tensor:
        """A `custom_generate` that returns a window's rows `(B, P + C)` and draws part of later windows' rows."""
        assert self._pool is not None
        window = self._step // (self.args.steps_per_generation * self.args.num_iterations)
        anywhere = (lambda flags: (self._gather(flags) > 0).any(dim=0).tolist()) if synced else list
        slots = Slots(model, generation_config, len(prompts), anywhere, input_ids.device)
        self._drawn = self._pool.draw(window, list(map(list, prompts)), self.state.global_step, slots)
        completions = [torch.tensor(row.completion_ids) for row in self._drawn]
        padded = pad_sequence(completions, batch_first=True, padding_value=self._tokenizer.pad_token_id)  # (B, C)
        return torch.cat([input_ids, padded.to(input_ids)], dim=1)

    def _make_pool(self) -> RolloutPool | None:
        args, process = self.args, self.accelerator.process_index
        if not args.rollout_pool:
            return None
        sampler, updates = self._get_train_sampler(), args.fresh_updates * args.num_iterations

        def prompts_of(window: int) -> list[list[int]]:
            rows = [self.train_dataset[index] for index in sampler.rollouts(window, process)]
            given = columns_for_rewards(rows, self._hidden_columns(bool(self._plan.mix.logged)))
            with temporarily(self, _prompts_are_rolled_out=True):
                return list(map(list, self._tokenize_prompts([row["prompt"] for row in given])[0]))

        ahead = args.rollout_pool // args.world_size
        return RolloutPool(ahead, prompts_of, lambda: -(-self.state.max_steps // updates))

    def _tokenize_prompts(self, prompts):
        prompt_ids, images, multimodal_fields = super()._tokenize_prompts(prompts)
        if self._prompts_are_rolled_out:
            prompt_ids = self._prompt_limit.applied(prompts, prompt_ids)
        return prompt_ids, images, multimodal_fields

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        if self._given_rewards is not None:
            self._fill_extra_logs(len(prompts))
            given = self.accelerator.gather(self._given_rewards)
            self._reward_totals = total_reward(given, self.reward_weights)
            return given
        self.model.train(not self.evaluating)  # TRL's continuous batching leaves an evaluated model in training mode
        guarded = list(map(self._reward_calls.guarded, self.reward_funcs, self.reward_func_names))
        # After a failure TRL would say that the functions returned None.
        silent = [lambda record: not self._reward_calls.failures]
        with (
            temporarily(self, reward_funcs=guarded),
            temporarily(grpo_trainer.logger.logger, filters=silent),
            self._timed("rewards"),
        ):
            rewards_per_func = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)  # (N, F)
        self._agree_on_failures(self._reward_calls.taken(), len(prompts))
        self._fill_extra_logs(len(prompts))
        weights = self.reward_weights.to(rewards_per_func.device)  # (F,)
        unknown = self._reward_calls.unknown(len(prompts), self.reward_func_names, weights.tolist())
        no_number = lacking_number(rewards_per_func, weights, self.reward_funcs)  # (N,)
        unknown_anywhere = self._gather(unknown).flatten().bool().to(no_number.device)  # (N,)
        rewards_per_func[unknown_anywhere | no_number] = torch.nan  # an unknown verdict is not a wrong one
        check_magnitude(rewards_per_func, weights, self.reward_func_names, self.args.beta)
        self._reward_totals = total_reward(rewards_per_func, weights)
        first = self.accelerator.process_index * len(prompts)
        local = rewards_per_func[first : first + len(prompts)]  # (B, F) NaN where there is no reward
        self._rewards = Rewards.of(
            local, weights, self.reward_func_names, self.args.reward_pessimism, bool(self.tools),
            inputs, prompts, completions,
        )  # fmt: skip
        return rewards_per_func

    def _log_reward_of_counted(self) -> None:
        """Correct TRL's latest `reward` and `reward_std`: functions of weight 0 score no row, though TRL counts it."""
        metrics, totals = self._metrics[self._mode], self._reward_totals
        metrics["reward"][-1], metrics["reward_std"][-1] = totals.nanmean().item(), nanstd(totals).item()

    def _fill_extra_logs(self, rows: int) -> None:
        """Fill the extra columns that functions logged earlier, but not this time, with None for each row."""
        for column in self._logs["extra"]:
            self._pending_extra_logs.setdefault(column, [None] * rows)

    def _agree_on_failures(self, failures: Sequence[Failure], completions: int) -> None:
        """Raise on every process if a reward function failed on one, or count it if `reward_on_error` says so."""
        for column in [n for n, values in self._pending_extra_logs.items() if failures and len(values) != completions]:
            del self._pending_extra_logs[column]  # its function failed half-way
        raises = self.args.reward_on_error == "raise"
        fatal = [one for one in failures if raises or one.reason == "wrong"]
        lost = Counter({(one.function, one.reason): one.completions for one in failures})
        kinds = [(name, reason) for name in self.reward_func_names for reason in REASONS]
        counts = self._gather([len(fatal), completions, *(lost[kind] for kind in kinds)])  # (P, 2 + 2F)
        if fatal:
            raise fatal[0].error
        if counts[:, 0].any():
            process = int(counts[:, 0].argmax())
            raise RuntimeError(f"A reward function failed on process {process}, which says how in its output.")
        if not raises and not self._judges_log:
            total, *lost_everywhere = counts[:, 1:].sum(dim=0).tolist()
            names = tuple(f"rewards/{name}/{reason}" for name, reason in kinds)
            pairs = torch.tensor([[count, total] for count in lost_everywhere], dtype=torch.float32)
            self._recorder.keep(Totals(names, pairs.to(self.accelerator.device)), self._mode)

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        return None, None, None  # TBRM has no old policy and scores the reference on trajectories

    def _reward_logged(self, rows: Sequence[Mapping[str, Any]], trajectories: Sequence[Trajectory]) -> list[float]:
        """Judge logged rows that have no reward. Every process calls this, maybe without a row."""
        judged = [(row, one.completion_ids.tolist()) for row, one in zip(rows, trajectories, strict=True)]
        counts = self._gather([len(rows)]).flatten()  # (P,)
        if counts.min() < counts.max():  # TRL gathers equally many rewards from each process
            (filler,) = broadcast_object_list([judged[0] if judged else None], from_process=int(counts.argmax()))
            judged += [filler] * (int(counts.max()) - len(rows))
        if not judged:
            return []
        given, ids = map(list, zip(*judged, strict=True))
        prompts, completions = map(list, zip(*(completion_of(row, self._tokenizer) for row in given), strict=True))
        with temporarily(self, _judges_log=True):
            rows_given = columns_for_rewards(given, self._hidden_columns(some_logged=True))
            self._calculate_rewards(rows_given, prompts, completions, ids)
        # Otherwise TRL would log what the functions logged here with the next rollouts.
        self._pending_metrics.clear()
        self._pending_extra_logs.clear()
        return self._rewards.total.tolist()[: len(rows)]

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

    def _give_values(self, window: Sequence[Trajectory], rows: Sequence[Mapping[str, Any]], group_size: int) -> None:
        """Set the baselines of a window and let the estimator set its constants."""
        self._baselines.set(window, group_size, self._gather, learn=not self.evaluating)
        self._soft_value.on_window(window, rows, group_size)

    def _microbatches_of(self, rows: list[UpdateRow]) -> list[list[UpdateRow]]:
        """The update's micro-batches, equally many per process: a sharded model's forward needs every process.

        Groups stay whole if micro-batches can hold them. Otherwise their soft value takes a separate forward pass.
        """
        size, group_size = self.args.microbatch_size, self.args.update_group_size
        whole = size.keeps_whole(rows, group_size)
        if size.tokens is not None and group_size > 1:
            whole = bool(self._gather([whole]).all())
        if not whole:
            group_size = 1
        microbatches = size.split(rows, group_size)
        if size.tokens is not None:
            microbatches = size.spread(microbatches, int(self._gather([len(microbatches)]).max()), group_size)
        if not whole:
            batches = ((part, self._collate([row.trajectory for row in part])) for part in microbatches)
            self._loss.value_beforehand(batches, partial(self._score, self.model))
        return microbatches

    # ---- score -------------------------------------------------------------------------------------------------

    def _collate(self, trajectories: Sequence[Trajectory]) -> Batch:
        return collate(
            trajectories,
            self._tokenizer.pad_token_id,
            self.accelerator.device,
            self.args.pad_to_multiple_of,
            self.args.padding_free,
            self._positions,
        )

    def _score(self, model: nn.Module, batch: Batch, **wanted: Any) -> TrajectoryScores:
        wanted["end_value"] = self.args.truncation == "bootstrap"
        with self.accelerator.autocast():
            return score(model, batch, masked=self._is_vlm or self.aux_loss_enabled, **wanted)

    def _is_stale(self, trajectory: Trajectory) -> bool:
        return trajectory.ref_key is None if self._reference is None else self._reference.is_stale(trajectory)

    @torch.no_grad()
    def _score_stale(self, trajectories: Sequence[Trajectory], filler: Trajectory | None = None) -> None:
        """Score with π_ref the trajectories that lack its scores. Every process calls this."""
        stale = [t for t in {id(t): t for t in trajectories}.values() if self._is_stale(t)]
        size = MicrobatchSize(self.args.per_device_eval_batch_size) if self.evaluating else self.args.microbatch_size
        batches = size.split(stale)
        forwards = int(self._gather([len(batches)]).max())
        if not forwards:
            return
        if self._reference is None:
            raise ValueError(
                "The reference was freed after it had scored the logged trajectories, so nothing new can be scored. "
                "Give the trainer its `eval_dataset` at construction, or set `precompute_ref_log_probs=False`."
            )
        with self._timed("reference"), self._reference.module() as reference:
            score_reference(
                batches,
                forwards,
                self._reference.key,
                self._collate,
                partial(self._score, reference),
                filler or trajectories[0],
            )
        if filler is None:  # otherwise the caller checks them, under their own names
            with failing_together():
                check_scores(stale, ["a trajectory of this window"] * len(stale))

    @torch.no_grad()
    def _check_new_adapter(self, rows: Sequence[UpdateRow]) -> None:
        """Check before the first update that the adapter `ref` leaves the model under it unchanged.

        At this point `ref` equals the policy. The check costs one forward pass of a micro-batch. A new adapter without
        `ref` has the model under it as its reference.
        """
        batch = self._collate([row.trajectory for row in rows])
        with in_use(self.accelerator.unwrap_model(self.model, keep_torch_compile=False), None):
            log_probs = self._score(self.model, batch).log_probs  # (B, T)
        self._check_start(batch, log_probs, of_adapter=True)

    @torch.no_grad()
    def _check_logits(self) -> None:
        """Check that the policy and the reference have the scores that their own logits give."""
        text = self._tokenizer(text=_SHORT_TEXT, add_special_tokens=False)["input_ids"][:32]
        rows = rows_of_text(text if len(text) > 3 else [0, 1, 0, 0, 1])  # a tokenizer may know none of its letters
        precision = self.accelerator.mixed_precision
        for one in (self.model, self.ref_model):
            if one is None:
                continue
            model = self.accelerator.unwrap_model(one, keep_torch_compile=False)  # compiling for this takes too long
            was_training = model.training
            model.eval()  # some models require inputs for images while they are trained
            with self.accelerator.autocast():
                scores = self._score(model, self._collate(rows))
                check_logits(model, rows, scores, self.temperature, computes_in_half(model, precision))
            model.train(was_training)
        self._logits_are_checked = True

    def _check_start(self, batch: Batch, log_probs: Tensor, of_adapter: bool = False) -> None:
        """Check before the first update that the reference's log-probabilities match another model's `(B, T)`."""
        difference = torch.where(batch.action_mask, (log_probs.detach() - batch.ref_log_probs).abs(), 0.0).sum()
        total, count = self._gather([difference.item(), int(batch.action_mask.sum())]).sum(dim=0).tolist()
        in_half = computes_in_half(self.model, self.accelerator.mixed_precision)
        check_start(total / max(count, 1), in_half, of_adapter)

    # ---- update ------------------------------------------------------------------------------------------------

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """The loss of this step's micro-batches. All but the last are back-propagated here.

        The Trainer back-propagates the last one, and processes exchange gradients in that backward. Under ZeRO-2 and
        ZeRO-3 they exchange gradients in every backward.
        """
        *earlier, last = inputs["microbatches"]
        done = torch.zeros((), device=self.accelerator.device)
        for rows in earlier:
            with self._reduction_deferred(model):
                loss = self._loss_of(model, rows)
                self.accelerator.backward(loss)
            done += loss.detach()
        return self._loss_of(model, last) + done

    @contextmanager
    def _reduction_deferred(self, model: nn.Module) -> Iterator[None]:
        """Keep gradients on their process, as in the Trainer's accumulation, unless `sync_each_batch` is set."""
        state = self.accelerator.gradient_state
        state._set_sync_gradients(False)
        try:
            with nullcontext() if state.plugin_kwargs.get("sync_each_batch") else self.accelerator.no_sync(model):
                yield
        finally:
            state._set_sync_gradients(True)

    def _loss_of(self, model: nn.Module, rows: list[UpdateRow]) -> Tensor:
        args = self.args
        batch = self._collate([row.trajectory for row in rows])
        output = self._loss(
            rows, batch, partial(self._score, model), in_part=not self.evaluating and args.token_fraction < 1
        )
        if self._starts_at_reference and not self.evaluating:
            self._starts_at_reference = False
            self._check_start(batch, output.scores.log_probs)
        weight = float_tensor([row.weight for row in rows], output.loss.device)  # (B,)
        # Gradients are averaged over processes. The factor turns the mean into the sum that the denominator expects.
        processes = self.accelerator.num_processes
        loss = processes * mean_over_counted(output.loss, output.inputs.counted, self._denominator, weight)
        if output.aux_loss is not None:
            share = 1.0 if self.evaluating else len(rows) / args.rows_per_device  # of the update
            loss = loss + self.router_aux_loss_coef * output.aux_loss * share

        is_finite = torch.isfinite(loss.detach())
        totals = microbatch_totals(
            rows, batch, output.scores, output.inputs, output.soft_value, output.residual, is_finite
        )
        in_reward_units = (args.beta * output.residual).detach()  # (B,)
        soft_value = (args.beta * output.soft_value).detach()  # (B,)
        if self.log_completions:
            self._completions.set(rows, in_reward_units.tolist(), soft_value.tolist(), self._mode)
        if self.evaluating:
            totals += evaluation_loss(output, weight)
            self._recorder.keep(totals.over_processes(self.accelerator), "eval")
            return loss
        self._scored.append((rows, output.loss.detach(), in_reward_units, soft_value))
        # Every process takes this update or none does: reducing the metrics settles it before the last backward.
        summed = self._recorder.record(totals, self.accelerator)
        if summed is not None:
            self._totals, is_finite = summed, summed.all_finite()
        return voided_unless(is_finite, loss)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The norm of the update's gradient, which decides whether the update is taken.

        A loss that is not finite has a gradient of NaN. DeepSpeed has already taken or skipped the step itself. Under
        float16, if only the gradient overflows, the loss scaler skips the step and lowers the scale.
        """
        norm = super()._get_grad_norm(model, grad_norm)
        is_finite = math.isfinite(norm)
        of_scale = not is_finite and self.accelerator.mixed_precision == "fp16" and bool(self._totals.all_finite())
        if is_finite or of_scale:
            if not self._denominator and not self.aux_loss_enabled:
                self._keep_weights(model)  # zeros as gradients would still let momentum move them
            self._take_update()
        else:
            self._skip_update(model)
        return norm

    def _keep_weights(self, model: nn.Module) -> None:
        """Let the coming optimizer step change no weight and no moment."""
        model.zero_grad()  # to None: the optimizer then skips a parameter and its moments
        if self._trained_modules is not None:
            self._trained_modules.skip_next_step()

    def _take_update(self) -> None:
        self._skipped.took()
        self._recorder.keep(self._totals, "train")
        replay = self._replay if self._replay is not None and self._replay.prioritized else None
        follows = type(self._soft_value).after_update is not SoftValue.after_update
        scored = list(self._scored_rows()) if replay is not None or follows or self.args.save_rollouts else []
        if replay is not None:
            for row, _, residual, _ in scored:
                if row.number is not None:
                    replay.set_priority(row.number, abs(residual))
        if self.args.save_rollouts:
            folder, process = Path(self.args.output_dir), self.accelerator.process_index
            written = [(row, residual, soft_value) for row, _, residual, soft_value in scored]
            append_update(folder, process, self.state.global_step + 1, self.args.beta, written)
        if follows:
            counted = ((row.trajectory, residual) for row, _, residual, _ in scored if row.left_out is None)
            self._soft_value.after_update(self._totals.means(), counted)
        if not self._was_advised and "soft_value" in (means := self._totals.means()):  # at least one trajectory counts
            self._was_advised = True
            self._advise(means["soft_value"])

    def _scored_rows(self) -> Iterator[tuple[UpdateRow, float, float, float]]:
        """Each row of the update with its loss, β δ and β V."""
        for rows, *columns in self._scored:
            yield from zip(rows, *(column.tolist() for column in columns), strict=True)

    def _skip_update(self, model: nn.Module) -> None:
        """Keep an update out of the weights, moments, replay buffer and log. The schedule and the data go on."""
        self._keep_weights(model)
        if self.is_deepspeed_enabled:
            self.model_wrapped.optimizer.overflow = False  # otherwise the Trainer would not step the schedule
        self._tr_loss.copy_(self._loss_before)
        self._skipped.skipped()
        scored = [(row, loss, residual) for row, loss, residual, _ in self._scored_rows()]
        culprits = [one for one in scored if not math.isfinite(one[1]) and one[0].left_out is None]
        of_loss = bool(self._gather([len(culprits)]).sum())
        if not of_loss:
            culprits = scored  # only the sum of their gradients is known
        update, process = self.state.global_step + 1, self.accelerator.process_index
        file = Path(self.args.output_dir) / SKIPPED / f"process-{process}.jsonl"
        write_culprits(file, update, "loss" if of_loss else "gradient", culprits)
        if self._replay is not None:
            self._replay.drop([row.trajectory for row, _, _ in culprits])
        if self._skipped.in_a_row >= self._skipped.limit:
            sound = complete_checkpoints(self.args.output_dir)
            raise FloatingPointError(
                f"{self._skipped.in_a_row} updates in a row were not finite (`max_skipped_updates`), the last one "
                f"update {update}. None of them reached the weights. Their trajectories are in {file.parent}. "
                f"The last complete checkpoint is {sound[-1] if sound else 'none'}. Rewards, reference scores or the "
                "model's own numbers overflow: look at the file, lower the learning rate, or use bf16 in place of fp16."
            )
        logger.warning(
            f"Update {update} was skipped: its {'loss' if of_loss else 'gradient'} is not finite. Its trajectories are "
            f"in {file.parent}."
        )

    def _gather(self, values: Sequence[float]) -> Tensor:
        """Gather a row of numbers from every process: `(n,)` → `(P, n)`, on the CPU."""
        return self.accelerator.gather(
            torch.tensor([values], dtype=torch.float32, device=self.accelerator.device)
        ).cpu()

    # ---- report ------------------------------------------------------------------------------------------------

    @property
    def _mode(self) -> str:
        """The key of TRL's metrics dictionary that is in use."""
        return "eval" if self.evaluating else "train"

    def _timed(self, name: str) -> AbstractContextManager[None]:
        return nullcontext() if self.evaluating else self._stopwatch(name)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        log_is_due, first = self.control.should_log, len(self.state.log_history)
        with temporarily(self, evaluating=True, _denominator=self._denominator):  # an update may be under way
            given = args[0] if args else kwargs.get("eval_dataset")
            if self.eval_dataset is None and given is None and _evaluates(self.callback_handler.callbacks):
                metrics = dict[str, float]()
                self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
            else:
                metrics = super().evaluate(*args, **kwargs)
            logged = {name for entry in self.state.log_history[first:] for name in entry}  # of every evaluated set
            added = {name: value for name, value in metrics.items() if name not in logged}
            if any(gather_object([bool(added)])):  # a callback may have added them on one process alone
                self.model.eval()  # TRL takes metrics for an evaluation's in this mode
                self.log(added)  # callbacks added these after the Trainer had logged
        if self.is_in_train:
            self.model.train()  # TRL logs training metrics only in this mode
            self.control.should_log = log_is_due  # logging an evaluation cleared it
        return metrics

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        with temporarily(self, evaluating=True, _denominator=self._denominator):
            return super().predict(*args, **kwargs)

    def evaluation_loop(self, dataloader: Any, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """Evaluate one set. Its metrics have its own prefix and are means over its rows, each counted once."""
        check_evaluation_batches(self.args, self.args.window_group_size)  # of a set that only this call brings
        check_evaluation_stream(dataloader.dataset, "The evaluation set", self.args.world_size)
        self._metrics["eval"].clear()
        self._recorder.means("eval")
        self._evaluated, self._rows_to_evaluate = [], None
        if has_length(dataloader.dataset):
            self._rows_to_evaluate = len(dataloader.dataset) * self.num_generations_eval
        output = super().evaluation_loop(dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        means = {name: _mean(values) for name, values in self._metrics["eval"].items()}
        if self._evaluated:
            names, weights = self.reward_func_names, self.reward_weights
            over_rows = evaluation_metrics(torch.cat(self._evaluated), names, weights, self.num_generations_eval)
            means |= {name: _mean([value]) for name, value in over_rows.items()}
        means |= self._recorder.means("eval")
        means.setdefault("loss", None)  # the Trainer's own is 0 where no row counts
        for name, value in ((f"{metric_key_prefix}_{name}", value) for name, value in means.items()):
            if value is not None:
                output.metrics[name] = value
            elif name == best_metric(self.args):  # the Trainer looks it up, and NaN is better than nothing before it
                output.metrics[name] = math.nan
                logger.warning(f"{name} has no value in this evaluation, and so chooses no checkpoint.")
            else:
                output.metrics.pop(name, None)
        self._metrics["eval"].clear()  # otherwise TRL would log them again, without the set's prefix
        return output

    def _advise(self, soft_value: float) -> None:
        """Print and log the advice drawn from the first update's window. `soft_value` is the mean of β V."""
        seen = [
            Seen(
                prompt=one.prompt_key,
                reward=self.args.reward_of(one),
                baseline=one.baseline,
                value=math.nan if one.value is None else one.value,
                length=len(one.completion_ids),
                cut=one.end is End.LENGTH,
                drawn=one.source is Source.ROLLOUT,
                counted=self._loss.left_out(one) is None,
            )
            for one in self._window
        ]
        size = sum(getattr(one, "ds_numel", one.numel()) for one in self.model.parameters() if one.requires_grad)
        full = None if is_peft_model(self.model) else size
        window = FirstWindow(gather_object(seen), soft_value, full, self.state.max_steps)
        if (said := advice(window, self.args)) and self.is_world_process_zero():
            self.accelerator.print("\n- ".join(["TBRM, after the first window:", *said]))
            if self.args.should_save:
                append_line(Path(self.args.output_dir) / LOG, {"step": self.state.global_step + 1, "advice": said})

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.evaluating:
            logs = {name: value for name, value in logs.items() if value == value}  # a NaN is no value
        else:
            self._metrics["train"].update({name: [mean] for name, mean in self._recorder.means("train").items()})
            self._metrics["train"]["skipped_updates"] = [self._skipped.total]
            if self._offset is not None:
                self._metrics["train"]["soft_value_offset"] = [self._offset.bias.item()]
            if "loss" in logs:
                since_log = self._skipped.taken_since_log + self._skipped.since_log
                times = {f"{name}_time": [seconds / since_log] for name, seconds in self._stopwatch.taken().items()}
                self._metrics["train"].update(times)
                if self._actor is not None and (waited := self._actor.waited()) is not None:
                    self._metrics["train"]["rollouts/actor_wait_time"] = [waited]
                logs["loss"] = self._skipped.mean_over_taken(logs["loss"])
                self._skipped.logged()
            if "train_loss" in logs:  # the Trainer's mean over the updates of this call to `train`
                updates = self.state.global_step - self._initial_global_step
                taken = updates - (self._skipped.total - self._skipped_before)
                logs["train_loss"] *= updates / taken if taken else 1.0
        for metrics in self._metrics.values():  # drop metrics without a value: TRL would log None
            for name in [name for name, values in metrics.items() if all(map(math.isnan, values))]:
                del metrics[name]
        table = self._logs
        if self.log_completions:
            scored = ((row, residual, soft_value) for row, _, residual, soft_value in self._scored_rows())
            table = self._completions.beside(self._logs, scored, self._tokenizer)
        with temporarily(self, _logs=table, num_completions_to_print=0):  # TRL would print control characters
            super().log(logs, start_time)
        if self.args.should_save and (self.is_in_train or self.state.global_step):  # not before any training
            more = self._evaluated_policy() if self.evaluating and self._followed is not None else {}
            append_line(Path(self.args.output_dir) / LOG, {**self.state.log_history[-1], **more})
        if self.log_completions and self.accelerator.is_main_process and table["prompt"] and is_rich_available():
            of_user = {name: table["extra"][name] for name in self._logs["extra"]}  # all columns leave no room for text
            prompts, completions, rewards, advantages, extra = map(
                printable, (table["prompt"], table["completion"], table["rewards"], table["advantages"], of_user)
            )
            step, number = self.state.global_step, self.num_completions_to_print
            print_prompt_completions_sample(prompts, completions, rewards, advantages, step, number, extra)

    def _evaluated_policy(self) -> dict[str, str]:
        """The evaluated policy and its sampler: the policy in memory, even if others draw the rollouts."""
        samplers = {
            "rollout_func": self.rollout_func,
            f"vllm ({self.args.vllm_mode})": self.use_vllm,
            "transformers, continuous batching": self.use_transformers_continuous_batching,
            "transformers": True,
        }
        return {
            "eval_policy": self._policy_version or f"step {self.state.global_step}",
            "eval_sampler": next(name for name, used in samplers.items() if used),
        }

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """Write the model card to the output directory. Before a push, list in `.gitignore` what is not pushed."""
        if not self.is_world_process_zero():
            return
        folder, repo = Path(self.args.output_dir), getattr(self, "hub_model_id", None)
        # With `load_best_model_at_end` the Trainer restores the best checkpoint's weights after training.
        best = self.state.best_global_step if self.args.load_best_model_at_end and not self.is_in_train else None
        updates = best or self.state.global_step
        rewarded = self._plan.mix.rollouts or some_unrewarded(self.train_dataset, self._plan.logged)
        base = get_config_model_id(self.model.config)
        given = [tags] if isinstance(tags, str) else tags or []
        libraries = ("tbrm-trl", "trl", "transformers", "datasets", "torch", *(["peft"] * is_peft_model(self.model)))
        facts = CardFacts(
            name=model_name or folder.name,
            repo=repo,
            base_model=base if base and not Path(base).is_dir() else None,
            adapter=is_peft_model(self.model),
            vision=self._is_vlm,
            dataset=dataset_name if dataset_name and not Path(dataset_name).exists() else None,
            rewards=self.reward_func_names if rewarded and _no_reward not in self.reward_funcs else [],
            updates=updates,
            settings=self.args.settings(),
            log=[entry for entry in self.state.log_history if entry["step"] <= updates],
            versions={name: version(name) for name in libraries},
            tags=[*dict.fromkeys([*self._tag_names, *given])],
            method=self._paper,
        )
        if repo is not None:
            keep_at_home(folder)
        model_card(facts).save(folder / "README.md")

    # ---- what an estimator may use: `loss.soft_value.Run` --------------------------------------------------------

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self._tokenizer

    @property
    def is_sharded(self) -> bool:
        return self.is_deepspeed_enabled or self.is_fsdp_enabled

    @property
    def reference_key(self) -> str | None:
        return self._reference.key if isinstance(self._reference, Reference) else None

    @property
    def rollout_settings(self) -> dict[str, Any]:
        return {
            "rewards": [[source_of(function) for function in self.reward_funcs], self.reward_weights.tolist()],
            "template": self.chat_template or getattr(self.processing_class, "chat_template", None),
            "tools": [[source_of(tool) for tool in self.tools or ()], self.args.max_tool_calling_iterations],
            "rollouts": source_of(self.rollout_func),
            "environments": {name: source_of(one) for name, one in (self.environment_factories or {}).items()},
            "end tokens": sorted(self.eos_token_ids),
        }

    def counts(self, trajectory: Trajectory) -> bool:
        return self.args.left_out(trajectory) is None

    def logged_trajectories(self) -> Iterator[Trajectory]:
        if self._logged_rows is None or not self._logged_rows.scored:
            raise ValueError(
                f'`soft_value="{self.args.soft_value}"` needs the reference\'s score of every completion before '
                "training, which adapters under DeepSpeed or FSDP do not give. Train the full model, or launch without "
                "them."
            )
        return map(logged_trajectory, self.train_dataset)

    def sample(self, rows: Sequence[Mapping[str, Any]]) -> list[Trajectory]:
        if self.is_sharded:
            raise ValueError(
                f'`soft_value="{self.args.soft_value}"` samples the reference before the model is sharded, which '
                "DeepSpeed and FSDP do not allow. Run the script once without them and with `max_steps=1`. "
                "`trainer.train_dataset` then has a column of what was sampled: save it, and train on that."
            )
        kept = copy.deepcopy(
            (self._metrics, self._logs, self.state.num_input_tokens_seen, self._recorder.since_log["train"])
        )
        self.model.train()  # otherwise TRL would take this for an evaluation
        try:
            return self._roll_out(rows)
        finally:
            self._metrics, self._logs, self.state.num_input_tokens_seen, self._recorder.since_log["train"] = kept

    def replace_prompts(self, dataset: Dataset) -> None:
        self._plan = DataPlan(*check_dataset(dataset, self.args, self.args.window_group_size), None)
        self.train_dataset = dataset

    def train_module(self, module: nn.Module, learning_rate: float) -> None:
        if self._trained_modules is None:
            self._trained_modules = ReplicatedModules(self.accelerator)
            self.add_callback(self._trained_modules)
        self._trained_modules.add(module, learning_rate)

    def value_head(self, learning_rate: float) -> ValueHead:
        policy = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        head = ValueHead(policy.get_output_embeddings().in_features)  # known for a sharded model too
        self.train_module(head, learning_rate)
        return head

    # ---- resume ------------------------------------------------------------------------------------------------

    @cached_property
    def _dataset_digest(self) -> str | None:
        return dataset_digest(self._given_dataset)

    def run_identity(self) -> dict[str, Any]:
        args, policy = self.args, self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        cuts = [args.long_prompts, args.max_prompt_length, args.max_completion_length]
        plateau = "reduce_lr_on_plateau"
        return {
            "processes": args.world_size,
            "data set": self._dataset_digest,
            "trajectories per update": args.rows_per_update,
            "updates per window": args.fresh_updates,
            "num_iterations": args.num_iterations,
            "num_generations": args.num_generations,
            "replay_buffer_size": args.replay_buffer_size,
            "logged trajectories per window": self._plan.mix.logged,
            "seed of the data order": args.data_order_seed if self.shuffle_dataset else None,
            "reference": "synced" if args.sync_ref_model else args.reference,
            "soft_value": [args.soft_value, *(getattr(args, name) for name in sorted(self._soft_value.options))],
            "soft_value_offset": args.soft_value_offset,
            "truncation": args.truncation,
            "rollout_pool": args.rollout_pool,
            "what the pool cuts": cuts if args.rollout_pool else None,
            "rollouts": "drawn" if self._followed is None else "followed",
            # A fused or paged variant of an optimizer keeps the same state, any other another.
            "optim": str(args.optim.value).removeprefix("paged_").removesuffix("_fused"),
            "lr_scheduler_type": plateau if args.lr_scheduler_type == plateau else "a function of the update",
            "the adapter": adapter_settings(policy).get("peft_type"),
            "the reference's weights": self._initial_reference_weights,
            "the tokenizer": tokenizer_digest(self._tokenizer),
            **{f"the adapter's {name}": value for name, value in adapter_settings(policy).items()},
        }

    def run_settings(self) -> dict[str, Any]:
        def digests(sources: Mapping[str, Any]) -> dict[str, str]:
            texts = {name: json.dumps(source, default=str) for name, source in sources.items()}
            return {name: xxhash.xxh3_64_hexdigest(text.encode()) for name, text in texts.items()}

        rollouts, ends = self.rollout_settings, "end tokens"
        rewards = dict(zip(self.reward_func_names, map(source_of, self.reward_funcs), strict=True))
        return {
            "reference key": self._initial_reference_key,
            "precision": self.accelerator.mixed_precision,
            "reward functions": digests(rewards),
            **digests({name: one for name, one in rollouts.items() if name not in ("rewards", ends)}),
            ends: rollouts[ends],
            **self.args.settings(),
            "versions": {name: version(name) for name in ("tbrm-trl", "trl", "transformers", "accelerate", "torch")},
        }

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        yield from super().tensors()
        if self.ref_model is not None:
            yield from tensors_of_model(self.ref_model, "reference weight")
        if self._trained_modules is not None:
            yield from tensors_of_model(self._trained_modules.modules, "soft value's weight")

    def require_own_folder(self, output_dir: Path, others: list[Path], anew: bool) -> None:
        super().require_own_folder(output_dir, others, anew)
        if not anew and rollout_files(output_dir / "rollouts"):
            raise ValueError(
                f"{output_dir / 'rollouts'} holds rollouts of another run, and no checkpoint to go on from is beside "
                'it. `resume_from_checkpoint="auto"` starts that run anew and drops them. To keep them, move them, or '
                "give the new run another output_dir."
            )
        if self._actor is not None:
            self._actor.require_own_folder(anew)

    def forget(self) -> None:
        self._step, self._window, self._rows_drawn, self._rows_trained = 0, [], 0, 0
        self._recorder.clear()
        self._baselines.clear()
        if self._followed is not None:
            self._followed.restore({})
        self._skipped, self._skipped_before = SkippedUpdates(self.args.max_skipped_updates), 0
        if self._replay is not None:
            self._replay.clear()
        self._last_loaded_step = -1  # TRL sends vLLM the weights of a step that it has not seen

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self._last_loaded_step = -1  # the same step, and other weights
        if self._publisher is not None:
            self._publisher.latest = None

    def before_training(self) -> None:
        # Callbacks that read metrics, such as early stopping, come after those that add some.
        self.callback_handler.callbacks.sort(key=lambda one: not getattr(one, "evaluates", False))
        step = updates_before(Path(self._resumed_from)) if self._resumed_from else None
        output_dir, process = Path(self.args.output_dir), self.accelerator.process_index
        with failing_together():
            go_back(output_dir, process, self.args.world_size, step)
            if process == 0 and self._actor is not None and self._resumed_from is None:
                self._actor.drop(self._actor.records.glob("window-*.parquet") if self._actor.starts else ())
            if process == 0 and self._followed is not None and self._resumed_from:
                # Before the actor starts, which does not draw a window that it sees.
                self._followed.restore(load_values(process_folder(self._resumed_from, 0))["own"]["followed"])
                self._redraw_what_changed(self._resumed_from, self._followed)
            if process == 0:
                rewind_rollouts(output_dir / "rollouts", step or 0)
        self._soft_value.prepare(self)
        self._stopwatch.taken()
        self._pool = self._make_pool()

    def after_training(self) -> None:
        if self._actor is not None:
            self._actor.end()

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        if self._has_trained and not self.state.global_step and not self._rows_drawn:
            prompts = self.args.generation_batch_size // self.args.num_generations
            raise ValueError(
                f"No update was made: the stream gave fewer than the {prompts} prompts of one generation window. Lower "
                "per_device_train_batch_size or steps_per_generation, or add prompts."
            )
        return super()._finalize_training(*args, **kwargs)

    def run_state(self, folder: Path) -> RunState:
        taken, logged = self._logged_rows.state() if self._logged_rows is not None else ([], [])
        own = {
            "totals": self._recorder.since_log["train"].state(),
            "seconds": dict(self._stopwatch.seconds),
            "skipped_updates": self._skipped.state(),
            "rows_drawn": self._rows_drawn,
            "rows_trained": self._rows_trained,
            "was_advised": self._was_advised,
            "logged_rows": taken,
            "soft_value": self._soft_value.state(),
            "baselines": self._baselines.state(),
            "completions": self._completions.state(self._window),
            **({"pool": self._pool.state()} if self._pool is not None else {}),
            **({"followed": self._followed.state()} if self._followed is not None else {}),
            "window_version": self._window_version,
        }
        arrays: dict[str, np.ndarray] = {}
        if self._replay is not None:
            own["replay"], arrays = self._replay.stored.state()
        if self._trained_modules is not None:
            self._trained_modules.save(folder / "soft_value.pt")
        if self.args.sync_ref_model and isinstance(self._reference, Reference):
            self._reference.save(folder)
        completions = {name: self._logs[name] for name in _COMPLETIONS} if self.log_completions else {}
        trainer = {"metrics": dict(self._metrics["train"]), "completions": completions}
        return {"trainer": trainer, "own": own}, {"window": self._window, "logged": logged}, arrays

    def restore_run_state(self, state: RunState, folder: Path, main_folder: Path) -> None:
        self._starts_at_reference = False
        warn_of_finished_schedule(self.lr_scheduler, self.state.global_step, self.state.max_steps)
        values, trajectories, arrays = state
        trainer, own = values["trainer"], values["own"]
        self._step = self.state.global_step * self.args.gradient_accumulation_steps
        self.model.train()  # otherwise TRL would log the rest of training as an evaluation
        self._metrics["train"].clear()
        self._metrics["train"].update(trainer["metrics"])
        for name, saved in trainer["completions"].items():
            if isinstance(saved, list):
                self._logs[name].extend(saved)
                continue
            for column, cells in saved.items():
                self._logs[name][column].extend(cells)
        self._recorder.clear(Totals.from_state(own["totals"], self.accelerator.device))
        self._stopwatch.seconds |= own.get("seconds", {})
        counts = {**own.get("skipped_updates", {}), "limit": self.args.max_skipped_updates}
        self._skipped = SkippedUpdates(**counts)
        self._skipped_before = self._skipped.total
        self._rows_drawn, self._rows_trained = own["rows_drawn"], own["rows_trained"]
        self._was_advised = own.get("was_advised", True)  # earlier versions, which lack the entry, have warned
        self._window = trajectories["window"]
        if "completions" in own:
            self._completions.restore(own["completions"], self._window)
        self._soft_value.restore(own.get("soft_value"))
        if "baselines" in own:
            self._baselines.restore(own["baselines"])
        if self._pool is not None:
            self._pool.restore(own.get("pool", []))
        if self._followed is not None:
            self._followed.restore(own["followed"])
        self._window_version = own.get("window_version")
        if self._logged_rows is not None:
            self._logged_rows.restore(own["logged_rows"], trajectories["logged"])
        if self._replay is not None:
            self._replay.restore(own["replay"], arrays)
        if self._trained_modules is not None:
            self._trained_modules.load(folder / "soft_value.pt")
        if self.args.sync_ref_model and isinstance(self._reference, Reference):
            self._reference.load(folder, main_folder)


def _mean(values: Sequence[float]) -> float | None:
    """Mean of the values that are not NaN, or None if there are none."""
    given = [value for value in values if not math.isnan(value)]
    return sum(given) / len(given) if given else None


def _what_trl_sees(
    model: Any, args: TBRMConfig, reference_model: Any, evaluates_itself: bool
) -> AbstractContextManager[None]:
    """Inside the block, the options under which TRL builds only what this trainer keeps of it.

    TRL syncs no adapter, copies one only if it is named "default", and would load its own reference beside a given one.
    """
    given_adapter = not isinstance(model, str) and is_peft_model(model)
    trls_reference = args.reference == "initial" and reference_model is None and not given_adapter
    return temporarily(
        args,
        sync_ref_model=False,
        beta=args.beta if trls_reference else 0.0,
        enable_jit_checkpoint=False,  # transformers would save in the middle of an update; see `ExactResume`
        # A callback may evaluate on its own benchmarks. The Trainer would still require an evaluation set.
        eval_strategy="no" if evaluates_itself else args.eval_strategy,
    )


def _evaluates(callbacks: Sequence[Any] | None) -> bool:
    """Whether a callback runs its own evaluation."""
    return any(getattr(one, "evaluates", False) for one in callbacks or ())


def _own(given: Any) -> Any:
    """A copy of a list, for TRL to add to. The user's list stays as it is, since the actor adds to it again."""
    return list(given) if isinstance(given, list) else given


def _no_reward(**kwargs: Any) -> list[float]:
    """Placeholder that is never called: TRL needs a reward function even if every trajectory has its reward."""
    raise RuntimeError("There is no reward function to reward a rollout: pass `reward_funcs`.")


def _keep_largest(values: list[float], value: float) -> None:
    """Keep one value of a metric since the last log, the largest: TRL would log the mean of several."""
    values[:] = [max(value, *values)] if values else [value]


def _numbered_by_group(rows: list[UpdateRow], group_size: int) -> list[UpdateRow]:
    for place, row in enumerate(rows):
        row.group = place // group_size
    return rows
