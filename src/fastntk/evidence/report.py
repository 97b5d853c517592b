"""Evidence: models side by side with those retrained without the forgotten data, as a table and as JSON."""

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from itertools import combinations

import torch
from jaxtyping import Float, Int
from rich.box import SIMPLE_HEAD
from rich.table import Table
from torch import Tensor
from torch.utils.data import Dataset

from fastntk.common.errors import InputError
from fastntk.evidence.measures import Subject, measured_by_all, shown
from fastntk.evidence.metrics import margins
from fastntk.inputs.batches import labels_of
from fastntk.tuning.outputs import Model, logits_of

ORIGINAL = "original"
"""The row of the fitted model."""

RETRAINED = "retrain"
"""The row of the first retrained model; those of others are called ``retrain_2``, ``retrain_3``, ..."""


Measures = Mapping[str, float | None]
"""The numbers of ``fastntk.evidence.measures.MEASURES`` of a model, by name; None where one cannot be told."""


def is_retrained(row: str) -> bool:
    """Whether a row is a retrained model's, by its name."""
    return row == RETRAINED or row.startswith(f"{RETRAINED}_")


@dataclass(frozen=True)
class Report:
    """A row of measures a model.

    Attributes:
        rows: per model the numbers of ``fastntk.evidence.measures.MEASURES``, by name; None where one cannot be told.
        logits: per model and set (``retain``, ``forget``, ``test``), so that other metrics need no model.
        labels: per set.
        retrained: the names of the rows that all others are compared with; how far apart these lie is the floor.
    """

    rows: dict[str, dict[str, float | None]]
    logits: dict[str, Mapping[str, Float[Tensor, "samples classes"]]]
    labels: Mapping[str, Int[Tensor, " samples"]]
    retrained: tuple[str, ...]

    def margins(self, model: str, part: str = "forget") -> Float[Tensor, " samples"]:
        """Per sample: the label's logit less the largest other."""
        return margins(self.logits[model][part], self.labels[part])

    def repeated(self, model: str, name: str) -> "Report":
        """With a model's row a second time, under another name."""
        rows, logits = ({**table, name: table[model]} for table in (self.rows, self.logits))
        return replace(self, rows=rows, logits=logits)  # type: ignore[arg-type]

    def to_dict(self) -> dict[str, object]:
        """For JSON: the rows and what they are compared with."""
        return {"rows": self.rows, "retrained": list(self.retrained)}

    def table(self, title: str = "") -> Table:
        """For a terminal."""
        columns = shown("terminal")
        caption = (
            "%: accuracies; member: of the forgotten, taken for members by an attack; d: root mean square logit "
            f"distance to a retrained model, mean over {len(self.retrained)}; ratio: d forget over the mean over their "
            "pairs; ratio p: of probabilities, to be read where the loss is cross-entropy"
        )
        table = Table(title=title, caption=caption, caption_justify="left", box=SIMPLE_HEAD, padding=0)
        table.add_column("model", no_wrap=True)
        for measure in columns.values():
            table.add_column(measure.heading, justify="right", min_width=max(map(len, measure.heading.split())))
        for model, row in self.rows.items():
            table.add_row(model, *(measure.text(row[name]) for name, measure in columns.items()))
        return table


def evaluate(
    models: Mapping[str, Model],
    *,
    retain: Dataset,
    forget: Dataset,
    test: Dataset,
    seconds: Mapping[str, float | None] | None = None,
    retrained: Sequence[str] | None = None,
    device: torch.device | str = "cpu",
) -> Report:
    """Compare models with those retrained on the retained data.

    Args:
        models: by name; modules, or functions of a batch of images (``fastntk.model_at(model, parameters)``). Two at
            least should be retrained ones: only beside how far apart these lie does a distance say anything.
        retain: the training samples that stay.
        forget: those that go.
        test: samples that no model was fitted to.
        seconds: what each model took to make.
        retrained: the names of the retrained ones, ``retrain`` and ``retrain_*`` by default; without any, distances are
            left out.
        device: where the models are.

    Raises:
        InputError: there is no model, or none of a name that was said to be retrained, or a set is empty.
    """
    odd = sorted(set(retrained or ()) - set(models))
    if odd:
        raise InputError(f"there is no model {odd[0]!r} to compare with, only {', '.join(models)}.")
    if not len(forget):  # type: ignore[arg-type]
        raise InputError("the forget set is empty: there is nothing to measure on it.")
    sets = {"retain": retain, "forget": forget, "test": test}
    subjects = {
        name: replace(subject, seconds=(seconds or {}).get(name))
        for name, subject in subjects_of(models, sets, device).items()
    }
    return reported(subjects, retrained)


def subjects_of(
    models: Mapping[str, Model], sets: Mapping[str, Dataset], device: torch.device | str
) -> dict[str, Subject]:
    """What is measured of the models: their logits on the sets. Of the forgotten there may be none to look at.

    Raises:
        InputError: there is no model, or another set is empty.
    """
    if not models:
        raise InputError("there is no model to evaluate.")
    for name in ("retain", "test"):
        if not len(sets[name]):  # type: ignore[arg-type]
            raise InputError(f"the {name} set is empty: there is nothing to measure on it.")
    labels = {name: labels_of(part) for name, part in sets.items()}
    return {
        name: Subject({part: logits_of(model, data, device).cpu() for part, data in sets.items()}, labels)
        for name, model in models.items()
    }


def reported(
    subjects: Mapping[str, Subject],
    retrained: Sequence[str] | None = None,
    thoroughly: bool = False,
    known: Mapping[str, Measures] | None = None,
) -> Report:
    """All measures of at least one subject, beside the retrained ones; the costly measures if ``thoroughly``. Rows that
    are ``known`` are not measured again."""
    names, there = tuple(filter(is_retrained, subjects) if retrained is None else retrained), known or {}
    rows = {
        name: dict(there[name]) if name in there else measured_by_all(each, thoroughly)
        for name, each in beside(subjects, names).items()
    }
    labels = next(iter(subjects.values())).labels
    return Report(rows, {name: subject.logits for name, subject in subjects.items()}, labels, names)


def beside(subjects: Mapping[str, Subject], retrained: Sequence[str]) -> dict[str, Subject]:
    """The subjects, each with the others of those names to be compared with."""
    pairs = [(subjects[one], subjects[other]) for one, other in combinations(retrained, 2)]
    return {
        name: replace(
            subject,
            retrained=tuple(subjects[each] for each in retrained if each != name) or None,
            pairs=pairs or None,
        )
        for name, subject in subjects.items()
    }


def environment() -> dict[str, str | int]:
    """What the numbers were made with."""
    return {
        "fastntk": version("fastntk"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
    }


def document(reports: Mapping[str, Report]) -> dict[str, object]:
    """``{"scenarios": {name: {"rows": ...}}, "environment": ...}``, for JSON."""
    return {"scenarios": {name: report.to_dict() for name, report in reports.items()}, "environment": environment()}
