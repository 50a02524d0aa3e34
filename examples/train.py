"""Train by a recipe; every option of it can be overridden on the command line:

    accelerate launch examples/train.py --config examples/recipes/tbrm.yaml --learning_rate 2e-6 --use_peft true

Options: those of `TBRMConfig`, those of TRL's `ModelConfig` (model, LoRA, quantization), and the data's, below. Rewards
are verified correctness by math-verify: pip install ".[math]".
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset
from trl import ModelConfig, TrlParser, get_peft_config, get_quantization_config
from trl.rewards import accuracy_reward

from tbrm_trl import TBRMConfig, TBRMTrainer, load_rollouts

# Where data sets keep the question and the answer; the first one present is taken.
PROMPT_COLUMNS = ("prompt", "problem", "question")
ANSWER_COLUMNS = ("answer", "solution", "final_answer")
LATEX = ("$", "\\boxed", "\\(", "\\[")


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

    answer = next((name for name in ANSWER_COLUMNS if name in dataset.column_names), None)
    if answer is not None:
        dataset = dataset.map(lambda row: {"solution": verifiable(row[answer])}, desc="Reading answers")
    prompt = next((name for name in PROMPT_COLUMNS if name in dataset.column_names), None)
    if prompt is not None and not {"completion", "completion_ids"} & set(dataset.column_names):
        dataset = dataset.map(lambda row: {"prompt": messages(row[prompt], arguments.system_prompt)}, desc="Prompts")
    return dataset


def verifiable(answer: Any) -> str | None:
    """An answer in the form that math-verify reads; bare LaTeX it would misread: 3\\sqrt{2} as 3."""
    text = str(answer[0] if isinstance(answer, list) else answer).split("####")[-1].strip()  # GSM8K's mark
    return text if any(mark in text for mark in LATEX) else f"${text}$"


def messages(prompt: str | list[dict[str, str]], system_prompt: str) -> list[dict[str, str]]:
    if not isinstance(prompt, str):
        return prompt
    system = [{"role": "system", "content": system_prompt}] if system_prompt else []
    return [*system, {"role": "user", "content": prompt}]


def correct(completions, solution, **kwargs) -> list[float | None]:
    """1 where the answer in the completion is that of the solution, else 0; None where the solution has none."""
    return accuracy_reward([one if isinstance(one, list) else [{"content": one}] for one in completions], solution)


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
    trainer = TBRMTrainer(
        model=model.model_name_or_path,
        reward_funcs=correct if "solution" in dataset.column_names else None,
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
