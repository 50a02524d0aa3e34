"""Count the bytes that are live while a model trains and generates, by running its code on tensors without storage.

The model's parameters are on the meta device. `estimate.py` counts them.
"""

import weakref
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from trl.kernels.chunked_logprob import TOKEN_CHUNK_SIZE, ChunkedLogProbFunction
from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as VOCABULARY_CHUNK

from ..model.decoding import frozen_casts_kept

WITHOUT_MASK = "sdpa_without_mask"
AttentionInterface.register(WITHOUT_MASK, sdpa_attention_forward)
AttentionMaskInterface.register(WITHOUT_MASK, lambda *args, **kwargs: None)


class _Live(TorchDispatchMode):
    """Counts the bytes of live tensors by the part they belong to. The tensors of `known` are not counted."""

    def __init__(self, known: Iterable[Tensor]):
        super().__init__()
        self.part, self.now, self.at_peak = "activations", Counter(), Counter()  # type: ignore[var-annotated]
        self.storages: dict[int, Any] = {tensor.untyped_storage()._cdata: None for tensor in known}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **(kwargs or {}))
        for tensor in tree_iter(output):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        return output

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.storages:
            return
        part = self.part

        def freed(_: Any) -> None:
            self.now[self.storages.pop(key)[1]] -= size

        self.storages[key] = (weakref.ref(storage, freed), part)
        self.now[part] += size
        if self.now.total() > self.at_peak.total():
            self.at_peak = self.now.copy()

    def is_gradient(self, tensor: Tensor) -> None:
        key = tensor.untyped_storage()._cdata
        reference, part = self.storages[key]
        self.storages[key] = (reference, "gradients")
        self.now[part] -= tensor.untyped_storage().nbytes()
        self.now["gradients"] += tensor.untyped_storage().nbytes()


