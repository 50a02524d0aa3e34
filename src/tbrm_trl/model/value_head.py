"""The trained part of a soft value: a constant, or a linear head on the policy's trunk. In reward units."""

import torch
from torch import Tensor, nn


class Offset(nn.Module):
    """`b`, one number for all states. It is 0 before training."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, hidden: Tensor) -> Tensor:
        """`(B, H)` last hidden states → `(B,)`."""
        return self.bias.expand(len(hidden))


class ValueHead(Offset):
    """`w · h/‖h‖₁ + b` of the policy's last hidden state h. It is 0 before training.

    An Adam update moves no weight by more than about its learning rate η. The features have a 1-norm of at most 1, so
    an update moves the value by at most about 2 η, whatever the model's width.
    """

    def __init__(self, hidden_size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(hidden_size))

    def forward(self, hidden: Tensor) -> Tensor:
        features = nn.functional.normalize(hidden.to(self.weight.dtype), p=1, dim=-1)  # (B, H)
        return features @ self.weight + super().forward(hidden)  # (B,)
