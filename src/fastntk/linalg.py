"""Symmetric matrices: products at half the arithmetic, ridge inverses, and two Krylov methods."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from fastntk.errors import InputError

_BLOCK = 2048


def add_product_(
    matrix: Float[Tensor, "n n"],
    left: Float[Tensor, "n k"],
    right: Float[Tensor, "n k"],
    sign: int = 1,
) -> Float[Tensor, "n n"]:
    """``matrix += sign * left right'`` in place, for a product known to be symmetric: blocks on and below the diagonal
    are multiplied, the others mirrored. The product is taken in the dtype of the factors."""
    for start in range(0, len(matrix), _BLOCK):
        rows = slice(start, start + _BLOCK)
        block = left[rows] @ right[: rows.stop].T
        matrix[rows, : rows.stop] += block if sign > 0 else -block
        matrix[:start, rows] = matrix[rows, :start].T
    return matrix


def ridge_inverse(matrix: Float[Tensor, "n n"], ridge: float) -> Float[Tensor, "n n"]:
    """``(matrix + ridge I)^-1`` for a positive semidefinite matrix, by Cholesky. ``ridge`` is a total.

    Raises:
        InputError: the shifted matrix is not positive definite in floating point.
    """
    return torch.cholesky_inverse(cholesky(matrix, ridge))


def cholesky(matrix: Float[Tensor, "n n"], ridge: float) -> Float[Tensor, "n n"]:
    """The lower Cholesky factor of ``matrix + ridge I``. Raises like ``ridge_inverse``."""
    shifted = matrix.clone()
    shifted.diagonal().add_(ridge)
    factor, info = torch.linalg.cholesky_ex(
        shifted, out=(shifted, torch.empty(0, dtype=torch.int32, device=matrix.device))
    )
    if info != 0:
        raise InputError(
            f"the Gram matrix plus the ridge {ridge:.3g} is not positive definite in floating point. Use a larger "
            "ridge, or 'auto'."
        )
    return factor


def conjugate_gradients(
    apply: Callable[[Tensor], Tensor],
    rhs: Float[Tensor, " n"],
    precondition: Callable[[Tensor], Tensor],
    tolerance: float = 1e-11,
    limit: int = 500,
) -> Float[Tensor, " n"]:
    """``x`` with ``|apply(x) - rhs| <= tolerance |rhs|`` for a positive definite operator.

    Raises:
        InputError: not reached within ``limit`` steps.
    """
    x, residual = torch.zeros_like(rhs), rhs.clone()
    direction = z = precondition(residual)
    rho, enough = residual @ z, tolerance * float(rhs.norm())
    for _ in range(limit):
        if float(residual.norm()) <= enough:
            return x
        image = apply(direction)
        length = rho / (direction @ image)
        x = x + length * direction
        residual = residual - length * image
        z = precondition(residual)
        rho, previous = residual @ z, rho
        direction = z + rho / previous * direction
    raise InputError(
        f"the solve did not converge in {limit} steps: its ridge is too far from the one prepared. Prepare with it."
    )


def lanczos(
    apply: Callable[[Tensor], Tensor], start: Float[Tensor, " n"], steps: int
) -> tuple[Float[Tensor, "n m"], Float[Tensor, "m m"]]:
    """An orthonormal basis ``Q`` of the Krylov space of a symmetric operator at ``start``, and ``T = Q' operator Q``.

    ``f(operator) start`` is approximated by ``|start| Q f(T) e_1``, with an error that falls fast with the number of
    steps, m <= ``steps``. The basis is orthogonalised in full.
    """
    basis, projected = [start / start.norm()], []
    for _ in range(min(steps, len(start))):
        image = apply(basis[-1])
        stacked = torch.stack(basis)
        coefficients = stacked @ image
        projected.append(coefficients)
        image = image - stacked.T @ coefficients
        image = image - stacked.T @ (stacked @ image)
        if float(image.norm()) <= 1e-10 * float(projected[0].norm()):
            break
        basis.append(image / image.norm())
    size = len(projected)
    upper = torch.stack([torch.nn.functional.pad(column, (0, size - len(column))) for column in projected], 1)
    lower = upper.triu(1).T
    return torch.stack(basis[:size], 1), upper.triu() + lower
