"""What other packages add."""

from rich.table import Table
from rich.text import Text

from fastntk.cli import options
from fastntk.cli.printing import show


def plugins(as_json: options.Json = False) -> None:
    """List what other packages add: selectors, methods, metrics, losses, data and rules (examples/plugin)."""
    from fastntk.evidence.bench.config import METHODS
    from fastntk.evidence.measures import MEASURES
    from fastntk.inputs.sources import READERS
    from fastntk.jacobians.rules.calls import PLUGGED
    from fastntk.tuning.losses import LOSSES
    from fastntk.tuning.selectors import SELECTORS

    kinds = {each.kind: each.others for each in (SELECTORS, METHODS, MEASURES, LOSSES, READERS, PLUGGED)}
    table = Table("kind", "name", "package")
    for kind, others in kinds.items():
        for name, package in others.items():
            table.add_row(*map(Text, (kind, name, package)))
    show(kinds, as_json, table if any(kinds.values()) else "No other package adds anything.")
