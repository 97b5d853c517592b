"""The head is what the logits are computed with last, wherever it is registered and whatever it is."""

import pytest
import torch
from torch import nn

import fastntk
from fastntk.inputs.heads import head_modules, head_parameters, reset_head
from fastntk.inputs.libraries import timm, torchvision


class First(nn.Module):
    """The head is registered before the body."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.fc = nn.Linear(16, classes)
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(48, 16), nn.ReLU())

    def forward(self, x):
        return self.fc(self.body(x))


class Two(nn.Module):
    """The mean of two heads, one of them a bare matrix with a shift that is added."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix, self.shift = nn.Parameter(torch.randn(8, 3)), nn.Parameter(torch.zeros(3))
        self.temperature = nn.Parameter(torch.tensor(2.0))
        self.body, self.other = nn.Linear(12, 8), nn.Linear(8, 3)
        self.unused = nn.Linear(8, 3)

    def forward(self, x):
        inner = self.body(x.flatten(1)).tanh()
        return self.temperature * (inner @ self.matrix + self.shift + self.other(inner)) / 2


class Frozen(First):
    def forward(self, x):
        with torch.no_grad():
            inner = self.body(x)
        return self.fc(inner)


def normed() -> nn.Module:
    net = nn.Sequential(nn.Flatten(), nn.Linear(48, 8), nn.ReLU(), nn.Linear(8, 3))
    nn.utils.parametrizations.weight_norm(net[3])
    return net


def convolutional() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())


@pytest.mark.parametrize(
    ("model", "modules", "names"),
    [
        (First(), ["fc"], ["fc.weight", "fc.bias"]),
        (Frozen(), ["fc"], ["fc.weight", "fc.bias"]),
        (Two(), ["", "other"], ["matrix", "shift", "other.weight", "other.bias"]),
        (normed(), ["3"], ["3.bias", "3.parametrizations.weight.original0", "3.parametrizations.weight.original1"]),
        (convolutional(), ["2"], ["2.weight", "2.bias"]),
        (nn.Linear(2, 2), [""], ["weight", "bias"]),
    ],
)
def test_it_is_found_by_a_forward_pass(model, modules, names):
    assert head_parameters(model) == names
    assert head_modules(model) == modules
    assert list(fastntk.tune(model, "head")) == names
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    reset_head(model, 1)
    drawn = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert drawn <= set(names), "no other layer is ever drawn anew"
    assert drawn >= {name for name in names if before[name].ndim > 1}


def test_looking_for_it_changes_nothing():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    model.train()
    model[1].eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    head_parameters(model)
    assert [module.training for module in model] == [True, False, True, True, True]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_libraries():
    model = timm().create_model("deit_tiny_distilled_patch16_224", num_classes=3, img_size=32)
    assert head_modules(model) == ["head", "head_dist"]
    assert head_modules(timm().create_model("repvit_m0_9", num_classes=3)) == ["head.head.l", "head.head_dist.l"]
    assert head_modules(torchvision().models.squeezenet1_1()) == ["classifier.1"]
    model, _ = fastntk.load_model("torchvision/squeezenet1_1", 5, size=64)
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 5)


def test_where_gradients_are_cut_above_several_layers_nobody_guesses():
    class Cut(First):
        def forward(self, x):
            return self.body(self.fc.weight.detach().new_zeros(len(x), 48))

    model = Cut()
    model.body.append(nn.Linear(16, 3))
    with pytest.raises(fastntk.InputError, match="name its parameters"):
        fastntk.tune(model, "head")


def test_a_model_that_no_image_goes_through_says_so():
    class Picky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(7, 2)

        def forward(self, x, mask):
            return self.fc(x)

    with pytest.raises(fastntk.InputError, match="Name its parameters"):
        fastntk.tune(Picky(), "head")
    assert list(fastntk.tune(Picky(), "fc")) == ["fc.weight", "fc.bias"]
