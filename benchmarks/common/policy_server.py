"""A server on the loopback with vLLM's HTTP interface. It draws from real weights and loads adapters or weights."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from common.loopback import Answering, Loopback


@dataclass
class Seen:
    """What the server saw in requests, for a test to look at."""

    versions: list[str] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)
    most_at_once: int = 0
    loaded: list[str] = field(default_factory=list)
    unloaded: list[str] = field(default_factory=list)


class PolicyServer:
    """Serves until it is stopped. `start` serves again on the same port, with the base alone.

    Args:
        model: folder of the base.
        adapters: whether it can load adapters.
        delay: seconds that a completion takes at least.
    """

    def __init__(self, model: str, adapters: bool = True, delay: float = 0.0):
        self.model, self.adapters, self.delay, self.seen = model, adapters, delay, Seen()
        self.script: Callable[[list[int]], list[int]] = lambda prompt: []  # what a completion begins with
        self.context: int | None = None  # tokens of a prompt and its completion, at most
        self.port = 0
        self._lock, self._at_once = threading.Lock(), 0
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        self._is_up = True
        self._policy: Any = AutoModelForCausalLM.from_pretrained(self.model, dtype=torch.float32).eval()
        self._names: set[str] = set()
        self._server = Loopback(_Handler, self, self.port)
        self.port = self._server.server_port

    def stop(self) -> None:
        self._server.close()
        with self._lock:  # wait for a request that is loading: transformers loads one model at a time
            self._is_up = False

    def load(self, asked: dict[str, Any]) -> tuple[int, Any]:
        name, path = asked["lora_name"], asked["lora_path"]
        if not self.adapters:
            return 404, {"detail": "Not Found"}
        if name in self._names:
            return 400, {"error": {"message": f"The lora adapter '{name}' has already been loaded."}}
        if not Path(path, "adapter_config.json").is_file():
            return 500, {"error": {"message": f"No adapter found for {path}"}}
        with self._lock:
            if not self._is_up:
                return 503, {}
            if self._names or isinstance(self._policy, PeftModel):
                self._policy.load_adapter(path, name)
            else:
                self._policy = PeftModel.from_pretrained(self._policy, path, name).eval()
            self._names.add(name)
        self.seen.loaded.append(name)
        return 200, "Success: loaded."

    def unload(self, asked: dict[str, Any]) -> tuple[int, Any]:
        with self._lock:
            if asked["lora_name"] not in self._names:
                return 404, {"error": {"message": "cannot be found"}}
            self._names.discard(asked["lora_name"])
        self.seen.unloaded.append(asked["lora_name"])
        return 200, "Success: removed."

    def reload(self, asked: dict[str, Any]) -> tuple[int, Any]:
        with self._lock:
            if not self._is_up:
                return 503, {}
            path = asked["kwargs"]["weights_path"]
            self._policy = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        self.seen.loaded.append(Path(path).name)
        return 200, {"results": [None]}

    def complete(self, asked: dict[str, Any]) -> tuple[int, Any]:
        name = asked["model"]
        if name != self.model and name not in self._names:
            return 404, {"error": {"message": f"The model `{name}` does not exist."}}
        if isinstance(asked["prompt"][0], list):
            said = [self._likeliest(name, prompt, asked["logprobs"]) for prompt in asked["prompt"]]
            return 200, {"choices": [{"index": i, "logprobs": {"top_logprobs": [one]}} for i, one in enumerate(said)]}
        if self.context is not None and len(asked["prompt"]) + asked["max_tokens"] > self.context:
            return 400, {"error": {"message": f"max_tokens is too large, the context is {self.context} tokens."}}
        self.seen.versions.append(name)
        self.seen.seeds.append(asked["seed"])
        self._at_once += 1
        self.seen.most_at_once = max(self.seen.most_at_once, self._at_once)
        try:
            time.sleep(self.delay)
            ids, log_probs = self._draw(name, asked)
        finally:
            self._at_once -= 1
        return 200, {"choices": [{"token_ids": ids, "logprobs": {"token_logprobs": log_probs}}]}

    @torch.no_grad()
    def _draw(self, name: str, asked: dict[str, Any]) -> tuple[list[int], list[float]]:
        generator = torch.Generator().manual_seed(asked["seed"])
        prompt = list(asked["prompt"])
        ids: list[int] = []
        log_probs: list[float] = []
        script = self.script(prompt)
        while len(ids) < asked["max_tokens"] and not (ids and ids[-1] in asked["stop_token_ids"]):
            scores = (self._logits(name, prompt + ids)[-1] / asked["temperature"]).log_softmax(-1)  # (V,)
            drawn = torch.multinomial(scores.exp(), 1, generator=generator).item()
            ids.append(script[len(ids)] if len(ids) < len(script) else int(drawn))
            log_probs.append(scores[ids[-1]].item())
        return ids, log_probs

    @torch.no_grad()
    def _likeliest(self, name: str, ids: list[int], count: int) -> dict[str, float]:
        values, tokens = self._logits(name, ids)[-1].log_softmax(-1).topk(count)
        return {f"token_id:{token}": value for token, value in zip(tokens.tolist(), values.tolist(), strict=True)}

    def _logits(self, name: str, ids: list[int]) -> torch.Tensor:
        with self._lock:
            if name in self._names:
                self._policy.set_adapter(name)
            return self._policy(torch.tensor([ids])).logits[0].float()  # (T, V)


class _Handler(Answering):
    def do_GET(self) -> None:
        self.answer({"data": [{"id": self.server.owner.model}]})

    def do_POST(self) -> None:
        policy = self.server.owner
        work = {
            "/v1/completions": policy.complete,
            "/v1/load_lora_adapter": policy.load,
            "/v1/unload_lora_adapter": policy.unload,
            "/collective_rpc": policy.reload,
            "/reset_prefix_cache": lambda asked: (200, {"success": True}),
        }[self.path]
        status, body = work(self.asked())
        self.answer(body, status)
