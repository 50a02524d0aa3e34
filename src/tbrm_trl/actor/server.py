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
from requests.utils import select_proxy

from ..model.publisher import Version

TRIES = 3  # how often a request that times out is made
SHORTEST_PAUSE, LONGEST_PAUSE = 0.1, 15.0  # seconds between two tries while the server is lost; each pause doubles
SAID_EVERY = 60.0  # seconds between two lines about the same wait
DISTANCE = 0.2  # nats, the largest mean difference over the probe's tokens; rounding to bfloat16 causes less
_ENDS = (None, "stop", "length")  # finish reasons of a whole completion
_LATER = (408, 429)  # status codes of a server that may accept the request later
TOLD = 5  # number of likeliest tokens the server is asked for
_UNFILTERED = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}


class ServerError(RuntimeError):
    """An error that waiting does not mend; its message says what to change."""


class _Lost(Exception):
    """The server does not answer, or does not serve what it should. It may come back."""


class _Superseded(Exception):
    """While a request waited for its version to be loaded, a later one was published."""


@dataclass
class Drawn:
    """A completion.

    Attributes:
        ids: its tokens, with the one that ended it.
        log_probs: the server's log-probability of each token.
        version: the policy that drew all of them.
    """

    ids: list[int]
    log_probs: list[float]
    version: Version


class Places:
    """A fixed number of places at the server. Earlier rows get a free place before later ones."""

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
    """Draws from a server, and keeps the policy's versions loaded there under their names while requests need them.

    An adapter is loaded under its own name, so requests in flight finish under the version they began with. Whole
    weights replace one another, so they are loaded only when no request is in flight.

    Args:
        url: the server's address.
        folder: holds the versions; the server must be able to read the same path.
        latest: returns the version under which to make requests.
        patience: most seconds to wait for a server that is down or fails a request, and most seconds for a completion
            over all its tries.
        base: the model on which the server should be started, for errors.
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
        self._loaded: set[str] = set()  # names of versions that the server has, as far as this process knows
        self._waiting = threading.Lock()  # held by the one thread that checks whether a lost server is back
        self._quiet_until = 0.0  # when the next line about waiting may be printed

    def draw(self, prompt_ids: Sequence[int], sampling: Mapping[str, Any]) -> Drawn:
        """Draw a completion of a prompt under the latest version.

        A failed request is repeated, under the version that is the latest by then.

        Raises:
            ServerError: if the server refuses the request, or is down, late or failing for longer than `patience`.
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
            except _Superseded:
                continue
            except _Lost as lost:
                if lost_at:  # the request was lost again though the server seemed back
                    pause = self._pause(str(lost), lost_at, pause)
                lost_at = lost_at or time.monotonic()
                self._wait(str(lost), lost_at)

    def _completion(self, choice: Mapping[str, Any]) -> tuple[list[int], list[float]]:
        """The tokens of a completion, and the server's log-probability of each.

        Raises:
            ServerError: if the server does not return them.
            _Lost: if the server broke the completion off, as it does when it is shut down.
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
        """A context in which the server has this version loaded; yields the model name for requests."""
        with self._changed:
            if not version.adapter:  # to replace other weights, wait until no request is in flight

                def is_old() -> bool:
                    return version.name not in self._loaded and self.latest().name != version.name

                self._changed.wait_for(lambda: version.name in self._loaded or not self._in_flight or is_old())
                if is_old():
                    raise _Superseded
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
                self._in_flight -= Counter([version.name])  # `-=` drops a version whose count falls to 0
                self._changed.notify_all()
            self._unload()

    def _forget(self, names: set[str]) -> None:
        """Mark versions as not loaded, so that the next request for them loads them again.

        The set is replaced, not changed, since other threads may be reading it.
        """
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
                return  # the right weights: a name stands for one set of weights only
            if not (self.folder / version.name).is_dir():
                raise _Lost(f"version {version.name} has gone from {self.folder}") from None
            if isinstance(error, _Missing):
                raise ServerError(f"{self.url} does not load {what} ({error}). Start it with {how}") from None
            raise

    def _check(self, version: Version) -> None:
        """Compare the log-probabilities of the likeliest next tokens after prefixes of the probe with the policy's own.

        Raises:
            _Lost: if the server serves another policy.
        """
        if not version.likeliest:
            return
        # vLLM mixes up `prompt_logprobs` with the adapters of other requests in its batch. So the server is asked for
        # one more token after each of several prefixes, with its likeliest tokens there.
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
                return  # not every server returns them
            theirs = {int(token.removeprefix("token_id:")): value for token, value in said[0].items()}
            for token in sorted(theirs, key=theirs.__getitem__)[-TOLD:]:  # leaves out a drawn token that is unlikely
                differences.append(abs(theirs[token] - own.get(token, min(own.values()))))
        distance = sum(differences) / len(differences)
        if not distance <= DISTANCE:
            raise _Lost(
                f"{self.url} serves another policy than {version.name}: what it says of the likeliest next tokens of "
                f"{len(choices)} short texts is {distance:.2g} nats away on average. Its model is "
                f"{self._base_name()}; start it on {self.base}"
            )

    def _check_connection(self, version: Version) -> None:
        """Check what the server serves if this thread has a new connection, since the server may have restarted.

        Only whole weights need this: a restarted server has lost its adapters and refuses requests for them. The check
        runs before and after a request. No thread loads weights in between, so the weights that the server has
        afterwards are those it drew with.

        Raises:
            _Lost: if the server serves another policy.
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
        """Unload the adapters that no request needs any more."""
        latest = self.latest()
        with self._changed:
            idle = [name for name in self._loaded if name != latest.name and not self._in_flight[name]]
            self._forget(set(idle))
        for name in idle if latest.adapter else ():
            # Failures do not matter: a restarted server has lost the adapter already.
            with suppress(_Missing, _Lost, ServerError, requests.Timeout):
                self._post("/v1/unload_lora_adapter", {"lora_name": name}, LONGEST_PAUSE)

    def _base_name(self) -> str:
        try:
            return self._ask("GET", "/v1/models", LONGEST_PAUSE)["data"][0]["id"]
        except (requests.Timeout, _Missing, LookupError, TypeError) as error:
            raise _Lost(f"{self.url} does not say what it serves ({type(error).__name__})") from error

    def _wait(self, why: str, lost_at: float) -> None:
        """Wait until the server answers and serves the latest version. One thread checks, the others wait for it.

        Raises:
            ServerError: if it does not within `patience` of the lost request.
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
        """Pause before another try, and return the next pause.

        The reason is printed at most once every `SAID_EVERY` seconds over all threads.

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
        """This thread's session."""
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
            return answer.text  # loading and unloading are answered with a sentence, not JSON


class _Connections(HTTPAdapter):
    """Counts the connections it makes, reconnections of a closed one included, which urllib3 does not count."""

    made = 0

    def send(self, request: Any, *args: Any, **options: Any) -> Any:
        if select_proxy(request.url, options.get("proxies")):
            self.made += 1  # a connection to a proxy outlives the server's restart
        return super().send(request, *args, **options)

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
    """The server has no such version or no such path."""
