"""Every selector on every library's models: one contract."""

import copy
import re
from pathlib import Path

import oracles
import pytest
import torch
from cases import CLASSES
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import fastntk
from fastntk.inputs.heads import head_modules
from fastntk.inputs.libraries import timm, torchvision, transformers
from fastntk.inputs.makers import Logits
from fastntk.inputs.structure import blocks
from fastntk.jacobians.per_sample import PerSampleJacobian
from fastntk.tuning.lora import lora_targets
from fastntk.tuning.parameters import snapshot
from fastntk.tuning.prompts import prompts_of
from fastntk.tuning.selectors import tunables

WIDTH, BLOCKS = 8, 2


class Own(nn.Module):
    """A user's own transformer: a list of blocks, mean pooling, no class token."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(WIDTH)
            self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
            self.mlp = nn.Sequential(nn.Linear(WIDTH, 12), nn.GELU(), nn.Linear(12, WIDTH))

        def forward(self, tokens: Tensor) -> Tensor:
            normed = self.norm(tokens)
            tokens = tokens + self.attention(normed, normed, normed, need_weights=False)[0]
            return tokens + self.mlp(tokens)

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, 8, 8)
        self.body = nn.ModuleList(self.Block() for _ in range(BLOCKS))
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        for block in self.body:
            tokens = block(tokens)
        return self.head(tokens.mean(1))


def of_transformers(kind: str, **options) -> nn.Module:
    auto = transformers()
    return Logits(
        auto.AutoModelForImageClassification.from_config(auto.AutoConfig.for_model(kind, num_labels=CLASSES, **options))
    )


TRANSFORMERS = {
    "timm": lambda: timm().create_model(
        "vit_tiny_patch16_224",
        img_size=16, patch_size=8, embed_dim=WIDTH, depth=BLOCKS, num_heads=2, num_classes=CLASSES,
    ),
    "timm average": lambda: timm().create_model(
        "vit_small_patch14_dinov2",
        img_size=16, patch_size=8, embed_dim=WIDTH, depth=BLOCKS, num_heads=2, num_classes=CLASSES,
        global_pool="avg", reg_tokens=2,
    ),
    "torchvision": lambda: torchvision().models.VisionTransformer(
        image_size=16, patch_size=8, num_layers=BLOCKS, num_heads=2, hidden_dim=WIDTH, mlp_dim=12, num_classes=CLASSES
    ),
    "transformers": lambda: of_transformers(
        "vit",
        hidden_size=WIDTH, num_hidden_layers=BLOCKS, num_attention_heads=2, intermediate_size=12, image_size=16,
        patch_size=8,
    ),
    "own": Own,
}  # fmt: skip
NETWORKS = {
    "timm cnn": lambda: timm().create_model("mobilenetv3_small_050", num_classes=CLASSES),
    "torchvision cnn": lambda: torchvision().models.shufflenet_v2_x0_5(num_classes=CLASSES),
    "transformers cnn": lambda: of_transformers(
        "resnet", embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic"
    ),
}
MODELS = {**TRANSFORMERS, **NETWORKS}
ON_TRANSFORMERS = (
    "ln",
    "norm",
    "bias",
    "head",
    "prompt:3",
    "deep-prompt:2",
    "deep-prompt:0,2",
    "lora:2",
    "last:1",
    "all",
)
ON_NETWORKS = ("bn", "norm", "bias", "head", "last:1", r"lora:1:conv_pw$|layer\.0\.convolution|branch2\.0")
PAIRS = [
    *((name, selector) for name in TRANSFORMERS for selector in ON_TRANSFORMERS),
    *((name, selector) for name in NETWORKS for selector in ON_NETWORKS),
]


def made(name: str) -> nn.Module:
    """The model, with nothing in it zero or one that a derivative could hide behind."""
    torch.manual_seed(0)
    model = MODELS[name]().double().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model


def images(name: str, count: int = 3) -> Tensor:
    side = 16 if name in TRANSFORMERS else 32
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def shaken(model: nn.Module, parameters: dict[str, nn.Parameter]) -> None:
    """The tuned parameters moved: adapters start where half of their derivatives vanish."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(("name", "selector"), PAIRS)
