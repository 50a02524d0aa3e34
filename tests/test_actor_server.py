"""Requests to a server of whole weights that fails, restarts or loses them: what it draws, under which version.

The server draws no text. The tokens of a completion are the steps of the weights at its beginning and at its end.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from common.loopback import Answering, Loopback

from tbrm_trl.actor.server import Drawn, Server, ServerError
from tbrm_trl.model.publisher import Version

BASE = 99  # the step of the weights with which the server starts
SOON = 0.3  # seconds after which an event counts as not happening


class WeightsServer(Loopback):
    """Answers as vLLM does, with a number in place of weights."""

    def __init__(self) -> None:
        self.weights, self.loaded, self.drawn_with, self.probes = BASE, list[str](), list[int](), 0
        self.during: Callable[[int], int] = lambda seed: 200  # called in the middle of a completion, returns its status
        self.on_load: Callable[[str], int] = lambda name: 200
        self.restarts_after_look = False
        self.models_status, self.reasons, self.told = 200, list[str](), {}  # of completions: why they end, other fields
        self.connections: list[socket.socket] = []
        super().__init__(Handler)

    def drop(self) -> None:
        """Close the connections, as a server does when they are not used for some seconds."""
        for one in self.connections:
            one.shutdown(socket.SHUT_RDWR)
        self.connections = []

    def restart(self) -> None:
        self.weights = BASE
        self.drop()

    def reply(self, path: str, asked: dict[str, Any]) -> tuple[int, Any]:
        if path == "/collective_rpc":
            name = Path(asked["kwargs"]["weights_path"]).name
            self.weights = int(name.split("-")[1])
            self.loaded.append(name)
            return self.on_load(name), {}
        if path == "/reset_prefix_cache":
            return 200, {}
        if path != "/v1/completions":
            return 404, {}
        if isinstance(asked["prompt"][0], list):
            self.probes += 1
            said = {"top_logprobs": [{"token_id:9": -self.weights}]}
            return 200, {"choices": [{"index": i, "logprobs": said} for i in (1, 0)]}
        began_with = self.weights
        self.drawn_with.append(began_with)
        status = self.during(asked["seed"])
        reason = self.reasons.pop(0) if self.reasons else "stop"
        said = {"token_ids": [began_with, self.weights], "logprobs": {"token_logprobs": [0.0, 0.0]}}
        return status, {"choices": [{**said, "finish_reason": reason, **self.told}]}


class Handler(Answering):
    server: WeightsServer

    def setup(self) -> None:
        super().setup()
        self.server.connections.append(self.connection)

    def do_GET(self) -> None:
        restarts, self.server.restarts_after_look = self.server.restarts_after_look, False
        if restarts:
            self.server.weights = BASE
        closes = {"Connection": "close"} if restarts else {}
        self.answer({"data": [{"id": "base"}]}, self.server.models_status, **closes)

    def do_POST(self) -> None:
        status, body = self.server.reply(urlsplit(self.path).path, self.asked())  # a proxy gets whole addresses
        self.answer(body, status)


class Client:
    """A server's client, in a run that publishes when the test says so."""

    def __init__(self, server: WeightsServer, folder: Path, patience: float = 10.0, url: str = ""):
        self.said: list[str] = []
        self.publish(0)
        self.server = Server(url or server.url, folder, lambda: self.latest, patience, "base", self.said.append)

    def publish(self, step: int) -> None:
        likeliest = {1: {9: float(-step)}, 2: {9: float(-step)}}
        self.latest = Version(f"step-{step}", step, adapter=False, probe_ids=(7, 8), likeliest=likeliest)

    def draw(self, seed: int = 0) -> Drawn:
        return self.server.draw([5], {"max_tokens": 2, "seed": seed})


@pytest.fixture
def served() -> Iterator[WeightsServer]:
    server = WeightsServer()
    yield server
    server.close()


def test_a_request_that_is_lost_loads_no_weights_under_others(served, tmp_path):
    """Of two requests in flight, one is lost after a version is published. The other ends with its first weights."""
    client, both, reloaded = Client(served, tmp_path), threading.Barrier(2), threading.Event()
    lost: list[int] = []

    def during(seed: int) -> int:
        if lost:  # made again
            return 200
        both.wait(5)
        if seed == 0:
            reloaded.wait(SOON)
            return 200
        lost.append(seed)
        client.publish(1)
        return 500

    def on_load(name: str) -> int:
        if name == "step-1":
            reloaded.set()
        return 200

    served.during, served.on_load = during, on_load
    with ThreadPoolExecutor(2) as threads:
        kept, again = threads.map(client.draw, [0, 1])
    assert (kept.version.step, kept.ids) == (0, [0, 0])
    assert (again.version.step, again.ids) == (1, [1, 1])
    assert served.loaded == ["step-0", "step-1"]


def test_versions_that_were_published_meanwhile_are_not_loaded_one_after_another(served, tmp_path):
    """While a request keeps its weights on the server, three versions are published. The next request has the last."""
    client, begun, ends = Client(served, tmp_path), threading.Event(), threading.Event()

    def during(seed: int) -> int:
        if seed == 0:
            begun.set()
            ends.wait(5)
        return 200

    served.during = during
    with ThreadPoolExecutor(3) as threads:
        early = threads.submit(client.draw, 0)
        assert begun.wait(5)
        late = []
        for step in (1, 2):
            client.publish(step)
            late.append(threads.submit(client.draw, step))
            time.sleep(SOON)  # it waits for the early one
        client.publish(3)
        ends.set()
        assert early.result().version.step == 0
        assert [one.result().version.step for one in late] == [3, 3]
    assert served.loaded == ["step-0", "step-3"]


