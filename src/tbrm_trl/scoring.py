"""One forward pass that scores a trajectory: log-probabilities, entropies and the soft value, without full logits."""

from __future__ import annotations

import functools
import inspect
import types
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from .objective import at_least_float32
from .trajectory import Batch


@dataclass
class TrajectoryScores(ModelOutput):
    """What the model says of a batch of trajectories. All in float32 or wider.

    Attributes:
        log_probs: `(B, T)` log π of the token in each column; 0 where `action_mask` is false.
        soft_value: `(B,)` V(s_1): logsumexp of the temperature-scaled logits at the state of the first action.
        end_value: `(B,)` V of the state after the last token, where asked for.
        state_values: `(B, T)` V of the state in which the token of each column was chosen, where asked for.
        entropy: `(B, T)` entropy of the distribution that each action was drawn from; None from the reference.
        aux_loss: load-balancing loss of a mixture-of-experts model, where router logits are asked for.
    """

    # `ModelOutput` wants a default for every field but one.
    log_probs: Tensor = None  # type: ignore[assignment]
    soft_value: Tensor = None  # type: ignore[assignment]
    end_value: Tensor | None = None
    state_values: Tensor | None = None
    entropy: Tensor | None = None
    aux_loss: Tensor | None = None


def logit_transform(model: PreTrainedModel, temperature: float):
    """What the model does to the output of its head before the softmax (scale, soft-cap), then division by T.

    The head's bias is applied by the head itself. Names of the scale differ by family: `logit_scale` (Cohere),
    `output_multiplier` (Muse), `lm_head_multiplier` (Falcon-H1), `logits_scaling` (Granite and MiniCPM3 divide by it,
    HyperCLOVA X multiplies).
    """
    config = model.config.get_text_config()
    scale = 1.0
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(config, name, None) is not None:
            scale = getattr(config, name)
            break
    else:
        if (scaling := getattr(config, "logits_scaling", None)) is not None:
            scale = scaling if config.model_type == "hyperclovax" else 1.0 / scaling
    soft_cap = getattr(config, "final_logit_softcapping", None)

    def transform(logits: Tensor) -> Tensor:
        logits = at_least_float32(logits) * scale
        if soft_cap is not None:
            logits = soft_cap * torch.tanh(logits / soft_cap)
        return logits / temperature

    return transform


