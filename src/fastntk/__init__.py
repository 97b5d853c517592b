"""Remove the influence of chosen training data from a fine-tuned vision model, without retraining it."""

from fastntk.auditing import audit
from fastntk.certificate import Audit, Certificate, Forgotten
from fastntk.errors import InputError
from fastntk.gain import amplified
from fastntk.heads import exact_head
from fastntk.lora import add_lora, remove_lora
from fastntk.loss import CrossEntropy, SquaredLoss
from fastntk.memory import Memory, load
from fastntk.models import Logits, Preprocessing, load_model
from fastntk.outputs import at
from fastntk.planning import Plan, plan
from fastntk.preparation import prepare, refresh
from fastntk.prompts import add_prompts, remove_prompts
from fastntk.report import Report, evaluate
from fastntk.training import Fit, Recipe, fit
from fastntk.tunable import snapshot, tunables, tune

__all__ = [
    "Audit",
    "Certificate",
    "CrossEntropy",
    "Fit",
    "Forgotten",
    "InputError",
    "Logits",
    "Memory",
    "Plan",
    "Preprocessing",
    "Recipe",
    "Report",
    "SquaredLoss",
    "add_lora",
    "add_prompts",
    "amplified",
    "at",
    "audit",
    "evaluate",
    "exact_head",
    "fit",
    "load",
    "load_model",
    "plan",
    "prepare",
    "refresh",
    "remove_lora",
    "remove_prompts",
    "snapshot",
    "tunables",
    "tune",
]
