"""Versions of the policy as files, which whoever draws for a run loads.

    policy/
        latest.json               the version that is served now; its folder is whole by then
        step-00000012-1a2b3c4d/   an adapter as PEFT saves it, or a model as transformers does
        base/                     the de-quantised base of an adapter that is trained on a quantised one, written once

A version's name ends in a digest of its weights: a name means one set of bits, also when a resumed run comes to the
same step with other weights.
"""

import copy
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import xxhash
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import gather_object, is_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import PreTrainedTokenizerBase, TrainerCallback

from ..files import appearing_folder, write_json
from ..processes import failing_together
from .reference import digest_of, gathering

logger = get_logger(__name__)

FOLDER = "policy"  # in the run's output directory
LATEST = "latest.json"
BASE = "base"
PLACES, LIKELIEST = 8, 20  # of the probe: after how many tokens something is said, and of how many tokens each time


@dataclass(frozen=True)
class Version:
    """A policy that was published.

    Attributes:
        name: of its folder, and of the adapter at the server.
        step: updates that it had made.
        adapter: whether its folder holds an adapter, or a whole model.
        probe_ids: a short text, as tokens.
        likeliest: after some first tokens of it, by their number, the tokens that the policy finds likeliest there,
            each with its log-probability at temperature 1.
    """

    name: str
    step: int
    adapter: bool = True
    probe_ids: tuple[int, ...] = ()
    likeliest: Mapping[int, Mapping[int, float]] = field(default_factory=dict)


def read_latest(folder: Path) -> Version:
    """The version that is served now. Raises FileNotFoundError before the first."""
    said = json.loads((folder / LATEST).read_text())
    after = {int(n): {int(token): one for token, one in of.items()} for n, of in said.get("likeliest", {}).items()}
    return Version(said["version"], said["step"], said["adapter"], tuple(said["probe_ids"]), after)


class Publisher(TrainerCallback):
    """Writes the policy as a new version when training begins, and after every update.

    Every process takes part, since a sharded model is gathered. The main process writes.

    Args:
        folder: of the versions.
        model: gives the model being trained, in its wrappers.
        accelerator: the trainer's.
        kept: versions of how many updates before the latest stay on disk, for who has just read of them.
        probe_ids: a short text, as tokens, by which a server that serves something else is found out.
    """

    def __init__(
        self,
        folder: Path,
        model: Callable[[], nn.Module],
        accelerator: Accelerator,
        kept: int,
        probe_ids: Sequence[int] = (),
    ):
        self.folder, self.model, self.accelerator, self.kept = folder, model, accelerator, kept
        self.probe_ids = tuple(probe_ids)
        self.latest: Version | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        self.publish(state.global_step)

    def on_step_end(self, args, state, control, **kwargs):
        self.publish(state.global_step)

    @torch.no_grad()
    def publish(self, step: int) -> Version:
        """Write the policy as it is now, and say that it is the latest.

        Raises:
            OSError: on every process, if the main process cannot write; says where, and what to do.
        """
        policy: Any = self.accelerator.unwrap_model(self.model(), keep_torch_compile=False)
        writes = self.accelerator.is_main_process
        tensors = gathered(_published(policy), writes)
        probe = self._probe()
        version = None
        with failing_together():
            if writes:
                name = f"step-{step:08d}-{_digest(tensors)[:8]}"
                version = Version(name, step, is_peft_model(policy), self.probe_ids, probe)
                self._write(version, policy, tensors)
        (version, *_) = gather_object([version])
        self.latest = version
        return version

    def _write(self, version: Version, policy: Any, tensors: dict[str, Tensor]) -> None:
        target = self.folder / version.name
        if not target.exists():
            with appearing_folder(target) as partial:
                if version.adapter:
                    _save_adapter(policy, tensors, partial)
                else:
                    policy.save_pretrained(partial, state_dict=tensors)
        said = asdict(version)
        write_json(self.folder / LATEST, {"version": said.pop("name"), **said})
        self._remove_old(version)

    def _remove_old(self, latest: Version) -> None:
        """Versions that no one can ask for any more, and those of updates that a resumed run has yet to make."""
        for folder in self.folder.glob("step-*"):
            step = int(folder.name.split("-")[1])
            if folder.name != latest.name and not latest.step - self.kept <= step <= latest.step:
                shutil.rmtree(folder, ignore_errors=True)

    def _probe(self) -> dict[int, dict[int, float]]:
        """What the policy finds likeliest after the probe's first tokens. Every process runs this forward pass."""
        if not self.probe_ids:
            return {}
        ids = torch.tensor([self.probe_ids], device=self.accelerator.device)  # (1, T)
        with self.accelerator.autocast():
            logits = self.model()(input_ids=ids, use_cache=False).logits  # (1, T, V)
        for module in self.model().modules():
            if isinstance(module, FSDPModule):  # its root would stay whole until a backward pass, which none follows
                module.reshard()
        places = sorted({round(len(self.probe_ids) * (i + 1) / PLACES) or 1 for i in range(PLACES)})
        log_probs = logits[0, [place - 1 for place in places]].float().log_softmax(-1)  # (places, V)
        top = log_probs.topk(min(LIKELIEST, log_probs.shape[1]))
        of_places = zip(places, top.indices.tolist(), top.values.tolist(), strict=True)
        return {place: dict(zip(tokens, values, strict=True)) for place, tokens, values in of_places}


