"""Remove the influence of chosen training data from a fine-tuned vision model, without retraining it."""

import sys

from fastntk.common.errors import InputError
from fastntk.evidence import methods, metrics
from fastntk.evidence.auditing import audit
from fastntk.evidence.gain import amplified
from fastntk.evidence.report import Report, evaluate
from fastntk.inputs.models import Logits, Preprocessing, load_model
from fastntk.memory.certificate import Audit, Certificate, Forgotten
from fastntk.memory.memory import Memory, load
from fastntk.memory.plan import Plan, plan
from fastntk.memory.prepare import prepare, refresh
from fastntk.solve.head import exact_head
from fastntk.tuning.fitting import Fit, Recipe, fit
from fastntk.tuning.lora import add_lora, remove_lora
from fastntk.tuning.loss import CrossEntropy, SquaredLoss
from fastntk.tuning.outputs import at
from fastntk.tuning.prompts import add_prompts, remove_prompts
from fastntk.tuning.selectors import snapshot, tunables, tune

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

sys.modules |= {f"{__name__}.methods": methods, f"{__name__}.metrics": metrics}  # their public names
