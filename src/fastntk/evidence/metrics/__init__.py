"""Measures of forgetting. They take tensors, never models, and per-sample scores can be had from each."""

from fastntk.evidence.metrics.distance import logit_distance, probability_distance
from fastntk.evidence.metrics.gaps import average_gap, tug_of_war
from fastntk.evidence.metrics.membership import attack_auc, modified_entropy, taken_for_members, threshold
from fastntk.evidence.metrics.predictions import agreement, kl_divergence
from fastntk.evidence.metrics.probability import label_probability
from fastntk.evidence.metrics.shadows import klom, published_klom, ulira
from fastntk.tuning.outputs import accuracy, log_odds, margins

__all__ = [
    "accuracy",
    "agreement",
    "attack_auc",
    "average_gap",
    "kl_divergence",
    "klom",
    "label_probability",
    "log_odds",
    "logit_distance",
    "margins",
    "modified_entropy",
    "probability_distance",
    "published_klom",
    "taken_for_members",
    "threshold",
    "tug_of_war",
    "ulira",
]
