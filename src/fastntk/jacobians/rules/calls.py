"""Per-sample copies of tuned parameters: what each functional call that uses one does instead.

While ``PerSample`` is active, a call such as ``F.batch_norm`` that is given a tuned parameter runs as ever, but
records, for the backward pass, one copy of the parameter a sample. The copies take no memory (they are expanded views);
their gradients are the per-sample Jacobians. It does not matter which library's module makes the call. Backward passes
compute what the tuned parameters need and nothing else: frozen parameters get no gradient, and what lies before the
first tuned parameter is not differentiated.
"""

from collections.abc import Callable, Collection, Mapping
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fastntk.common.errors import InputError
from fastntk.common.plugins import Registry
from fastntk.jacobians.outer import Layer, Outer
from fastntk.jacobians.rules.functions import BatchNorm, Convolution, GroupNorm, LayerNorm, Linear, Noted


def _data(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()


def _versions(*tensors: Tensor) -> tuple[int, ...]:
    """They change with every operation in place."""
    return tuple(tensor._version for tensor in tensors)


class LinearCall(NamedTuple):
    """A call of a linear layer with tuned parameters."""

    out: Tensor
    input: Tensor
    names: tuple[str, ...]
    versions: tuple[int, ...]

    @property
    def unchanged(self) -> bool:
        """Whether nobody has written to its input or output since."""
        return _versions(self.out, self.input) == self.versions


class Applied(NamedTuple):
    """A call of a linear layer or a convolution whose weight's derivatives are kept as outer products.

    Attributes:
        input: of the call.
        out: its output.
        weight: of the layer.
        geometry: stride, padding, dilation and groups of a convolution, or None.
        versions: of the input.
    """

    input: Tensor
    out: Tensor
    weight: Tensor
    geometry: tuple | None
    versions: tuple[int, ...]

    @property
    def groups(self) -> int:
        """Of a convolution; 1 for a linear layer."""
        return self.geometry[3] if self.geometry else 1

    @property
    def unchanged(self) -> bool:
        """Whether nobody has written to its input since."""
        return _versions(self.input) == self.versions

    def layer(self, name: str) -> Layer:
        """Its sizes, under its weight's name."""
        channels = len(self.weight)
        return Layer(name, self.out[0].numel() // channels, self.weight[0].numel(), channels)

    def outer(self, slopes: Float[Tensor, "batch outputs numbers"]) -> Outer:
        """From the derivatives with respect to its output, flat.

        Raises:
            InputError: its input has been written to.
        """
        if not self.unchanged:
            raise InputError("the model writes to a layer's input in place, in some batches only.")
        shape, channels = slopes.shape[:2], len(self.weight)
        if self.geometry is None:
            inputs = self.input.detach().reshape(shape[0], -1, self.weight.shape[1]).to(slopes)
            return Outer(inputs, slopes.view(*shape, -1, channels))
        stride, padding, dilation, _ = self.geometry
        patches = F.unfold(self.input.detach().to(slopes), self.weight.shape[2:], dilation, padding, stride)
        return Outer(patches.mT, slopes.view(*shape, channels, -1).mT)


class _Convolved(NamedTuple):
    """What a tensor is the convolution of, as long as nobody has written to either."""

    arguments: tuple[Tensor, Tensor, tuple]
    versions: tuple[int, ...]

    def holds(self, out: Tensor) -> bool:
        return _versions(out, self.arguments[0]) == self.versions


class PerSample(TorchFunctionMode):
    """While active, calls that use a tuned parameter use its per-sample copies.

    Args:
        tuned: the tuned parameters by name, the very tensors that the model is called with.
        batch: the number of samples in the batch.
        head: those of the head, which take no copies, known after a trial run; None during it.
        outer: weights of linear layers and convolutions whose gradients are kept as outer products: in place of their
            copies, ``slopes`` stand for what the layer puts out.
    """

    def __init__(
        self,
        tuned: Mapping[str, Tensor],
        batch: int,
        head: tuple[str, ...] | None = None,
        outer: Collection[str] = (),
    ) -> None:
        super().__init__()
        self.tuned = tuned
        self.names = {id(tensor): name for name, tensor in tuned.items()}
        self.batch = batch
        self.head = head
        self.copies: dict[str, Tensor] = {}
        self.linear_calls: list[LinearCall] = []
        self.outer = frozenset(outer)
        self.slopes: dict[str, Tensor] = {}
        self.applied: dict[str, list[Applied]] = {}

    def _name(self, tensor: Any) -> str | None:
        return self.names.get(id(tensor))

    def copied(self, tensor: Tensor | None) -> Tensor | None:
        """The per-sample copies of a tuned parameter; None for a frozen one, and for none."""
        return None if tensor is None or self._name(tensor) is None else self._copies(tensor)

    def _weights(self, weight: Tensor) -> Tensor | None:
        """The same of a layer's weight, unless its gradient is kept as outer products."""
        return None if self._name(weight) in self.outer else self.copied(weight)

    def _noted(self, out: Tensor, input: Tensor, weight: Tensor, geometry: tuple | None = None) -> Tensor:
        """What a layer puts out; where its weight's gradient is kept as outer products, noted."""
        name = self._name(weight)
        if name is None or name not in self.outer:
            return out
        self.slopes[name] = out.new_zeros(()).expand(out.shape).requires_grad_()
        self.applied.setdefault(name, []).append(Applied(input, out, weight, geometry, _versions(input)))
        return Noted.apply(out, self.slopes[name])

    def _copies(self, tensor: Tensor) -> Tensor:
        name = self.names[id(tensor)]
        if name not in self.copies:
            self.copies[name] = tensor.detach().expand(self.batch, *tensor.shape).requires_grad_()
        return self.copies[name]

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in _ELEMENTWISE and len(args) == 2:
            return self._elementwise(func, *args, **kwargs)
        rule = _RULES.get(func) or _plugged().get(func)
        return func(*args, **kwargs) if rule is None else rule(self, *args, **kwargs)

    def fits(self, x: Tensor | None, *parameters: Tensor | None) -> bool:
        """Whether a rule applies: one of the parameters is tuned and samples lie along the first axis of ``x``.

        A module that regroups samples is noticed in the trial run, and its parameters are left to ``torch.func``.
        """
        return x is not None and x.ndim > 1 and x.shape[0] == self.batch and any(map(self._name, parameters))

    def _batch_norm(
        self, input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5
    ):
        if training and running_mean is not None:
            raise InputError(
                "a batch norm layer is in training mode: it couples the samples of a batch, so per-sample Jacobians do "
                "not exist. Call model.eval() first."
            )
        if training:  # of a batch, or of weights that are standardised
            return F.batch_norm(input, None, None, weight, bias, True, momentum, eps)
        if not self.fits(input, weight, bias):
            return F.batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
        copies = self.copied(weight), self.copied(bias)
        noted = getattr(input, "_convolved", None)
        origin = noted.arguments if noted and noted.holds(input) else (None, None, None)
        input = input if origin[0] is None else input.detach()
        return BatchNorm.apply(input, _data(weight), _data(bias), running_mean, running_var, eps, *copies, *origin)

    def _group_norm(self, input, num_groups, weight=None, bias=None, eps=1e-5):
        if not self.fits(input, weight, bias):
            return F.group_norm(input, num_groups, weight, bias, eps)
        return GroupNorm.apply(
            input, num_groups, _data(weight), _data(bias), eps, self.copied(weight), self.copied(bias)
        )

    def _layer_norm(self, input, normalized_shape, weight=None, bias=None, eps=1e-5):
        if not self.fits(input if input.ndim > len(normalized_shape) else None, weight, bias):
            return F.layer_norm(input, normalized_shape, weight, bias, eps)
        copies = self.copied(weight), self.copied(bias)
        return LayerNorm.apply(input, tuple(normalized_shape), _data(weight), _data(bias), eps, *copies)

    def _linear(self, input, weight, bias=None):
        if not self.fits(input, weight, bias):
            if self._name(weight) or self._name(bias) or not input.requires_grad:
                return F.linear(input, weight, bias)
            return Linear.apply(input, _data(weight), _data(bias), None, None)
        names = tuple(name for name in (self._name(weight), self._name(bias)) if name)
        if names == self.head:
            out = F.linear(input, weight.detach(), _data(bias))
        else:
            out = Linear.apply(input, _data(weight), _data(bias), self._weights(weight), self.copied(bias))
            out = self._noted(out, input, weight)
        self.linear_calls.append(LinearCall(out, input, names, _versions(out, input)))
        return out

    def _conv2d(self, input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
        tuned = self._name(weight) or self._name(bias)
        known = not isinstance(padding, str) and input.ndim == 4
        if tuned and not self.fits(input if known else None, weight, bias):
            return F.conv2d(input, weight, bias, stride, padding, dilation, groups)
        pairs = [[each] * 2 if isinstance(each, int) else list(each) for each in (stride, padding, dilation) if known]
        geometry = (*pairs, groups)
        if tuned:
            copies = self._weights(weight), self.copied(bias)
            out = Convolution.apply(input, _data(weight), _data(bias), geometry, *copies)
            return self._noted(out, input, weight, geometry)
        out = F.conv2d(input, weight, bias, stride, padding, dilation, groups)
        if known and input.requires_grad:
            out._convolved = _Convolved((input, weight.detach(), geometry), _versions(out, input))  # type: ignore[attr-defined]
        return out

    def _elementwise(self, operation, left, right, **options):
        """A sum or product of activations with a parameter that is the same for every sample."""
        parameter, other = (right, left) if self._name(right) else (left, right)
        if not self._name(parameter) or not isinstance(other, Tensor):
            return operation(left, right, **options)
        shape = parameter.shape[1:] if parameter.ndim == other.ndim else parameter.shape
        shared = parameter.ndim < other.ndim or parameter.shape[0] == 1
        if not self.fits(other if shared else None, parameter):
            return operation(left, right, **options)
        copies = self._copies(parameter).reshape(self.batch, *[1] * (other.ndim - 1 - len(shape)), *shape)
        left, right = (left, copies) if parameter is right else (copies, right)
        return operation(left, right, **options)

    def _expand(self, tensor, *sizes):
        """A parameter that is repeated for every sample: a class token or a visual prompt."""
        out = tensor.expand(*sizes)
        per_sample = out.ndim > tensor.ndim or (tensor.ndim > 1 and tensor.shape[0] == 1 and out.ndim == tensor.ndim)
        if not per_sample or not self.fits(out, tensor):
            return out
        return self._copies(tensor).reshape(out.shape)

    def _prelu(self, input, weight):
        if not self.fits(input, weight):
            return F.prelu(input, weight)
        slopes = self._copies(weight).reshape(self.batch, -1, *[1] * (input.ndim - 2))
        return torch.where(input > 0, input, slopes * input)

    def _attention(self, query, key, value, *args, **kwargs):
        """Contiguous tokens make each projection one large product; a module with ``batch_first`` transposes them."""
        dense = {id(tokens): tokens.contiguous() for tokens in (query, key, value)}
        return F.multi_head_attention_forward(*(dense[id(tokens)] for tokens in (query, key, value)), *args, **kwargs)

    def _dropout(self, x, p=0.5, training=True, inplace=False):
        if training and p > 0:
            raise InputError("a dropout layer is in training mode: the logits are random. Call model.eval() first.")
        return x

    def _scaled_attention(self, query, key, value, attn_mask=None, dropout_p=0.0, *args, **kwargs):
        self._dropout(query, dropout_p)
        return F.scaled_dot_product_attention(query, key, value, attn_mask, 0.0, *args, **kwargs)


class Rule(NamedTuple):
    """What another package's entry point in ``fastntk.rules`` says of a function that uses parameters.

    Attributes:
        function: as the model calls it, such as ``torch.nn.functional.rms_norm``.
        does: in its place, called with the ``PerSample`` and the function's arguments. Where ``fits`` it uses what
            ``copied`` gives in place of a tuned parameter, a copy a sample along the first axis. A trial run compares
            every rule with autograd.
    """

    function: Callable[..., Any]
    does: Callable[..., Any]


PLUGGED: Registry[Rule] = Registry(
    "rules", {}, lambda made: isinstance(made, Rule), "a fastntk.jacobians.rules.calls.Rule"
)
"""Rules of other packages."""


@cache
def _plugged() -> dict[Any, Callable[..., Any]]:
    return {rule.function: rule.does for rule in PLUGGED.values()}


_RULES: dict[Any, Callable[..., Any]] = {
    F.batch_norm: PerSample._batch_norm,
    F.group_norm: PerSample._group_norm,
    F.layer_norm: PerSample._layer_norm,
    F.linear: PerSample._linear,
    F.conv2d: PerSample._conv2d,
    F.prelu: PerSample._prelu,
    Tensor.expand: PerSample._expand,
    F.multi_head_attention_forward: PerSample._attention,
    **dict.fromkeys((F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout), PerSample._dropout),
    F.scaled_dot_product_attention: PerSample._scaled_attention,
}


_ELEMENTWISE = {
    torch.add,
    torch.mul,
    *(
        getattr(Tensor, name)
        for name in ("add", "mul", "__add__", "__radd__", "__mul__", "__rmul__", "add_", "mul_", "__iadd__", "__imul__")
    ),
}
