"""Per-sample copies of tuned parameters: what each functional call that uses one does instead.

While ``PerSample`` is active, a call such as ``F.batch_norm`` that is given a tuned parameter runs as ever, but
records, for the backward pass, one copy of the parameter a sample. The copies take no memory (they are expanded views);
their gradients are the per-sample Jacobians. It does not matter which library's module makes the call. Backward passes
compute what the tuned parameters need and nothing else: frozen parameters get no gradient, and what lies before the
first tuned parameter is not differentiated.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

from fastntk.common.errors import InputError

if TYPE_CHECKING:
    from fastntk.jacobians.jacobian import Layout

_CACHE = 2**22  # bytes of activations that a processor's caches hold


def _sum(tensor: Tensor, axes: tuple[int, ...]) -> Tensor:
    """The sum over the axes inside a sample; over no axes, the tensor itself."""
    return tensor.sum(axes) if axes else tensor


def _sums(g: Tensor, x: Tensor, axes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The sums of ``g`` and of ``g x`` over the axes inside a sample.

    On a CPU the product is taken for a few samples at a time, and stays in cache.
    """
    if not axes:
        return g, g * x
    bytes_a_sample = g[:1].numel() * g.element_size()
    samples = max(1, _CACHE // max(1, bytes_a_sample)) if g.is_cpu else len(g)
    pairs = zip(g.split(samples), x.split(samples), strict=True)
    sums = [(part.sum(axes), (part * other).sum(axes)) for part, other in pairs]
    return sums[0] if len(sums) == 1 else (torch.cat([a for a, _ in sums]), torch.cat([b for _, b in sums]))


def _of_norm(g: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, of_scales: bool) -> tuple[Tensor | None, Tensor]:
    """The gradients of a norm's scales, ``sum g (x - mean) rstd``, if they are wanted, and of its shifts, ``sum g``.

    The sums are over the axes inside a sample and channel; ``mean`` and ``rstd`` have none of them.
    """
    inner = tuple(range(2, x.ndim))
    if not of_scales:
        return None, _sum(g, inner)
    shift, dot = _sums(g, x, inner)
    return torch.addcmul(dot, mean, shift, value=-1).mul_(rstd), shift


def _data(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()


def _of_input(g: Tensor, x: Tensor, weight: Tensor, geometry: tuple[Any, ...]) -> Tensor:
    """The gradient of a convolution with respect to its input."""
    none = [0] * (x.ndim - 2)
    stride, padding, dilation, groups = geometry
    mask = [True, False, False]
    x, weight = x.to(g.dtype), weight.to(g.dtype)  # as autocast did in the forward pass
    return torch.ops.aten.convolution_backward(
        g, x, weight, None, stride, padding, dilation, False, none, groups, mask
    )[0]


def _through(g: Tensor, weight: Tensor) -> Tensor:
    """``g W``, the gradient of a linear layer with respect to its input.

    Where the logits read the class token alone, the last block's gradient is zero at all others: they are left out.
    """
    rows = g.reshape(-1, g.shape[-1])  # one large product, whatever the strides
    if rows[-1].any():
        before = rows @ weight
    else:
        used = rows.any(1).nonzero()[:, 0]
        before = g.new_zeros(len(rows), weight.shape[1]).index_copy_(0, used, rows[used] @ weight)
    return before.view(*g.shape[:-1], -1)


class _BatchNorm(torch.autograd.Function):
    """Batch norm with running statistics, whose scale and shift have one copy a sample in the backward pass.

    Where its input ``x`` is the output of a frozen convolution, ``origin`` is that convolution's input and ``kernel``
    its weight. The backward pass then goes through both at once: the norm's scale is multiplied into the kernel, which
    saves a pass over the activations.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, mean, var, eps, scales, shifts, origin, kernel, geometry):
        ctx.rstd = torch.rsqrt(var + eps)
        ctx.scale = ctx.rstd if weight is None else ctx.rstd * weight
        ctx.geometry = geometry
        if origin is not None:
            kernel = kernel * ctx.scale.view(-1, *(1 for _ in kernel.shape[1:]))
        ctx.save_for_backward(x, mean, origin, kernel)
        return F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        x, mean, origin, kernel = ctx.saved_tensors
        of_x, *_, of_scales, of_shifts, of_origin, _, _ = ctx.needs_input_grad
        scale, shift = _of_norm(g, x, mean, ctx.rstd, of_scales)
        before = through = None
        if of_origin:
            through = _of_input(g, origin, kernel, ctx.geometry)
        elif of_x:
            before = g * ctx.scale.to(g.dtype).view(1, -1, *[1] * (x.ndim - 2))
        return before, *[None] * 5, scale, shift if of_shifts else None, through, None, None


class _GroupNorm(torch.autograd.Function):
    """Group norm whose scale and shift have one copy a sample in the backward pass."""

    @staticmethod
    def forward(ctx, x, groups, weight, bias, eps, scales, shifts):
        batch, channels = x.shape[:2]
        x = x.contiguous()
        sizes = batch, channels, x[0, 0].numel(), groups
        out, mean, rstd = torch.native_group_norm(x, weight, bias, *sizes, eps)
        ctx.sizes, ctx.weight = sizes, weight
        ctx.save_for_backward(x, mean, rstd)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        x, mean, rstd = ctx.saved_tensors
        of_x, *_, of_scales, of_shifts = ctx.needs_input_grad
        each_mean, each_rstd = (stat.repeat_interleave(ctx.sizes[1] // ctx.sizes[3], 1) for stat in (mean, rstd))
        scale, shift = _of_norm(g, x, each_mean, each_rstd, of_scales)
        before = None
        if of_x:
            before = torch.ops.aten.native_group_norm_backward(
                g.contiguous(), x, mean, rstd, ctx.weight, *ctx.sizes, [True, False, False]
            )[0]
        return before, *[None] * 4, scale, shift if of_shifts else None


class _LayerNorm(torch.autograd.Function):
    """Layer norm whose scale and shift have one copy a sample in the backward pass."""

    @staticmethod
    def forward(ctx, x, shape, weight, bias, eps, scales, shifts):
        out, mean, rstd = torch.native_layer_norm(x, shape, weight, bias, eps)
        ctx.shape, ctx.weight, ctx.bias = shape, weight, bias
        ctx.save_for_backward(x, mean, rstd)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        x, mean, rstd = ctx.saved_tensors
        of_x, *_, of_scales, of_shifts = ctx.needs_input_grad
        inner = tuple(range(1, x.ndim - len(ctx.shape)))
        scale = _sum(g * ((x - mean) * rstd), inner) if of_scales else None
        before = None
        if of_x:
            before = torch.ops.aten.native_layer_norm_backward(
                g.contiguous(), x, list(ctx.shape), mean, rstd, ctx.weight, ctx.bias, [True, False, False]
            )[0]
        return before, *[None] * 4, scale, _sum(g, inner) if of_shifts else None


class _Linear(torch.autograd.Function):
    """A linear layer whose weight and bias, where tuned, have one copy a sample in the backward pass."""

    @staticmethod
    def forward(ctx, x, weight, bias, weights, biases):
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        x, weight = ctx.saved_tensors
        of_x, _, _, of_weights, of_biases = ctx.needs_input_grad
        weights = torch.einsum("b...o,b...i->boi", g, x.to(g.dtype)) if of_weights else None
        biases = _sum(g, tuple(range(1, x.ndim - 1))) if of_biases else None
        return _through(g, weight.to(g.dtype)) if of_x else None, None, None, weights, biases


class _Convolution(torch.autograd.Function):
    """A convolution in two dimensions whose weight and bias have one copy a sample in the backward pass.

    A sample's weight gradient is the product of its output gradient with its unfolded input, group by group.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, geometry, weights, biases):
        ctx.geometry = geometry
        ctx.save_for_backward(x, weight)
        return F.conv2d(x, weight, bias, *geometry)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        x, weight = ctx.saved_tensors
        of_x, _, _, _, of_weights, of_biases = ctx.needs_input_grad
        before = weights = None
        if of_x:
            before = _of_input(g, x, weight, ctx.geometry)
        if of_weights:
            stride, padding, dilation, groups = ctx.geometry
            patches = F.unfold(x.to(g.dtype), weight.shape[2:], dilation, padding, stride).unflatten(1, (groups, -1))
            weights = g.flatten(2).unflatten(1, (groups, -1)) @ patches.mT
            weights = weights.reshape(len(x), *weight.shape)
        return before, None, None, None, weights, g.sum((2, 3)) if of_biases else None


class PerSample(TorchFunctionMode):
    """While active, calls that use a tuned parameter use its per-sample copies.

    Args:
        tuned: the tuned parameters by name, the very tensors that the model is called with.
        batch: the number of samples in the batch.
        layout: which of them have a rule, known after a trial run; None during it.
    """

    def __init__(self, tuned: Mapping[str, Tensor], batch: int, layout: "Layout | None" = None) -> None:
        super().__init__()
        self.names = {id(tensor): name for name, tensor in tuned.items()}
        self.batch = batch
        self.layout = layout
        self.copies: dict[str, Tensor] = {}
        self.linear_calls: list[tuple[Tensor, Tensor, tuple[str, ...]]] = []

    def _name(self, tensor: Any) -> str | None:
        return self.names.get(id(tensor))

    def _copy(self, tensor: Tensor | None) -> Tensor | None:
        """The per-sample copies of a tuned parameter; None for a frozen one, and for none."""
        return None if tensor is None or self._name(tensor) is None else self._copies(tensor)

    def _copies(self, tensor: Tensor) -> Tensor:
        name = self.names[id(tensor)]
        if name not in self.copies:
            self.copies[name] = tensor.detach().expand(self.batch, *tensor.shape).requires_grad_()
        return self.copies[name]

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in _ELEMENTWISE and len(args) == 2:
            return self._elementwise(func, *args, **kwargs)
        rule = _RULES.get(func)
        return func(*args, **kwargs) if rule is None else rule(self, *args, **kwargs)

    def _fits(self, x: Tensor | None, *parameters: Tensor | None) -> bool:
        """Whether a rule applies: one of the parameters is tuned and samples lie along the first axis of ``x``.

        A module that regroups samples is noticed in the trial run, and its parameters are left to ``torch.func``.
        """
        names = [name for name in map(self._name, parameters) if name]
        fits = x is not None and x.ndim > 1 and x.shape[0] == self.batch
        if names and not fits and self.layout:
            raise InputError(f"parameter {names[0]!r} is used along another axis than the batch in some batches only.")
        return bool(names) and fits

    def _batch_norm(
        self, input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5
    ):
        if training:
            raise InputError(
                "a batch norm layer is in training mode: it couples the samples of a batch, so per-sample Jacobians do "
                "not exist. Call model.eval() first."
            )
        if not self._fits(input, weight, bias):
            return F.batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
        copies = self._copy(weight), self._copy(bias)
        origin = getattr(input, "_convolved", (None, None, None))
        input = input if origin[0] is None else input.detach()
        return _BatchNorm.apply(input, _data(weight), _data(bias), running_mean, running_var, eps, *copies, *origin)

    def _group_norm(self, input, num_groups, weight=None, bias=None, eps=1e-5):
        if not self._fits(input, weight, bias):
            return F.group_norm(input, num_groups, weight, bias, eps)
        return _GroupNorm.apply(
            input, num_groups, _data(weight), _data(bias), eps, self._copy(weight), self._copy(bias)
        )

    def _layer_norm(self, input, normalized_shape, weight=None, bias=None, eps=1e-5):
        if not self._fits(input if input.ndim > len(normalized_shape) else None, weight, bias):
            return F.layer_norm(input, normalized_shape, weight, bias, eps)
        copies = self._copy(weight), self._copy(bias)
        return _LayerNorm.apply(input, tuple(normalized_shape), _data(weight), _data(bias), eps, *copies)

    def _linear(self, input, weight, bias=None):
        if not self._fits(input, weight, bias):
            if self._name(weight) or self._name(bias) or not input.requires_grad:
                return F.linear(input, weight, bias)
            return _Linear.apply(input, _data(weight), _data(bias), None, None)
        names = tuple(name for name in (self._name(weight), self._name(bias)) if name)
        if self.layout and names == self.layout.head:
            out = F.linear(input, weight.detach(), _data(bias))
        else:
            out = _Linear.apply(input, _data(weight), _data(bias), self._copy(weight), self._copy(bias))
        self.linear_calls.append((out, input, names))
        return out

    def _conv2d(self, input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
        tuned = self._name(weight) or self._name(bias)
        known = not isinstance(padding, str) and input.ndim == 4
        if tuned and not self._fits(input if known else None, weight, bias):
            return F.conv2d(input, weight, bias, stride, padding, dilation, groups)
        pairs = [[each] * 2 if isinstance(each, int) else list(each) for each in (stride, padding, dilation) if known]
        geometry = (*pairs, groups)
        if tuned:
            return _Convolution.apply(input, _data(weight), _data(bias), geometry, self._copy(weight), self._copy(bias))
        out = F.conv2d(input, weight, bias, stride, padding, dilation, groups)
        if known and input.requires_grad:
            out._convolved = input, weight.detach(), geometry  # type: ignore[attr-defined]
        return out

    def _elementwise(self, operation, left, right, **options):
        """A sum or product of activations with a parameter that is the same for every sample."""
        parameter, other = (right, left) if self._name(right) else (left, right)
        if not self._name(parameter) or not isinstance(other, Tensor):
            return operation(left, right, **options)
        shape = parameter.shape[1:] if parameter.ndim == other.ndim else parameter.shape
        shared = parameter.ndim < other.ndim or parameter.shape[0] == 1
        if not self._fits(other if shared else None, parameter):
            return operation(left, right, **options)
        copies = self._copies(parameter).reshape(self.batch, *[1] * (other.ndim - 1 - len(shape)), *shape)
        left, right = (left, copies) if parameter is right else (copies, right)
        return operation(left, right, **options)

    def _expand(self, tensor, *sizes):
        """A parameter that is repeated for every sample: a class token or a visual prompt."""
        out = tensor.expand(*sizes)
        per_sample = out.ndim > tensor.ndim or (tensor.ndim > 1 and tensor.shape[0] == 1 and out.ndim == tensor.ndim)
        if not per_sample or not self._fits(out, tensor):
            return out
        return self._copies(tensor).reshape(out.shape)

    def _attention(self, query, key, value, *args, **kwargs):
        """Contiguous tokens make each projection one large product; a module with ``batch_first`` transposes them."""
        dense = {id(tokens): tokens.contiguous() for tokens in (query, key, value)}
        return F.multi_head_attention_forward(*(dense[id(tokens)] for tokens in (query, key, value)), *args, **kwargs)

    def _dropout(self, x, p=0.5, training=True, inplace=False):
        if training and p > 0:
            raise InputError("a dropout layer is in training mode: the logits are random. Call model.eval() first.")
        return x


_RULES: dict[Any, Callable[..., Any]] = {
    F.batch_norm: PerSample._batch_norm,
    F.group_norm: PerSample._group_norm,
    F.layer_norm: PerSample._layer_norm,
    F.linear: PerSample._linear,
    F.conv2d: PerSample._conv2d,
    Tensor.expand: PerSample._expand,
    F.multi_head_attention_forward: PerSample._attention,
    F.dropout: PerSample._dropout,
}
_ELEMENTWISE = {
    torch.add,
    torch.mul,
    *(
        getattr(Tensor, name)
        for name in ("add", "mul", "__add__", "__radd__", "__mul__", "__rmul__", "add_", "mul_", "__iadd__", "__imul__")
    ),
}
