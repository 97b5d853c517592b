"""Layers whose tuned parameters have one copy a sample in the backward pass."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

_CACHE = 2**22  # bytes of activations that a processor's caches hold


def _own(out: Tensor) -> Tensor:
    """``out``, as no view: what ``forward`` returns is to be written to in place, as any layer's output."""
    return torch.ops.aten._unsafe_view(out, out.shape) if out._is_view() else out


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


class BatchNorm(torch.autograd.Function):
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


class GroupNorm(torch.autograd.Function):
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


class LayerNorm(torch.autograd.Function):
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


class Linear(torch.autograd.Function):
    """A linear layer whose weight and bias, where tuned, have one copy a sample in the backward pass."""

    @staticmethod
    def forward(ctx, x, weight, bias, weights, biases):
        ctx.save_for_backward(x, weight)
        return _own(F.linear(x, weight, bias))

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        x, weight = ctx.saved_tensors
        of_x, _, _, of_weights, of_biases = ctx.needs_input_grad
        weights = torch.einsum("b...o,b...i->boi", g, x.to(g.dtype)) if of_weights else None
        biases = _sum(g, tuple(range(1, x.ndim - 1))) if of_biases else None
        return _through(g, weight.to(g.dtype)) if of_x else None, None, None, weights, biases


class Convolution(torch.autograd.Function):
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


class Noted(torch.autograd.Function):
    """What a layer puts out, and what stands for it: the gradient of the one is that of the other."""

    @staticmethod
    def forward(ctx, out, slopes):
        return torch.ops.aten._unsafe_view(out, out.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return g if ctx.needs_input_grad[0] else None, g
