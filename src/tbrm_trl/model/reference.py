"""The reference policy π_ref: the module that computes it, its identity, its resets, and its scores."""

import copy
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
import xxhash
from accelerate import Accelerator
from accelerate.utils import gather_object, is_peft_model
from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedTokenizerBase, TrainerCallback
from trl.models import prepare_fsdp
from trl.trainer.callbacks import SyncRefModelCallback
from trl.trainer.utils import use_adapter

from ..batch import Batch, TrajectoryScores
from ..context import temporarily
from ..trajectory import PREVIOUS, Trajectory
from .partition import local_part, local_shard

ADAPTER = "ref"  # TRL's name for it
_WRAPPER = "_checkpoint_wrapped_module."
_Tensor = TypeVar("_Tensor", bound=Tensor)
_OF_AN_ADAPTERS_ORIGIN = frozenset(
    ("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode")
)


def digest_of(tensors: Iterable[tuple[str, Tensor]], digest: Any) -> str:
    """Update an xxhash digest with tensors, their names, shapes and types, and return it in hex."""
    for name, tensor in tensors:
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).cpu().numpy().data)
    return digest.hexdigest()


def shard_by_layer(model: Any, accelerator: Accelerator) -> Any:
    """Shard a reference by FSDP2, one unit per layer. TRL makes the model one unit, gathered whole in every pass."""
    model.requires_grad_(False)  # trained parameters of a unit must have one dtype, and a head may be float32
    plugin = accelerator.state.fsdp_plugin
    keep_precision_of_scores(accelerator)
    plugin.set_auto_wrap_policy(model)
    is_unit = fsdp2_prepare_auto_wrap_policy(plugin, model) or (lambda module: False)
    for module in [module for module in model.modules() if module is not model and is_unit(module)]:
        prepare_fsdp(module, accelerator)
    return prepare_fsdp(model, accelerator)


def keep_precision_of_scores(accelerator: Accelerator) -> None:
    """Keep FSDP2 from rounding a model's float32 outputs to the compute dtype, as it does by accelerate's default."""
    plugin = accelerator.state.fsdp_plugin
    if plugin.mixed_precision_policy is not None:
        plugin.mixed_precision_policy = replace(plugin.mixed_precision_policy, output_dtype=None)


