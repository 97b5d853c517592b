"""What a results folder shows: ``tables.md``, and ``tables.html`` with drawings."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastntk.common.files import write
from fastntk.evidence.bench.plots import accuracy_against_time, attack_curves, distance_ratios
from fastntk.evidence.bench.results import Cell, Results
from fastntk.evidence.bench.tables import by_model, by_request, overviews, tables
from fastntk.evidence.pages import page, svg


def draw(results: Results, cells: Sequence[Cell], found: Mapping[str, Any], ours: str, folder: Path) -> str:
    """Write both files; ``found`` is the summary of the cells. Returns the text of the first."""
    made = [*overviews(cells, found, ours), by_model(cells, ours), by_request(cells, ours), *tables(cells)]
    text = "\n\n".join(table.markdown() for table in made) + "\n"
    figures = [
        ("Accuracy against time", "Down and left is better.", accuracy_against_time(cells, ours)),
        (
            "Distance to retraining",
            "Root mean square logit distance on the forgotten images to a retrained model, over that of a second "
            "retrained model.",
            distance_ratios(cells, ours),
        ),
        (
            "Membership attack",
            "By modified entropy, forgotten against test images, mean over requests. Where the forgotten images are a "
            "class, retrained models tell them from test images of the others, too.",
            attack_curves(results, cells, ours),
        ),
    ]
    content = {
        "title": "Unlearning methods against retraining",
        "summary": found,
        "figures": [{"title": title, "caption": caption, "svg": svg(figure)} for title, caption, figure in figures],
        "tables": made,
        "ours": ours,
    }
    write(folder / "tables.md", lambda file: file.write_text(text))
    write(folder / "tables.html", lambda file: file.write_text(page("bench.html", **content)))
    return text
