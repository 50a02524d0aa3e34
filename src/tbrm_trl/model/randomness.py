"""Make a model compute in training what it computes in evaluation: no dropout, no noise, no repacked weights."""

import inspect
import re

from torch import nn

_NOISE = r"\w*(?:dropout|layerdrop|pdrop|jitter)\w*"  # names of rates


def keep_weights_unpacked(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking a 4-bit base for the CPU in evaluation, which spoils later training.

    Raises:
        ValueError: if it was repacked already.
    """
    for name, module in model.named_modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False
        if getattr(getattr(getattr(module, "weight", None), "quant_state", None), "packing_format_for_cpu", False):
            raise ValueError(
                f"The 4-bit weights of {name!r} were repacked for the CPU when the model was evaluated, and their "
                "gradients would be wrong. Load the model anew, and evaluate it after it was given to the trainer."
            )


def disable_randomness(model: nn.Module) -> None:
    """Switch off every dropout and router jitter of `model`, in place.

    A noisy log-probability biases a squared sum: E(δ + ε)² = δ² + Var ε. Attention layers keep their rate as a plain
    number beside the dropout modules, so both are set to 0.

    Raises:
        ValueError: if a layer reads its rate from the configuration in each forward pass. To set it to 0 there would
            change the configuration that is saved.
    """
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and value > 0 and re.fullmatch(_NOISE, name):
                setattr(module, name, 0.0)
    for layer, config in {type(module): getattr(module, "config", None) for module in model.modules()}.items():
        source = inspect.getsource(layer.forward) if config is not None else ""
        names = re.findall(rf"self\.config\.({_NOISE})", source)
        if noisy := {name: rate for name in names if (rate := getattr(config, name, 0))}:
            raise ValueError(
                f"{layer.__name__} reads {noisy} from the model's configuration in each forward pass, and noise biases "
                "a squared residual. Set it to 0 in the configuration (config.json, or `model.config` before training)."
            )
