"""Readers for other libraries' rollouts. Each returns a data set of logged rows to pass as `train_dataset`."""

import json
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset

from .logged import OWN_COLUMNS
from .saved_rollouts import column_of

Paths = str | Path | Iterable[str | Path]

VERIFIERS_TRACE_VERSION = 1


def read_verl_dump(paths: Paths, prompt: Callable[[dict[str, Any]], Any] | None = None) -> Dataset:
    """Read the rollouts that verl writes where `trainer.rollout_data_dir` is set, as logged rows.

    Each line of its files has `input`, `output` and `score`, which become `prompt`, `completion` and `reward`. All
    other entries (`gts`, `step`, what the reward function added) are kept as columns. An entry with the name of a
    logged row's own column is kept as `verl/<name>`.

    verl decodes both texts without special tokens. So `input` is what the policy read only if no chat template wrote
    the prompt. For a conversation pass `prompt`. Without it the policy is trained after a prompt that it never read.
    With several turns, `output` also holds the tools' text, which cannot be told from the policy's: do not read such
    dumps. A line does not say whether its completion was cut at the length limit. It counts as ended.

    Args:
        paths: files, or folders with files `<step>.jsonl`.
        prompt: returns an entry's prompt, text or messages. None takes `input`.

    Raises:
        FileNotFoundError: if there are no files.
        ValueError: for a line without `input`, `output` or `score`.

    Example:

    ```python
    rows = read_verl_dump("rollouts", prompt=lambda entry: [{"role": "user", "content": question(entry["input"])}])
    ```
    """
    rows = []
    for file, number, entry in _lines(paths, "*.jsonl", "trainer.rollout_data_dir"):
        if missing := [name for name in ("input", "output", "score") if name not in entry]:
            raise ValueError(f"{file}, line {number}: no {', '.join(missing)}. verl's dumps have all three.")
        others = {
            f"verl/{name}" if name in OWN_COLUMNS or name == "prompt" else name: value
            for name, value in entry.items()
            if name not in ("input", "output", "score")
        }
        made = entry["input"] if prompt is None else prompt(entry)
        rows.append({"prompt": made, "completion": entry["output"], "reward": entry["score"], **others})
    return _dataset(rows)


def read_verifiers_traces(paths: Paths) -> Dataset:
    """Read the traces of verifiers (`traces.jsonl`, as its evaluations and prime-rl write them) as logged rows.

    Each trace becomes a row. `prompt` holds the messages before the policy's first message, `completion` those from
    there to the policy's last. If the trace has the policy's tokens (the renderer client records them), `prompt_ids`,
    `completion_ids` and `loss_mask` are what the policy read and chose. Otherwise the trainer's chat template tokenizes
    the messages. It must be the policy's and get the same `tools`. `reward` is the weighted sum of the trace's rewards,
    None if it has none. `end` is "length" if the last model call was cut, "tool_limit" if it called a tool that was not
    run, None if there are ids and nothing says how the call ended: the last id then decides. `task` holds the task's
    data. `trace` and `agent` say where the row comes from.

    Some traces are left out, with one warning that counts them: those that failed, those of agents that are not trained
    (judges, users), those with images, those without a message of the policy, and those with several branches. A
    branched trace's reward belongs to several token sequences together, and a residual takes one.

    Args:
        paths: files, or folders with a file `traces.jsonl`.

    Raises:
        FileNotFoundError: if there are no files.
        ValueError: for traces of a later schema, and if none is left.
    """
    rows: list[dict[str, Any]] = []
    left_out: Counter[str] = Counter()
    for file, number, episode in _lines(paths, "traces.jsonl", "an evaluation"):
        if "traces" not in episode:
            raise ValueError(f"{file}, line {number}: no `traces`. Is this a file of verifiers?")
        for trace in episode["traces"]:
            if trace.get("version", 1) > VERIFIERS_TRACE_VERSION:
                raise ValueError(
                    f"{file}, line {number}: a trace of schema {trace['version']}, known up to "
                    f"{VERIFIERS_TRACE_VERSION}. Update tbrm-trl."
                )
            row = _row_of_trace(trace)
            if isinstance(row, str):
                left_out[row] += 1
            else:
                rows.append(row)
    if left_out:
        reasons = ", ".join(f"{count} {reason}" for reason, count in left_out.items())
        warnings.warn(
            f"{left_out.total()} of {left_out.total() + len(rows)} traces are left out: {reasons}.", stacklevel=2
        )
    if not rows:
        raise ValueError("No trace is left that could be trained on.")
    return _dataset(rows)