def test_contract(name, selector, tmp_path):
    model, x = made(name), images(name)
    before, logits = snapshot(dict(model.named_parameters())), model(x).detach()
    parameters = fastntk.tune(model, selector, "head")
    shaken(model, parameters)
    jacobian = PerSampleJacobian(model, snapshot(parameters))
    expected = oracles.jacobian(model, jacobian.parameters, jacobian.layout(x), x)
    torch.testing.assert_close(jacobian(x).dense(), expected, rtol=1e-8, atol=1e-10)
    assert (expected.flatten(0, 1).abs().amax(0) > 0).double().mean() > 0.1

    save_file({key: tensor.contiguous() for key, tensor in model.state_dict().items()}, tmp_path / "w.safetensors")
    fresh = made(name)
    fastntk.tune(fresh, selector, "head")
    fresh.load_state_dict(load_file(tmp_path / "w.safetensors"), strict=True)
    assert torch.equal(fresh(x), model(x))

    for added, take_off in (("prompt", fastntk.remove_prompts), ("lora", fastntk.remove_lora)):
        if added in selector:
            take_off(model)
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    moved = {key for key in before if not torch.equal(after[key], before[key])}
    assert moved == set(parameters) & set(before)
    with torch.no_grad():
        for key in moved:
            after[key].copy_(before[key])
    model.requires_grad_(True)  # as at first: torch's attention rounds otherwise when nothing in it is tuned
    assert torch.equal(model(x), logits)


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_prompts_are_tokens_that_every_block_sees(name):
    """Against the definition, token by token: prompts enter, attend and are attended to, and leave."""
    model, x = made(name), images(name)
    prompts = fastntk.add_prompts(model, 3, seed=4)
    first, *_, last = blocks(model).values()
    seen = []
    handles = [
        first.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0])),
        last.register_forward_hook(lambda _, inputs, output: seen.append(output)),
    ]
    with_prompts = model(x)
    entered, left = seen
    for handle in handles:
        handle.remove()
    tokens, own = entered.shape[1], prompts.tokens[0]
    assert torch.equal(entered[:, -3:], own.expand(len(x), -1, -1))
    assert left.shape[1] == tokens - 3
    assert not torch.allclose(with_prompts, made(name)(x))
    order = torch.tensor([2, 0, 1])
    with torch.no_grad():
        own.copy_(own[:, order])
    torch.testing.assert_close(model(x), with_prompts)  # their order means nothing


def test_copies_have_prompts_of_their_own():
    model, x = made("timm"), images("timm")
    fastntk.add_prompts(model, 2)
    copied = copy.deepcopy(model)
    before = copied(x)
    with torch.no_grad():
        prompts_of(model).tokens[0].mul_(3)
    assert torch.equal(copied(x), before)
    with torch.no_grad():
        prompts_of(copied).tokens[0].mul_(3)
    assert torch.equal(copied(x), model(x))
    fastntk.remove_prompts(copied)
    assert not torch.equal(copied(x), model(x))


def test_prompts_take_any_size_the_model_takes():
    model = timm().create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=WIDTH, depth=1, num_heads=2, dynamic_img_size=True
    )
    fastntk.add_prompts(model, 2)
    assert model.eval()(torch.zeros(1, 3, 24, 16)).shape == (1, 1000)


def test_the_paper_s_first_values():
    model = made("timm")
    fastntk.add_prompts(model, 400, seed=1)
    bound = (6 / (3 * 8 * 8 + WIDTH)) ** 0.5
    tokens = prompts_of(model).tokens[0]
    assert float(tokens.abs().max()) == pytest.approx(bound, rel=1e-2)
    assert abs(float(tokens.mean())) < bound / 10


@pytest.mark.parametrize("name", ["timm", "torchvision", "transformers"])
def test_selecting_again_keeps_what_is_there(name):
    model = made(name)
    for selector in ("prompt:2", "lora:2"):
        first = fastntk.tune(model, selector, "head")
        again = fastntk.tune(model, selector, "head")
        assert all(first[key] is again[key] for key in again)
        assert list(first) == list(again)


