"""`TBRMConfig`: the options of a run, checked together. `options.py` has each option and its help text."""

from dataclasses import dataclass

from .checks import launch, options
from .checks.advice import warn_of_sampling_filters
from .loss.soft_value import SoftValue
from .options import TBRMOptions


@dataclass(repr=False)
class TBRMConfig(TBRMOptions):
    __doc__ = TBRMOptions.__doc__

    def __post_init__(self):
        options.refuse_options_without_meaning(self)
        self._resolve_truncation()
        options.check_residual_options(self)
        options.check_generation(self)
        try:
            super().__post_init__()
        except ValueError as error:
            if self.generation_batch_size and self.generation_batch_size % self.num_generations:
                raise options.broken_groups(self) from error
            # GRPO's last word on batches, after it has derived all their sizes. Here one rollout is enough.
            if not (self.num_generations == 1 and str(error).startswith("GRPO requires at least 2 generations")):
                raise
        options.check_batch_arithmetic(self)
        options.check_microbatches(self)
        options.check_soft_value(self)
        options.check_groups(self, self.window_group_size, self.update_group_size)
        options.check_terms(self)
        options.check_padding(self)
        options.check_reference(self)
        options.check_stop(self)
        options.check_replay(self, self.update_group_size)
        launch.check_launch(self)
        warn_of_sampling_filters(self)

    def _resolve_truncation(self) -> None:
        if self.mask_truncated_completions and self.truncation not in (None, "mask"):
            raise ValueError(
                f"`mask_truncated_completions=True` is truncation='mask', but `truncation={self.truncation!r}`. Use "
                "one of the two."
            )
        if self.truncation is None:
            self.truncation = "mask" if self.mask_truncated_completions else "terminal"
        self.mask_truncated_completions: bool = self.truncation == "mask"
        if self.truncated_reward and self.truncation != "bootstrap":
            raise ValueError(
                f"`truncated_reward={self.truncated_reward}` has no effect with `truncation={self.truncation!r}`: only "
                "with 'bootstrap' is a cut completion's own reward ignored."
            )

    @property
    def window_group_size(self) -> int:
        """Trajectories of one prompt that stand together in one window of one process; 1 if none are compared."""
        compared = SoftValue.registry[self.soft_value].compares or self.reward_baseline == "group_mean"
        return self.num_generations if compared else 1

    @property
    def update_group_size(self) -> int:
        """Trajectories of one prompt that stand together in one update of one process; 1 if no ratios are compared."""
        return self.num_generations if SoftValue.registry[self.soft_value].compares == "ratios" else 1
