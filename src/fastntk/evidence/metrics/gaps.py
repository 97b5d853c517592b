"""Several accuracies of a model against a retrained one's, in one number."""

from collections.abc import Mapping
from math import prod


def average_gap(ours: Mapping[str, float], retrained: Mapping[str, float]) -> float:
    """``mean_k |ours_k - retrained_k|`` in points, over measures in percent; 0 is best.

    SalUn's average gap takes the accuracies on the retained, forgotten and test samples and the success of a membership
    attack on the forgotten ones: there a support vector machine on confidences, in this project's measure a threshold
    on the modified entropy (``fastntk.metrics.taken_for_members``). Source: Fan et al. 2024 (arXiv 2310.12508).

    Raises:
        ValueError: the two do not hold the same measures.
    """
    return sum(_gaps(ours, retrained)) / len(ours)


def tug_of_war(ours: Mapping[str, float], retrained: Mapping[str, float]) -> float:
    """``prod_k (1 - |ours_k - retrained_k| / 100)`` over the accuracies in percent on the three sets; 1 is best.

    Source: Zhao et al. 2024, "What makes unlearning hard and what to do about it" (arXiv 2406.01257).

    Raises:
        ValueError: the two do not hold the same measures.
    """
    return prod(1 - gap / 100 for gap in _gaps(ours, retrained))


def _gaps(ours: Mapping[str, float], retrained: Mapping[str, float]) -> list[float]:
    if ours.keys() != retrained.keys() or not ours:
        raise ValueError(f"the measures differ: {sorted(ours)} and {sorted(retrained)}.")
    return [abs(ours[name] - retrained[name]) for name in ours]
