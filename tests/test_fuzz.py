"""Random input of every kind is accepted, or refused in one clear sentence. No other error escapes."""

import json
import random
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
import yaml
from common.tiny import save
from datasets import Dataset
from helpers.examples import RECIPES
from helpers.runs import build
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tbrm_trl import TBRMConfig, load_rollouts
from tbrm_trl.checks.data import check_training_set
from tbrm_trl.cli.parsing import Refused
from tbrm_trl.options import TBRMOptions
from tbrm_trl.resume.checkpoint import checkpoint_to_resume, complete_checkpoints, damage, mark_complete, read_mark
from tbrm_trl.resume.folder_lock import NAME, FolderLock
from tbrm_trl.sources.store import TrajectoryStore
from tbrm_trl.trajectory import End, Trajectory

FEW = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
numbers = st.one_of(st.none(), st.floats(), st.integers(-5, 5), st.booleans(), st.just(1e300))
texts = st.text(max_size=6)
ids = st.one_of(st.none(), st.lists(st.integers(-2, 300), max_size=5))
messages = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "tool", ""]), "content": texts}), max_size=3
)
COLUMNS: dict[str, st.SearchStrategy] = {
    "prompt": st.one_of(st.none(), texts),
    "completion": st.one_of(st.none(), texts),
    "prompt_ids": ids,
    "completion_ids": ids,
    "loss_mask": st.one_of(st.none(), st.lists(st.integers(0, 2), max_size=5)),
    "reward": st.one_of(st.none(), st.floats()),
    "end": st.sampled_from([None, "eos", "length", "tool_limit", "stop"]),
    "ref_log_probs": st.one_of(st.none(), st.lists(st.floats(), max_size=5)),
    "ref_soft_value": st.one_of(st.none(), st.floats()),
    "ref_key": st.sampled_from([None, "previous/1", "x"]),
    "answer": numbers,
}


@st.composite
def tables(draw) -> list[dict[str, Any]]:
    names = draw(st.sets(st.sampled_from(list(COLUMNS)), min_size=1))
    columns = {name: COLUMNS[name] for name in names}
    if draw(st.booleans()):
        columns |= {name: st.one_of(st.none(), messages) for name in names & {"prompt", "completion"}}
    return draw(st.lists(st.fixed_dictionaries(columns), min_size=1, max_size=4))


@FEW
@given(tables(), st.booleans(), st.booleans())
def test_rows_of_a_training_set(rows, rewarded, previous):
    """Every refusal is a ValueError that names the place in the set."""
    try:
        dataset = Dataset.from_list(rows)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError, TypeError, ValueError):
        return  # datasets takes no such rows
    args = TBRMConfig("unused", use_cpu=True, bf16=False, per_device_train_batch_size=1,
                      reference="previous" if previous else "initial")  # fmt: skip
    try:
        check_training_set(dataset, args, args.window_group_size, rewarded, evaluated=False)
    except ValueError as error:
        said = str(error)
        words = ("training set", "row", "column", "prompt", "rolled out", "logged", "generation batch")
        assert len(said) > 30 and any(word in said for word in words), said


stored = st.builds(
    lambda prompt, completion, seed, step: Trajectory(
        prompt_ids=torch.tensor(prompt),
        completion_ids=torch.tensor(completion),
        loss_mask=torch.tensor(random.Random(seed).choices([True, False], k=len(completion))),
        reward=float(seed),
        end=list(End)[seed % 3],
        policy_step=step,
    ),
    st.lists(st.integers(0, 9), min_size=1, max_size=4),
    st.lists(st.integers(0, 9), min_size=1, max_size=40),
    st.integers(0, 9),
    st.integers(0, 3),
)


@FEW
@given(st.lists(st.one_of(stored, st.sampled_from(["popleft", "restore"]), st.integers(0, 30)), max_size=40),
       st.integers(1, 8))  # fmt: skip
def test_a_store_is_a_list_that_forgets(operations, capacity):
    """After appending, dropping the oldest, removing anywhere, saving and restoring, it equals a plain list."""
    store, plain = TrajectoryStore(capacity), []
    for one in operations:
        if isinstance(one, Trajectory):
            store.append(one)
            plain = [*plain, one][-capacity:]
        elif one == "popleft" and plain:
            assert store.popleft() == store.first - 1
            plain = plain[1:]
        elif one == "restore":
            state, arrays = store.state()
            store = TrajectoryStore(capacity)
            store.restore(json.loads(json.dumps(state)), arrays)
        elif isinstance(one, int) and plain:
            place = one % len(plain)
            store.remove({store.first + place})
            plain = plain[:place] + plain[place + 1 :]
        assert len(store) == len(plain)
        for kept, given_one in zip(store, plain, strict=True):
            assert torch.equal(kept.prompt_ids, given_one.prompt_ids) and kept.reward == given_one.reward
            assert torch.equal(kept.completion_ids, given_one.completion_ids) and kept.end is given_one.end
            assert torch.equal(kept.loss_mask, given_one.loss_mask)
        for place, one_of_them in enumerate(plain):
            same = [
                i
                for i, other in enumerate(plain)
                if other.policy_step == one_of_them.policy_step
                and torch.equal(other.prompt_ids, one_of_them.prompt_ids)
                and torch.equal(other.completion_ids, one_of_them.completion_ids)
            ]
            assert store.find(one_of_them) == [store.first + i for i in same] and place in same


