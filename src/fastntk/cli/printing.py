"""What the command line prints on standard output."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, NamedTuple

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from fastntk.cli.asked import Copies
    from fastntk.memory.certificate import Answer
    from fastntk.memory.disk.ledger import Request
    from fastntk.memory.memory import Memory
    from fastntk.tuning.fitting import Fit


def show(document: Mapping[str, object], as_json: bool, *texts: object) -> None:
    """Results on standard output: JSON for machines, or text for people."""
    if as_json:
        print(json.dumps(document))
    else:
        console = Console(markup=False, emoji=False)  # names of users' files may have brackets in them
        for text in texts:
            console.print(text, soft_wrap=isinstance(text, str))  # a terminal wraps, a file should not


def table_of(requests: "Sequence[Request]") -> Table:
    """A ledger."""
    table = Table("no", "kind", "samples", "answered (UTC)", "seconds", "state", "verdict")
    for each in requests:
        asked = (each.certificate.get(key, "") for key in ("samples", "verdict"))
        samples, verdict = map(str, asked)
        answered = each.answered[:16].replace("T", " ")
        table.add_row(str(each.number), each.kind, samples, answered, f"{each.seconds:.2f}", each.state, verdict)
    return table


class Solved(NamedTuple):
    """Of a fit that forgets exactly: how many samples may be forgotten, the seconds that all were solved for, and a
    command that forgets some."""

    others: int
    seconds: float
    command: str


def forgetting(run: Path, memory: "Memory") -> str:
    """The command that forgets one or two samples, where their ids can be typed."""
    from fastntk.memory.exact import forgettable

    ids = [text for text in map(str, forgettable(memory.state)[:2]) if text.isprintable() and not set(text) & set(", ")]
    named = f"--ids {quote(','.join(ids))}" if ids else "--ids-file ids.txt"
    return f"fastntk forget {quote(str(run))} {named}"


def show_fit(run: Path, fit: "Fit", as_json: bool, solved: Solved | None = None) -> None:
    """What a fit did, epoch by epoch, and what to do next."""
    count = sum(tensor.numel() for tensor in fit.initial.values())
    document = {"run": str(run), "tuned_parameters": count, "losses": fit.losses, "accuracies": fit.accuracies}
    document |= {"validation": fit.validation, "seconds": fit.seconds}
    table = Table("epoch", "loss", "training %", *(["validation %"] if fit.validation else []))
    for epoch, (loss, accuracy) in enumerate(zip(fit.losses, fit.accuracies, strict=True)):
        held_out = [f"{each:.1f}" for each in fit.validation[epoch : epoch + 1]]
        table.add_row(str(epoch + 1), f"{loss:.3f}", f"{accuracy:.1f}", *held_out)
    told = (
        f"Tuned {count:,} parameters in {fit.seconds:.1f} s, with {fit.recipe.loss.name} loss. Training columns are of "
        "the images as they were seen, while it learned."
        if fit.losses
        else f"Took over {count:,} tuned parameters; {'taken for true' if solved else 'the start was rebuilt'}: "
        f"{'; '.join(fit.assumed)}."
    )
    following = f"Next: fastntk prepare {quote(str(run))}"
    if solved:
        others = f"{solved.others:,} other samples were solved for in {solved.seconds:.1f} s"
        told += f"\nThat was the core. {others}, and can be forgotten exactly."
        following = f"Next: {solved.command}\nThe weights with all of them: fastntk export {quote(str(run))}"
    tables = [table] if fit.losses else []
    more = {"solved": {"others": solved.others, "seconds": solved.seconds}} if solved else {}
    document |= {"assumed": fit.assumed, **more}
    show(document, as_json, *tables, f"{told}\n{following}")


def show_answer(
    run: Path,
    answer: "Answer",
    purge_seconds: float | None,
    as_json: bool,
    unpurged: str = "answered, not purged",
    copies: "Copies | None" = None,
) -> None:
    """An answer and its certificate, and what was found of copies; ``purge_seconds`` is None if nothing was purged,
    which is said as ``unpurged``."""
    certificate = answer.certificate
    document = {"run": str(run), "seconds": answer.seconds, "purge_seconds": purge_seconds, **certificate.to_dict()}
    document |= copies.to_dict() if copies else {}
    text = (
        f"{certificate.kind}: {certificate.samples} samples in {answer.seconds:.2f} s; {certificate.retained:,} others "
        f"stay.\n{certificate.explanation}"
    )
    purged = unpurged if purge_seconds is None else f"purged in {purge_seconds:.2f} s (see docs/limits.md)"
    found = copies.text() if copies else ""
    show(document, as_json, f"{text}\nThe memory's folder: {purged}.", *([found] if found else []))
