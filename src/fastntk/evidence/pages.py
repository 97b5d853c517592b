"""Pages without outside references, from the templates beside this file."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
from matplotlib.figure import Figure

from fastntk.common.files import write, write_json
from fastntk.evidence.drawings import draw
from fastntk.evidence.measures import shown
from fastntk.evidence.report import Report, document, environment

_TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader("fastntk.evidence"), autoescape=True, undefined=jinja2.StrictUndefined
)


def page(template: str, **content: Any) -> str:
    """A template filled in, as HTML."""
    return _TEMPLATES.get_template(template).render(**content)


def svg(figure: Figure) -> str:
    """The drawing as an ``<svg>`` element, the same bytes for the same drawing."""
    with matplotlib.rc_context({"svg.hashsalt": "fastntk"}):
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()[text.getvalue().index("<svg") :]


def write_report(
    folder: Path, title: str, reports: Mapping[str, Report], notes: Mapping[str, str], template: str = "report.html"
) -> None:
    """``report.json``, ``report.html`` and a drawing a report in ``folder``; ``notes`` stand above the tables."""
    write_json(folder / "report.json", document(reports))
    drawings = {name: svg(draw(report)) for name, report in reports.items()}
    for name, drawing in drawings.items():
        write(folder / f"{name}.svg", lambda file, text=drawing: file.write_text(text))  # type: ignore[misc]
    write(folder / "report.html", lambda file: file.write_text(html(title, reports, notes, drawings, template)))


def html(
    title: str,
    reports: Mapping[str, Report],
    notes: Mapping[str, str],
    drawings: Mapping[str, str],
    template: str = "report.html",
) -> str:
    """A page without outside references: per scenario the table, the accuracies and the margins as drawings. Costly
    measures have a column where they were taken."""
    rows = [row for report in reports.values() for row in report.rows.values()]
    columns = {
        name: measure
        for name, measure in shown("terminal", "pages").items()
        if not measure.costly or any(row[name] is not None for row in rows)
    }
    sections = [
        {
            "name": name,
            "note": notes.get(name, ""),
            "rows": {
                model: [measure.text(row[key]) for key, measure in columns.items()]
                for model, row in report.rows.items()
            },
            "figure": drawings[name],
        }
        for name, report in reports.items()
    ]
    content = {"title": title, "reports": reports, "columns": list(columns.values()), "sections": sections}
    return page(template, **content, environment=environment())
