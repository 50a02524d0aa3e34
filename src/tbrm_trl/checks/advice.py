"""Messages to an allowed run: its arithmetic in one line, and warnings that name a better number."""

import math
import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import pyarrow.compute as pc
from datasets import Dataset
from transformers import GenerationConfig, PreTrainedTokenizerBase

from ..files import column_parts, is_text
from ..options import HARMLESS, TBRMOptions
from ..sources.sampler import WindowMix, WindowSampler
from .options import drawn_ahead

# Fields of a generation_config.json that do not change which token is drawn, or that TRL always sets itself.
HARMLESS_IN_FILES = frozenset(
    ("transformers_version", "_from_model_config", "do_sample", "temperature", "bos_token_id", "eos_token_id")
) | {"pad_token_id", "decoder_start_token_id", "output_attentions", "output_hidden_states", "return_dict_in_generate"}


def startup_line(mix: WindowMix, args: TBRMOptions, sampler: WindowSampler | None) -> str:
    """One line with prompts, rollouts, logged trajectories, updates, and what each epoch drops (a stream has none)."""
    accumulation, processes = args.gradient_accumulation_steps, args.world_size
    fresh = args.fresh_updates
    updates = fresh * args.num_iterations
    parts = []
    if mix.rollouts and not args.draws_prompts:
        parts.append(f"{mix.rollouts} rollouts from {args.followed_folder}")
    elif mix.rollouts:
        parts.append(
            f"{mix.rollouts // args.num_generations} prompts × {args.num_generations} rollouts = "
            f"{mix.rollouts} trajectories"
        )
    if mix.logged:
        parts.append(f"{mix.logged} logged trajectories")
    replayed = f", {updates - fresh} of them on replayed trajectories" if args.replay_buffer_size else ""
    line = (
        f"TBRM: each generation takes {' and '.join(parts)}, for {updates} update(s) on {args.rows_per_update} each"
        f"{replayed} ({args.per_device_train_batch_size} per device × {processes} process(es) × {accumulation} "
        "accumulation)"
    )
    if sampler is None or not args.draws_prompts:
        return f"{line}; {args.max_steps} updates in all."
    prompts, logs, windows = len(sampler.prompts), len(sampler.logged), sampler.windows
    left = logs - sampler.logged_per_pass
    unfilled = f"; {left} of them fill no group of {args.num_generations}, others in each pass" if left else ""
    if mix.rollouts:
        tail = prompts - windows * mix.rollouts // args.num_generations
        epoch = f"{prompts} prompts give {windows * updates} updates per epoch, dropping {tail} tail prompts"
        epoch += f", beside {logs} logged trajectories in turn{unfilled}" if logs else ""
    else:
        epoch = f"{logs} logged trajectories give {windows * updates} updates per epoch; the tail opens the next"
        epoch += unfilled
    total = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * windows * updates)
    return f"{line}; {epoch}; {total} updates in all."


def warn_of_double_bos(given: Sequence[Any], tokenizer: PreTrainedTokenizerBase) -> bool:
    """Warn of prompts given as text that begin with the BOS token, if the tokenizer writes one before them.

    Returns whether there are any.

    Args:
        given: data sets, or several by name. Streams, None and prompts that are messages are skipped.
        tokenizer: the policy's.
    """
    bos = tokenizer.bos_token
    if not bos or tokenizer(text=bos)["input_ids"][:2] != [tokenizer.bos_token_id] * 2:
        return False
    double = total = 0
    for one in given:
        for dataset in one.values() if isinstance(one, Mapping) else [one]:
            if not isinstance(dataset, Dataset) or "prompt" not in dataset.column_names:
                continue
            for _, prompts in column_parts(dataset, "prompt"):
                if is_text(prompts):
                    double += pc.sum(pc.starts_with(prompts, bos)).as_py() or 0
                    total += len(prompts)
    if double:
        warnings.warn(
            f"{double} of {total} prompts begin with {bos!r}, and the tokenizer writes one before every text: the "
            "policy reads two, which it never saw in its training. Take it off the prompts (a chat template may have "
            "written it), or give the prompts as messages.",
            stacklevel=2,
        )
    return double > 0


def warn_of_sampling_filters(args: TBRMOptions) -> None:
    if active := args.sampling_filters():
        warnings.warn(
            f"{active} makes the sampler another policy than softmax(logits / temperature), which is the one "
            "scored. The residual stays valid (any data is), but the metrics `kl` and `entropy` no longer "
            "describe the sampled policy, and tokens that the filter removes are never corrected.",
            stacklevel=4,
        )


def warn_of_pushed_state(args: TBRMOptions) -> None:
    """Warn of a push that includes a checkpoint's state, which holds prompts, completions and rewards."""
    strategy = getattr(args.hub_strategy, "value", args.hub_strategy)
    if args.push_to_hub and strategy in ("checkpoint", "all_checkpoints"):
        warnings.warn(
            f"`hub_strategy={strategy!r}` pushes whole checkpoints, and what a run goes on from holds prompts, "
            "completions and rewards. Make the repository private (`hub_private_repo=True`) if they are not to be "
            "read, or push models alone (`hub_strategy='every_save'`).",
            stacklevel=2,
        )


def warn_of_shipped_sampling(shipped: GenerationConfig, chosen: GenerationConfig) -> None:
    """Warn of sampling fields of the model's own generation_config.json that apply because no option sets them."""
    harmless = {*HARMLESS, *HARMLESS_IN_FILES}
    fields = {name: value for name, value in shipped.to_diff_dict().items() if name not in harmless}
    if applied := {name: value for name, value in fields.items() if getattr(chosen, name, None) is None}:
        warnings.warn(
            f"{applied} of the model's own generation_config makes the sampler another policy than softmax(logits / "
            "temperature), which is the one scored. The residual stays valid (any data is), but `kl` and `entropy` no "
            "longer describe the sampled policy. Set these fields to None in the model's generation_config.",
            stacklevel=4,
        )


def warn_of_drawing_ahead(args: TBRMOptions) -> None:
    """Warn of a constant soft value that is right only on the policy's own data, if rollouts are drawn ahead."""
    another = args.soft_value == "optimal" and args.soft_value_beta not in (None, args.beta)
    mean = args.soft_value == "tracked" and args.soft_value_tracks == "reward"
    if drawn_ahead(args) and (another or mean or args.soft_value in ("zero", "log_mean_exp")):
        warnings.warn(
            f"`{drawn_ahead(args)}` with `soft_value={args.soft_value!r}`: rollouts that run ahead are drawn by "
            "earlier policies. This value is a constant, and the optimum is its target on the policy's own rollouts "
            "alone (docs/theory.md). Use calibrated or group, or draw each window by itself.",
            stacklevel=4,
        )


def warn_of_empty_update(reasons: Collection[str | None]) -> None:
    """Warn that nothing was learned from an update, because all its trajectories were left out of the loss."""
    warnings.warn(
        f"No trajectory of this update counts in the loss ({', '.join(sorted(map(str, reasons)))}): it changes "
        "nothing. `left_out/…` in the logs says how many there are of each kind; docs/metrics.md explains them.",
        stacklevel=3,
    )


def warn_of_finished_schedule(schedule: Any, step: int, steps: int) -> None:
    """Warn if a run resumes with a learning rate of 0, from a checkpoint at which its schedule had ended."""
    if step < steps and not any(schedule.get_last_lr()):
        warnings.warn(
            f"The learning rate schedule had ended at the checkpoint of step {step}, so the next update has a learning "
            f"rate of 0, though {steps - step} updates are left. Start a new run from the weights to train for longer.",
            stacklevel=3,
        )
