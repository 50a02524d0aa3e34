"""Requests to an OpenAI-compatible server, each under a named version of the policy."""

import heapq
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests
from requests.adapters import HTTPAdapter

from ..model.publisher import Version

TRIES = 3  # of a request that is late
SHORTEST_PAUSE, LONGEST_PAUSE = 0.1, 15.0  # seconds between two tries of what is lost; each is twice the one before
SAID_EVERY = 60.0  # seconds
DISTANCE = 0.2  # of the probe's tokens, nats, on average: more than bfloat16 makes of float32
_ENDS = (None, "stop", "length")  # reasons for which a completion is whole
_LATER = (408, 429)  # answers of a server that may do it another time
TOLD = 5  # likeliest tokens that the server is asked for
_UNFILTERED = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}


class ServerError(RuntimeError):
    """What no waiting mends; says what to change."""


class _Lost(Exception):
    """The server does not answer, or does not serve what it should. It may come back."""


@dataclass
class Drawn:
    """A completion.

    Attributes:
        ids: its tokens, with the one that ended it.
        log_probs: what the server says of each.
        version: the policy that drew all of them.
    """

    ids: list[int]
    log_probs: list[float]
    version: Version


class Places:
    """A number of places, for which earlier rows go before later ones."""

    def __init__(self, count: int):
        self._free = count
        self._waiting: list[int] = []
        self._changed = threading.Condition()

    @contextmanager
    def held(self, row: int) -> Iterator[None]:
        with self._changed:
            heapq.heappush(self._waiting, row)
            self._changed.wait_for(lambda: self._free and self._waiting[0] == row)
            heapq.heappop(self._waiting)
            self._free -= 1
            self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._free += 1
                self._changed.notify_all()


