"""Measures of forgetting. They take tensors, never models, and per-sample scores can be had from each."""

from fastntk.metrics.accuracy import accuracy, margins
from fastntk.metrics.distance import logit_distance

__all__ = ["accuracy", "logit_distance", "margins"]
