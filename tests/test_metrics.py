"""Sums and weights of metrics, added by name."""

import torch

from tbrm_trl.loss.metrics import Totals


def totals(**pairs):
    return Totals(tuple(pairs), torch.tensor(list(pairs.values())))


def test_a_mean_is_over_the_weights_of_all_that_was_added():
    added = totals(kl=[6.0, 2.0], residual_mean_square=[9.0, 1.0]) + totals(kl=[0.0, 1.0], residual_mean_square=[0, 0])
    assert added.means() == {"kl": 2.0, "residual_rms": 3.0}


def test_what_one_side_lacks_counts_there_as_nothing():
    """An evaluation adds its loss to the totals of its rows, and a checkpoint of another version has other metrics."""
    old = Totals.from_state({"kl": [6.0, 2.0], "gone": [1.0, 1.0]}, torch.device("cpu"))
    assert (old + totals(entropy=[4.0, 1.0], kl=[0.0, 1.0])).means() == {"kl": 2.0, "gone": 1.0, "entropy": 4.0}
    assert (Totals() + old).state() == (old + Totals()).state() == old.state()


def test_what_has_no_weight_has_no_mean():
    assert totals(kl=[0.0, 0.0], entropy=[1.0, 4.0]).means() == {"entropy": 0.25}
    assert Totals.from_state({}, torch.device("cpu")).means() == {}
