"""`TBRMConfig`: the options of a run, checked together. `options.py` has each option and its help text."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.distributed.distributed_c10d import _set_pg_timeout

from .checks import launch, options
from .checks.advice import warn_of_drawing_ahead, warn_of_pushed_state, warn_of_sampling_filters
from .loss.soft_value import SoftValue
from .options import TBRMOptions, refuse


@dataclass(repr=False)
class TBRMConfig(TBRMOptions):
    __doc__ = TBRMOptions.__doc__

    def __post_init__(self):
        refuse(options.check_types(self))
        self._switch_top_k_off()
        problems = [
            *options.check_meaning(self),
            *self._resolve_truncation(),
            *options.check_residual_options(self),
            *options.check_terms(self),
            *options.check_reference(self),
            *self._derive(),
        ]
        derived = hasattr(self, "deepspeed_plugin") and self.steps_per_generation and self.generation_batch_size
        if derived and self.soft_value in SoftValue.registry:
            problems += [
                *options.check_model_kwargs(self),
                *options.check_padding(self),
                *options.check_generation(self),
                *options.check_batch_arithmetic(self),
                *options.check_reward_calls(self),
                *options.check_prompt_options(self),
                *options.check_skipping(self),
                *options.check_stop(self),
                *options.check_microbatches(self),
                *options.check_soft_value(self),
                *options.check_groups(self, self.window_group_size, self.update_group_size),
                *options.check_replay(self, self.update_group_size),
                *options.check_rollout_pool(self),
                *options.check_drawing_ahead(self),
                *options.check_following(self),
                *launch.check_launch(self),
            ]
        refuse(problems)
        self._keep_time_limit()
        warn_of_sampling_filters(self)
        warn_of_pushed_state(self)
        warn_of_drawing_ahead(self)

    def _derive(self) -> Iterator[str]:
        """Let transformers and TRL derive values from the options, and yield the problems they find."""
        if options.too_small(self):
            return  # already refused, and TRL divides by some of them
        try:
            super().__post_init__()
        except ValueError as error:
            if self.generation_batch_size and self.generation_batch_size % self.num_generations:
                yield options.broken_groups(self)
            # GRPO checks this last, after it has derived all batch sizes. TBRM needs only one rollout.
            elif not (self.num_generations == 1 and str(error).startswith("GRPO requires at least 2 generations")):
                yield str(error)

    def _switch_top_k_off(self) -> None:
        """Turn a `top_k` of None into 0. To TRL both mean all tokens, but transformers takes the first 50 for None."""
        given = getattr(self, "generation_kwargs", None) or {}
        generation = {**given, "top_k": given["top_k"] or 0} if "top_k" in given else given
        self.__dict__.update(top_k=self.top_k or 0, generation_kwargs=generation or None)

    def _keep_time_limit(self) -> None:
        """Set the process group's timeout to `ddp_timeout`, which transformers ignores with `use_cpu=True`."""
        if self.use_cpu and not self.is_default("ddp_timeout") and torch.distributed.is_initialized():
            _set_pg_timeout(self.ddp_timeout_delta)

    def _resolve_truncation(self) -> Iterator[str]:
        if self.mask_truncated_completions and self.truncation not in (None, "mask"):
            yield (
                f"`mask_truncated_completions=True` is truncation='mask', but `truncation={self.truncation!r}`. Use "
                "one of the two."
            )
        if self.truncation is None:
            self.truncation = "mask" if self.mask_truncated_completions else "terminal"
        self.mask_truncated_completions: bool = self.truncation == "mask"
        if self.truncated_reward and self.truncation != "bootstrap":
            yield (
                f"`truncated_reward={self.truncated_reward}` has no effect with `truncation={self.truncation!r}`: only "
                "with 'bootstrap' is a cut completion's own reward ignored."
            )

    @property
    def window_group_size(self) -> int:
        """Trajectories of one prompt that are adjacent in one process's window; 1 if none are compared."""
        compared = SoftValue.registry[self.soft_value].compares or self.reward_baseline == "group_mean"
        return self.num_generations if compared else 1

    @property
    def update_group_size(self) -> int:
        """Trajectories of one prompt that are adjacent in one process's update; 1 if no ratios are compared."""
        return self.num_generations if SoftValue.registry[self.soft_value].compares == "ratios" else 1
