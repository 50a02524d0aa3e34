"""Two real processes over gloo: the same trajectories give the same gradient as one process, and as brute force.

Adapters, DeepSpeed and FSDP2 are in test_distributed.py.
"""

from __future__ import annotations

import pytest
from accelerate import PartialState
from common.tiny import perturb, save
from helpers.forked import launch
from helpers.oracle import TOLERANCE, distance, plain, solve
from helpers.scripted import script, scripted_trainer
from helpers.sharded import unwrapped
from helpers.two_processes import on_two_processes, one_sided
from transformers import AutoModelForCausalLM

from tbrm_trl.processes import failing_together


@pytest.mark.parametrize("accumulation", [1, 2])
def test_same_gradient_with_exclusions_on_one_process(accumulation, tmp_path):
    """None of the second process's rows counts; it still runs its forward and backward."""
    folder, rows, seen = one_sided(
        tmp_path, per_device_train_batch_size=4 // accumulation, gradient_accumulation_steps=accumulation
    )
    perturbed = AutoModelForCausalLM.from_pretrained(folder)
    perturb(perturbed)
    policy = plain(AutoModelForCausalLM.from_pretrained(folder))
    answer = solve(policy, plain(perturbed), seen["windows"][0] + seen["windows"][1], beta=0.1)
    assert distance(unwrapped(seen["gradients"]), answer.gradient) <= TOLERANCE
    # What the log shows is the mean over processes.
    assert sum(map(sum, seen["losses"])) / 2 == pytest.approx(answer.loss, rel=TOLERANCE)
    assert seen["log"][0]["left_out/unscored"] == pytest.approx(5 / 8)
    assert seen["log"][0]["residual/mean"] == pytest.approx(0.1 * sum(answer.residuals) / 3, rel=1e-3)

    one = scripted_trainer(folder, rows, tmp_path, per_device_train_batch_size=8)
    perturb(one.ref_model)
    one.train()
    assert distance(unwrapped(seen["gradients"]), one.recorder.gradients[0]) <= TOLERANCE


def test_fsdp_that_became_ddp_is_refused(tmp_path):
    """accelerate silently replaces FSDP by DDP on CPUs."""
    with pytest.raises(AssertionError, match="FSDP was asked for, and accelerate made MULTI_CPU of it"):
        on_two_processes(save(tmp_path / "model"), script(), tmp_path, "fsdp2", per_device_train_batch_size=4)


class Unsendable(Exception):
    """An error that cannot be rebuilt from its arguments, as a receiving process would do."""

    def __init__(self, where: str, why: str):
        super().__init__(f"{why} at {where}")


def errors_of_this_process() -> list[str]:
    """What each of three blocks raises. None fails in the first, process 1 in the second, and both in the third."""
    process, seen = PartialState(cpu=True).process_index, []
    for failing in ((), (1,), (0, 1)):
        try:
            with failing_together():
                if process in failing:
                    raise Unsendable("the end", f"process {process} failed")
            seen.append("")
        except Exception as error:
            seen.append(f"{type(error).__name__}: {error}")
    return seen


def test_an_error_on_one_process_is_raised_on_every_one():
    first, second = launch("test_two_processes:errors_of_this_process")
    of_second = "Unsendable: process 1 failed at the end"
    assert first == ["", f"RuntimeError: {of_second}", "Unsendable: process 0 failed at the end"]
    assert second == ["", of_second, of_second]
