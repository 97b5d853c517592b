"""The command line. It parses, calls the library, and prints; it holds no logic of its own.

What a command needs is imported when it runs, so that ``--help`` answers at once.
"""

import logging
import sys
from collections.abc import Sequence

import typer
from rich.logging import RichHandler
from rich.text import Text

from fastntk.cli.commands import evidence, fitting, memory, plugins, requests
from fastntk.common.errors import InputError, PeerLost
from fastntk.common.launch import first, launched
from fastntk.common.progress import console

app = typer.Typer(
    name="fastntk",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Remove the influence of chosen training data from a fine-tuned vision model, without retraining it.\n\n"
    "The usual order: **fit** a model, **prepare** its memory once, **audit** it, then **forget** as requests come; "
    "**evaluate** shows the result beside models retrained without the data. **demo** does all of it on packaged data.",
)
for command in (
    evidence.demo,
    fitting.fit,
    fitting.models,
    fitting.tunables,
    plugins.plugins,
    memory.prepare,
    memory.plan,
    evidence.audit,
    requests.owners,
    requests.forget,
    requests.remember,
    requests.learn,
    memory.purge,
    memory.ledger,
    memory.verify,
    memory.refresh,
    memory.export,
    evidence.evaluate,
    evidence.bench,
):
    app.command()(command)

_INTERRUPTED = 130  # with which typer ends by itself as well


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: a caller's mistake is one line on standard error and exit status 2.

    Args:
        arguments: in place of the process's own.
    """
    handler = RichHandler(console=console, show_time=False, show_level=False, show_path=False)
    logging.basicConfig(level=logging.INFO if first() else logging.WARNING, format="%(message)s", handlers=[handler])
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if launched() and given[:1] not in (["fit"], ["prepare"]):
            raise InputError("only fit and prepare run in several processes. Start this command without a launcher.")
        app(given)
    except (InputError, PeerLost) as error:
        told = str(error).encode(errors="backslashreplace").decode()  # names of files may be no UTF-8
        console.print(Text("error: ", style="red").append(told, style="default"), highlight=False, soft_wrap=True)
        sys.exit(2 if isinstance(error, InputError) else 1)
    except OSError as error:
        console.print(Text("error: ", style="red").append(_of_system(error), style="default"), highlight=False)
        sys.exit(2)
    except (KeyboardInterrupt, SystemExit) as end:
        if isinstance(end, SystemExit) and end.code != _INTERRUPTED:
            if launched() and not end.code:
                from fastntk.common.distributed import leave

                leave()
            raise
        console.print(
            "interrupted. What the command had completed stays, and long work goes on from there with the same "
            "command. Which requests are answered, and which purged, says: fastntk ledger RUN."
        )
        sys.exit(_INTERRUPTED)


def _of_system(error: OSError) -> str:
    """What the system says of a file, in a line."""
    name = "" if error.filename is None else str(error.filename).encode(errors="backslashreplace").decode() + ": "
    return f"{name}{error.strerror or error}. Name another file or folder, or make it readable and writable."
