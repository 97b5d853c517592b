"""A folder that timm and transformers load: the same logits, without fastntk, and a card that counts."""

import json
import re

import numpy as np
import pytest
import torch
from alone import alone
from PIL import Image
from runs import RATE, refuse, succeed

from fastntk.cli.run import Run
from fastntk.inputs.hub import _processor
from fastntk.inputs.images import Images
from fastntk.inputs.libraries import timm, transformers
from fastntk.inputs.models import load_model

PHOTO = Image.fromarray(
    np.kron(np.random.default_rng(1).integers(0, 255, (6, 12, 3)), np.ones((20, 20, 1))).astype(np.uint8)
)
"""Twice as wide as it is high."""

CASES = {
    "a CNN of timm": ("mobilenetv3_small_050", 32, ["bn", "head"]),
    "a transformer of timm, of another size": ("vit_tiny_patch16_224", 32, ["lora:2", "head"]),
    "one of transformers": ("transformers/{small}", None, ["lora:2", "head"]),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "d.npz"
    x = np.random.default_rng(0).integers(0, 255, (20, 32, 32, 3), dtype=np.uint8)
    np.savez(path, x=x, y=np.arange(20) % 2, classes=["cat", "dog"])
    return path


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A small vision transformer that transformers saved."""
    folder, library = tmp_path_factory.mktemp("small"), transformers()
    config = library.ViTConfig(image_size=32, patch_size=8, hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
    library.ViTForImageClassification(config).save_pretrained(folder)
    library.ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=[0.1, 0.2, 0.3]).save_pretrained(folder)
    return folder


def as_fitted(shown, preprocessing):
    """The photo, as the folder's own preprocessing shows it, is what the model was fitted to."""
    expected = Images([PHOTO], [0], ["a"], preprocessing)[0][0]
    assert float((shown - expected).abs().mean()) < 0.02 / min(preprocessing.std), "pixels, of 0 to 1"


@pytest.mark.parametrize("kind", ["efficientnet", "convnext", "resnet", "vit", "mobilevit"])
def test_the_image_processor_shows_what_the_model_was_fitted_to(kind, tmp_path):
    """Whatever the one of its own type does: squash, crop a share, divide twice, flip channels."""
    model, preprocessing = load_model(f"transformers/{kind}", 2, size=64)
    _processor(preprocessing, model.bgr).save_pretrained(tmp_path)
    processor = transformers().AutoImageProcessor.from_pretrained(tmp_path)
    shown = processor(images=PHOTO, return_tensors="pt")["pixel_values"][0]
    as_fitted(shown.flip(0) if model.bgr else shown, preprocessing)


def fitted(folder, data, model, size, select):
    chosen = [part for each in select for part in ("--select", each)]
    sized = ["--image-size", size] if size else []
    succeed("fit", folder, "--model", model, *sized, "--data", data, "--epochs", 1, *RATE, *chosen)
    succeed("prepare", folder)
    succeed("forget", folder, "--ids", "3,4,5")


@pytest.mark.parametrize("case", CASES)
def test_the_library_loads_the_folder(case, data, small, tmp_path):
    name, size, select = CASES[case]
    name = name.format(small=small)
    run, folder = tmp_path / "run", tmp_path / "hub"
    fitted(run, data, name, size, select)
    said = succeed("export", run, "--hub", folder)
    assert f"{folder}" in said
    memory, images = Run(run).memory()
    batch = torch.stack([images[k][0] for k in range(4)])
    memory.model.load_state_dict(memory.parameters, strict=False)
    expected = memory.model(batch)
    if "/" in name:
        loaded = transformers().AutoModelForImageClassification.from_pretrained(folder).eval()
        processor = transformers().AutoImageProcessor.from_pretrained(folder)
        logits = loaded(pixel_values=batch).logits
        assert loaded.config.id2label == {0: "cat", 1: "dog"}
        shown = processor(images=PHOTO, return_tensors="pt")["pixel_values"][0]
    else:
        loaded = timm().create_model(f"local-dir:{folder}", pretrained=True).eval()
        logits = loaded(batch)
        config = loaded.pretrained_cfg
        assert config["label_names"] == ["cat", "dog"]
        assert (config["input_size"][-1], tuple(config["mean"])) == (32, images.preprocessing.mean)
        given = timm().data.resolve_data_config(pretrained_cfg=loaded.pretrained_cfg)
        shown = timm().data.create_transform(**given)(PHOTO)
    as_fitted(shown, images.preprocessing)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    text = (folder / "README.md").read_text()
    assert "| forgotten | 1 | 3 |" in text
    assert "| left in the model | | 17 |" in text
    assert not re.search(r"[0-9a-f]{64}", text), "no hash"
    refuse("is there already", "export", run, "--hub", folder)
    assert [each.name for each in tmp_path.iterdir() if each.name.startswith(".")] == []


def test_without_fastntk(data, tmp_path):
    """A process that has timm alone."""
    fitted(tmp_path / "run", data, *CASES["a CNN of timm"])
    load = json.loads(succeed("export", tmp_path / "run", "--hub", tmp_path / "hub", "--json"))["load"]
    code = f"print(tuple({load}.eval()(torch.zeros(1, 3, 32, 32)).shape))"
    assert alone(code) == "(1, 2)\n"


def test_what_no_library_loads_is_refused(data, tmp_path):
    fitted(tmp_path / "run", data, "vit_tiny_patch16_224", 32, ["prompt:2", "head"])
    refuse("prompts are in no library's architecture", "export", tmp_path / "run", "--hub", tmp_path / "hub")
    refuse("leave out one", "export", tmp_path / "run", "--hub", tmp_path / "hub", "--out", tmp_path / "w.pt")
    fitted(tmp_path / "own", data, "torchvision/mobilenet_v3_small", 32, ["head"])
    refuse("none of timm's or transformers' models", "export", tmp_path / "own", "--hub", tmp_path / "hub")
    assert not (tmp_path / "hub").exists()
