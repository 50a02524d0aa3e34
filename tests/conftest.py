"""Settings of every test, and fixtures that many tests use."""

import os

# Set before anything imports torch. Processes that a test starts inherit these variables.
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing in the tests may depend on a hub
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are tiny: more threads only get in each other's way

import tempfile

os.environ.setdefault("TRACKIO_DIR", tempfile.mkdtemp(prefix="trackio-"))  # read when TRL imports it

from importlib import import_module
from pathlib import Path

import pytest
from common.tiny import save


@pytest.fixture(scope="session")
def llama(tmp_path_factory) -> str:
    """The folder of a tiny model and its tokenizer."""
    return save(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="session")
def qwen2(tmp_path_factory) -> str:
    return save(tmp_path_factory.mktemp("qwen2"), "qwen2")


@pytest.fixture
def train_script():
    """The module of `tbrm train`."""
    return import_module("tbrm_trl.cli.train")


@pytest.fixture(scope="session")
def uninterrupted(qwen2, tmp_path_factory):
    """A function that gives the folder of an undisturbed run of `helpers.resume`, by its case."""
    from helpers.resume_processes import printed, train

    done: dict[str, Path] = {}

    def of(case: str) -> Path:
        if case not in done:
            folder = tmp_path_factory.mktemp("uninterrupted")
            assert not any(train(folder, case, qwen2)), printed(folder)
            done[case] = folder
        return done[case]

    return of
