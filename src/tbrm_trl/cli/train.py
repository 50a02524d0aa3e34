"""tbrm train: train by a recipe. The command line can override every field of it.

    tbrm train --config examples/recipes/tbrm.yaml --model_name_or_path Qwen/Qwen2.5-0.5B
    tbrm train --config recipe.yaml --accelerate_config zero3 --num_processes 4
    tbrm train --config recipe.yaml --reward_funcs math format my_module.my_reward --reward_weights 1.0 0.1 0.5
    tbrm train --config recipe.yaml --dry_run true

Options: the data options, those of `TBRMConfig`, and those of TRL's `ModelConfig` (model, LoRA, quantization). Options
of `accelerate launch` are passed on to it. `--accelerate_config` takes a file, or one of TRL's names (single_gpu,
multi_gpu, zero1, zero2, zero3, fsdp2).
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from .quiet import see_one_gpu, silence

silence()
if "ACCELERATE_MIXED_PRECISION" in os.environ and "LOCAL_RANK" not in os.environ:  # accelerate's launch of one process
    see_one_gpu()

import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError  # noqa: E402
from trl import ModelConfig, get_peft_config  # noqa: E402

from tbrm_trl import TBRMConfig, TBRMTrainer, load_rollouts  # noqa: E402
from tbrm_trl.evaluation.benchmarks import (  # noqa: E402
    BOXED,
    PROMPT_COLUMNS,
    in_template,
    load_benchmark,
    messages,
    require_question,
)
from tbrm_trl.evaluation.callback import EvaluationCallback  # noqa: E402
from tbrm_trl.evaluation.run import Settings  # noqa: E402
from tbrm_trl.evaluation.sampling import Sampling  # noqa: E402
from tbrm_trl.files import ROW_FILES, rows_of_file, rows_of_hub  # noqa: E402
from tbrm_trl.rewards import NAMES, find_column, read_golds  # noqa: E402
from tbrm_trl.rewards import load as load_rewards  # noqa: E402
from tbrm_trl.sources.logged import logged_rows, rewarded_rows  # noqa: E402

from .parsing import (  # noqa: E402
    Parser,
    Refused,
    Words,
    leave,
    quantization_of,
    sorted_words,
    unused_beside_template,
    with_line_breaks,
)

PROG = "tbrm train"
ADAPTERS = ("use_rslora", "use_dora")  # options of adapters, besides lora_*
LAUNCHED = "TBRM_LAUNCHED"  # set in the processes that the launcher starts


@dataclass
class DataArguments:
    """What to train on, and what to evaluate on during training."""

    dataset_name: str = field(
        metadata={
            "help": "Hub id, a .json, .jsonl, .parquet or .csv file, or the output folder of a run that saved "
            "rollouts. Prompts stand in the column `prompt`, `problem` or `question`."
        }
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a data set of the Hub."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split of a data set of the Hub."})
    system_prompt: str = field(
        default=BOXED,
        metadata={"help": "Put before prompts that are text. Messages, and rows with a completion, stay as they are."},
    )
    prompt_template: str | None = field(
        default=None,
        metadata={
            "help": "Text with {question} in it, for models without a chat template: prompts become that text, and no "
            "messages. Rows with a completion stay as they are. In a text on one line, \\n is a line break."
        },
    )
    answer_column: str | None = field(
        default=None,
        metadata={
            "help": "Column of the answers that `math` reads; `reward_model.ground_truth` is a key in a column. By "
            "default it is the column whose cells can best be read as answers. The answer as text becomes the column "
            "`solution`, for every reward. Other columns stay as they are."
        },
    )
    unreadable_answers: str = field(
        default="refuse",
        metadata={
            "help": "What becomes of rows whose answer cannot be read: to refuse stops and names them, to leave_out "
            "trains on the others.",
            "choices": ["refuse", "leave_out"],
        },
    )
    reward_funcs: list[str] = field(
        default_factory=lambda: ["math"],
        metadata={
            "help": "Rewards, by name (math, format, thinking, length(limit=2048), reasoning_gym) or dotted path."
        },
    )
    reward_time_limit: float = field(
        default=5.0,
        metadata={"help": "Seconds that math, reasoning_gym or a reward of yours may take for one completion."},
    )
    eval_benchmarks: list[str] = field(
        default_factory=list,
        metadata={"help": "Benchmarks to evaluate on at each evaluation (eval_strategy), as `tbrm eval` takes them."},
    )
    eval_reward: str | None = field(
        default=None,
        metadata={
            "help": "Reward that judges there, by name or dotted path. By default each benchmark's own; of "
            "a file, `math`."
        },
    )
    eval_samples: int = field(
        default=1,
        metadata={
            "help": "Completions of each problem there, n of avg@n. More than 1 need an --eval_temperature above 0."
        },
    )
    eval_temperature: float = field(default=0.0, metadata={"help": "Temperature there; 0 is greedy."})
    eval_max_new_tokens: int | None = field(
        default=None, metadata={"help": "Length limit there. By default that of training, max_completion_length."}
    )
    eval_batch_size: int = field(default=64, metadata={"help": "Completions generated at once there, on each process."})
    dry_run: bool = field(
        default=False,
        metadata={
            "help": "Check everything up to the first rollout, and stop. If all rows are logged, the reference scores "
            "them before, and the scores are kept for the run."
        },
    )

    wider_types = MappingProxyType({"reward_funcs": list[str] | dict[str, float]})  # in a recipe, with their weights


def load(arguments: DataArguments) -> Dataset:
    """The rows to train on, with answers in the column `solution` and questions as prompts for the policy."""
    path = Path(arguments.dataset_name)
    if path.is_dir():
        dataset = load_rollouts(path)
    elif path.is_file() or path.suffix in ROW_FILES:
        dataset = rows_of_file(path)
    else:
        dataset = rows_of_hub(arguments.dataset_name, arguments.dataset_config, arguments.dataset_train_split)
    if path.is_dir() or path.is_file():
        of_hub = {"config": arguments.dataset_config, "train_split": arguments.dataset_train_split}
        for name, value in of_hub.items():
            if value not in (None, "train"):
                print(f"--dataset_{name} {value} is for data sets of the Hub: all {len(dataset)} rows of {path} count.")

    column = arguments.answer_column or (find_column(dataset) if "math" in arguments.reward_funcs else None)
    if column is not None:
        others = [name for name in arguments.reward_funcs if name.partition("(")[0].strip() not in NAMES]
        dataset = with_answers(dataset, column, arguments.unreadable_answers, others)
    elif "math" in arguments.reward_funcs and not logged_rows(dataset).any():
        raise ValueError(
            f"{arguments.dataset_name}: no column holds answers that can be read. Columns: "
            f"{', '.join(dataset.column_names)}. Name one by --answer_column, or give rewards of your own by "
            "--reward_funcs. (In a log, completions stand in the column `completion` and rewards in `reward`.)"
        )
    prompt, logged = next((name for name in PROMPT_COLUMNS if name in dataset.column_names), None), logged_rows(dataset)
    if prompt is None and not logged.all():
        raise ValueError(
            f"{arguments.dataset_name}: none of its columns, {', '.join(dataset.column_names)}, is called "
            f"{', '.join(PROMPT_COLUMNS[:-1])} or {PROMPT_COLUMNS[-1]}. Rename the one that holds the prompts."
        )
    template = with_line_breaks(arguments.prompt_template)
    require_question(template)
    if prompt is not None and not logged.any():

        def asked(row: dict[str, Any]) -> dict[str, Any]:
            one = row[prompt]
            return {"prompt": in_template(template, one) if template else messages(one, arguments.system_prompt)}

        return dataset.map(asked, desc="Prompts")
    if prompt is not None and not logged.all() and isinstance(dataset[int(logged.argmin())][prompt], str):
        print(
            f"{(~logged).sum()} of {len(dataset)} rows are to be rolled out. Their prompts are text beside those of "
            "logged rows, and stay so: no system prompt is put before them, and no chat template is applied. Write all "
            "prompts and completions as messages where that is not meant."
        )
    return dataset


def with_answers(dataset: Dataset, column: str, unreadable: str, others: Sequence[str] = ()) -> Dataset:
    """The rows that have a readable answer or a reward, with the answer as text in the column `solution`."""
    rewarded = rewarded_rows(dataset, logged_rows(dataset))
    golds = read_golds(dataset, column, unreadable, needed=(~rewarded).tolist())
    if golds.unreadable:
        print(f"{golds} They are left out.")
    if "solution" in dataset.column_names:
        before_and_after = enumerate(zip(dataset["solution"], golds.texts, strict=True))
        if others and any(old != new for row, (old, new) in before_and_after if row not in golds.unreadable):
            where = "it" if column == "solution" else repr(column)
            print(
                f"The column 'solution' becomes the answer in {where}, which math compares with. That is what "
                f"{', '.join(others)} will be given, too: rename the column if they need what stands in it."
            )
        dataset = dataset.remove_columns("solution")
    dataset = dataset.add_column("solution", golds.texts)
    return dataset.select([row for row in range(len(dataset)) if row not in golds.unreadable])


def parser() -> Parser:
    # Noise in a log-probability biases the squared residual, so adapters have no dropout by default.
    return Parser(DataArguments, TBRMConfig, ModelConfig, prog=PROG, description=__doc__ or "", lora_dropout=0.0)


def parse(arguments: list[str]) -> tuple[DataArguments, TBRMConfig, ModelConfig]:
    """Parse a command line and its recipe, without launcher options. Raises `Refused`."""
    reader = parser()
    data, config, model = reader.parse(with_adapter_settled(sorted_words(reader, arguments)))
    return data, config, model


def with_adapter_settled(words: Words) -> Words:
    """The same words. Raises `Refused` for an adapter's options if nothing says whether an adapter is trained.

    TRL would train the full model.
    """
    given = sorted(words.given)
    adapters = [f"--{name}" for name in given if name.startswith("lora_") or name in ADAPTERS]
    if adapters and "use_peft" not in words.given:
        chosen = "say --use_peft true to train an adapter, or false to train all weights"
        raise Refused([f"{', '.join(adapters)} without --use_peft: {chosen}."])
    return words


def problems_of(data: DataArguments, chosen: Collection[str]) -> list[str]:
    """The arguments that do not go together, one line each. `chosen` are the names of those given."""
    problems = []
    alone = [f"--{name}" for name in sorted(chosen) if name.startswith("eval_") and hasattr(data, name)]
    if alone and not data.eval_benchmarks:
        problems.append(f"{', '.join(alone)} without --eval_benchmarks changes nothing: name benchmarks, or leave out.")
    if data.eval_samples < 1:
        problems.append(f"--eval_samples {data.eval_samples} must be at least 1.")
    if data.eval_samples > 1 and data.eval_temperature == 0:
        problems.append(
            f"--eval_samples {data.eval_samples} would all be the same: give an --eval_temperature above 0."
        )
    if data.eval_batch_size < 1:
        problems.append(f"--eval_batch_size {data.eval_batch_size} must be at least 1.")
    if data.eval_max_new_tokens is not None and data.eval_max_new_tokens < 1:
        problems.append(f"--eval_max_new_tokens {data.eval_max_new_tokens} must be at least 1.")
    if data.prompt_template is not None and data.system_prompt != BOXED:
        problems += unused_beside_template(["system_prompt"])
    return problems


class DryRun(TBRMTrainer):
    """A trainer that stops in `train` where rollouts would begin."""

    class Passed(Exception):
        """Every check has passed."""

    def before_training(self) -> None:
        raise DryRun.Passed


def init_kwargs(config: TBRMConfig, model: ModelConfig) -> dict[str, Any]:
    """How the model is loaded: what `model_init_kwargs` says goes before the options of their own."""
    return {
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
        **(config.model_init_kwargs or {}),
    }


def run(data: DataArguments, config: TBRMConfig, model: ModelConfig) -> None:
    """Train and save a model, and push it to the Hub if asked."""
    if model.model_name_or_path is None:
        raise Refused(["--model_name_or_path is missing: the id of a model on the Hub, or a folder."])
    if config.reward_weights is not None and len(config.reward_weights) != len(data.reward_funcs):
        raise Refused(
            [f"--reward_weights has {len(config.reward_weights)} numbers for {len(data.reward_funcs)} reward_funcs."]
        )
    config.model_init_kwargs = init_kwargs(config, model)
    try:
        # Workers know which row raised, so only that row is passed over.
        passed_over = config.reward_on_error != "raise"
        of_rows: dict[str, Any] = dict(raises=False, failed=config.reward_of_failure) if passed_over else {}
        rewards, weights = load_rewards(data.reward_funcs, time_limit=data.reward_time_limit, **of_rows)
        config.reward_weights = config.reward_weights or weights
        callbacks = evaluations(data, config)
        dataset = load(data)
        # Logged rows without answers bring their own rewards.
        answered = "solution" in dataset.column_names or list(data.reward_funcs) != ["math"]
        trainer = (DryRun if data.dry_run else TBRMTrainer)(
            model=model.model_name_or_path,
            reward_funcs=rewards if answered else None,
            args=config,
            train_dataset=dataset,
            callbacks=callbacks,
            quantization_config=quantization_of(model),
            peft_config=get_peft_config(model),
        )
    # OSError: the model or the rollouts are missing; ImportError: a package is
    except (ValueError, OSError, ImportError) as error:
        raise Refused([str(error)]) from error
    try:
        trainer.train()
    except ValueError as error:
        if trainer.is_in_train:
            raise
        raise Refused([str(error)]) from error  # the checkpoint cannot be resumed
    except DryRun.Passed:
        trainer.accelerator.print("Dry run: everything up to the first rollout is in order. Nothing was trained.")
        trainer.end()
        return
    trainer.save_model(config.output_dir)
    trainer.accelerator.print(f"Saved to {config.output_dir}.")
    if config.push_to_hub:
        trainer.push_to_hub(dataset_name=data.dataset_name)
    trainer.accelerator.wait_for_everyone()  # only the main process saves; the others would leave its group
    trainer.end()


def evaluations(data: DataArguments, config: TBRMConfig) -> list[Any]:
    """The callback that evaluates on benchmarks, if any are named."""
    if not data.eval_benchmarks and config.eval_strategy != "no":
        raise ValueError(
            f"eval_strategy is {config.eval_strategy}, but there is nothing to evaluate on: name --eval_benchmarks, or "
            "leave --eval_strategy out."
        )
    if not data.eval_benchmarks:
        return []
    if config.eval_strategy == "no":
        raise ValueError(
            "--eval_benchmarks is given, but eval_strategy is no: set --eval_strategy steps and --eval_steps."
        )
    length = config.max_completion_length if data.eval_max_new_tokens is None else data.eval_max_new_tokens
    sampling = Sampling(temperature=data.eval_temperature, max_new_tokens=length)
    template = with_line_breaks(data.prompt_template)
    settings = Settings(data.eval_samples, sampling, config.seed, data.system_prompt, template)
    benchmarks = [load_benchmark(name, reward=data.eval_reward) for name in data.eval_benchmarks]
    return [EvaluationCallback(benchmarks, settings, data.eval_batch_size, data.reward_time_limit)]


def main(arguments: list[str] | None = None) -> None:
    given = sys.argv[1:] if arguments is None else arguments
    try:
        reader = parser()
        words = with_adapter_settled(sorted_words(reader, given, launcher_options()))
        launched = any(name in os.environ for name in (LAUNCHED, "LOCAL_RANK", "ACCELERATE_MIXED_PRECISION"))
        if not launched and (words.launcher or torch.cuda.device_count() > 1):
            launch(words)
        else:
            data, config, model = reader.parse(words)
            if problems := problems_of(data, words.given):
                raise Refused(problems)
            run(data, config, model)
    except Refused as refused:
        leave(PROG, refused)


def launcher_options() -> dict[str, argparse.Action]:
    """The options of `accelerate launch`, and `--accelerate_config`."""
    from accelerate.commands.launch import launch_command_parser

    launcher = launch_command_parser()
    launcher.add_argument("--accelerate_config")
    actions = [action for action in launcher._actions if action.dest != "help"]
    return dict(sorted((option, action) for action in actions for option in action.option_strings))


def launch(words: Words) -> None:
    """Run the command in the processes that accelerate starts."""
    from accelerate.commands.launch import launch_command, launch_command_parser
    from trl.cli.accelerate_config import resolve_accelerate_config_argument

    os.environ[LAUNCHED] = "1"
    try:
        options = resolve_accelerate_config_argument(words.launcher)
        launch_command(launch_command_parser().parse_args([*options, "--module", "tbrm_trl.cli", "train", *words.own]))
    except (ValueError, ImportError) as error:  # the launcher's own options are wrong, or DeepSpeed is missing
        raise Refused([f"accelerate: {error}"]) from error
    except ChildFailedError as error:  # the failed process has printed its error
        sys.exit(error.get_first_failure()[1].exitcode)
    except subprocess.CalledProcessError as error:  # raised when the launcher starts one process
        sys.exit(error.returncode)


if __name__ == "__main__":
    main()
