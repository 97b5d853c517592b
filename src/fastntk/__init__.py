"""Remove the influence of chosen training data from a fine-tuned vision model, without retraining it.

Eight parts, in the order in which data flow through them; each imports only from those before it:

common     errors, files, formats, devices and processes: what every part needs
inputs     models and labelled images, by name and from files
tuning     which parameters are tuned, the loss, and fitting them
jacobians  per-sample Jacobians of the fitted network, and products with them
solve      the linear problem over the samples, solved, in forms that samples can leave
memory     a solution that answers requests, and its folder
evidence   answers beside retrained models: measures, methods, reports
cli        the command line

What is named here is imported when it is first used.
"""

import importlib
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastntk.cli.training import lightning_callback as lightning_callback
    from fastntk.cli.training import trainer_callback as trainer_callback
    from fastntk.common.errors import InputError as InputError
    from fastntk.evidence import methods as methods
    from fastntk.evidence import metrics as metrics
    from fastntk.evidence.auditing import audit as audit
    from fastntk.evidence.auditing import audit_exact as audit_exact
    from fastntk.evidence.auditing import left_out_gain as left_out_gain
    from fastntk.evidence.report import Report as Report
    from fastntk.evidence.report import evaluate as evaluate
    from fastntk.inputs.augmentations import Views as Views
    from fastntk.inputs.images import Preprocessing as Preprocessing
    from fastntk.inputs.makers import Logits as Logits
    from fastntk.inputs.models import load_model as load_model
    from fastntk.jacobians.numerics import Numerics as Numerics
    from fastntk.memory.audit import Audit as Audit
    from fastntk.memory.certificate import Answer as Answer
    from fastntk.memory.certificate import Certificate as Certificate
    from fastntk.memory.certificate import Removal as Removal
    from fastntk.memory.copies import copies as copies
    from fastntk.memory.copies import near_copies as near_copies
    from fastntk.memory.exact import fit_exact as fit_exact
    from fastntk.memory.finish import exact_head as exact_head
    from fastntk.memory.finish import finished as finished
    from fastntk.memory.finish import refresh as refresh
    from fastntk.memory.memory import Memory as Memory
    from fastntk.memory.memory import load as load
    from fastntk.memory.memory import prepare as prepare
    from fastntk.memory.plan import Plan as Plan
    from fastntk.memory.plan import plan as plan
    from fastntk.tuning.fitting import Fit as Fit
    from fastntk.tuning.fitting import fit as fit
    from fastntk.tuning.lora import add_lora as add_lora
    from fastntk.tuning.lora import remove_lora as remove_lora
    from fastntk.tuning.losses import CrossEntropy as CrossEntropy
    from fastntk.tuning.losses import SquaredLoss as SquaredLoss
    from fastntk.tuning.outputs import model_at as model_at
    from fastntk.tuning.parameters import snapshot as snapshot
    from fastntk.tuning.prompts import add_prompts as add_prompts
    from fastntk.tuning.prompts import remove_prompts as remove_prompts
    from fastntk.tuning.rebuilding import RebuiltStart as RebuiltStart
    from fastntk.tuning.rebuilding import rebuilt_start as rebuilt_start
    from fastntk.tuning.recipe import Recipe as Recipe
    from fastntk.tuning.recipe import shrinkage as shrinkage
    from fastntk.tuning.selectors import tunables as tunables
    from fastntk.tuning.selectors import tune as tune

_HOMES = {
    "common.errors": ["InputError"],
    "inputs.augmentations": ["Views"],
    "inputs.images": ["Preprocessing"],
    "inputs.makers": ["Logits"],
    "inputs.models": ["load_model"],
    "tuning.fitting": ["Fit", "fit"],
    "tuning.lora": ["add_lora", "remove_lora"],
    "tuning.losses": ["CrossEntropy", "SquaredLoss"],
    "tuning.outputs": ["model_at"],
    "tuning.parameters": ["snapshot"],
    "tuning.prompts": ["add_prompts", "remove_prompts"],
    "tuning.rebuilding": ["RebuiltStart", "rebuilt_start"],
    "tuning.recipe": ["Recipe", "shrinkage"],
    "tuning.selectors": ["tunables", "tune"],
    "jacobians.numerics": ["Numerics"],
    "memory.audit": ["Audit"],
    "memory.certificate": ["Answer", "Certificate", "Removal"],
    "memory.copies": ["copies", "near_copies"],
    "memory.exact": ["fit_exact"],
    "memory.finish": ["exact_head", "finished", "refresh"],
    "memory.memory": ["Memory", "load", "prepare"],
    "memory.plan": ["Plan", "plan"],
    "evidence.auditing": ["audit", "audit_exact", "left_out_gain"],
    "evidence.report": ["Report", "evaluate"],
    "cli.training": ["lightning_callback", "trainer_callback"],
}
_HOME = {name: f"{__name__}.{module}" for module, names in _HOMES.items() for name in names}
__all__ = sorted(_HOME)


class _Elsewhere(ModuleType):
    """A module that lives under another name, imported when one of its names is asked for."""

    def __init__(self, name: str, home: str) -> None:
        super().__init__(name)
        self._home, self.__spec__ = home, ModuleSpec(name, None)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name != "__all__":  # which tools ask every module for
            raise AttributeError(name)
        return getattr(importlib.import_module(self._home), name)

    def __dir__(self) -> list[str]:
        return dir(importlib.import_module(self._home))


for _name in ("methods", "metrics"):
    sys.modules[f"{__name__}.{_name}"] = _Elsewhere(f"{__name__}.{_name}", f"{__name__}.evidence.{_name}")


def __dir__() -> list[str]:
    return [*globals(), *__all__, "methods", "metrics"]


def __getattr__(name: str) -> Any:
    if f"{__name__}.{name}" in sys.modules:
        return sys.modules[f"{__name__}.{name}"]
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
