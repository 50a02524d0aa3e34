"""Computes the loss and its metrics from scores and rewards: arithmetic only."""
