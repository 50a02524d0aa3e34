"""Checks of a launch, which refuse or warn of sharding, offload and optimizers that conflict with an option."""

import os
import warnings
from collections.abc import Iterator

from accelerate import Accelerator

from ..options import TBRMOptions

# Optimizers that DeepSpeed has on the CPU too (accelerate's `map_pytorch_optim_to_deepspeed`).
OFFLOADED_OPTIMIZERS = frozenset(
    ("adamw_torch", "adamw_torch_fused", "paged_adamw_32bit", "lion_32bit", "paged_lion_32bit", "adagrad")
)


def check_devices(args: TBRMOptions) -> Iterator[str]:
    """Refuse one process for several GPUs, over which TRL would spread a model that is given by its name."""
    if args.n_gpu > 1:
        yield (
            f"This process sees {args.n_gpu} GPUs, and trains on one. For all of them, start it by `accelerate launch` "
            "or `torchrun`; for one, set CUDA_VISIBLE_DEVICES."
        )


def check_launch(args: TBRMOptions) -> Iterator[str]:
    """Refuse or warn of ways to shard, offload or generate that keep an option from doing what it says."""
    deepspeed = {} if args.deepspeed_plugin is None else args.deepspeed_plugin.deepspeed_config
    zero = deepspeed.get("zero_optimization") or {}  # a file may hold null
    if not args.ds3_gather_for_generation:
        if args.use_vllm:
            yield (
                "`ds3_gather_for_generation=False` with `use_vllm=True` is refused: vLLM needs every weight gathered, "
                "and TRL does so one at a time whatever this option says. Leave it at True."
            )
        if zero.get("stage") == 3:
            warnings.warn(
                "`ds3_gather_for_generation=False` under ZeRO-3: every generated token gathers all weights once, layer "
                "by layer, which is very slow. Unless one GPU cannot hold the whole model, leave it at True; if it "
                "cannot, prefer `use_vllm=True`.",
                stacklevel=4,
            )
    offload = zero.get("offload_optimizer") or {}
    offloaded = offload.get("device", "none") != "none"
    own = "optimizer" in deepspeed  # DeepSpeed's configuration names one, which replaces `optim`
    replaced = offloaded and not own and deepspeed.get("zero_force_ds_cpu_optimizer", True)
    if replaced and args.optim not in OFFLOADED_OPTIMIZERS:
        yield (
            f"`optim={args.optim.value!r}` with DeepSpeed's optimizer offload is refused: accelerate replaces it by "
            "DeepSpeed's 32-bit CPU Adam, with an L2 penalty for weight decay. Use optim='adamw_torch', "
            "which becomes DeepSpeed's CPU AdamW, or do not offload the optimizer."
        )
    precise = deepspeed.get("bf16") or {}
    if deepspeed and not zero.get("stage") and not args.fp16:
        yield (
            "DeepSpeed without ZeRO is refused: it steps inside backward, and looks at no gradient before. An update "
            "that is not finite would reach the weights. Set `zero_optimization.stage` to 1, 2 or 3."
        )
    looks = {"zero_optimization.compute_grad_norm": zero.get("compute_grad_norm")}
    if precise.get("enabled"):
        looks["bf16.check_grad_overflow"] = precise.get("check_grad_overflow")
    for name, value in looks.items():
        if value is False:
            yield (
                f"DeepSpeed's `{name}=false` is refused: an update that is not finite would reach the weights. Leave "
                "it out, or set it to true."
            )
    version = fsdp_version(args)
    if version is None:
        return
    if version == 1:
        yield (
            "FSDP version 1 is refused: the reference is saved, reset and compared by whole parameters, which it "
            "flattens. Put `fsdp_version: 2` into the `fsdp_config` of the launcher's file."
        )
    if "torch" not in args.optim and any(word in args.optim for word in ("8bit", "paged", "bnb", "lion", "ademamix")):
        yield (
            f"`optim={args.optim.value!r}` under FSDP2 is refused: bitsandbytes' update is not defined for sharded "
            "tensors (torch: no sharding strategy registered). Use optim='adamw_torch', which is sharded as well."
        )


def fsdp_version(args: TBRMOptions) -> int | None:
    """The version of FSDP that the launcher's environment or the arguments ask for, or None."""
    if args.fsdp_plugin_args is not None:
        return int(args.fsdp_plugin_args["fsdp_version"])
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        return int(os.environ.get("FSDP_VERSION", "1"))
    return None


def check_sharding(args: TBRMOptions, accelerator: Accelerator) -> None:
    """Refuse a launch of several processes that asked for DeepSpeed or FSDP and silently became DDP."""
    asked = "DEEPSPEED" if args.deepspeed_plugin is not None else "FSDP" if fsdp_version(args) else None
    became = accelerator.distributed_type.value
    if asked not in (None, became) and accelerator.num_processes > 1:
        raise ValueError(
            f"{asked} was asked for, and accelerate made {became} of it: nothing would be sharded. On CPUs it has no "
            "FSDP, and takes `ACCELERATE_USE_CPU` (`--cpu`) for no DeepSpeed. Unset it, or launch with ddp.yaml."
        )
