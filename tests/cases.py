"""Small problems that all tests share, in float64."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import fastntk
from fastntk.inputs.libraries import timm

CLASSES = 3


class Convolutional(nn.Module):
    """Convolutions (one depthwise), batch norms of both dimensions, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(),
            nn.Conv2d(4, 4, 3, groups=4), nn.BatchNorm2d(4), nn.SiLU(),
        )  # fmt: skip
        self.flat = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.flat(self.body(x).mean((2, 3))))


class Attention(nn.Module):
    """Patches, layer norms, multi-head attention, a free parameter that no rule covers, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, 4)
        self.position = nn.Parameter(torch.randn(1, 4, 8) * 0.1)
        self.before, self.after = nn.LayerNorm(8), nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8))
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.position
        normed = self.before(tokens)
        tokens = tokens + self.attention(normed, normed, normed, need_weights=False)[0]
        return self.head((tokens + self.mlp(self.after(tokens))).mean(1))


class Grouped(nn.Module):
    """Group norm, strided, dilated and grouped convolutions with biases, a scale and a shift of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.norm = nn.GroupNorm(2, 4)
        self.second = nn.Conv2d(4, 6, 3, padding=2, dilation=2, groups=2)
        self.scale = nn.Parameter(torch.randn(6, 1, 1))
        self.shift = nn.Parameter(torch.randn(1, 6, 1, 1))
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = self.second(torch.tanh(self.norm(self.first(x))))
        return self.head((torch.tanh(h * self.scale + self.shift)).mean((2, 3)))


class SharedScale(nn.Module):
    """One norm used twice, one weight used by a rule and outside it, and logits that are not the head's own output."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(6)
        self.linear = nn.Linear(6, 6)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x[:, 0, :2, :3].flatten(1))
        h = self.norm(torch.tanh(self.linear(h))) @ self.linear.weight
        return 2 * self.head(h)


class Prompted(nn.Module):
    """A class token ``[1, 1, d]`` and prompts ``[k, d]``, repeated a sample; the head reads the former alone."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Attention()
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.prompts = nn.Parameter(torch.randn(2, 8))

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.inner.patches(x).flatten(2).transpose(1, 2)
        extra = [self.token.expand(len(x), -1, -1), self.prompts.expand([len(x), -1, -1])]
        tokens = self.inner.before(torch.cat([*extra, tokens], 1))
        tokens = tokens + self.inner.attention(tokens, tokens, tokens)[0]
        return self.inner.head((tokens + self.inner.mlp(self.inner.after(tokens)))[:, 0])


class LinearInTuned(nn.Module):
    """Frozen features, a tuned head: exactly linear in what is tuned."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Tanh(), nn.Flatten(), nn.Linear(216, 5), nn.Tanh())
        self.head = nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def fused() -> nn.Module:
    """timm's batch norm with the activation inside, depthwise convolutions and squeeze-excite."""
    return timm().create_model("mobilenetv3_small_050", num_classes=CLASSES)


@dataclass(frozen=True)
class Case:
    """A model and what of it is tuned."""

    make: Callable[[], nn.Module]
    select: tuple[str, ...]
    size: int = 8

    def model(self, seed: int = 0) -> nn.Module:
        """The model, with batch norm statistics and scales that are not trivial, tuned and in eval mode."""
        torch.manual_seed(seed)
        model = self.make().double().eval()
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_mean.normal_(0, 0.2)
                module.running_var.uniform_(0.5, 1.5)
            if isinstance(module, nn.modules.batchnorm._BatchNorm | nn.LayerNorm):
                nn.init.normal_(module.weight, 1, 0.2)
                nn.init.normal_(module.bias, 0, 0.2)
        fastntk.tune(model, *self.select)
        return model

    def images(self, count: int, seed: int = 1) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(count, 3, self.size, self.size, generator=generator, dtype=torch.float64)

    def data(self, count: int = 14, seed: int = 1) -> TensorDataset:
        generator = torch.Generator().manual_seed(seed)
        labels = torch.cat([torch.arange(CLASSES), torch.randint(CLASSES, (count - CLASSES,), generator=generator)])
        return TensorDataset(self.images(count, seed), labels)


CASES = {
    "bn+head": Case(Convolutional, ("bn", "head")),
    "bn": Case(Convolutional, ("bn",)),
    "head": Case(Convolutional, ("head",)),
    "head bias": Case(Convolutional, (r"^head\.bias$", "bn")),
    "everything": Case(Convolutional, ("all",)),
    "fused bn+head": Case(fused, ("bn", "head"), size=32),
    "ln+head": Case(Attention, ("ln", "head")),
    "bias": Case(Attention, ("bias",)),
    "all of attention": Case(Attention, ("all",)),
    "prompts+head": Case(Prompted, (r"token|prompts", "head")),
    "grouped": Case(Grouped, ("all",)),
    "shared": Case(SharedScale, ("all",)),
}


def linear(count=12, width=6):
    """A linear model, and images in three classes."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(count, 1, 2, width // 2, generator=generator)
    model = nn.Sequential(nn.Flatten(), nn.Linear(width, 3, bias=False))
    with torch.no_grad():
        model[1].weight.copy_(torch.randn(3, width, generator=generator))
    return model, TensorDataset(images, torch.arange(count) % 3)