@pytest.mark.parametrize(
    ("name", "selectors", "message"),
    [
        ("timm cnn", ["prompt"], "plain vision transformer.*no blocks that attend"),
        ("timm cnn", ["lora"], "needs targets in this model"),
        ("timm cnn", ["lora:4:nowhere"], "'nowhere' matches no layer"),
        ("timm", ["prompt:0"], "above 0 somewhere"),
        ("timm", ["deep-prompt:1,2,3"], "one length for each of the model's 2 blocks, not 3"),
        ("timm", ["prompt:many"], "takes whole numbers"),
        ("timm", ["lora:0"], "rank of at least 1"),
        ("timm cnn", ["lora:1:conv_dw"], "cannot be adapted.*groups"),
        ("timm", ["last:9"], "'last:9' needs a model with that many blocks; this one has 2"),
        ("timm", ["prompt:2", "nonsense"], "'nonsense' matches no parameter"),
        ("timm", ["lora:2", "bn"], "'bn' matches no parameter"),
    ],
)
def test_what_does_not_apply_is_refused_and_changes_nothing(name, selectors, message):
    model = made(name)
    before, logits = list(model.state_dict()), model(images(name))
    with pytest.raises(fastntk.InputError, match=message):
        fastntk.tune(model, *selectors)
    assert list(model.state_dict()) == before
    assert torch.equal(model(images(name)), logits)


def test_other_prompts_or_adapters_than_there_are():
    model = made("timm")
    for remove in (fastntk.remove_prompts, fastntk.remove_lora):
        with pytest.raises(fastntk.InputError, match="has no"):
            remove(model)
    fastntk.tune(model, "prompt:2", "lora:2")
    with pytest.raises(fastntk.InputError, match="has prompts already"):
        fastntk.tune(model, "prompt:3")
    for other in ("lora:3", "lora:2:qkv"):
        with pytest.raises(fastntk.InputError, match="has adapters already"):
            fastntk.tune(model, other)


def test_an_adapted_head_is_still_the_head():
    model = made("timm")
    fastntk.tune(model, "lora:2:head|qkv", "head")
    assert head_modules(model) == ["head.base_layer"]
    x = images("timm")
    jacobian = PerSampleJacobian(model, snapshot(fastntk.tune(model, "lora:2:head|qkv", "head")))
    expected = oracles.jacobian(model, jacobian.parameters, jacobian.layout(x), x)
    torch.testing.assert_close(jacobian(x).dense(), expected, rtol=1e-8, atol=1e-10)


def test_adapters_go_to_attention_or_where_that_cannot_be_to_the_rest_of_the_block():
    assert {name.rpartition(".")[2] for name in lora_targets(made("timm"))} == {"qkv", "proj"}
    assert {name.rpartition(".")[2] for name in lora_targets(made("transformers"))} >= {"q_proj", "v_proj"}
    assert all(".mlp." in name for name in lora_targets(made("torchvision")))


@pytest.mark.parametrize("selector", ["prompt:2", "deep-prompt:1", "lora:1"])
def test_what_was_added_is_fitted_and_forgotten(selector):
    model, x = made("transformers"), images("transformers", 12)
    data = TensorDataset(x, torch.arange(12) % CLASSES)
    fastntk.tune(model, selector, "head")
    fitted = fastntk.fit(model, data, epochs=2, batch_size=4)
    memory = fastntk.prepare(model, data, fitted.initial, ridge=1.0, form="dual")
    primal = fastntk.prepare(model, data, fitted.initial, ridge=1.0, form="primal")
    for key, tensor in memory.forget([1, 2]).parameters.items():
        torch.testing.assert_close(tensor, primal.preview([1, 2]).parameters[key], rtol=1e-7, atol=1e-9)


DOCUMENTED = Path(__file__).parent.parent / "docs" / "tuning.md"


def documented() -> dict[str, dict[str, int]]:
    """The table of parameter counts in the documentation: model to selector to count."""
    rows = [line.strip("| \n").split("|") for line in DOCUMENTED.read_text().splitlines() if line.startswith("|")]
    table = [[cell.strip() for cell in row] for row in rows]
    head = next(row for row in table if row[0] == "model")
    found = {}
    for row in table:
        if (name := re.fullmatch(r"`(.+)`", row[0])) and len(row) == len(head):
            cells = zip(head[1:], row[1:], strict=True)
            found[name[1]] = {key.strip("`"): int(cell.replace(",", "")) for key, cell in cells if cell != "–"}
    return found


def test_counts_are_as_documented():
    table = documented()
    assert len(table) == 6
    for name, counts in table.items():
        model, _ = fastntk.load_model(name, 10)
        assert tunables(model) == counts, name