@pytest.fixture(scope="module")
def rollouts(tmp_path_factory) -> Path:
    """A file of saved rollouts."""
    folder = tmp_path_factory.mktemp("saved")
    trainer = build(save(folder / "model"), folder, save_rollouts=True, max_steps=1)
    trainer.train()
    (file,) = (folder / "out" / "rollouts").glob("*.parquet")
    return file


def damaged(data: st.DataObject, good: bytes, last: int) -> bytes:
    """Bytes with one changed bit, a hole or an end somewhere up to `last`."""
    at = data.draw(st.integers(0, last))
    kind = data.draw(st.sampled_from(["flip", "cut", "hole"]))
    return {
        "flip": good[:at] + bytes([good[at] ^ 1 << data.draw(st.integers(0, 7))]) + good[at + 1 :],
        "cut": good[:at],
        "hole": good[:at] + bytes(len(good[at : at + 50])) + good[at + 50 :],
    }[kind]


@settings(FEW, max_examples=60)
@given(st.data())
def test_damaged_rollouts(rollouts, data):
    """Any changed bit or hole among the pages, and any cut, gives an error with the file's name, or changes no row.

    The footer has no checksum of its own.
    """
    good = rollouts.read_bytes()
    footer = int.from_bytes(good[-8:-4], "little") + 8  # bytes
    content = damaged(data, good, len(good) - footer - 51)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / rollouts.name
        file.write_bytes(content)
        try:
            rows = load_rollouts(folder).to_list()
        except ValueError as error:
            assert str(file) in str(error) or "later version" in str(error)
            return
    assert rows == load_rollouts(rollouts.parent).to_list()


values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), texts, st.sampled_from([10**400, -1, 0, "1e-6"])),
    lambda inner: st.one_of(st.lists(inner, max_size=2), st.dictionaries(texts, inner, max_size=2)),
    max_leaves=3,
)


@settings(FEW, max_examples=60)
@given(st.sampled_from(sorted(TBRMOptions.__annotations__)), values)
def test_a_recipe_with_any_value_of_an_option(train_script, name, value):
    """It is accepted, or refused with the option's name, before anything is loaded. No list or table is accepted."""
    recipe = yaml.safe_load((RECIPES / "tbrm.yaml").read_text()) | {name: value}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "recipe.yaml"
        file.write_text(yaml.safe_dump(recipe))
        try:
            _, config, _ = train_script.parse(["--config", str(file), "--use_cpu", "true", "--bf16", "false"])
        except Refused as refused:
            assert name in str(refused)
        else:
            assert not isinstance(getattr(config, name), list | dict)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A small folder with a mark."""
    folder = tmp_path_factory.mktemp("marked") / "checkpoint-4"
    (folder / "tbrm/process-0").mkdir(parents=True)
    (folder / "tbrm/process-0/state.json").write_text(json.dumps({"state": {"loss": 0.5}, "lists": {"window": [0]}}))
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": 4}))
    mark_complete(folder, {"identity": {"processes": 1}, "settings": {"beta": 0.1}, "step": 4})
    assert damage(folder) is None
    return folder


@FEW
@given(st.sampled_from(["tbrm/complete.json", "tbrm/process-0/state.json", "trainer_state.json"]), st.data())
def test_a_damaged_file_of_a_checkpoint(checkpoint, name, data):
    """It is reported as damaged, by its name, and no run resumes from it; or it reads as before."""
    said, file = read_mark(checkpoint), checkpoint / name
    good = file.read_bytes()
    anything = values.map(lambda value: json.dumps(value).encode())
    content = data.draw(anything) if data.draw(st.booleans()) else damaged(data, good, len(good) - 1)
    try:
        file.write_bytes(content)
        problem = damage(checkpoint)
        if problem is None:
            assert content == good or (name == "tbrm/complete.json" and read_mark(checkpoint) == said)
            return
        assert problem.startswith(f"file {name} of checkpoint-4 is damaged (") or "a later version" in problem
        assert checkpoint in complete_checkpoints(checkpoint.parent)
        with pytest.raises(ValueError, match=r"heckpoint-4 (is damaged|was written by a later version)"):
            checkpoint_to_resume(str(checkpoint), str(checkpoint.parent), said["identity"])
        assert checkpoint_to_resume("auto", str(checkpoint.parent), said["identity"])[0] is None
    finally:
        file.write_bytes(good)


@FEW
@given(st.one_of(values.map(lambda value: json.dumps(value).encode()), st.binary(max_size=9), st.just(b"[" * 10**5)))
def test_a_damaged_lock(content):
    """Whatever is in the file of a held lock, a second run is told that the folder is taken."""
    with tempfile.TemporaryDirectory() as folder:
        lock = FolderLock(folder)
        lock.acquire()
        (Path(folder) / NAME).write_bytes(content)
        with pytest.raises(RuntimeError, match=r"belongs to a run that is under way: (its process holds|process )"):
            FolderLock(folder).acquire()
        lock.release()
