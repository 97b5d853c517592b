"""A folder that timm's or transformers' own ``from_pretrained`` loads: configuration, weights, and a card."""

import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL.Image import Resampling
from torch import nn

from fastntk.common.errors import InputError
from fastntk.common.files import check_writable, sync
from fastntk.inputs.images import Preprocessing
from fastntk.inputs.libraries import timm, transformers
from fastntk.inputs.makers import Logits, resolved


def check_hub(name: str, folder: Path) -> None:
    """Raises ``InputError`` unless a model of that name can be written so, to a folder that is new or empty."""
    if resolved(name)[0] not in _SAVERS:
        raise InputError(f"{name} is none of timm's or transformers' models, so neither of them loads it. Use --out.")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} is there already. Name a folder that is new, or empty.")
    check_writable(folder.absolute().parent)


def write_hub(
    name: str, model: nn.Module, preprocessing: Preprocessing, classes: Sequence[str], card: str, folder: Path
) -> str:
    """Write such a folder, whole or not at all; returns the expression that loads it.

    Args:
        name: of the model, as ``load_model`` takes it.
        model: without adapters or prompts, which the libraries' own architectures have not.
        preprocessing: the model's.
        classes: their names.
        card: the text of ``README.md``.
        folder: new or empty.

    Raises:
        InputError: like ``check_hub``.
    """
    check_hub(name, folder)
    library, short = resolved(name)
    staged = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.absolute().parent))
    try:
        load = _SAVERS[library](short, model, preprocessing, list(classes), staged)
        (staged / "README.md").write_text(f"---\nlibrary_name: {library}\ntags: [image-classification]\n---\n{card}")
        staged.chmod(0o755)
        for each in (*staged.rglob("*"), staged):
            sync(each)
        if folder.exists():
            folder.rmdir()
        os.replace(staged, folder)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    return load.format(folder)


def _by_timm(name: str, model: nn.Module, preprocessing: Preprocessing, classes: list[str], folder: Path) -> str:
    side = preprocessing.size
    seen = {"input_size": [3, side, side], "mean": list(preprocessing.mean), "std": list(preprocessing.std)}
    config: dict[str, Any] = {
        "num_classes": len(classes),
        "label_names": classes,
        "pretrained_cfg": {**seen, "crop_pct": 1.0, "crop_mode": "center", "interpolation": "bilinear"},
    }
    fixed: Any = getattr(model, "pretrained_cfg", {})
    sized = {"img_size": side} if fixed.get("fixed_input_size") else None
    timm().models.save_for_hf(model, str(folder), model_config=config, model_args=sized, safe_serialization=True)
    return "timm.create_model('local-dir:{}', pretrained=True)"


def _by_transformers(
    name: str, model: nn.Module, preprocessing: Preprocessing, classes: list[str], folder: Path
) -> str:
    if not isinstance(model, Logits):
        raise InputError(f"{name} is no classifier of transformers.")
    inner: Any = model.model
    inner.config.id2label = dict(enumerate(classes))
    inner.config.label2id = {each: number for number, each in enumerate(classes)}
    inner.save_pretrained(folder)
    _processor(preprocessing, model.bgr).save_pretrained(folder)
    return "transformers.AutoModelForImageClassification.from_pretrained('{}')"


def _processor(preprocessing: Preprocessing, bgr: bool) -> Any:
    """An image processor of transformers' that does what ``Images`` does, whatever the model's own does: the shorter
    side to ``size``, the middle of the longer one, then mean and std; where channels are flipped there is neither."""
    side, library = preprocessing.size, transformers()
    size = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    seen = {**size, "resample": Resampling.BILINEAR}
    if bgr:
        return library.MobileViTImageProcessor(**seen)
    return library.BitImageProcessor(
        **seen, image_mean=list(preprocessing.mean), image_std=list(preprocessing.std), do_convert_rgb=True
    )


_SAVERS: dict[str, Callable[[str, nn.Module, Preprocessing, list[str], Path], str]] = {
    "timm": _by_timm,
    "transformers": _by_transformers,
}
