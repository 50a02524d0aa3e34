"""One forward pass that scores a trajectory: log-probabilities, entropies and the soft value, without full logits."""

from __future__ import annotations

import functools
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

    It knows nothing of the layout, padded rows or one packed row: `scored` are the tokens whose log-probability and
    entropy are computed, and `first_state` and, where V is wanted there too, `last_state` are the `(B,)` places of the
    state of each trajectory's first action and of its last token, in the row or rows laid end to end. `every_value`
    asks for V at every action. Results per token come back in the layout of the input.

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
        first_state: Tensor | None = None,
        last_state: Tensor | None = None,
        every_value: bool = False,
        **kwargs: Any,
    ) -> Any:
        if action_mask is None:
            return fused_forward(*args, **kwargs)

        assert scored is not None and first_state is not None, "`score` gives both"
        soft_values: dict[str, Tensor] = {}

        def keep_acting_states(module: nn.Module, inputs: Any, output: Any) -> Any:
            states = output.last_hidden_state.flatten(0, 1)  # (B·T, hidden)
            device = states.device

            def choosing(mask: Tensor) -> Tensor:
                """The states in which these tokens were chosen. No trajectory's first token is an action."""
                return states[:-1][mask.flatten()[1:].to(device)]  # (N, hidden)

            wanted = {"soft_value": states[first_state.to(device)]}  # (B, hidden)
            if last_state is not None:
                wanted["end_value"] = states[last_state.to(device)]  # (B, hidden)
            if every_value:
                wanted["state_values"] = choosing(action_mask)  # (N, hidden)
            # FSDP2 frees the head's weights when backward is through its module. So the module's one call goes before
            # the kernel, which has the bare weights: backward is then through the kernel first.
            together = soft_value(torch.cat(list(wanted.values())))
            soft_values.update(zip(wanted, together.split([len(one) for one in wanted.values()]), strict=True))
            output.last_hidden_state = choosing(scored).unsqueeze(0)  # (1, N, hidden)
            return output

        hook = self.base_model.register_forward_hook(keep_acting_states)
        try:
            actions = kwargs["input_ids"][scored].unsqueeze(0)  # (1, N)
            scores = fused_forward(*args, shift_labels=actions, fused_lm_head=True, **kwargs)
        finally:
            hook.remove()

        if every_value:
            soft_values["state_values"] = _in_place(soft_values["state_values"], action_mask)
        return TrajectoryScores(
            log_probs=_in_place(scores.log_probs, scored),
            entropy=None if scores.entropy is None else _in_place(scores.entropy, scored),
            aux_loss=scores.aux_loss,
            **soft_values,
        )

    model.forward = types.MethodType(forward, model)


def _in_place(values: Tensor, mask: Tensor) -> Tensor:
    """Values of the tokens where the mask is true, in order, at their places in a tensor of its shape; 0 elsewhere."""
    return values.new_zeros(mask.shape).masked_scatter(mask.to(values.device), values)


def score(
    model: nn.Module,
    batch: Batch,
    *,
    masked: bool = False,
    router_logits: bool = False,
    scored: Tensor | None = None,
    end_value: bool = False,
    every_value: bool = False,
) -> TrajectoryScores:
    """Score a batch with a model that has the trajectory head, wrapped or not. One forward pass.

    A packed batch goes through the model as one row: the real tokens of all trajectories end to end, positions that
    begin anew for each, and no attention mask, which together tell transformers to keep them apart. The result is
    `(B, T)` all the same.

    Args:
        model: the policy or the reference, as prepared for training.
        batch: from `collate`.
        masked: give the model the attention mask. Where attention is causal nothing real looks at what is padded on its
            right, and without a mask the kernels are faster and keep less. Vision-language models take their positions
            from it, and a mixture of experts leaves padding out of its load-balancing loss.
        router_logits: ask a mixture-of-experts model for its load-balancing loss.
        scored: `(B, T)` the tokens whose log-probability and entropy are wanted; by default all actions. s_1 is the
            state of the first action in any case.
        end_value: ask for V of the state after the last token.
        every_value: ask for V of every state in which the policy acted.
    """
    real = batch.attention_mask.bool()  # (B, T)
    lengths = real.sum(dim=1)  # (B,)
    per_token = {
        "input_ids": batch.input_ids,
        "action_mask": batch.action_mask,
        "scored": batch.action_mask if scored is None else scored,
    }
    if batch.packed:
        per_token["position_ids"] = batch.attention_mask.cumsum(dim=1) - 1
        per_token = {name: values[real].unsqueeze(0) for name, values in per_token.items()}  # (1, N) each
        starts = lengths.cumsum(dim=0) - lengths  # (B,) the place of each trajectory's first token
    else:
        if masked:
            per_token["attention_mask"] = batch.attention_mask
        starts = torch.arange(len(real), device=real.device) * real.shape[1]  # (B,)
    wanted: dict[str, Any] = {"every_value": every_value}
    if end_value:
        wanted["last_state"] = starts + lengths - 1  # (B,)
    if router_logits:
        wanted["output_router_logits"] = True
    first_state = starts + batch.action_mask[:, 1:].int().argmax(dim=1)  # (B,)
    scores = model(**per_token, **batch.vision, first_state=first_state, **wanted)
    if batch.packed:
        for name in ("log_probs", "entropy", "state_values"):
            if name in scores:  # a `ModelOutput` holds what is not None
                scores[name] = _in_place(scores[name], real)  # (B, T)
    return scores


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
