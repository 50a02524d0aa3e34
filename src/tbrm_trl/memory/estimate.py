"""Estimate the memory that a training run will take, before anything is loaded.

The model's own code runs a micro-batch and a step of generation on tensors that have shapes and no storage
(`FakeTensorMode`), and the bytes that would be live are added up. Formulas give what is sharded: `docs/memory.md`.
"""

import math
from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from ..files import in_one_line
from .live_bytes import Trace, quantize

# By `optim`: state tensors per trained tensor; whether they have 8 bits; whether they are in pages that may go to the
# host.
OPTIMIZERS = {
    "adamw_torch": (2, False, False),
    "adamw_torch_fused": (2, False, False),
    "adamw_8bit": (2, True, False),
    "adamw_bnb_8bit": (2, True, False),
    "paged_adamw_32bit": (2, False, True),
    "paged_adamw_8bit": (2, True, True),
    "lion_32bit": (1, False, False),
    "lion_8bit": (1, True, False),
    "paged_lion_32bit": (1, False, True),
    "paged_lion_8bit": (1, True, True),
    "rmsprop": (1, False, False),
    "adagrad": (1, False, False),
    "sgd": (0, False, False),
}
SMALL, BLOCK = 4096, 256  # bitsandbytes: smaller tensors stay float32; the others have a float32 for each block
REDUCE_BUCKET, LIVE_PARAMETERS = 500_000_000, 1_000_000_000  # DeepSpeed's defaults, in elements
TAKES_MASKS = (None, "sdpa", "eager")  # attention that gets masks if prompts are padded
PARTS = ("weights", "reference", "optimizer", "gradients", "communication", "activations", "head", "generation")


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on each process's device at the peak of each phase of training, by part.

    The parts: `weights` of the policy, `reference`, `optimizer` (states, and master weights under DeepSpeed),
    `gradients`, `communication` (buckets, gathered parameters), `activations` of a micro-batch, `head` (logits in
    tiles, soft values, the head's own gradient before it is added), `generation` (KV cache and one step).

    Attributes:
        phases: `generation`, `update`, `optimizer step`, and `evaluation` if there is one → part → bytes.
        parameters: number of the policy's parameters, adapters included.
        trained: number of those that are trained.
        paged: bytes of optimizer states that go to the host if the device has no room. The phases leave them out.
    """

    phases: dict[str, dict[str, int]]
    parameters: int
    trained: int
    paged: int = 0

    @property
    def total(self) -> int:
        """The peak over all phases, in bytes."""
        return max(sum(parts.values()) for parts in self.phases.values())

    def __str__(self) -> str:
        def row(name: str, values: Iterable[int]) -> str:
            return f"| {name:15} |" + "".join(f" {value / 2**30:>14.2f} |" for value in values)

        named = {part: [parts[part] for parts in self.phases.values()] for part in PARTS}
        lines = ["| GiB per process |" + "".join(f" {phase:>14} |" for phase in self.phases)]
        lines.append("|-----------------|" + "---------------:|" * len(self.phases))
        lines += [row(part, values) for part, values in named.items() if any(values)]
        lines.append(row("together", (sum(parts.values()) for parts in self.phases.values())))
        paged = f", and {self.paged / 2**30:.1f} GiB of paged optimizer states" if self.paged else ""
        lines.append(
            f"\n{self.parameters:,} parameters, {self.trained:,} of them trained. "
            f"Peak: {self.total / 2**30:.1f} GiB per process{paged}."
        )
        return "\n".join(lines)


def estimate_memory(
    model: str | PretrainedConfig,
    *,
    rows: int,
    prompt_length: int,
    completion_length: int,
    generated_rows: int | None = None,
    gathered_to_generate: bool | None = None,
    evaluated_rows: int = 0,
    evaluated_length: int | None = None,
    accumulation: int = 1,
    dtype: str = "float32",
    mixed_precision: str | None = "bfloat16",
    attn_implementation: str | None = None,
    gradient_checkpointing: bool = True,
    optimizer: str = "adamw_torch_fused",
    peft_config: Any = None,
    quantization: str | None = None,
    double_quantization: bool = False,
    reference: bool = True,
    values_per_row: int = 1,
    processes: int = 1,
    zero_stage: int = 0,
    fsdp: bool = False,
    device: str = "cuda",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> MemoryEstimate:
    """Estimate the memory that [`TBRMTrainer`] takes on each process's device. Only the configuration is loaded.

    Args:
        model: id or folder of a causal language model, or its configuration.
        rows: rows of a micro-batch on one process. If more than one are rolled out, they are taken to differ in length.
        prompt_length, completion_length: lengths of the longest rows, in tokens.
        generated_rows: rows rolled out at a time on one process; 0 if no model here generates. By default `rows`.
        gathered_to_generate: whether each process gathers a sharded policy to draw rollouts. By default it does if rows
            are generated.
        evaluated_rows: completions that an evaluation on benchmarks draws at a time on one process; 0 without one.
        evaluated_length: the longest of them, in tokens. By default `completion_length`.
        accumulation: micro-batches per optimizer step.
        dtype: dtype in which the weights are loaded; "auto" is the configuration's.
        mixed_precision: "bfloat16", "float16" or None: dtype of autocast, or of the weights themselves under DeepSpeed.
        attn_implementation: "sdpa" by default. "eager" keeps its scores; others are taken for sdpa without a mask.
        gradient_checkpointing, optimizer: as `gradient_checkpointing` and `optim` of `TrainingArguments`.
        peft_config: configuration of a LoRA adapter; None for full fine-tuning.
        quantization: "4bit" or "8bit" for linear layers quantized by bitsandbytes, except the head; or None.
        double_quantization: whether 4-bit quantization also quantizes its constants.
        reference: whether a frozen copy is kept. With an adapter there is none.
        values_per_row: soft values per row: 1; 2 with `truncation="bootstrap"`; one per action with `residual="token"`.
        processes: number of processes on all nodes, one device each.
        zero_stage: 1, 2 or 3 under DeepSpeed with its own defaults, else 0.
        fsdp: FSDP2; parameters, gradients and states are sharded over all processes.
        device: "cuda" or "cpu". On the CPU, TRL's head takes several copies of a tile.
        revision: revision of a model on the Hub.
        trust_remote_code: whether code beside a model may be run.

    Raises:
        ValueError: for a model that is missing or cannot be run without values, an optimizer with unknown states, and
            options that do not go together.
    """
    _check(optimizer, zero_stage, fsdp, quantization, peft_config)
    lengths = dict(prompt_length=prompt_length, completion_length=completion_length)
    for name, number in dict(rows=rows, **lengths, processes=processes).items():
        if number < 1:
            raise ValueError(f"`{name}={number}` must be at least 1.")
    if device not in ("cuda", "cpu"):
        raise ValueError(f"`device={device!r}` is not among those whose memory is known: 'cuda' and 'cpu'.")
    config = _configuration(model, revision=revision, trust_remote_code=trust_remote_code)
    loaded = (config.dtype or torch.float32) if dtype == "auto" else getattr(torch, dtype)
    computed = getattr(torch, mixed_precision) if mixed_precision else loaded
    sharded = bool(zero_stage or fsdp)
    trace = Trace(
        rows, prompt_length, completion_length, values_per_row, device,
        masked=attn_implementation in TAKES_MASKS,
        autocast=None if sharded or not mixed_precision else computed,
        gradients="reduced" if zero_stage > 1 or fsdp else "kept" if zero_stage or accumulation > 1 else "made",
    )  # fmt: skip
    with torch.device("meta"):
        policy = _policy(config, computed if sharded else loaded, attn_implementation, trust_remote_code)
        if peft_config is not None:
            _add_adapters(policy, peft_config, computed if zero_stage else torch.float32 if quantization else None)
    packed = quantize(policy, quantization, double_quantization) if quantization else {}
    if gradient_checkpointing:
        policy.gradient_checkpointing_enable()
        if peft_config is not None:
            policy.enable_input_require_grads()
    try:
        update = trace.update(policy)
        generated = rows if generated_rows is None else generated_rows
        rollout = trace.generation(policy, generated, completion_length)
        evaluation = trace.generation(policy, evaluated_rows, evaluated_length or completion_length)
    except RuntimeError as error:
        raise ValueError(
            f"{config.model_type!r} cannot be run without values ({str(error).splitlines()[0]}), as where "
            "tokens choose experts: its activations are not known beforehand. Estimate a dense model of its width."
        ) from error

    def held(name: str, parameter: nn.Parameter) -> int:
        dtype = parameter.dtype
        if fsdp:  # accelerate keeps trained parameters in float32, and gathers all parameters in the computed dtype
            dtype = torch.float32 if mixed_precision and parameter.requires_grad else loaded
        return packed.get(name, parameter.numel() * dtype.itemsize)

    bytes_of = {name: held(name, parameter) for name, parameter in policy.named_parameters()}
    trained = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    whole, gradients = sum(bytes_of.values()), sum(bytes_of[name] for name in trained)
    elements, count = sum(p.numel() for p in policy.parameters()), sum(p.numel() for p in trained.values())
    itemsize = {name: 4 if zero_stage else bytes_of[name] // p.numel() for name, p in trained.items()}
    # The Trainer keeps the optimizer states of embeddings in float32.
    embeddings = {id(m.weight) for m in policy.modules() if isinstance(m, nn.Embedding)}
    states = sum(_states(optimizer, p.numel(), itemsize[name], id(p) in embeddings) for name, p in trained.items())
    paged = OPTIMIZERS[optimizer][2] and not zero_stage
    ways = processes if zero_stage == 3 or fsdp else 1  # number of shards of the weights
    always = {
        "weights": whole // ways,
        "reference": whole // ways if reference and peft_config is None else 0,
        "optimizer": 0 if paged else (states + (4 * count if zero_stage else 0)) // (processes if sharded else 1),
    }
    reduced = gradients // processes if zero_stage > 1 or fsdp else 0
    # FSDP2 reduces in the last micro-batch, and keeps whole gradients until then.
    unreduced = count * computed.itemsize if fsdp and accumulation > 1 else 0

    # Communication: buckets, and parameters that are whole while in use.
    bucket = REDUCE_BUCKET * computed.itemsize if zero_stage else gradients if processes > 1 and not fsdp else 0
    gathered, all_gathered = 0, 0
    if zero_stage == 3:
        gathered, all_gathered = min(elements, LIVE_PARAMETERS) * computed.itemsize, elements * computed.itemsize
    elif fsdp:
        blocks = [sum(p.numel() for p in block.parameters()) for block in _blocks(policy)]
        others = elements - sum(blocks)
        all_gathered = (others + 2 * max(blocks)) * computed.itemsize  # one block in use, and the next
        gathered = all_gathered + (max(blocks) if peft_config is None else 0) * computed.itemsize  # its gradients
    gathers = generated > 0 if gathered_to_generate is None else gathered_to_generate
    foreach = gradients if optimizer == "adamw_torch" and device != "cpu" and not zero_stage else 0
    if zero_stage:  # float32 gradients of the partition (under ZeRO-3, of a sub-group of 1e9 elements)
        foreach = 4 * min(count // processes, LIVE_PARAMETERS if zero_stage == 3 else count)
    phases = {
        "generation": {
            "communication": (all_gathered if gathers else 0) + (bucket if zero_stage in (0, 3) else 0),
            "gradients": reduced if zero_stage == 3 else 0,
            "generation": rollout,
        },
        "update": {
            **update,
            "gradients": update["gradients"] + reduced + unreduced,
            "communication": bucket + gathered,
        },
        "optimizer step": {"gradients": (reduced or gradients) + foreach, "communication": bucket},
    }
    if evaluated_rows:
        phases["evaluation"] = {
            **phases["generation"],
            "communication": 0 if sharded else bucket,
            "generation": evaluation,
        }
    return MemoryEstimate(
        {name: {**dict.fromkeys(PARTS, 0), **always, **parts} for name, parts in phases.items()},
        elements,
        count,
        states if paged else 0,
    )


def _check(optimizer: str, zero_stage: int, fsdp: bool, quantization: str | None, peft_config: Any) -> None:
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"`optim={optimizer!r}` is not among those whose memory is known: {', '.join(OPTIMIZERS)}.")
    if zero_stage not in range(4) or (zero_stage and fsdp):
        raise ValueError(f"`zero_stage={zero_stage}`, `fsdp={fsdp}`: ZeRO has stages 1 to 3, and goes without FSDP.")
    if quantization not in (None, "4bit", "8bit") or (quantization and peft_config is None):
        raise ValueError(f"`quantization={quantization!r}`: '4bit' or '8bit', and with an adapter: bare, it is frozen.")


def _configuration(model: str | PretrainedConfig, **options: Any) -> PretrainedConfig:
    if isinstance(model, PretrainedConfig):
        return deepcopy(model)
    try:
        return AutoConfig.from_pretrained(model, **options)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"No configuration of a model at {model!r}. Give the id of a model on the Hub, or a folder with its "
            f"config.json ({in_one_line(error)})"
        ) from error


def _policy(
    config: PretrainedConfig, dtype: torch.dtype, attention: str | None, trust_remote_code: bool
) -> PreTrainedModel:
    options = dict(dtype=dtype, attn_implementation=attention if attention in TAKES_MASKS else "sdpa")
    try:
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code, **options).train()
    except ValueError as error:
        raise ValueError(f"{config.model_type!r} does not load as a causal language model: {error}") from error


def _blocks(model: PreTrainedModel) -> list[nn.Module]:
    """The decoder's layers."""
    return list(max((m for m in model.modules() if isinstance(m, nn.ModuleList)), key=len, default=[model]))


def _states(optimizer: str, elements: int, itemsize: int, embedding: bool) -> int:
    number, eight_bits, _ = OPTIMIZERS[optimizer]
    if not eight_bits:
        return number * elements * itemsize
    return number * (4 * elements if embedding or elements < SMALL else elements + 4 * math.ceil(elements / BLOCK))


def _add_adapters(policy: PreTrainedModel, peft_config: Any, dtype: torch.dtype | None) -> None:
    """Adapters as PEFT makes them: in float32, unless `dtype` says otherwise."""
    from peft import get_peft_model

    get_peft_model(policy, deepcopy(peft_config))  # in place
    if dtype is not None:
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)
