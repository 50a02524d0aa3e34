"""DRO-V: a separate value, trained on the same squared residual as the policy."""

from collections.abc import Iterator

from torch import Tensor

from ...options import TBRMOptions
from .base import SoftValue, ValueInputs
from .run import Run


class LearnedValue(SoftValue):
    """`V = V_φ(s_1)/β`, V_φ a head on the policy's last hidden state (DRO-V, arXiv 2405.19107).

    `(R − V_φ − β log π_θ/π_ref)²` trains both. The hidden state carries no gradient, so V moves no logit.
    """

    name = "learned"
    takes_baseline = True

    @classmethod
    def _problems(cls, args: TBRMOptions) -> Iterator[str]:
        if args.soft_value_offset:
            yield (
                '`soft_value_offset=True` with `soft_value="learned"` is refused: the head has a constant of its own. '
                "Leave it at False."
            )

    def attach(self, run: Run) -> None:
        self.head = run.value_head(self.args.soft_value_learning_rate)

    def __call__(self, inputs: ValueInputs) -> Tensor:
        return self.head(inputs.hidden) / inputs.beta