def add_trajectory_head(model: PreTrainedModel, temperature: float, cast_lm_head_to_fp32: bool = False) -> None:
    """Teach `model` to score trajectories: `model(..., action_mask=mask)` returns `TrajectoryScores`.

    `scored` (the action mask by default) picks the tokens whose log-probability and entropy are computed; s_1 is the
    state of the first action in any case. `end_value` and `every_value` ask for more soft values.

    Everything happens inside the model's own forward, so that the hooks of DDP, FSDP and DeepSpeed ZeRO fire. The
    backbone runs once; only the states in which the policy acted go on to TRL's chunked head (which the model must
    already have, see `trl.trainer.utils.add_fused_lm_head`), and one state per trajectory to the ordinary head, for
    the soft value. Neither ever forms the `(B, T, vocabulary)` logits (but `every_value` those of all actions). Without
    `action_mask` the forward is unchanged.

    Args:
        model: causal language model with TRL's fused head, not wrapped by PEFT.
        temperature: sampling temperature T; the policy is softmax(logits / T).
        cast_lm_head_to_fp32: keep the head out of autocast, as TRL's option of that name does.
    """
    fused_forward = model.forward
    transform = logit_transform(model, temperature)

    def soft_value(states: Tensor) -> Tensor:
        head = model.get_output_embeddings()
        # The kernel computes in the autocast dtype, if any, and else in that of the states: so does the soft value.
        in_head_dtype = torch.autocast(states.device.type, enabled=False) if cast_lm_head_to_fp32 else nullcontext()
        with in_head_dtype:
            return transform(head(states.to(head.weight.device))).logsumexp(dim=-1)  # (N,)

    @functools.wraps(fused_forward)  # `generate` reads the signature
    def forward(
        self,
        *args: Any,
        action_mask: Tensor | None = None,
        scored: Tensor | None = None,
        end_value: bool = False,
        every_value: bool = False,
        **kwargs: Any,
    ) -> Any:
        if action_mask is None:
            return fused_forward(*args, **kwargs)

        scored = action_mask if scored is None else scored  # (B, T)
        acting = action_mask[:, 1:]  # (B, T-1) column t: does the policy act in the state that ends with token t?
        first = acting.int().argmax(dim=1)  # (B,) the column of s_1
        last = kwargs["attention_mask"].sum(dim=1) - 1  # (B,) the column of the last token
        soft_values: dict[str, Tensor] = {}

        def keep_acting_states(module: nn.Module, inputs: Any, output: Any) -> Any:
            states = output.last_hidden_state  # (B, T, hidden)
            device = states.device
            rows = torch.arange(len(states), device=device)
            wanted = {"soft_value": states[rows, first.to(device)]}  # (B, hidden)
            if end_value:
                wanted["end_value"] = states[rows, last.to(device)]  # (B, hidden)
            if every_value:
                wanted["state_values"] = states[:, :-1][acting.to(device)]  # (N, hidden)
            # FSDP2 frees the head's weights when backward is through its module. So the module's one call goes before
            # the kernel, which has the bare weights: backward is then through the kernel first.
            packed = soft_value(torch.cat(list(wanted.values())))
            soft_values.update(zip(wanted, packed.split([len(one) for one in wanted.values()]), strict=True))
            output.last_hidden_state = states[:, :-1][scored[:, 1:].to(device)].unsqueeze(0)  # (1, N, hidden)
            return output

        hook = self.base_model.register_forward_hook(keep_acting_states)
        try:
            actions = kwargs["input_ids"][scored].unsqueeze(0)  # (1, N)
            scores = fused_forward(*args, shift_labels=actions, fused_lm_head=True, **kwargs)
        finally:
            hook.remove()

        def in_place(packed: Tensor, mask: Tensor) -> Tensor:
            return packed.new_zeros(mask.shape).masked_scatter(mask.to(packed.device), packed)  # (B, T)

        if every_value:
            soft_values["state_values"] = in_place(soft_values["state_values"], action_mask)
        return TrajectoryScores(
            log_probs=in_place(scores.log_probs, scored),
            entropy=None if scores.entropy is None else in_place(scores.entropy, scored),
            aux_loss=scores.aux_loss,
            **soft_values,
        )

    model.forward = types.MethodType(forward, model)


def score(
    model: nn.Module, batch: Batch, *, positions_from_mask: bool, router_logits: bool = False, **wanted: Any
) -> TrajectoryScores:
    """Score a batch with a model that has the trajectory head, wrapped or not. One forward pass.

    Args:
        model: the policy or the reference, as prepared for training.
        batch: from `collate`.
        positions_from_mask: pass `position_ids` counted from the attention mask. So for every text model that takes
            them; vision-language models derive them from the image grid.
        router_logits: ask a mixture-of-experts model for its load-balancing loss.
        wanted: `scored`, `end_value`, `every_value`, as the trajectory head takes them.
    """
    inputs: dict[str, Any] = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, **batch.vision}
    if positions_from_mask:
        inputs["position_ids"] = (batch.attention_mask.cumsum(dim=1) - 1).clamp(min=0)  # (B, T)
    if router_logits:
        inputs["output_router_logits"] = True
    return model(**inputs, action_mask=batch.action_mask, **wanted)


def accepts_position_ids(model: PreTrainedModel) -> bool:
    """Whether the architecture takes `position_ids` (those with ALiBi derive distances from the mask instead)."""
    return "position_ids" in inspect.signature(type(model).forward).parameters


def disable_randomness(model: nn.Module) -> None:
    """Switch off every dropout and router jitter of `model`, in place.

    A noisy log-probability biases a squared sum: E(δ + ε)² = δ² + Var ε. Besides dropout modules, attention layers
    keep a rate of their own as a plain number.
    """
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and value > 0 and any(word in name for word in ("dropout", "pdrop", "jitter")):
                setattr(module, name, 0.0)