@dataclass
class Trace:
    """Runs a model on tensors without storage, as the trainer would."""

    rows: int
    prompt: int
    completion: int
    values_per_row: int
    device: str
    masked: bool
    autocast: torch.dtype | None
    gradients: str  # "made" in backward, "kept" from micro-batch to micro-batch, or "reduced" and freed at once

    def __post_init__(self) -> None:
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)  # parameters on the meta device

    def mask(self, policy: PreTrainedModel, padded: bool, *shape: int) -> Tensor | None:
        """The mask transformers builds for padded input, else None."""
        attention = policy.config._attn_implementation
        if attention == "eager":
            return None  # eager attention makes its own
        policy.set_attn_implementation("sdpa" if padded else WITHOUT_MASK)
        return torch.ones(*shape, dtype=torch.bool) if padded else None

    def mixed_precision(self) -> torch.autocast:
        return torch.autocast("cpu", self.autocast or torch.bfloat16, enabled=self.autocast is not None)

    def update(self, policy: PreTrainedModel) -> dict[str, int]:
        """Run forward and backward of a micro-batch; return the bytes by part at the peak."""
        length = self.prompt + self.completion
        head = policy.get_output_embeddings()
        with self.mode:
            policy.to_empty(device="cpu")  # still without storage; the CPU's kernels are chosen
        policy.tie_weights()
        live = _Live([*policy.parameters(), *policy.buffers()])

        def enter(part: str) -> None:
            live.part = part

        def made(parameter: Tensor) -> None:
            if self.gradients == "reduced":
                parameter.grad = None
            elif self.gradients == "made":
                assert parameter.grad is not None
                live.is_gradient(parameter.grad)

        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(made)
        with self.mode, live:
            if self.gradients == "kept":
                enter("gradients")
                for parameter in policy.parameters():
                    parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
            enter("activations")
            with self.mixed_precision():
                ids = torch.zeros(self.rows, length, dtype=torch.long)  # (B, T)
                # Training passes no mask for text, but an attention window that is shorter than the rows needs one.
                window = getattr(policy.config, "sliding_window", None)
                windowed = window is not None and window <= length
                mask = self.mask(policy, windowed, self.rows, 1, length, length)
                states = policy.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
                del mask
                acting = states[:, -self.completion - 1 : -1]  # (B, C, hidden)
                enter("head")
                logits = head(acting[:, : self.values_per_row])  # (B, values, V)
                values = logits.float().logsumexp(dim=-1)
                packed = acting.reshape(-1, acting.shape[-1])  # (N, hidden)
                packed.register_hook(lambda _: enter("activations"))
                log_probs = self.head(packed, head)
                log_probs.register_hook(lambda _: enter("head"))
                del states, acting, packed, logits
            (values.sum() + log_probs.sum()).backward()
        return {part: live.at_peak[part] for part in ("activations", "gradients", "head")}

    def head(self, states: Tensor, head: nn.Module) -> Tensor:
        if self.device != "cpu":
            return _Head.apply(states, head.weight, self.autocast or states.dtype)
        targets = torch.zeros(len(states), dtype=torch.long)
        return ChunkedLogProbFunction.apply(
            states, head.weight, head.bias, targets, 1.0, VOCABULARY_CHUNK, None, 1.0, ("entropy",)
        )[0]

    @torch.no_grad()
    def generation(self, policy: PreTrainedModel, rows: int, completion: int) -> int:
        """Bytes of the KV cache at its longest and one step, or of the pass over the prompts if that takes more."""
        if not rows:
            return 0
        policy.eval()  # in training mode, gradient checkpointing switches the cache off
        peaks = []
        for given, new in ((0, max(self.prompt, 1)), (self.prompt + completion - 1, 1)):
            live = _Live([*policy.parameters(), *policy.buffers()])
            with self.mode, live, self.mixed_precision(), frozen_casts_kept(policy):
                cache = None
                if given:
                    ids = torch.zeros(rows, given, dtype=torch.long)
                    cache = policy(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values
                    live.at_peak.clear()
                ids = torch.zeros(rows, new, dtype=torch.long)
                mask = self.mask(policy, self.masked and rows > 1, rows, 1, new, given + new)
                output = policy(
                    input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, logits_to_keep=1
                )
                logits = output.logits[:, -1].to(torch.float32, copy=True)  # (R, V)
                torch.softmax(logits / 1.0, dim=-1)
            peaks.append(live.at_peak.total())
        return max(peaks)


class _Head(torch.autograd.Function):
    """Allocates what TRL's chunked head does when Triton's kernels work on its tile in place."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(states, weight)
        ctx.dtype = dtype
        _tile(states, weight, dtype)
        return states.new_empty(len(states), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        states, weight = ctx.saved_tensors
        wanted = [x for x, needed in zip((states, weight), ctx.needs_input_grad[:2], strict=True) if needed]
        sums = [torch.empty_like(x, dtype=torch.float32) for x in wanted]
        _tile(states, weight, ctx.dtype)
        grads = [total.to(x.dtype) for total, x in zip(sums, wanted, strict=True)]
        return (*grads, *[None] * (3 - len(grads)))


def _tile(states: Tensor, weight: Tensor, dtype: torch.dtype) -> list[Tensor]:
    tokens, words = min(len(states), TOKEN_CHUNK_SIZE), min(len(weight), VOCABULARY_CHUNK)
    return [states.new_empty(tokens, words, dtype=dtype), weight[:words].to(dtype), states[:tokens].to(dtype)]


class _Quantized(torch.autograd.Function):
    """bitsandbytes' linear layer: it de-quantizes the weight in forward and again in backward, and keeps neither."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        return nn.functional.linear(states, torch.empty_like(weight, dtype=states.dtype), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad @ torch.empty_like(ctx.weight, dtype=grad.dtype), None, None


def quantize(policy: PreTrainedModel, quantization: str, double: bool) -> dict[str, int]:
    """Make frozen linear layers except the head compute as bitsandbytes' do; return each weight's bytes by name."""

    def forward(self: nn.Linear, states: Tensor) -> Tensor:
        return _Quantized.apply(states, self.weight, self.bias)

    sizes = {}
    for name, module in policy.named_modules():
        frozen = isinstance(module, nn.Linear) and not module.weight.requires_grad
        if frozen and module is not policy.get_output_embeddings():
            module.forward = MethodType(forward, module)
            number = module.weight.numel()
            if quantization == "8bit":
                sizes[f"{name}.weight"] = number + 4 * module.out_features
            else:  # a constant per 64 weights, in float32; with `double` in 8 bits, and a float32 per 256 constants
                constants = number // 64
                sizes[f"{name}.weight"] = number // 2 + (constants + constants // 64 if double else 4 * constants)
    return sizes
