"""Rollouts by vLLM: the launch lines as they stand, and that vLLM samples from the policy in training.

Run where vLLM for CPUs is (`make vllm`); tests/vllm_on_cpu.py says what it needs there. Sleep mode, which the colocate
setup asks for, exists on GPUs alone.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import pytest
from common.launch import free_port, launcher_of
from common.tiny import save
from test_distributed import HOW
from test_examples import ROOT, SETUPS, run, run_line, updates
from test_recipes import command_of
from test_two_processes import TESTS
from vllm_on_cpu import install

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(find_spec("vllm") is None, reason="no vLLM here: `make vllm` has it"),
]

BFLOAT16 = 0.1  # of a token's log-probability, nats, on average: vLLM computes float32 checkpoints in it
AWAY = 1.0  # what the updates move it by, at least


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One model for all: a server and its trainers must name the same. Heads of 32, which its CPU kernels take."""
    folder = tmp_path_factory.mktemp("vllm")
    return save(folder / "model", hidden_size=128, intermediate_size=128, head_dim=32)


@pytest.fixture(scope="module")
def environment(model: str) -> dict[str, str]:
    paths = install(Path(model).parent / "plugin")
    return {"PYTHONPATH": f"{paths}:{ROOT / 'src'}:{ROOT / 'benchmarks'}",
            "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_CI_ENV": "1", "VLLM_HOST_IP": "127.0.0.1"}  # fmt: skip


@pytest.fixture(scope="module")
def server(model: str, environment: dict[str, str]) -> Iterator[int]:
    """The server of the setup's comment; its port."""
    text = re.search(r"in another shell:\n((?:# {5}.*\n)+)", (SETUPS / "vllm_server.yaml").read_text())[1]
    line = shlex.split(re.sub(r"^# *", "", text, flags=re.MULTILINE).replace("\\\n", " "))
    at = line.index("vllm")
    assert line[at : at + 2] == ["vllm", "serve"]
    line[at + 2] = model
    port = free_port()
    log = Path(model).parent / "server.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [str(Path(sys.executable).parent / "vllm"), *line[at + 1 :], "--max-model-len", "128", "--port", str(port)],
            env={**os.environ, **environment, **dict(word.split("=") for word in line[:at])},
            stdout=output,
            stderr=output,
            start_new_session=True,  # with its engine
        )
    try:
        deadline = time.monotonic() + 300
        while not answers(port):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-4000:]
            time.sleep(1)
        yield port
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def answers(port: int) -> bool:
    try:
        with urlopen(f"http://localhost:{port}/health", timeout=5) as response:
            return response.status == 200
    except (URLError, OSError):
        return False


def test_colocate_setup(model, environment, tmp_path):
    """Its own line, without sleep mode."""
    options = ["--model_name_or_path", model, "--vllm_max_model_length", "128", "--vllm_enable_sleep_mode", "false"]
    done = run_line(SETUPS / "vllm_colocate.yaml", tmp_path, *options, **environment)
    assert done.returncode == 0, done.stderr[-4000:]
    updates(tmp_path)


def through_the_plugin(line: list[str]) -> list[str]:
    at = line.index("examples/train.py")
    return [*line[:at], "tests/vllm_on_cpu.py", *line[at:]]


def trained(model: str, out: Path, environment: dict[str, str], file: str, **options: Any) -> dict[str, Any]:
    """What vllm_processes.py has seen under a launch file."""
    script = [str(TESTS / "vllm_on_cpu.py"), str(TESTS / "vllm_processes.py")]
    processes = 1 if file == "single" else 2
    done = run([sys.executable, "-m", *launcher_of(file, processes), *script, model, str(out), json.dumps(options)],
               **environment)  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((out / "seen.json").read_text())


def check(seen: dict[str, Any], file: str) -> None:
    print(file, seen)
    assert (seen["strategy"], seen["updates"]) == (HOW[file][0], 4)
    assert seen["trained"] < BFLOAT16 < AWAY < seen["before"], seen


@pytest.mark.parametrize("file", ["single", "ddp"])
def test_colocated_samples_are_of_the_trained_policy(file, model, environment, tmp_path):
    check(trained(model, tmp_path, environment, file, vllm_mode="colocate"), file)


def test_server_setup(model, server, environment, tmp_path, monkeypatch):
    """Its own line, against the server of its own line."""
    options = ["--model_name_or_path", model, "--vllm_server_port", str(server), "--vllm_group_port", str(free_port())]
    monkeypatch.setattr("test_examples.command_of", lambda file: through_the_plugin(command_of(file)))
    done = run_line(SETUPS / "vllm_server.yaml", tmp_path, *options, **environment)
    assert done.returncode == 0, done.stderr[-4000:]
    updates(tmp_path)


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("file", ["single", "fsdp2", "zero3"])
def test_served_samples_are_of_the_trained_policy(file, lora, model, server, environment, tmp_path):
    """The server takes merged adapters and gathered shards, and of one run after the other."""
    options: dict[str, Any] = {"lora": True, "learning_rate": 0.05} if lora else {}
    ports = dict(vllm_server_port=server, vllm_group_port=free_port())
    check(trained(model, tmp_path, environment, file, vllm_mode="server", **ports, **options), file)
