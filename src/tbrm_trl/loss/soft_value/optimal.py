"""A*-PO: the optimal value of each prompt, estimated once from samples of the reference."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import torch
import xxhash
from accelerate.utils import gather_object
from datasets import Dataset
from tqdm.auto import tqdm

from ...files import dataset_digest, read_table, write_table
from ...options import TBRMOptions, refuse
from ...trajectory import Trajectory
from .base import ConstantValue
from .log_mean_exp import log_mean_exp, problem_of_temperature
from .run import Run

COLUMN = "optimal_value"


class OptimalValue(ConstantValue):
    """`V̂*(x) = β₁ log mean_i exp(r_i/β₁)` over N samples of the reference, once per prompt; `V = V̂*/β`.

    A*-PO (arXiv 2505.20686) has N = 8, β₁ = 0.5 and β = 1e-3. A training set may bring V̂*, in reward units, in a column
    `optimal_value`. Without that column `train` begins by sampling, through the same generation and rewards as
    training. The sampled rewards are kept in `output_dir/optimal_values`, under a digest of the reference, the data and
    the sampling settings. An interrupted run goes on with the next block, and another run on the same reads them all.
    """

    name = "optimal"
    options: ClassVar = frozenset({"soft_value_beta", "soft_value_samples", "soft_value_drop_unsolved"})

    @classmethod
    def check(cls, args: TBRMOptions) -> None:
        refuse(cls._problems(args))

    @staticmethod
    def _problems(args: TBRMOptions) -> Iterator[str]:
        yield from problem_of_temperature(args.soft_value_beta)
        if args.reference == "previous" or args.sync_ref_model:
            yield (
                '`soft_value="optimal"` is the value of the initial reference, sampled once. Use `reference="initial"` '
                "without `sync_ref_model`."
            )
        if filters := args.sampling_filters():
            yield (
                f'{filters} with `soft_value="optimal"` is refused: the samples would come from another policy than '
                "the reference, and their log-mean-exp would be another value. Leave them at their defaults."
            )
        if args.remove_unused_columns:
            yield (
                f'`remove_unused_columns=True` would drop the column `{COLUMN}` that `soft_value="optimal"` reads. '
                "Leave it at False."
            )

    def check_data(self, dataset: Any, logged: np.ndarray) -> None:
        if not isinstance(dataset, Dataset):
            raise ValueError(
                '`soft_value="optimal"` estimates a value for every prompt before training, which a stream does not '
                "allow. Load the training set without streaming."
            )
        if COLUMN in dataset.column_names:
            for index, value in enumerate(dataset[COLUMN]):
                if value is None or not math.isfinite(value):
                    raise ValueError(f"Row {index} of the training set: `{COLUMN}` is {value}. It must be finite.")
            for name in self.options:
                if not self.args.is_default(name):
                    raise ValueError(
                        f"`{name}={getattr(self.args, name)!r}` has no effect: the training set brings `{COLUMN}`, and "
                        "nothing is sampled. Leave it at its default, or drop the column."
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
                f'`soft_value="optimal"` samples prompts without a completion. For logged rows add a column `{COLUMN}` '
                "(V̂*, in reward units) to the training set."
            )

    def prepare(self, run: Run) -> None:
        if COLUMN in run.train_dataset.column_names:
            return
        rewards = self._sampled_rewards(run)  # (prompts, N)
        temperature = self.args.soft_value_beta or self.args.beta
        values = [
            log_mean_exp(row[~row.isnan()], temperature).item() if (~row.isnan()).any() else math.nan for row in rewards
        ]
        dataset = run.train_dataset.add_column(COLUMN, values)
        if self.args.soft_value_drop_unsolved:
            solved = torch.nonzero((rewards > 0).any(dim=1)).flatten().tolist()
            run.accelerator.print(
                f"TBRM: {len(dataset) - len(solved)} of {len(dataset)} prompts dropped: no reference sample was "
                "rewarded."
            )
            needed = self.args.generation_batch_size // self.args.num_generations
            if len(solved) < needed:
                raise ValueError(
                    f"`soft_value_drop_unsolved=True` leaves {len(solved)} of {len(dataset)} prompts, fewer than the "
                    f"{needed} of one generation window. Raise soft_value_samples, give easier prompts, or train on "
                    "all."
                )
            dataset = dataset.select(solved)
        run.replace_prompts(dataset)

    def on_window(self, trajectories: Sequence[Trajectory], rows: Sequence[Mapping[str, Any]], group_size: int) -> None:
        for trajectory, row in zip(trajectories, rows, strict=True):
            trajectory.value = row.get(COLUMN)  # prompts of an evaluation set have no value

    def _sampled_rewards(self, run: Run) -> torch.Tensor:
        """`(prompts, N)` rewards of the reference's samples, NaN if unscored. What is on disk is not sampled again."""
        accelerator, args, prompts = run.accelerator, self.args, run.train_dataset
        file = Path(args.output_dir) / "optimal_values" / f"{self._key(run)}.parquet"
        if not all(gather_object([file.exists()])):
            if run.is_sharded:
                raise ValueError(
                    '`soft_value="optimal"` samples the reference before the model is sharded, which DeepSpeed and '
                    "FSDP do not "
                    "allow. Run the script once without them and with `max_steps=1`; `run.train_dataset` then "
                    f"has a column `{COLUMN}`: save it, and train on that."
                )
            process, processes = accelerator.process_index, accelerator.num_processes
            rollouts = args.per_device_train_batch_size * args.steps_per_generation
            size = max(1, rollouts // args.soft_value_samples)  # prompts of a block, on each process
            parts = []
            blocks = range(0, len(prompts), size * processes)
            silent = args.disable_tqdm or not accelerator.is_main_process
            for first in tqdm(blocks, desc="Sampling the reference", disable=silent):
                part = file.with_suffix("") / f"{first:09d}-{size * processes}.parquet"
                parts.append(part)
                if all(gather_object([part.exists()])):
                    continue
                mine = [min(first + process * size + i, len(prompts) - 1) for i in range(size)]  # filled up
                rows = [prompts[index] for index in mine for _ in range(args.soft_value_samples)]
                with _random_state_of(args.seed, first + process):
                    sampled = [t.reward for t in run.sample(rows)]
                by_prompt = np.array(sampled).reshape(size, -1).tolist()
                gathered = gather_object(by_prompt)[: len(prompts) - first]
                if accelerator.is_main_process:
                    write_table(part, pa.table({"rewards": gathered}))
                accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                write_table(file, pa.concat_tables([read_table(part) for part in parts]))
            accelerator.wait_for_everyone()
        else:
            accelerator.print(f"TBRM: rewards of the reference's samples read from {file}.")
        return torch.tensor(read_table(file)["rewards"].to_pylist(), dtype=torch.float64)

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
            # At their defaults these two are not named, so that what was sampled before there were any is found.
            **({"prompts are cut to": args.max_prompt_length} if args.long_prompts == "cut" else {}),
            **({"rewards of failures": str(args.reward_on_error)} if args.reward_on_error != "raise" else {}),
        }
        return xxhash.xxh3_128_hexdigest(json.dumps(settings, sort_keys=True, default=str).encode())


@contextmanager
def _random_state_of(*seed: int) -> Iterator[None]:
    """Make draws depend on the seed alone inside the block, and leave those after it as they would have been."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(hash(seed) % 2**63)
        yield
