"""Remove the influence of chosen training data from a fine-tuned vision model, without retraining it."""

from fastntk.certificate import Certificate
from fastntk.errors import InputError
from fastntk.loss import SquaredLoss
from fastntk.memory import Forgotten, Memory, load
from fastntk.models import load_model
from fastntk.outputs import at
from fastntk.planning import Plan, plan
from fastntk.preparation import prepare, refresh
from fastntk.report import Report, evaluate
from fastntk.training import Fit, Recipe, fit
from fastntk.tunable import snapshot, tune

__all__ = [
    "Certificate",
    "Fit",
    "Forgotten",
    "InputError",
    "Memory",
    "Plan",
    "Recipe",
    "Report",
    "SquaredLoss",
    "at",
    "evaluate",
    "fit",
    "load",
    "load_model",
    "plan",
    "prepare",
    "refresh",
    "snapshot",
    "tune",
]