def _row_of_trace(trace: Mapping[str, Any]) -> dict[str, Any] | str:
    """The logged row, or why there is none."""
    if not trace.get("ok"):
        return "failed"
    if not trace["agent"].get("trainable", True):
        return "of an agent that is not trained"
    nodes = trace["nodes"]
    paths = [path for path in _branches(nodes) if any(node.get("sampled") for node in path)]
    if not paths:
        return "without a message of the policy"
    if len(paths) > 1:
        return "with several branches"
    path = paths[0]
    sampled = [place for place, node in enumerate(path) if node.get("sampled")]
    first, last = sampled[0], sampled[-1]
    path = path[: last + 1]
    if any(
        isinstance(content := node["message"].get("content"), list)
        and any(part.get("type") != "text" for part in content)
        for node in path
    ):
        return "with images"
    messages = [_message(node["message"]) for node in path]
    calls = {call["node"]: call.get("finish_reason") for call in trace.get("calls", ()) if call.get("node") is not None}
    reason = next((calls[place] for place, node in enumerate(nodes) if node is path[-1] and place in calls), None)
    rewards = [reward for reward in trace.get("rewards", {}).values() if reward is not None]
    tokens = _tokens(path)
    unknown = None if tokens["completion_ids"] else "eos"  # the last id decides
    ends = {"length": "length", "tool_calls": "tool_limit", None: unknown}
    return {
        "prompt": messages[:first],
        "completion": messages[first:],
        **tokens,
        "reward": sum(reward["score"] * reward.get("weight", 1.0) for reward in rewards) if rewards else None,
        "end": ends.get(reason or None, "eos"),
        "task": trace["task"]["data"],
        "trace": trace["id"],
        "agent": trace["agent"].get("name"),
    }


def _branches(nodes: Sequence[Mapping[str, Any]]) -> Iterator[list[Mapping[str, Any]]]:
    """The paths from a root to a leaf that verifiers trains on: no compaction attempts that were not continued."""
    parents = {node.get("parent") for node in nodes}
    links = [[(link["type"], link["node"]) for link in node.get("semantic_parents", ())] for node in nodes]
    accepted = {source for one in links for kind, source in one if kind == "compaction"}
    for leaf in range(len(nodes)):
        attempt = any(kind == "compaction_attempt" for kind, _ in links[leaf])
        if leaf in parents or (attempt and leaf not in accepted):
            continue
        path = [nodes[leaf]]
        while (parent := path[-1].get("parent")) is not None:
            path.append(nodes[parent])
        yield path[::-1]


def _tokens(path: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Ids and mask of a path, if each of its messages has them."""
    if all(node.get("token_ids") and len(node["token_ids"]) == len(node["mask"]) for node in path):
        ids = [token for node in path for token in node["token_ids"]]
        mask = [chosen for node in path for chosen in node["mask"]]
        if any(mask) and not mask[0]:
            first, end = mask.index(True), len(mask) - mask[::-1].index(True)
            return {"prompt_ids": ids[:first], "completion_ids": ids[first:end], "loss_mask": mask[first:end]}
    return {"prompt_ids": None, "completion_ids": None, "loss_mask": None}


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message as chat templates take it."""
    made = {name: value for name, value in message.items() if value is not None and name != "provider_state"}
    if calls := made.pop("tool_calls", None):
        made["tool_calls"] = [
            {
                "id": call["id"],
                "type": "function",
                "function": {"name": call["name"], "arguments": _arguments(call["arguments"])},
            }
            for call in calls
        ]
    return made


def _arguments(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:  # the policy wrote no JSON
        return text


def _lines(paths: Paths, pattern: str, writer: str) -> Iterator[tuple[Path, int, dict[str, Any]]]:
    for path in [paths] if isinstance(paths, (str, Path)) else paths:
        path = Path(path)
        files = sorted(path.glob(pattern), key=_by_number) if path.is_dir() else [path] if path.exists() else []
        if not files:
            raise FileNotFoundError(f"No {pattern} in {path}. Were they written, by {writer}?")
        for file in files:
            with file.open(encoding="utf-8") as opened:
                for number, line in enumerate(opened, start=1):
                    if line.strip():
                        yield file, number, _parsed(line, f"{file}, line {number}")


def _parsed(line: str, place: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{place}: no whole JSON ({error}). Was the file cut short? Remove the line.") from None
    if not isinstance(row, dict):
        raise ValueError(f"{place}: {type(row).__name__} instead of a JSON object.")
    return row


def _by_number(file: Path) -> tuple[int, str]:
    return (int(file.stem) if file.stem.isdigit() else -1, file.stem)


def _dataset(rows: Sequence[Mapping[str, Any]]) -> Dataset:
    names = list({name: None for row in rows for name in row})
    return Dataset(pa.table({name: column_of([row.get(name) for row in rows]) for name in names}))
