"""The options that commands of the command line share, their help, and what their values mean."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastntk.common.errors import InputError

if TYPE_CHECKING:
    from fastntk.memory.certificate import Removal

SELECTED = ["bn", "head"]
"""What is tuned if nothing is said."""


def said(value: str | None) -> str | None:
    """Refuses an option that was given and is empty."""
    if value == "":
        raise typer.BadParameter("it is empty. Leave it out, or say what.")
    return value


def place(text: str) -> Path:
    """A folder, which is not the current one by mistake: ``RUN`` may be an empty variable of a shell."""
    said(text)
    return Path(text)


Folder = Annotated[
    Path,
    typer.Argument(parser=place, metavar="RUN", help="The run folder: everything about one model lies in it."),
]
Model = Annotated[
    str, typer.Option(help="timm/NAME, torchvision/NAME, transformers/TYPE or /FOLDER, or FILE.py:FUNCTION.")
]
Data = Annotated[
    str,
    typer.Option(
        callback=said, help="A folder of class folders, an .npz (x, y), a saved Hugging Face or a torchvision dataset."
    ),
]
Root = Annotated[str | None, typer.Option(callback=said, help="The folder that a torchvision dataset lies in.")]
Select = Annotated[
    list[str] | None,
    typer.Option(
        help="What to tune, repeatable: bn, ln, norm, bias, head, prompt:10, deep-prompt:10, lora:8, last:1 (block), "
        "all, or a regular expression over parameter names; bn and head if nothing is said. `fastntk tunables MODEL` "
        "shows what there is."
    ),
]
Weights = Annotated[
    str | None, typer.Option(callback=said, help="A local state dict (.safetensors, .pt), or 'pretrained'.")
]
Size = Annotated[int | None, typer.Option(min=1, help="Side of the input in pixels; the model's own by default.")]
IdColumn = Annotated[
    str | None,
    typer.Option(callback=said, help="The column (array of an .npz) that names the samples; their index by default."),
]
Device = Annotated[str, typer.Option(help="Where to compute: cpu, cuda, cuda:1, ...")]
SEED = {"min": 0, "max": 2**32 - 1}
"""What every library takes for one."""

Seed = Annotated[int, typer.Option(**SEED, help="Of the head's first values and the order of the samples.")]
LossName = Annotated[str, typer.Option("--loss", help="squared or cross-entropy.")]
Smoothing = Annotated[float, typer.Option("--label-smoothing", help="Of cross-entropy, from 0 to below 1.")]
Fitted = Annotated[
    str | None,
    typer.Option(
        callback=said,
        help="Weights that your own fit ended with: nothing is fitted, the start is rebuilt from --weights.",
    ),
]
HeadStart = Annotated[
    str | None,
    typer.Option(
        callback=said,
        help="With --fitted, what its head started from: zero (the default), or fitted (it is not pulled at).",
    ),
]
Optimizer = Annotated[str, typer.Option(help="adam, adamw or sgd (with a momentum of 0.9).")]
Decay = Annotated[float, typer.Option("--weight-decay", help="Per sample; of adamw, its own.")]
DecayToward = Annotated[str, typer.Option(help="What weight decay pulls to: start (before fitting) or zero.")]
Augment = Annotated[
    list[str] | None, typer.Option(help="Change every training image at random, repeatable: flip, crop.")
]
Mixup = Annotated[
    str, typer.Option(help="off, and nothing else: what is fitted to mixtures of images cannot forget one of them.")
]
Validation = Annotated[
    str | None,
    typer.Option(callback=said, help="Data, as for --data (a test split, if there is one), to measure every epoch on."),
]
Form = Annotated[
    str,
    typer.Option(
        help="primal (p x p), dual (nC x nC), convex (cross-entropy), convex-disk, layerwise, matrix-free, or auto."
    ),
]
Classes = Annotated[str, typer.Option(help="Classes a sample that the convex form keeps: auto, all, or a number.")]
Sums = Annotated[str, typer.Option(help="Dtype of the primal form's sums: float64, or float32 for half the memory.")]
Precision = Annotated[str, typer.Option(help="Of the network: full, tf32 (NVIDIA only) or bf16.")]
Probes = Annotated[
    int | None, typer.Option(help="Random combinations of the logits in place of all classes; answers become rough.")
]
Workers = Annotated[int, typer.Option(min=0, max=32, help="Processes that read images ahead.")]
Moved = Annotated[
    str | None,
    typer.Option(
        "--data",
        callback=said,
        help="Where the training data lie now, if not where they did; of a torchvision dataset its folder.",
    ),
]
FittedTo = Annotated[
    str | None,
    typer.Option(callback=said, help="Where the training data lie now, if not where they did: --data elsewhere."),
]
MovedModel = Annotated[
    str | None, typer.Option("--model", callback=said, help="What makes the model now, if not what did: as for fit.")
]
Core = Annotated[
    str | None,
    typer.Option(
        callback=said,
        help="Fit these alone in the ordinary way, and solve for the rest, which is then forgotten exactly: a pattern "
        "of ids, as `*/public/*`, or a file of ids; or other images, also of other classes: a folder or an .npz. They "
        "themselves cannot be forgotten.",
    ),
]
Noise = Annotated[
    str | None,
    typer.Option(
        "--removal",
        callback=said,
        metavar="EPS,DELTA",
        help="With --core: noise in the objective, by which forgetting is an (eps, delta)-certified removal: 1,1e-5.",
    ),
]
Owners = Annotated[
    str | None,
    typer.Option(
        callback=said,
        help="Whose the images are: a FILE.csv (a header, then id, owner), a column, or a pattern over ids with one "
        "group, as '^[^/]+/([^/]+)/' (class/owner/image).",
    ),
]
Owner = Annotated[list[str] | None, typer.Option(help="All samples of an owner, repeatable.")]
Requests = Annotated[
    Path | None,
    typer.Option(help="A file of requests: a CSV with the columns request, owner, ids and date, or lines of JSON."),
]
Certificates = Annotated[Path | None, typer.Option(help="With --requests, the folder for certificates and a summary.")]
Match = Annotated[list[str] | None, typer.Option(help="All samples whose id matches, repeatable: `*/alice/*`.")]
WithCopies = Annotated[
    bool, typer.Option("--with-copies", help="Take the samples too that show the very same image, pixel by pixel.")
]
Near = Annotated[
    float | None,
    typer.Option(
        help="Name the samples that are so near to a forgotten one (1: like two at random; try 0.4); all are read."
    ),
]
Ids = Annotated[
    str | None,
    typer.Option(help="Places in the training set, as 3,17; paths in a folder of images; or what --id-column holds."),
]
IdsFile = Annotated[Path | None, typer.Option(help="A text file of such ids, one a line.")]
Defer = Annotated[bool, typer.Option("--defer-purge", help="Leave the rewriting of the memory to a later command.")]
Refresh = Annotated[
    bool, typer.Option(help="Re-anchor afterwards, so that the folder tells nothing of them: a pass over the rest.")
]
Gain = Annotated[bool, typer.Option(help="Multiply the step by the audit's gain (below 1: with a new head).")]
NewHead = Annotated[
    bool | None,
    typer.Option("--exact-head/--step-alone", help="Solve the head anew first, or not; if it can be, by default."),
]
Full = Annotated[bool, typer.Option("--full", help="Solve anew from the sums, to compare.")]
CertificateFile = Annotated[
    Path | None, typer.Option(help="A new file for the certificate (JSON), with the salt of its hashed ids.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]


def number(text: str) -> float:
    """What ``--ridge`` says, if it is not 'auto'.

    Raises:
        InputError: no number.
    """
    try:
        return float(text)
    except ValueError as error:
        raise InputError(f"--ridge must be 'auto' or a number, not {text!r}.") from error


def classes(text: str) -> int | str:
    """What ``--classes`` says."""
    return int(text) if text.isdecimal() and len(text) < 10 else text


def loss(name: str, smoothing: float) -> Any:
    """The loss that ``--loss`` and ``--label-smoothing`` say.

    Raises:
        InputError: there is none of that name, or it has no smoothing.
    """
    from fastntk.tuning.losses import CrossEntropy, loss_named

    found = loss_named(name)
    if not smoothing:
        return found
    if not isinstance(found, CrossEntropy):
        raise InputError("--label-smoothing goes with --loss cross-entropy.")
    return CrossEntropy(smoothing)


def recipe(**fields: Any) -> Any:
    """How to fit: ``fastntk.Recipe`` of its fields."""
    from fastntk.tuning.recipe import Recipe

    return Recipe(**fields)


def head_start(text: str | None, fitted: str | None) -> str:
    """What ``--head-start`` says.

    Raises:
        InputError: it is given, and nothing was fitted elsewhere.
    """
    if text is not None and fitted is None:
        raise InputError("--head-start goes with --fitted: what is fitted here starts from --seed.")
    return "zero" if text is None else text


def removal(text: str | None, core: str | None) -> "Removal | None":
    """What ``--removal`` says.

    Raises:
        InputError: it is no pair of numbers that noise can be drawn for, or there is no core.
    """
    if text is None:
        return None
    from fastntk.memory.certificate import Removal

    if core is None:
        raise InputError("--removal goes with --core: noise certifies a fit that forgets exactly.")
    try:
        eps, delta = map(float, text.split(","))
    except ValueError as error:
        raise InputError(f"--removal is eps and delta, as 1,1e-5, not {text!r}.") from error
    found = Removal(eps, delta)
    found.check()
    return found


def no_mixup(text: str) -> None:
    """Raises ``InputError`` unless ``--mixup`` says off."""
    if text != "off":
        raise InputError(
            f"--mixup must be off, not {text!r}: a fit to mixtures of two images has no share that is one image's, "
            "which could be taken out. Use --augment, which changes each image by itself."
        )


def numerics(sums: str, precision: str, class_probes: int | None, workers: int) -> Any:
    """The options that plan and prepare share, as the library takes them: ``fastntk.Numerics``.

    Raises:
        InputError: sums of another dtype, or no such precision.
    """
    import torch

    from fastntk.jacobians.numerics import Numerics

    dtype = {"float64": torch.float64, "float32": torch.float32}.get(sums)
    if dtype is None:
        raise InputError(f"--sums must be float64 or float32, not {sums!r}.")
    return Numerics(precision=precision, dtype=dtype, workers=workers, class_probes=class_probes)


_OF_RUN = "run.json", "initial.safetensors", "model.safetensors", "memory", "partial", "lock", "underway"


def check_certificate(path: Path | None, run: Path) -> None:
    """Like ``check_out``, for a certificate, which no other one takes the place of: each has a salt of its own."""
    if path and path.is_file():
        raise InputError(f"{path} is there already. Name a file for this request alone: a certificate is not replaced.")
    check_out(path, run)


def check_out(path: Path | None, run: Path) -> None:
    """Make ready for a file that is to be written later; what a killed command left of it goes.

    Raises:
        InputError: it cannot be written, or would take the place of one of the run's own.
    """
    from fastntk.common.files import aside, check_writable, discard

    if path and any(path.resolve().is_relative_to(run.resolve() / name) for name in _OF_RUN):
        raise InputError(f"{path} is the run's own. Name another file.")
    if path and path.exists() and not path.is_file():
        raise InputError(f"{path} is a {'folder' if path.is_dir() else 'device or a pipe'}. Name a file.")
    if path:
        check_writable(path.parent)
        discard(aside(path))


def text_of(path: Path) -> str:
    """A text file.

    Raises:
        InputError: it cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8-sig", errors="surrogateescape")  # names of files may be no UTF-8
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as text ({error}).") from error
    if "\0" in text:
        raise InputError(f"{path} is no text in UTF-8. Save it as that.")
    return text