class Reference:
    """π_ref of a policy: a frozen copy (full fine-tuning), the adapter `ref`, or the base model without adapters.

    Args:
        policy: returns the model being trained, wrapped or not.
        frozen_copy: reference of a fully fine-tuned model, prepared for the process group; None for PEFT.
        accelerator: the trainer's.
        settings: what the scores depend on besides weights (temperature, dtype, …), as JSON-able values.
    """

    def __init__(
        self,
        policy: Callable[[], nn.Module],
        frozen_copy: nn.Module | None,
        accelerator: Accelerator,
        settings: dict[str, Any],
    ):
        self.policy, self.frozen_copy, self.accelerator, self.settings = policy, frozen_copy, accelerator, settings
        self.renew_key()

    @contextmanager
    def module(self) -> Iterator[nn.Module]:
        """The module that computes π_ref."""
        if self.frozen_copy is not None:
            yield self.frozen_copy
            return
        policy = self.policy()
        adapters = self._unwrapped(policy)
        with in_use(adapters, ADAPTER if ADAPTER in adapters.peft_config else None):
            yield policy

    def sync(self, alpha: float) -> None:
        """Move the reference to `alpha × policy + (1 − alpha) × reference`; alpha = 1 is a hard reset.

        This makes stored scores stale. A trajectory is scored again the next time it is trained on.
        """
        trained = self._trained()
        for name, parameter in self._synced().items():  # one by one, since ZeRO-3 gathers all that a call syncs
            SyncRefModelCallback.sync_target_model(
                nn.ParameterList([trained[name]]), nn.ParameterList([parameter]), alpha
            )
        self.renew_key()

    def save(self, folder: Path) -> None:
        """Write the parameters that `sync` changes. The main process writes all, or each process its FSDP2 shard."""
        tensors = {}
        for name, parameter in self._synced().items():
            with gathering(parameter):
                if self.accelerator.is_main_process or isinstance(parameter, DTensor):
                    tensors[name] = local_shard(parameter).detach().to("cpu", copy=True).contiguous()
        if tensors:
            save_file(tensors, _file(folder))

    @torch.no_grad()
    def load(self, folder: Path, main_folder: Path) -> None:
        """Read back what `save` wrote.

        Args:
            folder: where this process wrote.
            main_folder: where the main process wrote. It wrote everything, unless shards were written.
        """
        parameters = self._synced()
        sharded = any(isinstance(parameter, DTensor) for parameter in parameters.values())
        with safe_open(_file(folder if sharded else main_folder), framework="pt") as saved:
            for name, parameter in parameters.items():
                with gathering(parameter):
                    local_shard(parameter).copy_(saved.get_tensor(name))
        self.renew_key()

    def is_stale(self, trajectory: Trajectory) -> bool:
        """Whether a trajectory has no reference scores, or another reference's."""
        return trajectory.ref_key != self.key

    def renew_key(self) -> None:
        """Set `key` to a digest of π_ref's weights and the settings: stored scores with this key are its own.

        `weights` becomes the digest of the weights alone.

        Call this after every change of the weights, or of how they are sharded.
        """
        if self.frozen_copy is not None:
            weights = list(own_names(self._unwrapped(self.frozen_copy).named_parameters()))
        else:
            policy = self._unwrapped(self.policy())
            others = [f".{name}." for name in policy.peft_config if name != ADAPTER]
            named = own_names(policy.named_parameters())
            weights = [(n, p) for n, p in named if not any(o in f"{n}." for o in others)]
        # A divided parameter is fingerprinted by this process's part, without gathering it.
        local = ((n, local_part(p).detach().contiguous()) for n, p in weights)
        # Processes with whole copies have equal digests. The digests of processes with shards make one key together.
        parts = sorted(set(gather_object([digest_of(local, xxhash.xxh3_128())])))
        self.key = xxhash.xxh3_128_hexdigest(json.dumps([parts, self.settings], sort_keys=True).encode())
        self.weights = xxhash.xxh3_128_hexdigest(json.dumps(parts).encode())

    def _unwrapped(self, model: nn.Module) -> Any:
        """The model without its wrappers, `torch.compile`'s included, which prefixes the names of parameters."""
        return self.accelerator.unwrap_model(model, keep_torch_compile=False)

    def _synced(self) -> dict[str, nn.Parameter]:
        """The parameters that a sync changes, by the names of the policy's own parameters."""
        if self.frozen_copy is not None:
            return dict(own_names(self._unwrapped(self.frozen_copy).named_parameters()))
        return _adapter(self._unwrapped(self.policy()), ADAPTER)

    def _trained(self) -> dict[str, nn.Parameter]:
        policy = self._unwrapped(self.policy())
        if self.frozen_copy is not None:
            return dict(own_names(policy.named_parameters()))
        return _adapter(policy, policy.active_adapter)


class PreviousPolicy:
    """Uses the policy that produced a trajectory as its reference, and scores it once, before it is trained on.

    Args:
        policy: returns the model being trained, wrapped or not.
        step: returns the number of updates that the policy has made.
    """

    def __init__(self, policy: Callable[[], nn.Module], step: Callable[[], int]):
        self.policy, self.step = policy, step

    @property
    def key(self) -> str:
        return f"{PREVIOUS}{self.step()}"

    def module(self) -> AbstractContextManager[nn.Module]:
        """The policy as it is now."""
        return nullcontext(self.policy())

    def is_stale(self, trajectory: Trajectory) -> bool:
        """Whether a trajectory has not been scored."""
        return trajectory.ref_key is None


def _adapter(policy: nn.Module, adapter: str) -> dict[str, nn.Parameter]:
    """The parameters of one adapter, by names that are the same for every adapter."""
    inside = f".{adapter}."
    named = own_names(policy.named_parameters())
    return {f"{n}.".replace(inside, ".")[:-1]: p for n, p in named if inside in f"{n}."}


def own_names(named: Iterable[tuple[str, _Tensor]]) -> Iterator[tuple[str, _Tensor]]:
    """Tensors by the model's own names: FSDP2's activation checkpointing puts the names of its wrappers into them."""
    return ((name.replace(_WRAPPER, ""), tensor) for name, tensor in named)


def _file(folder: Path) -> Path:
    return folder / "reference.safetensors"


def gathering(parameter: Tensor) -> AbstractContextManager[None]:
    """Gather a ZeRO-3 parameter inside the block; at its end, partition what the main process wrote to it."""
    if hasattr(parameter, "ds_id"):
        import deepspeed

        return deepspeed.zero.GatheredParameters([parameter], modifier_rank=0)
    return nullcontext()


