"""Pages without outside references, from the templates beside this file."""

import io
from typing import Any

import jinja2
import matplotlib
from matplotlib.figure import Figure

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
