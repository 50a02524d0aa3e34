"""TRL's generation by a vLLM server for a policy with an adapter: the server loads the adapter; nothing is merged."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from trl.generation.vllm_client import VLLMClient
from trl.generation.vllm_generation import VLLMGeneration

from ..context import temporarily
from .publisher import Version


class ServedAdapter(VLLMGeneration):
    """`VLLMGeneration` in mode "server" that makes the server load each version of the adapter under its own name.

    TRL would merge the adapter into the base, send all weights, and unmerge it. That rounds a half-precision base
    each time, and a quantised base cannot be sent at all. The overridden methods are

    - `_init_vllm`: joins no group for sending weights;
    - `sync_weights`: publishes the adapter, and names it in requests.

    Args:
        publish: writes the current policy. Every process calls it.
        folder: holds the versions, under a path that the server can read too.
        before: called with the model on the main process before it looks for the server.
    """

    def __init__(
        self, *args: Any, publish: Callable[[], Version], folder: Path, before: Callable[[Any], None], **kwargs: Any
    ):
        self.publish, self.folder, self.before = publish, folder, before
        self._served: str | None = None
        super().__init__(*args, **kwargs)

    def _init_vllm(self) -> None:
        if self.accelerator.is_main_process:
            self.before(self.model)
        with temporarily(VLLMClient, init_communicator=lambda client, device: None):
            super()._init_vllm()

    def sync_weights(self) -> None:
        version = self.publish()
        if not self.accelerator.is_main_process or version.name == self._served:
            return
        client = self.vllm_client
        asked = {"lora_name": version.name, "lora_path": str((self.folder / version.name).absolute())}
        answer = client.session.post(f"{client.base_url}/v1/load_lora_adapter", json=asked)
        if answer.status_code != 200 and "already been loaded" not in answer.text:
            raise RuntimeError(
                f"The vLLM server at {client.base_url} did not load the adapter {asked['lora_path']} "
                f"({answer.status_code}: {answer.text[:300]}). Start it with --enable-lora and --max-lora-rank RANK, "
                "and with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True in its environment; it must see the same folders."
            )
        client.model = version.name
        if self._served is not None:
            client.session.post(f"{client.base_url}/v1/unload_lora_adapter", json={"lora_name": self._served})
        self._served = version.name
