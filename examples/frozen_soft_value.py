# python examples/frozen_soft_value.py --model Qwen/Qwen2.5-0.5B
"""An estimator of the soft value in one file: V_θ(s_1) without gradient, the ablation of arXiv 2505.15311, App. F."""

import argparse

from datasets import Dataset
from torch import Tensor

from tbrm_trl import SoftValue, TBRMConfig, TBRMTrainer
from tbrm_trl.loss.soft_value import ValueInputs


class FrozenValue(SoftValue):
    """`sg(V_θ(s_1))`: a constant of the prompt that moves with θ, never fitted. Published as the worse variant."""

    name = "frozen"

    def __call__(self, inputs: ValueInputs) -> Tensor:
        return inputs.policy_value.detach()  # (B,) nats


def correct(completions, answer, **kwargs):
    return [float(a in c) for c, a in zip(completions, answer, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="Qwen/Qwen2.5-0.5B")
    parser.add_argument("--output_dir", default="outputs/frozen")
    parser.add_argument("--max_steps", type=int, default=50)
    parser.add_argument("--use_cpu", action="store_true")
    options = vars(parser.parse_args())
    trainer = TBRMTrainer(
        model=options.pop("model"),
        reward_funcs=correct,
        args=TBRMConfig(**options, beta=0.005, soft_value="frozen", max_completion_length=16),
        train_dataset=Dataset.from_list(
            [{"prompt": f"{a} + {b} =", "answer": str(a + b)} for a in range(10) for b in range(10)]
        ),
    )
    trainer.train()


if __name__ == "__main__":
    main()