def test_weights_that_were_loaded_in_part_are_not_taken_for_the_old_ones(served, tmp_path):
    """A resumed run goes back to an earlier version, and the server no longer has those weights."""
    client = Client(served, tmp_path)
    assert client.draw().ids == [0, 0]

    def fails(name: str) -> int:
        served.on_load = lambda name: 200
        client.publish(0)
        return 500

    served.on_load = fails
    client.publish(1)
    drawn = client.draw()
    assert (drawn.version.step, drawn.ids) == (0, [0, 0])
    assert served.loaded == ["step-0", "step-1", "step-0"]


def test_a_request_that_always_fails_is_an_error(served, tmp_path):
    """Other checks of the server succeed. The first 5 tries have pauses of 0, 0.1, 0.2 and 0.4 seconds between them."""
    client = Client(served, tmp_path, patience=0.5)
    served.during = lambda seed: 500 if len(served.drawn_with) < 50 else 200
    with pytest.raises(ServerError, match=r"answers /v1/completions with 500.* Waited \d seconds \(follow_timeout\)"):
        client.draw()
    assert 2 <= len(served.drawn_with) <= 5


def test_a_request_that_fails_some_times_says_so_once(served, tmp_path):
    client = Client(served, tmp_path)
    served.during = lambda seed: 500 if len(served.drawn_with) < 4 else 200
    assert client.draw().ids == [0, 0]
    (line,) = client.said
    assert "answers /v1/completions with 500" in line and "Waiting" in line


@pytest.mark.parametrize("reason", ["abort", "error"])
def test_a_completion_that_is_broken_off_is_asked_for_again(reason, served, tmp_path):
    """A server that shuts down answers with a part of it. That is no rollout that was cut at the length limit."""
    client = Client(served, tmp_path)
    served.reasons = [reason, "length"]
    assert client.draw().ids == [0, 0] and len(served.drawn_with) == 2 and not served.reasons


@pytest.mark.parametrize("status", [408, 429])
def test_a_server_that_is_busy_is_waited_for(status, served, tmp_path):
    client = Client(served, tmp_path)
    served.during = lambda seed: status if len(served.drawn_with) < 2 else 200
    assert client.draw().ids == [0, 0]


def test_what_no_waiting_mends_is_said_at_once(served, tmp_path):
    client = Client(served, tmp_path, patience=1000.0)
    for told in ({"token_ids": None}, {"logprobs": None}):
        served.told = told
        with pytest.raises(ServerError, match=r"tells no tokens of its completions.*Use a server that does"):
            client.draw()
    served.models_status = 401
    with pytest.raises(ServerError, match="refuses /v1/models with 401"):
        client.draw()
    with pytest.raises(ValueError, match="must begin with http:// or https://, not 'localhost:8000'"):
        Server("localhost:8000", tmp_path, lambda: client.latest, 1.0, "base")


@pytest.mark.parametrize("looked", [False, True], ids=["between requests", "between a look at it and a request"])
def test_a_server_that_was_started_again_gets_its_weights_again(looked, served, tmp_path):
    """It answers every request. Only its connections show that it was restarted."""
    client = Client(served, tmp_path)
    assert client.draw().ids == [0, 0]
    if looked:
        served.restarts_after_look = True
    else:
        served.restart()
    assert client.draw().ids == [0, 0]
    assert served.loaded == ["step-0", "step-0"]
    assert served.drawn_with == ([0, BASE, 0] if looked else [0, 0])


def test_behind_a_proxy_every_request_is_looked_at(served, tmp_path, monkeypatch):
    """The connection to the proxy stays open when the server behind it is restarted."""
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", served.url)
    client = Client(served, tmp_path, url="http://policy.test")
    assert client.draw().ids == [0, 0]
    served.weights = BASE
    assert client.draw().ids == [0, 0]
    assert served.loaded == ["step-0", "step-0"]


def test_weights_are_not_loaded_under_a_request_that_has_yet_to_be_looked_at(served, tmp_path):
    """It began on a restarted server. If weights were loaded before it ends, the check after it would pass."""
    client, begun, reloaded = Client(served, tmp_path), threading.Event(), threading.Event()

    def during(seed: int) -> int:
        if seed == 1 and not begun.is_set():
            begun.set()
            reloaded.wait(SOON)
        return 200

    def on_load(name: str) -> int:
        reloaded.set()
        return 200

    with ThreadPoolExecutor(1) as thread:
        thread.submit(client.draw).result()
        served.during, served.on_load, served.restarts_after_look = during, on_load, True
        early = thread.submit(client.draw, 1)
        assert begun.wait(5)
        assert client.draw(2).ids == [0, 0]
        assert early.result().ids == [0, 0]
    assert served.loaded == ["step-0", "step-0"]


def test_a_connection_that_was_closed_costs_a_look_and_no_weights(served, tmp_path):
    client = Client(served, tmp_path)
    client.draw()
    client.draw()
    probes = served.probes
    served.drop()
    assert client.draw().ids == [0, 0]
    assert served.loaded == ["step-0"] and served.probes == probes + 1


def test_versions_that_no_request_is_under_are_forgotten(served, tmp_path):
    client = Client(served, tmp_path)
    for step in range(3):
        client.publish(step)
        assert client.draw().ids == [step, step]
    assert len(client.server._in_flight) == 0
