"""What rollouts beside training save: drawing and training at once, against drawing and training by turns.

    python benchmarks/asynchronous.py          # SmolLM2-135M with vLLM for CPUs (`make vllm`), on two cores: two hours
    python benchmarks/asynchronous.py --quick  # a tiny model and a server on the loopback, in minutes

G is what the server takes for a window where nothing holds its actor back, on one core, while the run trains on the
other. U is what the run takes to train on a window that is there and to publish the policy. Turn by turn a window takes
G + U. At once it takes max(G, U) at best, so the bound of the speed-up is (G + U) / max(G, U). A run beside its actor
is measured after its first windows, server on one core, trainer and actor on the other. The synchronous server mode, of
this library and of TRL's GRPO, may use both cores in each phase.

With slow rewards, each row's verdict takes half a second over HTTP, and with a slow environment each row's start does:
the run that draws for itself has its rows rewarded, or begun, one after the other, as TRL does.

Every finished measurement is kept in docs/benchmarks/asynchronous.json, and is not made again.
"""

import importlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import urlopen

from common import tasks, tiny
from common.launch import ROOT, SEARCHED, free_port
from common.loopback import Answering, Loopback
from common.measure import QUIET, quiet, set_up
from common.policy_server import PolicyServer
from common.report import Store, listed, parse, processor, table, versions, wrapped, write
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer
from trl.chat_template_utils import qwen3_chat_template

from tbrm_trl import TBRMConfig, TBRMTrainer

WARM_UP = 4  # windows at the start of a run that are not timed
SLOW = 0.5  # seconds of a slow verdict
MEASURED = ("alone", "beside", "by itself", "server mode", "GRPO")
# What is measured of each: tokens at most, which give two ratios of G to U, and windows after the warm-up.
COMPARED = {
    "short completions": (16, 12, MEASURED),
    "long completions": (64, 12, MEASURED),
    "slow rewards": (16, 6, MEASURED[:-1]),
    "slow environment": (16, 12, MEASURED[:-1]),
}
TIMES = {("slow environment", "beside"): 3}  # what is measured more than once


# ---- servers ---------------------------------------------------------------------------------------------------------


@contextmanager
def loopback(model: str, core: int | None) -> Iterator[str]:
    """A server with real weights in this process, for `--quick`."""
    server = PolicyServer(model)
    try:
        yield server.url
    finally:
        server.stop()


@contextmanager
def vllm(model: str, core: int | None) -> Iterator[str]:
    """vLLM for CPUs, on one core or on all."""
    port, log = free_port(), Path(tempfile.mkdtemp()) / "server.log"
    pinned = ["taskset", "-c", str(core)] if core is not None else []
    command = [
        *pinned, str(Path(sys.executable).parent / "vllm"), "serve", model, "--enable-lora", "--max-lora-rank", "16",
        "--max-loras", "4", "--max-model-len", "256", "--no-enable-chunked-prefill", "--port", str(port),
        "--weight-transfer-config", '{"backend": "nccl"}', "--logprobs-mode", "processed_logprobs",
    ]  # fmt: skip
    given = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True", "VLLM_SERVER_DEV_MODE": "1", "VLLM_CPU_KVCACHE_SPACE": "2",
             "VLLM_HOST_IP": "127.0.0.1"}  # fmt: skip
    patched = {"PYTHONPATH": f"{vllm_on_cpu().install(log.parent / 'plugin')}:{SEARCHED}:{ROOT / 'src'}"}
    with log.open("w") as output:
        process = subprocess.Popen(
            command, env={**os.environ, **given, **patched}, stdout=output, stderr=output, start_new_session=True
        )
    try:
        while not answers(port):
            if process.poll() is not None:
                raise RuntimeError(log.read_text()[-4000:])
            time.sleep(1)
        yield f"http://localhost:{port}"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def vllm_on_cpu() -> Any:
    """The tests' stand-in for NCCL, by which TRL sends full weights to a server on a CPU."""
    sys.path.append(str(ROOT / "tests"))
    return importlib.import_module("helpers.vllm_on_cpu")


