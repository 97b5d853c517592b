import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

import fastntk
from fastntk.inputs.images import Preprocessing
from fastntk.inputs.libraries import peft, transformers
from fastntk.inputs.weights import load_weights, read_weights, rename_by_order

SMALL = "mobilenetv3_small_050"


def test_timm_and_torchvision_names():
    model, preprocessing = fastntk.load_model(SMALL, 4, size=64)
    assert model(torch.zeros(2, 3, 64, 64)).shape == (2, 4)
    assert preprocessing == Preprocessing(64, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert not model.training
    model, preprocessing = fastntk.load_model("torchvision/resnet18", 5)
    assert model.fc.out_features == 5
    assert preprocessing.size == 224
    vit, _ = fastntk.load_model("torchvision/vit_b_32", 3, size=64)
    assert vit(torch.zeros(1, 3, 64, 64)).shape == (1, 3)
    dino, preprocessing = fastntk.load_model("vit_tiny_patch16_224", 3, size=32)
    assert dino(torch.zeros(1, 3, 32, 32)).shape == (1, 3)
    assert preprocessing.mean == (0.5, 0.5, 0.5)


def test_same_seed_same_model():
    left, right, other = (fastntk.load_model(SMALL, 4, seed=seed)[0].state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(left[name], right[name]) for name in left)
    assert not torch.equal(left["classifier.weight"], other["classifier.weight"])
    assert left["classifier.weight"].std() == pytest.approx(0.01, rel=0.1)
    assert not left["classifier.bias"].any()


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_local_weights_keep_a_head_of_other_classes(suffix, tmp_path):
    source, _ = fastntk.load_model(SMALL, 7, seed=3)
    path = tmp_path / f"w{suffix}"
    state = {name: tensor.contiguous() for name, tensor in source.state_dict().items()}
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    model, _ = fastntk.load_model(SMALL, 4, weights=path)
    loaded = model.state_dict()
    assert all(torch.equal(loaded[name], state[name]) for name in state if "classifier" not in name)
    assert loaded["classifier.weight"].shape[0] == 4


def test_weights_under_other_names_are_paired_in_order():
    source, target = (fastntk.load_model(SMALL, 4, seed=seed)[0] for seed in (1, 2))
    foreign = {f"net.{i}": tensor for i, tensor in enumerate(source.state_dict().values()) if tensor.ndim}
    load_weights(target, rename_by_order(foreign, target))
    assert torch.equal(target.conv_stem.weight, source.conv_stem.weight)
    assert torch.equal(target.bn1.running_var, source.bn1.running_var)
    with pytest.raises(fastntk.InputError, match="needs"):
        rename_by_order(dict(list(foreign.items())[:5]), target)
    with pytest.raises(fastntk.InputError, match="'net.1' has shape"):
        rename_by_order(dict(list(foreign.items())[1:]), target)


def test_weights_that_do_not_fit_name_the_tensor():
    model, _ = fastntk.load_model(SMALL, 4)
    state = dict(model.state_dict())
    with pytest.raises(fastntk.InputError, match="lack tensor 'conv_stem.weight'"):
        load_weights(model, {name: tensor for name, tensor in state.items() if name != "conv_stem.weight"})
    with pytest.raises(fastntk.InputError, match="unknown tensor 'extra'"):
        load_weights(model, {**state, "extra": torch.zeros(1)})
    with pytest.raises(fastntk.InputError, match=r"'bn1.weight' has shape \[3\], the model needs \[16\]"):
        load_weights(model, {**state, "bn1.weight": torch.zeros(3)})
    with pytest.raises(fastntk.InputError, match=r"'classifier.weight' has shape"):
        load_weights(model, {**state, "classifier.weight": torch.zeros(3, 3)}, with_head=True)


def test_unreadable_weights(tmp_path):
    for name, content in (("a.pt", b"PK\x03\x04 cut"), ("b.safetensors", b"\x10"), ("c.pth", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(fastntk.InputError, match=f"{name} cannot be read as weights"):
            read_weights(tmp_path / name)
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(fastntk.InputError, match="not a state dict"):
        read_weights(tmp_path / "list.pt")
    with pytest.raises(fastntk.InputError, match="there is no weights file"):
        read_weights(tmp_path / "none.pt")


@pytest.mark.parametrize(
    ("name", "classes", "message"),
    [
        ("resnet81", 3, "neither timm nor torchvision.*Did you mean resnet18"),
        ("keras/resnet", 3, "unknown library 'keras'"),
        ("resnet18", 1, "from 2 to 1,000,000 classes"),
    ],
)
def test_unknown_models(name, classes, message):
    with pytest.raises(fastntk.InputError, match=message):
        fastntk.load_model(name, classes)


def saved(folder, **options):
    """A small vision transformer with its image processor, as transformers writes them."""
    auto = transformers()
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12}
    config = auto.AutoConfig.for_model("vit", image_size=16, patch_size=8, num_labels=5, **sizes, **options)
    model = auto.AutoModelForImageClassification.from_config(config)
    model.save_pretrained(folder)
    auto.ViTImageProcessor(
        size={"height": 16, "width": 16}, image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6]
    ).save_pretrained(folder)
    return model.eval()


def test_what_transformers_saved(tmp_path):
    source, name = saved(tmp_path), f"transformers/{tmp_path}"
    for classes in (5, 3):
        model, preprocessing = fastntk.load_model(name, classes)
        assert preprocessing == Preprocessing(16, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
        state, images = model.state_dict(), torch.randn(2, 3, 16, 16)
        assert all(torch.equal(state[f"model.{k}"], t) for k, t in source.state_dict().items() if "classifier" not in k)
        assert model(images).shape == (2, classes)
    fastntk.load_model(name, 3)[0].load_state_dict(state, strict=True)
    with pytest.raises(fastntk.InputError, match="position_embeddings' is missing or of another shape.*side of 32"):
        fastntk.load_model(name, 3, size=32)


def test_a_type_of_transformers_with_random_weights():
    model, preprocessing = fastntk.load_model("transformers/resnet", 3, size=32)
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 3)
    assert preprocessing == Preprocessing(32, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    with pytest.raises(fastntk.InputError, match="no image classifier 'nonesuch'"):
        fastntk.load_model("transformers/nonesuch", 3)


def test_a_user_s_own_function(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "import fastntk, torch\n"
        "net = lambda n: torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, n))\n"
        "def make(classes): return net(classes), fastntk.Preprocessing(2, (0.5,) * 3, (0.5,) * 3)\n"
        "def bare(classes): return net(classes)\n"
    )
    model, preprocessing = fastntk.load_model(f"{file}:make", 4)
    assert model(torch.zeros(1, 3, 2, 2)).shape == (1, 4)
    assert preprocessing.size == 2
    for name, message in ((f"{file}:bare", "must return a module"), (f"{file}:none", "no function 'none'")):
        with pytest.raises(fastntk.InputError, match=message):
            fastntk.load_model(name, 4)
    with pytest.raises(fastntk.InputError, match="there is no file"):
        fastntk.load_model(f"{tmp_path}/other.py:make", 4)


def test_a_missing_extra_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    peft.cache_clear()
    with pytest.raises(fastntk.InputError, match=r"pip install 'fastntk\[lora\]'"):
        peft()


def test_torchvision_imports_in_a_fresh_process_beside_any_torch():
    code = (
        "from fastntk.inputs.libraries import timm, torchvision; print(torchvision().__version__, timm().__version__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
