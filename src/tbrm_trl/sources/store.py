"""`TrajectoryStore`: many trajectories in little memory, first in, first out."""

import math
from bisect import bisect_right
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from ..trajectory import End, Trajectory

_ENDS = list(End)
# One record per trajectory, 62 bytes. Its tokens begin at `first_word` of its segment.
_RECORD = np.dtype(
    [
        ("reward", np.float64),
        ("value", np.float64),
        ("baseline", np.float64),
        ("ref_log_prob", np.float32),  # Σ_h m_h log π_ref
        ("ref_soft_value", np.float32),
        ("ref_end_value", np.float32),
        ("priority", np.float32),
        ("prompt", np.int32),  # tokens
        ("completion", np.int32),  # tokens
        ("first_word", np.int32),
        ("policy_step", np.int32),
        ("ref_key", np.uint32),
        ("end", np.uint8),
        ("masked", np.bool_),
    ]
)
_SEGMENT = 1 << 14  # int32 words that are allocated and freed together


class TrajectoryStore:
    """A queue of text trajectories in flat arrays: int32 ids end to end, and one record of 62 bytes each.

    A loss mask that is not all true is kept as bits in the words after the ids. The reference's log-probabilities are
    kept as their sum over the actions, since a trajectory residual needs no more. None is kept as NaN. Trajectories are
    numbered in the order they came, and keep their numbers until one of them is removed.

    A trajectory read from the store has no raw rewards by function, no group and no vision inputs. Each of its actions
    has the mean of the reference's log-probabilities.

    Args:
        capacity: the largest number of trajectories. When it is reached, the oldest is dropped for a new one.
    """

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.clear()

    def clear(self) -> None:
        self.first = self.end = 0  # numbers of the oldest trajectory and of the next one
        self._records = np.empty(self.capacity, _RECORD)  # (capacity,) at number % capacity
        self._segments: list[np.ndarray] = []  # (words,) int32 each
        self._starts: list[int] = []  # per segment, the number of its first trajectory
        self._used = 0  # words of the last segment
        self._keys: list[str | None] = []  # keys of references, in the order they came

    def __len__(self) -> int:
        return self.end - self.first

    def __iter__(self) -> Iterator[Trajectory]:
        return (self[number] for number in range(self.first, self.end))

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays. Records that were never written take no memory and are not counted."""
        return sum(segment.nbytes for segment in self._segments) + min(self.end, self.capacity) * _RECORD.itemsize

    def append(self, trajectory: Trajectory) -> int:
        """Add a trajectory, and return its number."""
        masked = not bool(trajectory.loss_mask.all())
        words = [ids.numpy().astype(np.int32) for ids in (trajectory.prompt_ids, trajectory.completion_ids)]
        if masked:
            bits = np.packbits(trajectory.loss_mask.numpy())
            words.append(np.pad(bits, (0, -len(bits) % 4)).view(np.int32))
        record = np.zeros((), _RECORD)
        record["reward"], record["baseline"] = trajectory.reward, trajectory.baseline
        record["value"], record["priority"] = trajectory.value, trajectory.priority  # NumPy makes NaN of None
        record["prompt"], record["completion"] = len(trajectory.prompt_ids), len(trajectory.completion_ids)
        record["policy_step"] = trajectory.policy_step
        record["end"], record["masked"] = _ENDS.index(trajectory.end), masked
        self._append(np.concatenate(words), record)
        self.keep_scores(self.end - 1, trajectory)
        return self.end - 1

    def _append(self, words: np.ndarray, record: np.ndarray) -> None:
        if len(self) == self.capacity:
            self.popleft()
        if not self._segments or self._used + len(words) > len(self._segments[-1]):
            if self._segments:
                self._segments[-1] = self._segments[-1][: self._used].copy()  # frees the unused rest
            self._segments.append(np.empty(max(_SEGMENT, len(words)), np.int32))
            self._starts.append(self.end)
            self._used = 0
        self._segments[-1][self._used : self._used + len(words)] = words
        record["first_word"] = self._used
        self._records[self.end % self.capacity] = record
        self._used += len(words)
        self.end += 1

    def popleft(self) -> int:
        """Drop the oldest, and return its number."""
        self.first += 1
        while len(self._starts) > 1 and self._starts[1] <= self.first:  # the first segment is empty
            del self._segments[0], self._starts[0]
        return self.first - 1

    def find(self, trajectory: Trajectory) -> list[int]:
        """The numbers of stored trajectories with this one's tokens and `policy_step`."""
        numbers = np.arange(self.first, self.end)
        records = self._records[numbers % self.capacity]  # (N,)
        alike = np.ones(len(numbers), bool)  # (N,)
        for name, value in (
            ("policy_step", trajectory.policy_step),
            ("prompt", len(trajectory.prompt_ids)),
            ("completion", len(trajectory.completion_ids)),
        ):
            alike &= records[name] == value
        ids = torch.cat([trajectory.prompt_ids, trajectory.completion_ids]).numpy()  # (P + C,)
        return [n for n in numbers[alike].tolist() if np.array_equal(self._ids(n), ids)]

    def remove(self, numbers: set[int]) -> None:
        """Drop trajectories at any position. Later ones get lower numbers. It copies the whole store."""
        state, arrays = self.state()
        kept = np.array([number not in numbers for number in range(self.first, self.end)], bool)  # (N,)
        arrays["words"] = arrays["words"][np.repeat(kept, arrays["words_of"])]
        arrays["words_of"] = arrays["words_of"][kept]
        arrays["records"] = arrays["records"].view(_RECORD)[kept].view(np.uint8)
        self.restore(state, arrays)

    def priorities(self, numbers: np.ndarray) -> np.ndarray:
        """`(N,)` float64; NaN for trajectories that were not replayed yet."""
        return self._records["priority"][numbers % self.capacity].astype(np.float64)

    def policy_step(self, number: int) -> int:
        return int(self._records["policy_step"][number % self.capacity])

    def set_priority(self, number: int, priority: float) -> None:
        self._records["priority"][number % self.capacity] = priority

    def keep_scores(self, number: int, trajectory: Trajectory) -> None:
        """Replace a trajectory's stored reference scores by those it carries now."""
        record = self._records[number % self.capacity]
        log_probs = trajectory.ref_log_probs
        record["ref_log_prob"] = math.nan if log_probs is None else log_probs[trajectory.loss_mask].double().sum()
        record["ref_soft_value"], record["ref_end_value"] = trajectory.ref_soft_value, trajectory.ref_end_value
        if not self._keys or self._keys[-1] != trajectory.ref_key:  # a stale score is renewed with the newest key
            self._keys.append(trajectory.ref_key)
        record["ref_key"] = len(self._keys) - 1

    def _words(self, number: int, record: np.ndarray) -> np.ndarray:
        first = int(record["first_word"])
        segment = self._segments[bisect_right(self._starts, number) - 1]
        completion = int(record["completion"])
        bits = -(-completion // 32) if record["masked"] else 0
        return segment[first : first + int(record["prompt"]) + completion + bits]

    def _ids(self, number: int) -> np.ndarray:
        record = self._records[number % self.capacity]
        return self._words(number, record)[: int(record["prompt"]) + int(record["completion"])]

    def __getitem__(self, number: int) -> Trajectory:
        record = self._records[number % self.capacity]
        words = self._words(number, record)
        prompt, completion = int(record["prompt"]), int(record["completion"])
        ids = torch.from_numpy(words[: prompt + completion].astype(np.int64))  # (P + C,)
        mask = torch.ones(completion, dtype=torch.bool)
        if record["masked"]:
            bits = np.unpackbits(words[prompt + completion :].view(np.uint8), count=completion)
            mask = torch.from_numpy(bits.astype(bool))
        log_prob = float(record["ref_log_prob"])
        return Trajectory(
            prompt_ids=ids[:prompt],
            completion_ids=ids[prompt:],
            loss_mask=mask,
            reward=float(record["reward"]),
            end=_ENDS[record["end"]],
            policy_step=int(record["policy_step"]),
            ref_log_probs=None if math.isnan(log_prob) else mask * (log_prob / max(int(mask.sum()), 1)),
            ref_soft_value=_or_none(record["ref_soft_value"]),
            ref_end_value=_or_none(record["ref_end_value"]),
            ref_key=self._keys[record["ref_key"]],
            value=_or_none(record["value"]),
            baseline=float(record["baseline"]),
            priority=_or_none(record["priority"]),
        )

    def state(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """JSON-able values and arrays from which `restore` rebuilds the store."""
        words = [self._words(number, self._records[number % self.capacity]) for number in range(self.first, self.end)]
        records = self._records[np.arange(self.first, self.end) % self.capacity]  # (N,)
        records["first_word"] = 0  # `restore` sets them again
        used, records["ref_key"] = np.unique(records["ref_key"], return_inverse=True)  # without unused keys
        arrays = {
            "words": np.concatenate([np.empty(0, np.int32), *words]),
            "words_of": np.array([len(one) for one in words], np.int64),
            "records": records.view(np.uint8),
        }
        return {"first": self.first, "keys": [self._keys[key] for key in used]}, arrays

    def restore(self, state: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
        """The inverse of `state`."""
        self.clear()
        self.first = self.end = state["first"]
        self._keys = list(state["keys"])
        parts = np.split(arrays["words"], arrays["words_of"].cumsum()[:-1])
        for words, record in zip(parts, arrays["records"].view(_RECORD), strict=False):
            self._append(words, record)


def _or_none(value: np.floating) -> float | None:
    return None if np.isnan(value) else float(value)
