"""Estimators that use the rewards of samples from the reference, drawn once before training and kept on disk."""

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from numbers import Real
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import torch
import xxhash
from accelerate.utils import gather_object
from datasets import Dataset
from tqdm.auto import tqdm

from ...batch import chunks
from ...files import dataset_digest, read_table, write_table
from ...options import TBRMOptions
from ...trajectory import largest_return
from .base import ConstantValue
from .run import Run

FOLDER = "optimal_values"


class SampledValue(ConstantValue):
    """A constant computed from the rewards of N samples of the reference per prompt.

    A column of the training set may already hold these rewards, or what the estimator computes from them. Without that
    column `train` begins by sampling, through the same generation and rewards as training. The sampled rewards are kept
    in `output_dir/optimal_values`, under a digest of the reference, the data and the sampling settings. An interrupted
    run continues with the next block. Another run with the same digest reads them all, also with another of these
    estimators. The file stays as it is, so that a resumed run goes on with the values that it began with. If samples
    are unscored, since a reward function was down, remove the file: a new run samples their blocks once more and fills
    in what they lack.

    Class attributes:
        column: name of that column.
        content: what the column holds, for error messages.
    """

    column: ClassVar[str]
    content: ClassVar[str]

    @classmethod
    def _problems(cls, args: TBRMOptions) -> Iterator[str]:
        if args.reference == "previous" or args.sync_ref_model:
            yield (
                f'`soft_value="{cls.name}"` is made of samples of the initial reference, drawn once. Use '
                '`reference="initial"` without `sync_ref_model`.'
            )
        if filters := args.sampling_filters():
            yield (
                f'{filters} with `soft_value="{cls.name}"` is refused: the samples would come from another policy than '
                "the reference, and give another value. Leave them at their defaults."
            )
        if args.remove_unused_columns:
            yield (
                f'`remove_unused_columns=True` would drop the column `{cls.column}` that `soft_value="{cls.name}"` '
                "reads. Leave it at False."
            )

    def problem_of_cell(self, cell: Any) -> str | None:
        """What is wrong with a cell of the column, if anything is."""
        raise NotImplementedError

    def problem_of_number(self, value: Any) -> str | None:
        """What is wrong with a number in reward units, if anything is."""
        largest = largest_return(self.args.beta)
        if isinstance(value, Real) and math.isfinite(value) and abs(float(value)) <= largest:
            return None
        return f"A number in reward units must be finite, and at most {largest:g} with this beta."

    def cells(self, rewards: Sequence[torch.Tensor]) -> list[Any]:
        """The cells of the column, from each prompt's sampled rewards without the NaN ones."""
        raise NotImplementedError

    def check_data(self, dataset: Any, logged: np.ndarray) -> None:
        if not isinstance(dataset, Dataset):
            raise ValueError(
                f'`soft_value="{self.name}"` samples every prompt before training, which a stream does not allow. Load '
                "the training set without streaming."
            )
        if not self.samples(dataset):
            cells = list(dataset[self.column])
            for index, cell in enumerate(cells):
                if not _is_missing(cell) and (problem := self.problem_of_cell(cell)):
                    raise ValueError(f"Row {index} of the training set: `{self.column}` is {cell}. {problem}")
            if all(map(_is_missing, cells)):
                raise ValueError(f"`{self.column}` is empty in every row of the training set. It holds {self.content}.")
            for name in self.options:
                if not self.args.is_default(name):
                    raise ValueError(
                        f"`{name}={getattr(self.args, name)!r}` has no effect: the training set brings "
                        f"`{self.column}`, and nothing is sampled. Leave it at its default, or drop the column."
                    )
            return
        samples, group = self.args.soft_value_samples, self.args.num_generations
        if samples < 1 or samples % group:
            raise ValueError(
                f"`soft_value_samples={samples}` must be a positive multiple of num_generations={group}: generation "
                f"takes prompts in groups of that size. Use {max(samples + group - samples % group, group)}."
            )
        if logged.any():
            raise ValueError(
                f'`soft_value="{self.name}"` samples prompts without a completion. For logged rows add a column '
                f"`{self.column}` ({self.content}) to the training set."
            )

    def samples(self, dataset: Dataset) -> bool:
        """Whether the reference is sampled before training, because the training set lacks the column."""
        return self.column not in dataset.column_names

    def prepare(self, run: Run) -> None:
        if not self.samples(run.train_dataset):
            if lacking := sum(map(_is_missing, run.train_dataset[self.column])):
                run.accelerator.print(
                    f"TBRM: `{self.column}` is empty in {lacking} of {len(run.train_dataset)} rows, which are left out."
                )
            return
        key, *_ = gather_object([self._key(run)])  # the main process's: a user's function may hold what differs
        file = Path(self.args.output_dir) / FOLDER / f"{key}.parquet"
        rewards = self._sampled_rewards(run, file)  # (prompts, N)
        unscored = rewards.isnan()  # (prompts, N)
        if lacking := int(unscored.sum()):
            run.accelerator.print(
                f"TBRM: {lacking} of {unscored.numel()} samples of the reference are unscored. "
                f"{int(unscored.all(dim=1).sum())} of {len(rewards)} prompts have no other, so no value, and are left "
                f"out. To have the rest sampled again, remove {file} and start a new run."
            )
        dataset = run.train_dataset.add_column(self.column, self.cells([row[~row.isnan()] for row in rewards]))
        run.replace_prompts(self.kept(dataset, rewards, run))

    def kept(self, dataset: Dataset, rewards: torch.Tensor, run: Run) -> Dataset:
        """The rows to train on, given the sampled rewards `(prompts, N)`."""
        return dataset

    def _sampled_rewards(self, run: Run, file: Path) -> torch.Tensor:
        """`(prompts, N)` rewards of the reference's samples, NaN if unscored. Whole blocks on disk are not repeated."""
        accelerator, args, prompts = run.accelerator, self.args, run.train_dataset
        if not all(gather_object([file.exists()])):
            process, processes = accelerator.process_index, accelerator.num_processes
            rollouts = args.per_device_train_batch_size * args.steps_per_generation
            size = max(1, rollouts // args.soft_value_samples)  # prompts of a block, on each process
            most = max(1, rollouts // args.num_generations) * args.num_generations  # whole groups, as in training
            parts = []
            blocks = range(0, len(prompts), size * processes)
            silent = args.disable_tqdm or not accelerator.is_main_process
            for first in tqdm(blocks, desc="Sampling the reference", disable=silent):
                part = file.with_suffix("") / f"{first:09d}-{size * processes}.parquet"
                parts.append(part)
                if all(gather_object([_is_whole(part)])):
                    continue
                mine = [min(first + process * size + i, len(prompts) - 1) for i in range(size)]  # then the last again
                rows = [prompts[index] for index in mine for _ in range(args.soft_value_samples)]
                # Processes that share an engine must draw alike.
                engine = args.vllm_tensor_parallel_size if args.draws_from_own_engine else 1
                with _random_state_of(args.seed, first + process // engine):
                    sampled = [t.reward for some in chunks(rows, most) for t in run.sample(some)]
                by_prompt = np.array(sampled).reshape(size, -1).tolist()
                gathered = gather_object(by_prompt)[: len(prompts) - first]
                if accelerator.is_main_process:
                    write_table(part, pa.table({"rewards": _filled(part, gathered)}))
                accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                write_table(file, pa.concat_tables([read_table(part) for part in parts]))
            accelerator.wait_for_everyone()
        else:
            accelerator.print(f"TBRM: rewards of the reference's samples read from {file}.")
        return torch.from_numpy(_rewards_in(file))

    def _key(self, run: Run) -> str:
        """Digest of the reference, the data and how it is sampled. β₁ is applied to the rewards later."""
        args = self.args
        settings = {
            "reference": run.reference_key,
            "data set": dataset_digest(run.train_dataset),
            "pessimism": args.reward_pessimism,
            "samples": args.soft_value_samples,
            "temperature": args.temperature,
            "max_completion_length": args.max_completion_length,
            "generation": [args.generation_kwargs, args.chat_template_kwargs, args.use_vllm],
            **run.rollout_settings,
            # These two are left out at their defaults, so that samples from before they existed are found.
            **({"prompts are cut to": args.max_prompt_length} if args.long_prompts == "cut" else {}),
            **({"rewards of failures": str(args.reward_on_error)} if args.reward_on_error != "raise" else {}),
        }
        return xxhash.xxh3_128_hexdigest(json.dumps(settings, sort_keys=True, default=str).encode())


def _is_missing(cell: Any) -> bool:
    """Whether a cell holds no value, as where none of a prompt's samples was scored."""
    return cell is None or cell == [] or (isinstance(cell, float) and math.isnan(cell))


def _rewards_in(file: Path) -> np.ndarray:
    return np.array(read_table(file)["rewards"].to_pylist(), dtype=np.float64)


def _is_whole(file: Path) -> bool:
    """Whether a file has the rewards of its prompts, all of them scored."""
    return file.exists() and not np.isnan(_rewards_in(file)).any()


def _filled(file: Path, sampled: list[list[float]]) -> list[list[float]]:
    """The rewards of a file, with those that it lacks from a new sample; all of the sample if there is no file."""
    if not file.exists():
        return sampled
    earlier = _rewards_in(file)
    return np.where(np.isnan(earlier), sampled, earlier).tolist()


@contextmanager
def _random_state_of(*seed: int) -> Iterator[None]:
    """Make draws inside the block depend only on the seed, and do not change the draws after it."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(hash(seed) % 2**63)
        yield
