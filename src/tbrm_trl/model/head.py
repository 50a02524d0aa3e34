"""The trajectory head: it makes a model's own forward score trajectories without forming the full logits."""

import functools
import types
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..batch import TrajectoryScores, at_least_float32


def logit_transform(model: PreTrainedModel, temperature: float):
    """Return a function that applies to a head's output what comes before the softmax: scale, soft-cap, division by T.

    The head itself applies its bias. The name of the scale differs by family: `logit_scale` (Cohere),
    `output_multiplier` (Muse), `lm_head_multiplier` (Falcon-H1), `logits_scaling` (Granite and MiniCPM3 divide by it,
    HyperCLOVA X multiplies).
    """
    config = model.config.get_text_config()
    factors = (getattr(config, name, None) for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"))
    scale = next((factor for factor in factors if factor is not None), None)
    if scale is None:
        scaling = getattr(config, "logits_scaling", None) or 1.0
        scale = scaling if config.model_type == "hyperclovax" else 1.0 / scaling
    soft_cap = getattr(config, "final_logit_softcapping", None)

    def transform(logits: Tensor) -> Tensor:
        logits = at_least_float32(logits) * scale
        if soft_cap is not None:
            logits = soft_cap * torch.tanh(logits / soft_cap)
        return logits / temperature

    return transform


def keep_head_in_float32(model: PreTrainedModel) -> None:
    """Compute logits in float32 whatever the states' dtype, as `cast_lm_head_to_fp32` does in TRL.

    An embedding that shares the head's weight keeps the dtype of its output.
    """
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    dtype, is_tied = head.weight.dtype, head.weight is embeddings.weight
    head.float()

    head.forward = lambda states: nn.functional.linear(states.float(), head.weight.float(), head.bias)
    if is_tied:
        embeddings.register_forward_hook(lambda module, inputs, output: output.to(dtype))


def add_trajectory_head(model: PreTrainedModel, temperature: float, cast_lm_head_to_fp32: bool = False) -> None:
    """Teach `model` to score trajectories: `model(..., action_mask=mask)` returns `TrajectoryScores`.

    The new forward takes padded rows or one packed row, and returns results per token in the layout of its input.
    `scored` marks the tokens that get a log-probability and an entropy. `first_state` and `last_state` are `(B,)`
    places in the rows laid end to end. `first_state` points to the state of each trajectory's first action, where V
    is always computed. `last_state`, if given, points to the state of its last token, where V is computed too.
    `every_value` asks for V at every action.

    Everything happens inside the model's own forward, so that the hooks of DDP, FSDP and DeepSpeed ZeRO fire. The
    backbone runs once. Only the states of scored tokens go to TRL's chunked head, which the model must already have
    (`trl.trainer.utils.add_fused_lm_head`). One state per trajectory (two with `last_state`) goes to the ordinary head
    for the soft value. The `(B, T, vocabulary)` logits are never formed; only `every_value` forms those of all actions.
    Without `action_mask` the forward is unchanged.

    Args:
        model: causal language model with TRL's fused head, not wrapped by PEFT.
        temperature: sampling temperature T; the policy is softmax(logits / T).
        cast_lm_head_to_fp32: keep the head out of autocast, where scores are computed and where tokens are drawn.
    """
    fused_forward = model.forward
    transform = logit_transform(model, temperature)
    if cast_lm_head_to_fp32:
        _keep_out_of_autocast(model.get_output_embeddings())

    def soft_value(states: Tensor) -> Tensor:
        head = model.get_output_embeddings()
        # The soft value is computed in the kernel's dtype: autocast's if it is on, else that of the states.
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
            # FSDP2 frees the head's weights once backward has passed its module, and the kernel needs the bare weights.
            # So the module is called once, before the kernel: backward then passes the kernel first.
            values = soft_value(torch.cat(list(wanted.values())))
            soft_values.update(zip(wanted, values.split([len(one) for one in wanted.values()]), strict=True))
            soft_values["hidden"] = wanted["soft_value"].detach()
            output.last_hidden_state = choosing(scored).unsqueeze(0)  # (1, N, hidden)
            return output

        hook = self.base_model.register_forward_hook(keep_acting_states)
        try:
            actions = kwargs["input_ids"][scored].unsqueeze(0)  # (1, N)
            scores = fused_forward(*args, shift_labels=actions, fused_lm_head=True, **kwargs)
        finally:
            hook.remove()

        if every_value:
            soft_values["state_values"] = at_mask(soft_values["state_values"], action_mask)
        return TrajectoryScores(
            log_probs=at_mask(scores.log_probs, scored),
            entropy=None if scores.entropy is None else at_mask(scores.entropy, scored),
            aux_loss=scores.aux_loss,
            **soft_values,
        )

    model.forward = types.MethodType(forward, model)


def _keep_out_of_autocast(head: nn.Module) -> None:
    compute = head.forward

    def forward(states: Tensor) -> Tensor:
        with torch.autocast(states.device.type, enabled=False):
            return compute(states)

    head.forward = forward


def at_mask(values: Tensor, mask: Tensor) -> Tensor:
    """Put values, in order, where the mask is true in a tensor of its shape; 0 elsewhere."""
    return values.new_zeros(mask.shape).masked_scatter(mask.to(values.device), values)