@contextmanager
def base_kept(policy: Any) -> Iterator[None]:
    """Inside the block, adding an adapter beside another of the same configuration does not change the base.

    Some initialisations (PiSSA, OLoRA, …) rewrite the base for the new adapter. TRL and this library then give `ref`
    the values of the trained adapter, so its own initialisation does not matter.
    """
    configs = [one for one in getattr(policy, "peft_config", {}).values() if hasattr(one, "init_lora_weights")]
    with ExitStack() as stack:
        for config in configs:
            stack.enter_context(temporarily(config, init_lora_weights=True))
        yield


@contextmanager
def in_use(policy: Any, adapter: str | None) -> Iterator[None]:
    """Inside the block, a PEFT policy has this adapter active, or none. After it, it is as it was."""
    with frozen_kept(policy), use_adapter(policy, adapter):
        yield


@contextmanager
def frozen_kept(policy: Any) -> Iterator[None]:
    """After the block, those parameters are frozen that were before. PEFT unfreezes an adapter that it activates."""
    before = [(parameter, parameter.requires_grad) for parameter in policy.parameters()]
    try:
        yield
    finally:
        for parameter, required in before:
            if parameter.requires_grad != required:
                parameter.requires_grad_(required)


def add_reference_adapter(policy: Any) -> None:
    """Give a PEFT policy the frozen adapter `ref`, equal to the one being trained. TRL may have added it already."""
    active = policy.active_adapter
    if ADAPTER not in policy.peft_config:
        with base_kept(policy), frozen_kept(policy):
            policy.add_adapter(ADAPTER, copy.deepcopy(policy.peft_config[active]))
            policy.set_adapter(active)  # leaves `ref` frozen
    trained = _adapter(policy, active)
    for name, parameter in _adapter(policy, ADAPTER).items():
        # The dtype is copied too: PEFT makes adapters float32, and TRL trains some in bfloat16.
        parameter.data = trained[name].data.clone()


class SyncReference(TrainerCallback):
    """Moves the reference to the policy every `ref_model_sync_steps` updates."""

    def __init__(self, reference: Reference):
        self.reference = reference

    def on_train_begin(self, args, state, control, **kwargs):
        self.reference.renew_key()  # a policy with adapters is sharded by now, as it will be when `load` renews the key

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % args.ref_model_sync_steps == 0:
            self.reference.sync(args.ref_model_mixup_alpha)


@torch.no_grad()
def score_reference(
    batches: Sequence[Sequence[Trajectory]],
    forwards: int,
    key: str,
    collate: Callable[[Sequence[Trajectory]], Batch],
    score: Callable[[Batch], TrajectoryScores],
    filler: Trajectory,
) -> None:
    """Store log π_ref, V_ref(s_1) and the reference's key in each trajectory, both scores from the same forward.

    Args:
        batches: trajectories to score, one batch per forward.
        forwards: forwards to run, equally many on every process: a sharded model needs all processes in each.
        key: the key of the reference that scores.
        collate: trajectories → padded batch.
        score: padded batch → scores of the reference.
        filler: trajectory to run if this process has fewer batches than forwards; its scores are dropped.
    """
    scored = [(batch, score(collate(batch))) for batch in batches]
    for _ in range(forwards - len(batches)):
        score(collate([filler]))
    for batch, scores in scored:  # read after all forwards are launched
        log_probs, soft_values = scores.log_probs.cpu(), scores.soft_value.tolist()
        end_values = [None] * len(batch) if scores.end_value is None else scores.end_value.tolist()
        for trajectory, row, soft_value, end_value in zip(batch, log_probs, soft_values, end_values, strict=True):
            trajectory.ref_log_probs = row[len(trajectory.prompt_ids) : len(trajectory)].clone()
            trajectory.ref_soft_value, trajectory.ref_end_value = soft_value, end_value
            trajectory.ref_key = key


def adapter_settings(policy: nn.Module) -> dict[str, Any]:
    """The settings that decide, besides its weights, what a trained adapter computes; none for a full model."""
    if not is_peft_model(policy):
        return {}
    settings = policy.peft_config[policy.active_adapter].to_dict()  # type: ignore[index, union-attr]
    return {
        name: sorted(value) if isinstance(value, set) else value
        for name, value in settings.items()
        if name not in _OF_AN_ADAPTERS_ORIGIN and not name.startswith("init_") and not name.endswith("_config")
    }


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(sorted(tokenizer.get_vocab().items())).encode())
