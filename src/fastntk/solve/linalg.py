"""Symmetric matrices: products at half the arithmetic, factors in place, and two Krylov methods."""

from collections.abc import Callable
from math import isqrt

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fastntk.common.errors import InputError

LOOK = 10
"""Steps of ``lanczos`` between looks at what is found."""

_BLOCK = 512
_STEPS = 500  # of conjugate gradients, at most


def _halves(size: int) -> int:
    """Where to split a matrix in two: near the middle, at a multiple of the block."""
    return (size // 2 + _BLOCK - 1) // _BLOCK * _BLOCK


def add_product_(
    matrix: Float[Tensor, "n n"],
    left: Float[Tensor, "n k"],
    right: Float[Tensor, "n k"],
    sign: int = 1,
) -> Float[Tensor, "n n"]:
    """The lower triangle of ``matrix += sign * left right'``, in place, for a product known to be symmetric.

    Square blocks below the diagonal are multiplied, halving the arithmetic; what lies above the diagonal is left
    undefined (see ``mirror_``). The product is taken in the dtype of the factors.
    """
    if len(matrix) <= _BLOCK:
        return _add(matrix, left, right, sign)
    half = _halves(len(matrix))
    add_product_(matrix[:half, :half], left[:half], right[:half], sign)
    _add(matrix[half:, :half], left[half:], right[:half], sign)
    add_product_(matrix[half:, half:], left[half:], right[half:], sign)
    return matrix


def _add(block: Tensor, left: Tensor, right: Tensor, sign: int) -> Tensor:
    if block.dtype == left.dtype:
        return block.addmm_(left, right.T, alpha=sign)
    return block.add_(left @ right.T, alpha=sign)


def mirror_(matrix: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    """Copy the lower triangle over the upper one, in place."""
    for start in range(0, len(matrix), _BLOCK):
        rows = slice(start, start + _BLOCK)
        matrix[:start, rows] = matrix[rows, :start].T
        square = matrix[rows, rows]
        square.copy_(square.tril() + square.tril(-1).T)
    return matrix


def cholesky_(matrix: Float[Tensor, "n n"]) -> bool:
    """The Cholesky factor of a positive definite matrix, lower, in place; only its lower triangle is read, and zeros
    are above it. Whether there is one."""
    info, upper = torch.empty(0, dtype=torch.int32, device=matrix.device), matrix.T  # LAPACK's order: no copy is made
    torch.linalg.cholesky_ex(upper, upper=True, out=(upper, info))
    return not int(info)


def factor_(matrix: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    """``cholesky_``, and the factor.

    Raises:
        InputError: the matrix is not positive definite in floating point.
    """
    if not cholesky_(matrix):
        raise InputError(
            "the Gram matrix plus the ridge is not positive definite in floating point. Use a larger ridge, 'auto', or "
            "float64 sums."
        )
    return matrix


def near_factor(matrix: Callable[[torch.dtype], Float[Tensor, "n n"]]) -> Float[Tensor, "n n"]:
    """The factor to precondition with: of a matrix that can be made in any dtype, in float32, or in float64 where
    rounding would make that indefinite. Raises like ``factor_``."""
    lower = matrix(torch.float32)
    return lower if cholesky_(lower) else factor_(matrix(torch.float64))


def regularised_factor(matrix: Float[Tensor, "n n"], dtype: torch.dtype | None = None) -> Float[Tensor, "n n"]:
    """The factor to precondition with, of a matrix that rounding may have made indefinite: in a dtype (its own) where
    it is definite there, else in float64 with as little more on its diagonal as makes it so, from 1e-15 of its largest
    entry up by tens.

    Raises:
        InputError: it is not finite.
    """
    lower = matrix.to(dtype or matrix.dtype, copy=True)
    if cholesky_(lower):
        return lower
    size = float(matrix.diagonal().abs().max())
    for digits in range(15, 0, -1):
        lower = shifted(matrix.double(), size * 10.0**-digits)
        if cholesky_(lower):
            return lower
    return factor_(shifted(matrix.double(), size * len(matrix)))


def solved_by(lower: Float[Tensor, "n n"], columns: Float[Tensor, "n some"]) -> Float[Tensor, "n some"]:
    """``(L L')^-1`` times some columns for a factor L, in their dtype."""
    half = torch.linalg.solve_triangular(lower, columns.to(lower), upper=False)
    return torch.linalg.solve_triangular(lower.mT, half, upper=True).to(columns)


def shifted(matrix: Float[Tensor, "n n"], shift: float) -> Float[Tensor, "n n"]:
    """``matrix + shift I``, in a matrix of its own."""
    copy = matrix.clone()
    copy.diagonal().add_(shift)
    return copy


def ridge_inverse(matrix: Float[Tensor, "n n"], ridge: float) -> Float[Tensor, "n n"]:
    """``(matrix + ridge I)^-1`` for a positive semidefinite matrix. ``ridge`` is a total. Raises like ``factor_``."""
    return torch.cholesky_inverse(factor_(shifted(matrix, ridge)))


def factorised(core: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    """The Cholesky factor of the small matrix that an update of a solution inverts.

    Raises:
        InputError: it is not positive definite, as it is for samples that are in the sums.
    """
    factor, info = torch.linalg.cholesky_ex(core)
    if info != 0:
        raise InputError(
            "the samples' Jacobians are not among those that the memory was made of: the images, the model or the "
            "arithmetic have changed. Prepare again."
        )
    return factor


def below(size: float) -> Callable[[Tensor, int], bool]:
    """What is left is no longer than that: a question for ``conjugated``."""
    return lambda left, _: float(left.norm()) <= size


def relative(left: Tensor, rhs: Tensor) -> float:
    """``|left| / |rhs|``, what a solve leaves of its right-hand side; the former where the latter vanishes."""
    size = float(rhs.norm())
    return float(left.norm()) / size if size else float(left.norm())


def conjugated(
    apply: Callable[[Tensor], Tensor],
    rhs: Float[Tensor, " n"],
    precondition: Callable[[Tensor], Tensor],
    enough: Callable[[Tensor, int], bool],
    limit: int,
) -> tuple[Float[Tensor, " n"], bool]:
    """``x`` with ``apply(x)`` near ``rhs`` for a positive definite operator, by conjugate gradients, and whether it is
    near ``enough``, a question asked of the residual and the number of steps; of these there are at most ``limit``."""
    x, residual = torch.zeros_like(rhs), rhs.clone()
    direction = s = precondition(residual)
    rho = residual @ s
    for step in range(limit):
        if float(rho) <= 0 or enough(residual, step):  # nothing is left, or little
            return x, True
        image = apply(direction)
        length = rho / (direction @ image)
        x, residual = x + length * direction, residual - length * image
        s = precondition(residual)
        rho, before = residual @ s, rho
        direction = s + rho / before * direction
    return x, enough(residual, limit)


def conjugate_gradients(
    apply: Callable[[Tensor], Tensor],
    rhs: Float[Tensor, " n"],
    precondition: Callable[[Tensor], Tensor],
    tolerance: float = 1e-11,
) -> Float[Tensor, " n"]:
    """``x`` with ``|apply(x) - rhs| <= tolerance |rhs|`` for a positive definite operator.

    Raises:
        InputError: not reached within 500 steps.
    """
    x, done = conjugated(apply, rhs, precondition, below(tolerance * float(rhs.norm())), _STEPS)
    if not done:
        raise InputError(
            f"the solve did not converge in {_STEPS} steps: its ridge is too far from the one prepared. "
            "Prepare with it."
        )
    return x


def lanczos(
    apply: Callable[[Tensor], Tensor],
    start: Float[Tensor, " n"],
    steps: int,
    enough: Callable[[Tensor, Tensor], bool] = lambda basis, projected: False,
) -> tuple[Float[Tensor, "n m"], Float[Tensor, "m m"]]:
    """An orthonormal basis ``Q`` of the Krylov space of a symmetric operator at ``start``, and ``T = Q' operator Q``.

    ``f(operator) start`` is approximated by ``|start| Q f(T) e_1``, with an error that falls fast with the number of
    steps, m <= ``steps``. The basis is orthogonalised in full. Every ``LOOK`` steps both are looked at, and what is
    ``enough`` is returned.
    """
    steps = min(steps, len(start))
    basis, projected = start.new_empty(steps, len(start)), start.new_zeros(steps, steps)
    basis[0] = start / start.norm()
    size = 0
    while size < steps:
        image = apply(basis[size])
        size += 1
        for _ in range(2):  # once more, for what rounding left
            coefficients = basis[:size] @ image
            projected[:size, size - 1] += coefficients
            image = image - basis[:size].T @ coefficients
        if float(image.norm()) <= 1e-10 * float(projected[0, 0].abs()):
            break
        if size < steps:
            basis[size] = image / image.norm()
        if size % LOOK == 0 and enough(basis[:size].T, _symmetric(projected[:size, :size])):
            break
    return basis[:size].T, _symmetric(projected[:size, :size])


def _symmetric(matrix: Tensor) -> Tensor:
    """What its upper triangle stands for."""
    upper = matrix.triu()
    return upper + upper.triu(1).T


def zero_(square: Float[Tensor, "n n"], places: Int[Tensor, " some"]) -> None:
    """Nothing is left of some rows and columns."""
    square[places] = 0
    square[:, places] = 0


def border_(
    square: Float[Tensor, "n n"],
    places: Int[Tensor, " some"],
    border: Float[Tensor, "old some"],
    block: Float[Tensor, "some some"],
) -> None:
    """Other rows and columns at ``places``: beside the first ``old`` of the square, and with themselves."""
    old = len(border)
    square[:old, places], square[places, :old] = border, border.T
    square[places[:, None], places] = block


def lower_of(square: Float[Tensor, "n n"]) -> Float[Tensor, " entries"]:
    """The lower triangle of a matrix, row after row: half of the file that it is written to."""
    return torch.cat([row[: place + 1] for place, row in enumerate(square)]) if len(square) else square.flatten()


def square_of(entries: Float[Tensor, " entries"]) -> Float[Tensor, "n n"]:
    """The reverse, with zeros above the diagonal."""
    size = isqrt(2 * len(entries))
    square, start = entries.new_empty(size, size), 0
    for end, row in enumerate(square, 1):
        row[:end], row[end:] = entries[start : start + end], 0
        start += end
    return square
