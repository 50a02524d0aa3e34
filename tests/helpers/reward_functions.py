"""Reward functions that misbehave at certain completions, for tests of worker processes."""

import math
import os
import subprocess
import time
from pathlib import Path


def length(completions, **columns):
    """The number of characters, or None for an empty completion."""
    return [float(len(one)) if one else None for one in completions]


def misbehaving(completions, log_extra=None, log_metric=None, **columns):
    """Does what the completion says, such as "hang" or "die"; else returns its length."""
    rewards = []
    for one in completions:
        if one == "hang":
            while True:
                pass
        if one == "sleep":
            time.sleep(1000)
        if one == "long call":
            sum(range(10**13))  # in which no other thread of Python runs
        if one == "die":
            os._exit(3)
        if one == "raise":
            raise ValueError(one)
        if one == "recurse":
            misbehaving([one])
        if one == "fill memory":
            bytearray(64 << 30)
        rewards.append(float(len(one)))
    if log_extra is not None:
        log_extra("first letter", [one[:1] for one in completions])
        log_metric("words", sum(len(one.split()) for one in completions) / len(completions))
    return rewards


def both_there(completions, folder, **columns):
    """Write a file named after the completion, and return 1 once the folder has two files."""
    (Path(folder[0]) / completions[0]).touch()
    while len(os.listdir(folder[0])) < 2:
        time.sleep(0.01)
    return [1.0]


def starts_a_program(completions, path, **columns):
    """Start a program that does not end, write its process number to a file, and wait for it."""
    with subprocess.Popen(["sleep", "1000"]) as program:
        Path(path[0]).write_text(str(program.pid))
    return [1.0]


def weighted_column(completions, weight, **columns):
    return [float(one) for one in weight]


def giving(completions, given, **columns):
    return given[0]


def of_completions_alone(completions):
    return [1.0] * len(completions)


async def later(completions, **columns):
    return [1.0] * len(completions)


async def later_in(completions, given, **columns):
    """What the column says: "inf", a number, "short" for one reward too few, or "raise"."""
    if given[0] == "raise":
        raise KeyError("no judge")
    return [float(one) for one in given if one != "short"]


class Unloadable:
    """A function that a worker cannot load."""

    def __call__(self, completions, **columns):
        return [0.0] * len(completions)

    def __reduce__(self):
        return _fail, ()


def _fail():
    raise RuntimeError("not here")


def letters(completions, **columns):
    """The number of lower-case letters in each message, divided by eight."""
    return [sum(map(str.islower, one[0]["content"])) / 8 for one in completions]


def value_below_six(completions, **kwargs) -> list[float]:
    """Each completion as a number, or NaN from 6 on."""
    numbers = [float(completion[0]["content"]) for completion in completions]
    return [one if one < 6 else math.nan for one in numbers]


class Touchy:
    """A reward whose making fails."""

    def __init__(self, limit: int) -> None:
        self.share = 1 / limit
