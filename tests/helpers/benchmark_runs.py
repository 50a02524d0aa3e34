"""Training runs that are evaluated on a benchmark, in this process or in several."""

from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from transformers import TrainerCallback

from helpers.runs import PROMPTS, build
from tbrm_trl import TBRMTrainer
from tbrm_trl.evaluation.benchmarks import Benchmark
from tbrm_trl.evaluation.callback import EvaluationCallback
from tbrm_trl.evaluation.run import Settings
from tbrm_trl.evaluation.sampling import Sampling

LETTERS = Benchmark("letters", PROMPTS, {}, "helpers.reward_functions.letters")
SETTINGS = Settings(samples=3, sampling=Sampling(max_new_tokens=8))
NAME = "eval_letters/avg@3"


class OnMain(TrainerCallback):
    """Adds a metric on the main process alone."""

    def on_evaluate(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            kwargs["metrics"]["eval_on_main"] = float(state.global_step)


def train(model: str, folder: str, lora: bool = False, **options: Any) -> dict[str, Any]:
    """Make three updates, evaluate before and after each, and keep the best.

    Returns what each process logged, and the best.
    """
    if lora:
        from peft import LoraConfig

        options["peft_config"] = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.0)
    callback = EvaluationCallback([LETTERS], SETTINGS, batch_size=8)
    trainer = build(
        model, Path(folder), trainer_class=TBRMTrainer, callbacks=[callback, OnMain()], max_steps=3,
        eval_strategy="steps", eval_steps=1, eval_on_start=True, logging_steps=2, save_strategy="steps", save_steps=1,
        metric_for_best_model=NAME, load_best_model_at_end=True, **options,
    )  # fmt: skip
    trainer.train()
    logs = [row for row in trainer.state.log_history if NAME in row]
    if trainer.accelerator.is_main_process:
        assert [row["eval_on_main"] for row in logs] == [row["step"] for row in logs]
    return {
        "evaluations": gather_object([[(row["step"], row[NAME]) for row in logs]]),
        "training": [row["step"] for row in trainer.state.log_history if "residual/rms" in row],
        "best": trainer.state.best_metric,
        "best_step": trainer.state.best_global_step,
        "model": trainer.model if trainer.accelerator.num_processes == 1 else None,
        "weights": {name: one.detach().clone() for name, one in trainer.model.named_parameters()},
    }
