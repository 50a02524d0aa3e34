"""Train by a recipe; every option of it can be overridden on the command line:

    accelerate launch examples/train.py --config examples/recipes/tbrm.yaml --learning_rate 2e-6 --use_peft true

Options: those of `TBRMConfig`, those of TRL's `ModelConfig` (model, LoRA, quantization), and the data's, below. The
reward is mathematical equality with the answer in the data (docs/rewards.md): pip install ".[math]". Others go by name
or dotted path: --reward_funcs math format my_module.my_reward --reward_weights 1.0 0.1 0.5
"""

from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset, load_dataset
from trl import ModelConfig, TrlParser, get_peft_config, get_quantization_config

from tbrm_trl import TBRMConfig, TBRMTrainer, load_rollouts
from tbrm_trl.rewards import find_column, read_golds
from tbrm_trl.rewards import load as load_rewards

# Where data sets keep the question; the first one present is taken.
PROMPT_COLUMNS = ("prompt", "problem", "question")


@dataclass
class DataArguments:
    """What to train on."""

    dataset_name: str = field(
        metadata={
            "help": "Hub id, a .json, .jsonl or .parquet file, or the output folder of a run that saved rollouts."
        }
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a data set of the Hub."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split of a data set of the Hub."})
    system_prompt: str = field(
        default="Please reason step by step, and put your final answer within \\boxed{}.",
        metadata={"help": "Put before prompts that are text. Messages, and rows with a completion, stay as they are."},
    )
    answer_column: str | None = field(
        default=None,
        metadata={
            "help": "Column of the answers; `reward_model.ground_truth` is a key in a column. By default it is the "
            "column whose cells can best be read as answers."
        },
    )
    unreadable_answers: str = field(
        default="refuse",
        metadata={
            "help": 'What becomes of rows whose answer cannot be read: "refuse" stops and names them, "leave_out" '
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


def load(arguments: DataArguments) -> Dataset:
    """The rows, with their answers in the column `solution`, and as prompts what the policy is to answer."""
    path = Path(arguments.dataset_name)
    if path.is_dir():
        dataset = load_rollouts(path)
    elif path.is_file():
        kind = "json" if path.suffix == ".jsonl" else path.suffix.removeprefix(".")
        dataset = load_dataset(kind, data_files=str(path), split="train")
    else:
        dataset = load_dataset(arguments.dataset_name, arguments.dataset_config, split=arguments.dataset_train_split)

    column = arguments.answer_column or find_column(dataset)
    if column is not None:
        dataset = with_answers(dataset, column, arguments.unreadable_answers)
    prompt = next((name for name in PROMPT_COLUMNS if name in dataset.column_names), None)
    if prompt is not None and not {"completion", "completion_ids"} & set(dataset.column_names):
        dataset = dataset.map(lambda row: {"prompt": messages(row[prompt], arguments.system_prompt)}, desc="Prompts")
    return dataset


def with_answers(dataset: Dataset, column: str, unreadable: str) -> Dataset:
    """The rows with an answer that can be read, and that answer as text in the column `solution`."""
    golds = read_golds(dataset, column, unreadable)
    if golds.unreadable:
        print(f"{golds} They are left out.")
    if "solution" in dataset.column_names:
        dataset = dataset.remove_columns("solution")
    dataset = dataset.add_column("solution", golds.texts)
    return dataset.select([row for row, text in enumerate(golds.texts) if text is not None])


def messages(prompt: str | list[dict[str, str]], system_prompt: str) -> list[dict[str, str]]:
    if not isinstance(prompt, str):
        return prompt
    system = [{"role": "system", "content": system_prompt}] if system_prompt else []
    return [*system, {"role": "user", "content": prompt}]


def parse(arguments: list[str] | None = None) -> tuple[DataArguments, TBRMConfig, ModelConfig]:
    parser = TrlParser((DataArguments, TBRMConfig, ModelConfig))
    parser.set_defaults(lora_dropout=0.0)  # noise in a log-probability biases the squared residual
    return parser.parse_args_and_config(arguments)


def main(data: DataArguments, config: TBRMConfig, model: ModelConfig) -> None:
    config.model_init_kwargs = {
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
        **(config.model_init_kwargs or {}),
    }
    dataset = load(data)
    # A log without answers has its rewards already.
    answered = "solution" in dataset.column_names or data.reward_funcs != ["math"]
    rewards, _ = load_rewards(data.reward_funcs)
    trainer = TBRMTrainer(
        model=model.model_name_or_path,
        reward_funcs=rewards if answered else None,
        args=config,
        train_dataset=dataset,
        quantization_config=get_quantization_config(model),
        peft_config=get_peft_config(model),
    )
    trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)
    trainer.save_model(config.output_dir)
    trainer.accelerator.print(f"Saved to {config.output_dir}.")
    if config.push_to_hub:
        trainer.push_to_hub(dataset_name=data.dataset_name)
    trainer.end()


if __name__ == "__main__":
    main(*parse())
