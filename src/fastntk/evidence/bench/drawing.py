"""What a results folder shows: ``tables.md``, and ``tables.html`` with drawings."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastntk.common.files import write
from fastntk.evidence.bench.plots import against_time, ratios
from fastntk.evidence.bench.results import Cell
from fastntk.evidence.bench.tables import by_model, conclusions, grouped, in_words, overviews, tables
from fastntk.evidence.pages import page, svg


def draw(cells: Sequence[Cell], found: Mapping[str, Any], ours: str, folder: Path) -> str:
    """Write both files; ``found`` is the summary of the cells. Returns the text of the first."""
    told, made, model, details = conclusions(found), overviews(found), by_model(cells, ours), tables(cells)
    words = [in_words(cell, ours) for cell in cells if ours in cell.rows]
    parts = [
        "\n".join(f"- {text}" for text in told),
        *(table.markdown() for table in (*made, model)),
        "### Request by request\n\n" + "\n".join(f"- {text}" for text in words),
        *(table.markdown() for table in details),
    ]
    text = "\n\n".join(parts) + "\n"
    content = {
        "title": "Unlearning methods against retraining",
        "cells": len(cells),
        "conclusions": [sentence.replace("**", "") for sentence in told],
        "overviews": [
            {"table": table, "drawings": [svg(of(rows, ours)) for of in (against_time, ratios)]}
            for table, (_, _, rows) in zip(made, grouped(found["rows"]), strict=True)
        ],
        "by_model": model,
        "words": words,
        "tables": details,
        "ours": ours,
    }
    write(folder / "tables.md", lambda file: file.write_text(text))
    write(folder / "tables.html", lambda file: file.write_text(page("bench.html", **content)))
    return text
