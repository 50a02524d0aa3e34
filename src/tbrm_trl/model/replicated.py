"""Modules trained beside the policy, whole on every process."""

from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import nn
from transformers import TrainerCallback


class ReplicatedModules(TrainerCallback):
    """Trains modules with their own AdamW, however the policy is sharded.

    The loss of each process is scaled so that its mean over processes is the loss of the whole update. So gradients are
    averaged over processes before each step.

    Args:
        accelerator: the trainer's.

    Raises:
        ValueError: for mixed precision in float16, since its loss scale would reach these gradients too.
    """

    optimizer: torch.optim.AdamW

    def __init__(self, accelerator: Accelerator):
        if accelerator.mixed_precision == "fp16":
            raise ValueError(
                "A soft value with trained parameters cannot be trained with fp16=True: the loss scale would reach its "
                "gradients. Use bf16=True, or full precision."
            )
        self.modules, self.accelerator = nn.ModuleList(), accelerator
        self._skips = False

    def add(self, module: nn.Module, learning_rate: float) -> None:
        """Train a module at a constant learning rate. Every process starts from the main process's weights."""
        module.to(self.accelerator.device)
        for parameter in module.parameters():
            parameter.data = broadcast(parameter.data)
        group = {"params": list(module.parameters()), "lr": learning_rate}
        if self.modules:
            self.optimizer.add_param_group(group)
        else:
            self.optimizer = torch.optim.AdamW([group], weight_decay=0.0)
        self.modules.append(module)

    def skip_next_step(self) -> None:
        """Skip the next step, because the policy's update is skipped."""
        self._skips = True

    def on_optimizer_step(self, args, state, control, **kwargs):
        is_finite = True
        for parameter in self.modules.parameters():
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad = self.accelerator.reduce(gradient, reduction="mean")
            is_finite = is_finite and bool(torch.isfinite(parameter.grad).all())
        if is_finite and not self._skips:
            self.optimizer.step()
        self.optimizer.zero_grad()
        self._skips = False

    def save(self, path: Path) -> None:
        """Write weights and optimizer, which are equal on every process."""
        torch.save({"modules": self.modules.state_dict(), "optimizer": self.optimizer.state_dict()}, path)

    def load(self, path: Path) -> None:
        """Read back what `save` wrote. The learning rates are those of this run."""
        rates = [group["lr"] for group in self.optimizer.param_groups]
        saved = torch.load(path, map_location=self.accelerator.device, weights_only=True)
        self.modules.load_state_dict(saved["modules"])
        self.optimizer.load_state_dict(saved["optimizer"])
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
