"""Write versions of the policy as files, which the server that draws rollouts for a run loads.

    policy/
        latest.json               the version to serve now, written after its folder is complete
        step-00000012-1a2b3c4d/   an adapter as PEFT saves it, or a model as transformers does
        base/                     the de-quantised base, if an adapter is trained on a quantised one; written once

A version's name ends in a digest of its weights. So a name means one set of weights, even if a resumed run reaches the
same step with other weights.
"""

import copy
import json
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

from ..files import appearing_folder, remove_folder, write_json
from ..processes import failing_together
from .reference import digest_of, gathering, own_names

logger = get_logger(__name__)

FOLDER = "policy"  # in the run's output directory
LATEST = "latest.json"
BASE = "base"
PLACES, LIKELIEST = 8, 20  # of the probe: how many of its prefixes are continued, and how many tokens are kept for each


@dataclass(frozen=True)
class Version:
    """A published policy.

    Attributes:
        name: name of its folder, and of the adapter on the server.
        step: number of updates it has made.
        adapter: whether its folder holds an adapter; else it holds a whole model.
        probe_ids: a short text as token ids.
        likeliest: number of leading tokens of the probe → the policy's likeliest next tokens → their log-probabilities
            at temperature 1.
    """

    name: str
    step: int
    adapter: bool = True
    probe_ids: tuple[int, ...] = ()
    likeliest: Mapping[int, Mapping[int, float]] = field(default_factory=dict)


def read_latest(folder: Path) -> Version:
    """Read the version that is served now. Raises FileNotFoundError before the first."""
    said = json.loads((folder / LATEST).read_text())
    after = {int(n): {int(token): one for token, one in of.items()} for n, of in said.get("likeliest", {}).items()}
    return Version(said["version"], said["step"], said["adapter"], tuple(said["probe_ids"]), after)


class Publisher(TrainerCallback):
    """Writes the policy as a new version when training begins, and after every update.

    Every process takes part, since a sharded model is gathered. The main process writes.

    Args:
        folder: holds the versions.
        model: returns the model being trained, in its wrappers.
        accelerator: the trainer's.
        kept: number of updates before the latest whose versions stay on disk, for readers that just saw their names.
        probe_ids: a short text as token ids. A server's answer to it shows whether it serves this policy.
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
        """Write the current policy, and record it as the latest.

        Raises:
            OSError: on every process, if the main process cannot write. The message says where, and what to do.
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
        """Remove versions older than `kept` updates, and those of updates that a resumed run has yet to make."""
        for folder in self.folder.glob("step-*"):
            step = int(folder.name.split("-")[1])
            if folder.name != latest.name and not latest.step - self.kept <= step <= latest.step:
                remove_folder(folder)

    def _probe(self) -> dict[int, dict[int, float]]:
        """Find the likeliest next tokens after prefixes of the probe. Every process runs this forward pass."""
        if not self.probe_ids:
            return {}
        ids = torch.tensor([self.probe_ids], device=self.accelerator.device)  # (1, T)
        with self.accelerator.autocast():
            logits = self.model()(input_ids=ids, use_cache=False).logits  # (1, T, V)
        for module in self.model().modules():
            if isinstance(module, FSDPModule):  # its root would stay whole, since no backward pass follows
                module.reshard()
        places = sorted({round(len(self.probe_ids) * (i + 1) / PLACES) or 1 for i in range(PLACES)})
        log_probs = logits[0, [place - 1 for place in places]].float().log_softmax(-1)  # (places, V)
        top = log_probs.topk(min(LIKELIEST, log_probs.shape[1]))
        of_places = zip(places, top.indices.tolist(), top.values.tolist(), strict=True)
        return {place: dict(zip(tokens, values, strict=True)) for place, tokens, values in of_places}


def gathered(parameters: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """Copy parameters that DeepSpeed or FSDP may shard, whole, to the CPU. Every process calls this.

    Args:
        parameters: by name.
        keep: whether this process gets the tensors; else the result is empty.
    """
    tensors = {}
    for name, parameter in parameters.items():
        with gathering(parameter):
            whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
            if keep:
                tensors[name] = whole.detach().to("cpu", copy=True).contiguous()
    return tensors


def write_base(folder: Path, model: Any, tokenizer: PreTrainedTokenizerBase) -> Path:
    """Write the weights that a quantised base computes with, de-quantised. The model itself does not change.

    Args:
        folder: holds the versions.
        model: a causal language model that bitsandbytes quantised to 4 bits, with an adapter or without.
        tokenizer: written beside the base, for the server.

    Returns:
        The base's folder. A base already written stays if its weights are the same.
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
    remove_folder(target)
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
    """Log how to start a server on the de-quantised base."""
    logger.warning(
        f"The base is de-quantised in {folder.absolute()}, for the server: VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm "
        f"serve {folder.absolute()} --enable-lora --max-loras 4 --max-lora-rank RANK"
    )


def _published(policy: Any) -> dict[str, Tensor]:
    """The tensors of a version: the trained adapter's, or every weight and saved buffer."""
    if is_peft_model(policy):
        return {name: parameter for name, parameter in own_names(policy.named_parameters()) if parameter.requires_grad}
    return {**dict(own_names(policy.named_parameters())), **_saved_buffers(policy)}


def _saved_buffers(policy: nn.Module) -> dict[str, Tensor]:
    saved = policy.state_dict().keys()
    return {name: buffer for name, buffer in own_names(policy.named_buffers()) if name in saved and _is_plain(name)}


def _is_plain(name: str) -> bool:
    """Whether a buffer is the model's own; bitsandbytes keeps others beside a packed weight."""
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