class Server:
    """A server that has the policy's versions loaded under their names while requests need them.

    An adapter is loaded by its name, so requests in flight end under the version that they began with. Whole weights
    replace one another: they are loaded when no request is in flight.

    Args:
        url: its address.
        folder: of the versions, by a path that the server can read too.
        latest: gives the version that requests are to be made under.
        patience: seconds to wait for a server that is down or fails a request, and at most to draw a completion, all
            tries together.
        base: what the server should be started on, for errors.
        say: prints a line.
    """

    def __init__(
        self,
        url: str,
        folder: Path,
        latest: Callable[[], Version],
        patience: float,
        base: str,
        say: Callable[[str], None] = print,
    ):
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"The address of the server must begin with http:// or https://, not {url!r}.")
        self.url, self.folder, self.latest, self.patience, self.base = url.rstrip("/"), folder, latest, patience, base
        self.say = say
        self._local = threading.local()
        self._changed = threading.Condition()
        self._loading = threading.Lock()
        self._in_flight: Counter[str] = Counter()  # requests by version
        self._loaded: set[str] = set()  # names of versions that the server has, as far as is known
        self._waiting = threading.Lock()  # held by who waits for a server that is down
        self._quiet_until = 0.0  # when it may be said again what is waited for

    def draw(self, prompt_ids: Sequence[int], sampling: Mapping[str, Any]) -> Drawn:
        """A completion of a prompt under the latest version. A request that fails is made again, under the latest then.

        Raises:
            ServerError: for what the server refuses, and if it is down, late or failing for longer than `patience`
                allows.
        """
        late, lost_at, pause = 0, 0.0, SHORTEST_PAUSE
        while True:
            version = self.latest()
            try:
                with self._using(version) as name:
                    asked = {"model": name, "prompt": list(prompt_ids), "n": 1, "logprobs": 0, "return_token_ids": True}
                    said = self._post("/v1/completions", {**asked, **sampling}, self.patience / TRIES)
                    self._check_connection(version)
                (choice,) = said["choices"]
                return Drawn(*self._completion(choice), version)
            except requests.Timeout as error:
                late += 1
                if late == TRIES:
                    raise ServerError(
                        f"{self.url} did not end a completion of at most {sampling.get('max_tokens')} tokens within "
                        f"{self.patience / TRIES:.0f} seconds, {TRIES} times. Raise follow_timeout, lower "
                        "--concurrency, or look at the server."
                    ) from error
                self.say(f"{self.url} is late with a completion ({late} of {TRIES}); asked again.")
            except _Lost as lost:
                if lost_at:  # it is not enough that the server looks well
                    pause = self._pause(str(lost), lost_at, pause)
                lost_at = lost_at or time.monotonic()
                self._wait(str(lost), lost_at)

    def _completion(self, choice: Mapping[str, Any]) -> tuple[list[int], list[float]]:
        """The tokens of a completion, and what the server says of each.

        Raises:
            ServerError: if it does not give them.
            _Lost: if it has ended the completion before the policy did, as a server does that is shut down.
        """
        ids, log_probs = choice.get("token_ids"), (choice.get("logprobs") or {}).get("token_logprobs")
        if ids is None or log_probs is None:
            raise ServerError(
                f"{self.url} tells no tokens of its completions (`return_token_ids`, `logprobs`), and a rollout is "
                "made of them. Use a server that does, such as vLLM."
            )
        if not ids or choice.get("finish_reason") not in _ENDS:
            raise _Lost(f"{self.url} broke a completion off ({choice.get('finish_reason')})")
        return ids, log_probs

    @contextmanager
    def _using(self, version: Version) -> Iterator[str]:
        """Inside, the server has this version; gives the name to ask for."""
        with self._changed:
            if not version.adapter:  # who finds other weights waits until it is alone, and loads these
                self._changed.wait_for(lambda: version.name in self._loaded or not self._in_flight)
                self._loaded = self._loaded & {version.name}
            is_loaded = version.name in self._loaded
            self._in_flight[version.name] += 1
        try:
            if not is_loaded:
                self._load(version)
            name = version.name if version.adapter else self._base_name()
            self._check_connection(version)
            yield name
        except _Missing:
            self._forget({version.name})
            self.say(f"{self.url} has no version {version.name} any more; it is loaded again.")
            raise _Lost(f"{self.url} has no version {version.name} any more") from None
        finally:
            with self._changed:
                self._in_flight -= Counter([version.name])  # this drops a key that comes to 0
                self._changed.notify_all()
            self._unload()

    def _forget(self, names: set[str]) -> None:
        """Have these loaded again before the next request for them. Others may be reading the set: it is replaced."""
        with self._changed:
            self._loaded = self._loaded - names

    def _load(self, version: Version) -> None:
        with self._loading:
            if version.name in self._loaded:
                return
            self._have_loaded(version)
            self._check(version)
            with self._changed:
                self._loaded = self._loaded | {version.name}
                self._changed.notify_all()

    def _have_loaded(self, version: Version) -> None:
        path = str((self.folder / version.name).absolute())
        if version.adapter:
            what, requests = "adapters", {"/v1/load_lora_adapter": {"lora_name": version.name, "lora_path": path}}
            how = (
                f"VLLM_ALLOW_RUNTIME_LORA_UPDATING=True in its environment: vllm serve {self.base} --enable-lora "
                "--max-loras 4 --max-lora-rank RANK"
            )
        else:
            weights: dict[str, Any] = {"method": "reload_weights", "kwargs": {"weights_path": path}}
            what, requests = "weights", {"/collective_rpc": weights, "/reset_prefix_cache": {}}
            how = f"VLLM_SERVER_DEV_MODE=1 in its environment: vllm serve {self.base}"
        try:
            for path, asked in requests.items():
                self._post(path, asked, self.patience)
        except (_Missing, ServerError) as error:
            if "already been loaded" in str(error):
                return  # a name means one set of bits
            if not (self.folder / version.name).is_dir():
                raise _Lost(f"version {version.name} has gone from {self.folder}") from None
            if isinstance(error, _Missing):
                raise ServerError(f"{self.url} does not load {what} ({error}). Start it with {how}") from None
            raise

    def _check(self, version: Version) -> None:
        """Compare what the server says of a short text with what the policy says of it.

        Raises:
            _Lost: if it serves another policy.
        """
        if not version.likeliest:
            return
        # vLLM mixes up what it says of a prompt (`prompt_logprobs`) and the adapters of other requests in its batch. So
        # it is asked for one more token after each of several beginnings, and says which it finds likeliest.
        asked = {
            "model": version.name if version.adapter else self._base_name(),
            "prompt": [list(version.probe_ids[:place]) for place in version.likeliest],
            "max_tokens": 1,
            "logprobs": TOLD,
            "return_tokens_as_token_ids": True,
            **_UNFILTERED,
        }
        choices = self._post("/v1/completions", asked, self.patience)["choices"]
        choices.sort(key=lambda choice: choice["index"])
        differences: list[float] = []
        for choice, own in zip(choices, version.likeliest.values(), strict=True):
            if not (said := (choice.get("logprobs") or {}).get("top_logprobs")):
                return  # not every server tells
            theirs = {int(token.removeprefix("token_id:")): value for token, value in said[0].items()}
            for token in sorted(theirs, key=theirs.__getitem__)[-TOLD:]:  # without one that was drawn, and is unlikely
                differences.append(abs(theirs[token] - own.get(token, min(own.values()))))
        distance = sum(differences) / len(differences)
        if not distance <= DISTANCE:
            raise _Lost(
                f"{self.url} serves another policy than {version.name}: what it says of the likeliest next tokens of "
                f"{len(choices)} short texts is {distance:.2g} nats away on average. Its model is "
                f"{self._base_name()}; start it on {self.base}"
            )

    def _check_connection(self, version: Version) -> None:
        """Look at what the server serves if this thread has a new connection to it: it may have been started again.
        It would then refuse an adapter, which it has lost, so only whole weights need this.

        It is done before and after a request. No one loads weights meanwhile, so what the server has afterwards is what
        it drew with.

        Raises:
            _Lost: if it serves another policy.
        """
        if version.adapter or self._local.checked == self._local.connections.made:
            return
        try:
            self._check(version)
        except _Lost:
            self._forget({version.name})
            raise
        self._local.checked = self._local.connections.made

    def _unload(self) -> None:
        """Free the places of adapters that no request needs any more."""
        latest = self.latest()
        with self._changed:
            idle = [name for name in self._loaded if name != latest.name and not self._in_flight[name]]
            self._forget(set(idle))
        for name in idle if latest.adapter else ():
            # It may have gone with the server already.
            with suppress(_Missing, _Lost, ServerError, requests.Timeout):
                self._post("/v1/unload_lora_adapter", {"lora_name": name}, LONGEST_PAUSE)

    def _base_name(self) -> str:
        try:
            return self._ask("GET", "/v1/models", LONGEST_PAUSE)["data"][0]["id"]
        except (requests.Timeout, _Missing, LookupError, TypeError) as error:
            raise _Lost(f"{self.url} does not say what it serves ({type(error).__name__})") from error

    def _wait(self, why: str, lost_at: float) -> None:
        """Wait until the server answers and serves what it should. One thread looks, the others wait for it.

        Raises:
            ServerError: if `patience` has passed since the request was lost, and it does not yet.
        """
        was_down, pause = False, SHORTEST_PAUSE
        with self._waiting:
            while True:
                try:
                    self._base_name()
                    with self._using(self.latest()):
                        break
                except (_Lost, requests.Timeout) as lost:
                    why, was_down = str(lost) or why, True
                    self._forget(self._loaded)
                pause = self._pause(why, lost_at, pause)
            if was_down:
                self.say(f"{self.url} is back after {time.monotonic() - lost_at:.0f} seconds.")
                self._quiet_until = 0.0

    def _pause(self, why: str, lost_at: float, pause: float) -> float:
        """Pause before another try, and say why, once a minute for all threads together. Gives the next pause.

        Raises:
            ServerError: if `patience` has passed since the request was lost.
        """
        now = time.monotonic()
        waited = now - lost_at
        if waited > self.patience:
            raise ServerError(f"{why}. Waited {waited:.0f} seconds (follow_timeout).")
        with self._changed:
            if now >= self._quiet_until:
                self.say(f"{why}. Waiting, for {self.patience - waited:.0f} more seconds at most.")
                self._quiet_until = now + SAID_EVERY
        time.sleep(pause)
        return min(2 * pause, LONGEST_PAUSE)

    @property
    def _session(self) -> requests.Session:
        """This thread's."""
        if not hasattr(self._local, "session"):
            self._local.session, self._local.connections, self._local.checked = requests.Session(), _Connections(), 0
            for scheme in ("http://", "https://"):
                self._local.session.mount(scheme, self._local.connections)
        return self._local.session

    def _post(self, path: str, body: Mapping[str, Any], limit: float) -> Any:
        return self._ask("POST", path, limit, body)

    def _ask(self, method: str, path: str, limit: float, body: Mapping[str, Any] | None = None) -> Any:
        try:
            answer = self._session.request(method, self.url + path, json=body, timeout=(LONGEST_PAUSE, limit))
        except requests.ReadTimeout:
            raise
        except requests.RequestException as error:
            raise _Lost(f"{self.url} does not answer ({type(error).__name__})") from error
        if answer.status_code == 404:
            raise _Missing(answer.text[:200])
        if answer.status_code >= 500 or answer.status_code in _LATER:
            raise _Lost(f"{self.url} answers {path} with {answer.status_code}: {answer.text[:300]}")
        if not answer.ok:
            raise ServerError(f"{self.url} refuses {path} with {answer.status_code}: {answer.text[:500]}")
        try:
            return answer.json()
        except ValueError:
            return answer.text  # of loading and unloading, a sentence


class _Connections(HTTPAdapter):
    """Counts the connections that it makes: also again, of one that was closed, which urllib3 does not count."""

    made = 0

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, **kwargs)
        pools = self.poolmanager.pool_classes_by_scheme
        self.poolmanager.pool_classes_by_scheme = {scheme: self._counted(pool) for scheme, pool in pools.items()}

    def _counted(self, pool: Any) -> Any:
        adapter = self
        connection: Any = pool.ConnectionCls

        class Counted(connection):
            def connect(self) -> None:
                super().connect()
                adapter.made += 1

        return type(pool.__name__, (pool,), {"ConnectionCls": Counted})


class _Missing(Exception):
    """The server knows no such version, or has no such path."""