def gathered(parameters: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """Whole tensors on the CPU, of parameters that DeepSpeed or FSDP may divide. Every process calls this.

    Args:
        parameters: by name.
        keep: whether this process wants them; one that does not gets none.
    """
    tensors = {}
    for name, parameter in parameters.items():
        with gathering(parameter):
            whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
            if keep:
                tensors[name] = whole.detach().to("cpu", copy=True).contiguous()
    return tensors


def write_base(folder: Path, model: Any, tokenizer: PreTrainedTokenizerBase) -> Path:
    """Write what a quantised base computes with: its weights de-quantised. The model itself stays as it is.

    Args:
        folder: of the versions.
        model: a causal language model that bitsandbytes quantised to 4 bits, with an adapter or without.
        tokenizer: written beside it, for the server.

    Returns:
        Its folder. A base that was written before is left alone if it is of the same weights.
    """
    from bitsandbytes.functional import dequantize_4bit

    policy: Any = model.get_base_model() if is_peft_model(model) else model
    tensors: dict[str, Tensor] = {}
    for name, value in {**dict(policy.named_parameters()), **_saved_buffers(policy)}.items():
        if "lora_" in name:
            continue
        state = getattr(value, "quant_state", None)
        whole = value.detach() if state is None else dequantize_4bit(value.data, state)
        tensors[name.replace(".base_layer", "")] = whole.to("cpu", copy=True).contiguous()
    target, digest = folder / BASE, _digest(tensors)
    written = target / "digest"
    if written.is_file() and written.read_text() == digest:
        return target
    shutil.rmtree(target, ignore_errors=True)
    config = copy.deepcopy(policy.config)
    config.__dict__.pop("quantization_config", None)
    config.dtype = next(value.dtype for value in tensors.values() if value.is_floating_point())
    with appearing_folder(target) as partial:
        config.save_pretrained(partial)
        policy.generation_config.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        save_file(tensors, partial / "model.safetensors", {"format": "pt"})
        (partial / "digest").write_text(digest)
    return target


def say_base(folder: Path) -> None:
    """Say how a server is started on the de-quantised base."""
    logger.warning(
        f"The base is de-quantised in {folder.absolute()}, for the server: VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm "
        f"serve {folder.absolute()} --enable-lora --max-loras 4 --max-lora-rank RANK"
    )


def _published(policy: Any) -> dict[str, Tensor]:
    """What a version is made of: the adapter that is trained, or every weight."""
    if is_peft_model(policy):
        return {name: parameter for name, parameter in policy.named_parameters() if parameter.requires_grad}
    return {**dict(policy.named_parameters()), **_saved_buffers(policy)}


def _saved_buffers(policy: nn.Module) -> dict[str, Tensor]:
    saved = policy.state_dict().keys()
    return {name: buffer for name, buffer in policy.named_buffers() if name in saved and _is_plain(name)}


def _is_plain(name: str) -> bool:
    """Whether a buffer is the model's own, and not one that bitsandbytes keeps beside a packed weight."""
    return not any(part in name for part in (".absmax", ".quant_map", ".nested_", ".quant_state", ".SCB"))


def _save_adapter(policy: Any, tensors: dict[str, Tensor], folder: Path) -> None:
    from peft import get_peft_model_state_dict

    name = policy.active_adapter
    state = get_peft_model_state_dict(policy, tensors, name, save_embedding_layers=False)
    save_file({one: value.contiguous() for one, value in state.items()}, folder / "adapter_model.safetensors")
    config = copy.copy(policy.peft_config[name])
    config.inference_mode = True
    config.save_pretrained(folder)


def _digest(tensors: Mapping[str, Tensor]) -> str:
    return digest_of(tensors.items(), xxhash.xxh3_64())
