"""What the commands leave of a run after a fault: all of what was before, or of what is after; and how they repeat."""

import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faults
import numpy as np
import runs
import scipy.optimize  # noqa: F401 (as what follows: not at every fork)

import fastntk.cli.asked
import fastntk.evidence.pages  # noqa: F401
from fastntk.cli.run import Run
from fastntk.common.errors import InputError
from fastntk.common.files import digest
from fastntk.inputs.libraries import torchvision


@dataclass(frozen=True)
class Trial:
    """A command on a prepared place.

    Attributes:
        name: what is tried.
        words: of the command, with RUN and PLACE for folders.
        after: the commands that make what it works on.
        again: the repeat; the command itself by default. Where the request is answered already it may be refused.
    """

    name: str
    words: str
    after: tuple[str, ...] = ()
    again: str | None = None


_FIT = "fit RUN --model PLACE/own.py:small --data PLACE/data.npz --epochs 2 --batch-size 4"
_FITTED, _PREPARED = (_FIT,), (_FIT, "prepare RUN")
_ASKED = "forget RUN --ids 3,5 --certificate ROOT/certificate.json"
TRIALS = [
    Trial("fit", _FIT),
    Trial("fit over a fit", f"{_FIT} --seed 1", _PREPARED),
    Trial("prepare", "prepare RUN", _FITTED),
    Trial("prepare over a memory", "prepare RUN --ridge 3", _PREPARED),
    Trial("forget", _ASKED, _PREPARED),
    Trial("forget, not purged", f"{_ASKED} --defer-purge", _PREPARED),
    Trial("forget with a refresh", f"{_ASKED} --refresh", _PREPARED),
    Trial("remember", "remember RUN --ids 3", (*_PREPARED, "forget RUN --ids 3,5")),
    Trial("purge", "purge RUN", (*_PREPARED, "forget RUN --ids 3,5 --defer-purge")),
    Trial("refresh", "refresh RUN", (*_PREPARED, "forget RUN --ids 3,5")),
    Trial("audit", "audit RUN --fraction 0.3", _PREPARED),
    Trial("export", "export RUN", (*_PREPARED, "forget RUN --ids 3,5")),
]


@dataclass(frozen=True)
class Found:
    """What a fault did: which of the sums of ``benchmarks/faults.py`` it counts in, or None, and in words."""

    trial: str
    operation: int
    fault: str
    wrong: str | None
    said: str = ""


class Place:
    """Where trials are made: ``given`` has the model and the data, ``root`` is what faults are counted in."""

    def __init__(self, folder: Path) -> None:
        torchvision()
        faults.warm()
        self.given, self.whole, self.root = folder, folder / "whole", folder / "root"
        (folder / "own.py").write_text(runs.NETWORK)
        x = np.random.default_rng(0).integers(0, 255, (20, 8, 8, 3), dtype=np.uint8)
        y = np.arange(20) % 2
        np.savez(folder / "data.npz", x_train=x, y_train=y, x_test=x[:4], y_test=y[:4])

    @property
    def run(self) -> Path:
        return self.root / "run"

    def command(self, words: str, at: int = 0, fault: str = "fails") -> faults.Outcome:
        places = {"RUN": self.run, "PLACE": self.given, "ROOT": self.root}
        given = re.sub("RUN|PLACE|ROOT", lambda found: str(places[found[0]]), words)
        return faults.run(given.split(), self.root, at, fault)

    def made(self, trial: Trial) -> None:
        """What the trial works on, in ``whole``."""
        self._cleared(self.root)
        for words in trial.after:
            done = self.command(words)
            assert done.status == 0, done.said
        shutil.rmtree(self.whole, ignore_errors=True)
        shutil.copytree(self.root, self.whole)

    def fresh(self) -> None:
        """The folder as it was made, for another fault."""
        shutil.rmtree(self.root)
        shutil.copytree(self.whole, self.root)

    def _cleared(self, folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()

    def state(self) -> dict[str, Any]:
        """What the run is, as the next command finds it; what is not there is None."""
        run = Run(self.run)
        try:
            memory, _ = run.memory()
        except InputError as error:
            absent = next((each for each in ("holds no run", "Prepare one first") if each in str(error)), None)
            if absent is None:
                raise
            return {"fit": None if absent == "holds no run" else run.settings().files, "memory": None}
        kinds = [request.kind for request in memory.requests()]
        found = digest(memory.parameters), memory.ridge, tuple(memory.ids), tuple(kinds)
        return {"fit": run.settings().files, "memory": found}

    def files(self) -> list[str]:
        """All that is in the folder, with the numbers of files left out."""
        names = (path.relative_to(self.root).as_posix() for path in self.root.rglob("*") if path.is_file())
        return sorted(re.sub(r"-\d+\.", "-N.", name) for name in names if not name.endswith("lock"))


def tried(place: Place, trial: Trial, chosen: Callable[[int], bool] = lambda operation: True) -> Iterator[Found]:
    """Every fault at every operation of a trial that is ``chosen`` by its number."""
    place.made(trial)
    if place.run.exists():
        place.state()
        place.fresh()
    before = _state_of(place)
    place.fresh()
    whole = place.command(trial.words)
    assert whole.status == 0, whole.said
    after, files = place.state(), place.files()
    for operation in filter(chosen, range(1, whole.operations + 1)):
        for fault in faults.FAULTS:
            place.fresh()
            done = place.command(trial.words, operation, fault)
            wrong, said = _wrong(place, trial, done, (before, after), files)
            yield Found(trial.name, operation, fault, wrong, said)


def _state_of(place: Place) -> dict[str, Any]:
    return place.state() if place.run.exists() else {"fit": None, "memory": None}


def _wrong(
    place: Place, trial: Trial, done: faults.Outcome, states: tuple[dict, dict], files: list[str]
) -> tuple[str | None, str]:
    """Which sum the outcome of a fault counts in, and why."""
    before, after = states
    if done.traceback or done.status not in (0, 2, faults.KILLED):
        return "tracebacks", done.said[-800:]
    try:
        now = _state_of(place)
    except InputError as error:
        return "lost", str(error)
    if not any(_same(now, each) for each in _between(trial, before, after)):
        return "between", f"{now} is neither {before} nor {after}"
    again = place.command(trial.words)
    answered = trial.words.startswith(("forget", "remember")) and not _same(now, before)
    if again.traceback or (again.status != 0 and not (answered and again.status == 2)):
        return "unrepeatable", again.said[-800:]
    for words in ("purge RUN", "refresh RUN") if "--refresh" in trial.words else ("purge RUN",) if answered else ():
        if (mended := place.command(words)).status:
            return "unrepeatable", mended.said[-800:]
    extra = set(place.files()) - set(files)
    return ("leftovers", ", ".join(sorted(extra))) if extra else (None, "")


def _between(trial: Trial, before: dict, after: dict) -> list[dict]:
    """The states that a cut-off command may leave: of two requests in one, also that after the first."""
    if "--refresh" not in trial.words:
        return [before, after]
    return [before, {"fit": before["fit"], "memory": (None, None, after["memory"][2], ("forget",))}, after]


def _same(now: dict, then: dict) -> bool:
    """Equal, but for what a state does not say."""
    if now["fit"] != then["fit"] or (now["memory"] is None) != (then["memory"] is None):
        return False
    pairs = zip(now["memory"] or (), then["memory"] or (), strict=True)
    return all(right is None or left == right for left, right in pairs)