def answers(port: int) -> bool:
    try:
        with urlopen(f"http://localhost:{port}/health", timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False


class Verdict(Answering):
    """The other side of a reward function, which takes its time for each row."""

    def do_GET(self) -> None:
        time.sleep(SLOW)
        self.answer(b"0.5")


# ---- runs ------------------------------------------------------------------------------------------------------------


class Clock(TrainerCallback):
    """When each update ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, args, state, control, **kwargs):
        self.ends.append(time.perf_counter())

    def seconds(self) -> float:
        """Of a window, after the warm-up."""
        return (self.ends[-1] - self.ends[WARM_UP - 1]) / (len(self.ends) - WARM_UP)


def rewarding(kind: str, url: str) -> dict[str, Any]:
    """Of a trainer: how many different tokens there are; or rewards, or an environment, that wait for this address."""

    def distinct(completion_ids, **kwargs):
        return [len(set(ids)) / len(ids) for ids in completion_ids]

    def judged(completion_ids, **kwargs):
        return [waited(url) for _ in completion_ids]

    class Slow:
        def reset(self, **kwargs: Any) -> None:
            waited(url)

    if kind == "slow rewards":
        return dict(reward_funcs=judged)
    return dict(reward_funcs=distinct, **(dict(environment_factory=Slow) if kind == "slow environment" else {}))


def waited(url: str) -> float:
    with urlopen(url) as answer:
        return float(answer.read())


@dataclass
class Work:
    """What a run trains on: `rows` prompts a window, completions of at most `tokens`, so many windows."""

    model: str
    tokens: int
    rows: int
    windows: int

    @property
    def data(self) -> Dataset:
        texts = [f"{i} and {j}:" for i in range(16) for j in range(16)]
        return Dataset.from_list([{"prompt": [{"role": "user", "content": text}]} for text in texts])


def train(work: Work, rewards: dict[str, Any], grpo: bool = False, **options: Any) -> tuple[Clock, Any]:
    """A run of one update a window, and when its updates ended."""
    clock = Clock()
    trainer_class: Any = GRPOTrainer if grpo else TBRMTrainer
    settings = {
        **QUIET, **dict(
            output_dir=tempfile.mkdtemp(), use_cpu=True, bf16=False, max_steps=work.windows, learning_rate=1e-5,
            max_completion_length=work.tokens, per_device_train_batch_size=work.rows,
            num_generations=2 if grpo else 1,
        ), **options,
    }  # fmt: skip
    args = (GRPOConfig if grpo else TBRMConfig)(**settings)
    adapter = LoraConfig(r=16, target_modules="all-linear")
    tokenizer = AutoTokenizer.from_pretrained(work.model)
    if "environment_factory" in rewards:  # TRL asks for a template that can render tools
        tokenizer.chat_template = qwen3_chat_template
    with quiet():
        trainer = trainer_class(
            model=work.model, args=args, train_dataset=work.data, processing_class=tokenizer, peft_config=adapter,
            callbacks=[clock], **rewards,
        )  # fmt: skip
        trainer.train()
    return clock, trainer


def alone(work: Work, url: str, rewards: dict[str, Any]) -> dict[str, float]:
    """G and U: an actor that never waits for a policy, then a run that finds all windows there."""
    records = Path(tempfile.mkdtemp()) / "records"
    train(work, rewards, rollouts="async", async_server=url, max_staleness=work.windows, follow_rollouts=str(records))
    written = sorted(file.stat().st_mtime for file in records.glob("*.parquet"))
    drawn = (written[-1] - written[WARM_UP - 1]) / (len(written) - WARM_UP)
    clock, _ = train(work, dict(reward_funcs=None), follow_rollouts=str(records), publish_policy=True)
    shutil.rmtree(records.parent)
    return {"G": drawn, "U": clock.seconds()}


def beside(work: Work, url: str, rewards: dict[str, Any]) -> dict[str, float]:
    clock, trainer = train(
        work, rewards, rollouts="async", async_server=url, max_staleness=2, logging_strategy="steps", logging_steps=1
    )
    log = [row for row in trainer.state.log_history if "rollouts/queue" in row]
    return {
        "seconds": clock.seconds(),
        "learner waits": statistics.mean(row["rollouts/learner_wait_time"] for row in log[WARM_UP:]),
        "actor waits": statistics.mean(row.get("rollouts/actor_wait_time", 0.0) for row in log[WARM_UP:]),
        "staleness": max(row["staleness/max"] for row in log),
    }


def measured(mode: str, work: Work, kind: str, url: str, quick: bool) -> Any:
    """One of `MEASURED`."""
    rewards, serve = rewarding(kind, url), loopback if quick else vllm
    if mode in ("alone", "beside"):
        set_up(1)
        with on_core(1), serve(work.model, 0) as server:
            return (alone if mode == "alone" else beside)(work, server, rewards)
    set_up(2)
    if mode == "by itself":
        return train(work, rewards)[0].seconds()
    vllm_on_cpu().in_trainer()
    with serve(work.model, None) as server:
        taking: dict[str, Any] = dict(use_vllm=True, vllm_mode="server", vllm_server_base_url=server)
        if mode == "GRPO":
            return train(work, rewards, grpo=True, beta=0.0, **taking)[0].seconds()
        return train(work, rewards, **taking)[0].seconds()


def in_a_process(**job: Any) -> Any:
    """`measured` in a process of its own: trainers leave memory and ports behind."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        subprocess.run([sys.executable, __file__, "--worker", json.dumps(job), str(result)], check=True)
        return json.loads(result.read_text())


def report(runs: dict[str, Any], environment: dict[str, Any]) -> str:
    rows = []
    for name, one in runs.items():
        (alone,), beside = one["alone"], one["beside"]
        g, u = alone["G"], alone["U"]
        at_once, waits = (statistics.median(run[key] for run in beside) for key in ("seconds", "learner waits"))
        staleness = max(run["staleness"] for run in beside)
        bound, reached = (g + u) / max(g, u), (g + u) / at_once
        others = [f"{one[mode][0]:.2f}" if mode in one else "–" for mode in ("by itself", "server mode", "GRPO")]
        rows.append([
            name, *(f"{value:.2f}" for value in (g, u, bound, at_once, reached, reached / bound, waits)),
            f"{staleness:.0f}", *others, one["processor"],
        ])  # fmt: skip
    header = [
        "", "G, s", "U, s", "bound", "at once, s", "speed-up", "of the bound", "learner waits, s", "staleness",
        "draws for itself, s", "TBRM, server mode, s", "GRPO, server mode, s", "processor",
    ]  # fmt: skip
    text = """Seconds of a window, over the windows after the first four: each measured once, the slow environment
        at once three times, of which the medians are shown. The bound is (G + U) / max(G, U), the speed-up
        (G + U) / at once. G is drawing with nothing that holds the actor back, U is training on windows that are there
        (in the slow environment's row also publishing the policy), on one core each. `at once` is the run beside its
        actor, which starts no row that could be more than two updates old. The last three take turns, with both cores
        in each phase: a run that draws with `generate`, and two whose rollouts vLLM draws. vLLM's build for CPUs takes
        longer for a model of this size than `generate` does, so none of this says which sampler to use; it says how
        much of drawing and training overlaps."""
    return f"""# Rollouts beside training

Written by `python benchmarks/asynchronous.py`. Raw numbers: [asynchronous.json](asynchronous.json).

{wrapped(text)}

{table(header, rows)}

{wrapped(listed(environment))}
"""


def main() -> None:
    arguments = parse(__doc__, quick="a tiny model and a server on the loopback")
    quick = arguments.quick
    environment = versions("torch", "transformers", "trl")
    store = Store(arguments.output / "asynchronous.json", **environment)
    model = tiny.save(Path(tempfile.mkdtemp()) / "tiny") if quick else tasks.smollm2()
    verdicts = Loopback(Verdict)
    for name, (tokens, windows, modes) in COMPARED.items():
        sizes = (8, 4, WARM_UP + 4) if quick else (tokens, 16, WARM_UP + windows)
        for mode in modes[:3] if quick else modes:
            while len(kept := store.get(name, {}).get(mode, [])) < TIMES.get((name, mode), 1):
                work = dict(zip(("model", "tokens", "rows", "windows"), (model, *sizes), strict=True))
                found = in_a_process(mode=mode, work=work, kind=name, url=verdicts.url, quick=quick)
                store[name] = {**store.get(name, {}), mode: [*kept, found], "processor": processor()}
                print(name, mode, found, file=sys.stderr)
    write(arguments.output, "asynchronous", report(store, environment))


@contextmanager
def on_core(core: int) -> Iterator[None]:
    """Inside, this process and those that it starts have one core, where there are several."""
    before = os.sched_getaffinity(0)
    if core in before:
        os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        job = json.loads(sys.argv[2])
        Path(sys.argv[3]).write_text(json.dumps(measured(**{**job, "work": Work(**job["work"])})))
    else:
        main()
