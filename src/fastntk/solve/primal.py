"""The unlearning step, in its primal (p x p) and its dual (nC x nC) form.

For a set S, linearised at ``theta*`` with ``u = theta* - theta_0``:

    s(S) = argmin_d  1/2 sum_S |J_i d - r_i|^2 + ridge/2 |d + u|^2
         = (G_S + ridge I)^-1 (b_S - ridge u)                      primal
         = J_S' (J_S J_S' + ridge I)^-1 (r_S + J_S u) - u          dual

is the step to the optimum that S predicts. Forgetting F out of D = R + F moves the tuned parameters by
``s(R) - s(D)``, anchored at what ``theta*`` itself falls short of. With ``B = (G_D + ridge I)^-1`` and
``A = (K_D + ridge I)^-1``, the forgotten samples alone give that difference:

    s(R) - s(D) = -B J_F' (I - J_F B J_F')^-1 (r_F - J_F s(D))     primal
                = -J_D' A_DF A_FF^-1 a_F,   a = A (r_D + J_D u)    dual

``(I - J_F B J_F')^-1 (r_F - J_F s(D))`` is the error that the linearised model makes on F when it has not seen F.
Adding samples is the same with the other sign (primal), or bordering A (dual).
The ridge is a total over the set, the same for D and R: half of it times ``|theta - theta_0|^2`` is what fitting adds
to the summed loss. Source: Golatkar et al. 2020 (arXiv 2003.02960) for the step without ``u``, Li et al. 2023 (arXiv
2312.14923) for taking it over parameter-efficient parameters.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from fastntk.jacobians.jacobian import Jacobian
from fastntk.solve.linalg import add_product_, conjugate_gradients, invert_, mirror_, ridge_inverse
from fastntk.solve.solution import RowsOf, Update, factorised, relative
from fastntk.solve.sums import Rows, Sums


def targets(rows: Rows, displacement: Float[Tensor, " p"]) -> Float[Tensor, " rows"]:
    """``r_S + J_S u``, what the linearised model must add to its value at ``theta_0``."""
    return (rows.residual.double() + rows.jacobian.matvec(displacement)).flatten()


@dataclass
class PrimalSolution:
    """``B = (G_S + ridge I)^-1`` and ``s(S)`` for a set S that samples leave; the size does not depend on S.

    G consists of blocks: R (rest), X_c (rest by the head's inputs, one a class) and ``I_C (x) H`` (head). B is kept as
    the inverses of ``H + ridge I`` and of the Schur complement ``R + ridge I - sum_c X_c (H + ridge I)^-1 X_c'``, which
    is B's own block for the rest. So the head's C^2 blocks are never written out, and products with B go through X_c.

    Attributes:
        sums: of S.
        displacement: ``u``.
        ridge: a total.
        inverse: of the Schur complement.
        head_inverse: ``(H + ridge I)^-1``.
        step: ``s(S)``.
    """

    form: ClassVar[Literal["primal"]] = "primal"
    sums: Sums
    displacement: Float[Tensor, " p"]
    ridge: float
    inverse: Float[Tensor, "rest rest"]
    head_inverse: Float[Tensor, "features features"]
    step: Float[Tensor, " p"]

    @classmethod
    def of(cls, sums: Sums, displacement: Float[Tensor, " p"], ridge: float) -> "PrimalSolution":
        """Solve for the set that ``sums`` are over."""
        head_inverse = ridge_inverse(sums.head, ridge)
        inverse = sums.rest.clone()
        inverse.diagonal().add_(ridge)
        for block in sums.cross if head_inverse.numel() else ():
            add_product_(inverse, block @ head_inverse, block, -1)
        solution = cls(sums, displacement, ridge, invert_(inverse), head_inverse, torch.zeros_like(displacement))
        rhs = sums.rhs - ridge * displacement
        for _ in range(2):  # the second time takes off the rounding of the first
            solution.step += solution.solve(rhs - solution._apply(solution.step))
        return solution

    def tensors(self) -> dict[str, Tensor]:
        """Everything but the ridge, by name."""
        sums = {f"sums.{field.name}": getattr(self.sums, field.name) for field in fields(Sums)}
        return {**sums, **{name: getattr(self, name) for name in ("displacement", "inverse", "head_inverse", "step")}}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], ridge: float) -> "PrimalSolution":
        """The reverse of ``tensors``."""
        sums = Sums(*(tensors[f"sums.{field.name}"] for field in fields(Sums)))
        own = (tensors[name] for name in ("inverse", "head_inverse", "step"))
        return cls(sums, tensors["displacement"], ridge, *own)

    def _apply(self, vector: Tensor) -> Tensor:
        """``(G + ridge I) v``."""
        return self.sums.matvec(vector) + self.ridge * vector

    def solve(self, vector: Float[Tensor, " p"]) -> Float[Tensor, " p"]:
        """``B v``, in the dtype of the vector."""
        classes, rest, features = self.sums.cross.shape
        v = vector.to(self.inverse.dtype)
        head = v[rest:].view(classes, features) @ self.head_inverse
        upper = self.inverse @ (v[:rest] - self.sums.across(head))
        head = head - self.sums.down(upper) @ self.head_inverse
        return torch.cat([upper, head.flatten()]).to(vector.dtype)

    def update(self, positions: Int[Tensor, " samples"], rows: RowsOf, sign: int) -> Update:
        """What adding the samples at ``positions`` to S (``sign`` 1), or taking them out (-1), would change.

        ``low_rank``: the rest's rows of ``B J_F'``, ``(H + ridge I)^-1 h_i`` of every sample, and the Cholesky factor
        of ``I + sign J_F B J_F'``.
        """
        these = rows(positions)
        h, solved, reduced, upper = self._projected(these)
        core = reduced.T @ upper + torch.kron(h @ solved, torch.eye(len(self.sums.cross)).to(h))
        factor = factorised(torch.eye(len(core)).to(core) + sign * core)
        weights = torch.cholesky_solve(self._error(these, self.step)[:, None].to(factor), factor)[:, 0]
        return Update(sign * self._lift(upper, solved, weights), positions, sign, these, (upper, solved, factor))

    def _projected(self, rows: Rows) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The head's inputs h, ``(H + ridge I)^-1 h'``, and the rest's rows of J' less what the head takes up of them,
        before and after the inverse; one column a sample and class."""
        j, h = (part.to(self.inverse.dtype) for part in (rows.jacobian.rest, rows.jacobian.features))
        solved = self.head_inverse @ h.T
        reduced = (j.permute(2, 0, 1) - (self.sums.cross @ solved).permute(1, 2, 0)).flatten(1)
        return h, solved, reduced, self.inverse @ reduced

    def alone(self, positions: Int[Tensor, " samples"], rows: RowsOf) -> Float[Tensor, "samples classes"]:
        """``J_i (s(S - i) - s(S)) = -M_i (I - M_i)^-1 (r_i - J_i s(S))`` with ``M_i = J_i B J_i'``, for each sample i.

        It is what forgetting a sample alone changes of its own logits, to first order.
        """
        these = rows(positions)
        h, solved, reduced, upper = self._projected(these)
        samples, classes = these.residual.shape
        blocks = [each.view(-1, samples, classes).permute(1, 2, 0) for each in (reduced, upper)]
        eye = torch.eye(classes).to(h)
        leverage = blocks[0] @ blocks[1].mT + (h * solved.T).sum(1)[:, None, None] * eye
        error = self._error(these, self.step).view(samples, classes, 1).to(h)
        return -(leverage @ torch.linalg.solve(eye - leverage, error))[..., 0]

    def _lift(self, upper: Tensor, solved: Tensor, weights: Float[Tensor, " rows"]) -> Float[Tensor, " p"]:
        """``B J_F' w``, in float64, from parts of an update's ``low_rank``."""
        change = upper @ weights
        own = weights.view(solved.shape[1], len(self.sums.cross)).T @ solved.T
        head = own - self.sums.down(change) @ self.head_inverse
        return torch.cat([change, head.flatten()]).to(self.step)

    def apply_(self, update: Update) -> None:
        """Add the samples of an ``update`` to S, or take them out, in place."""
        upper, _, factor = update.low_rank
        rows = cast(Rows, update.rows)
        add_product_(self.inverse, upper, torch.cholesky_solve(upper.T, factor).T, -update.sign)
        mirror_(self.inverse)
        self.step += update.change
        self.sums.observe_(rows.jacobian, rows.residual, update.sign).complete_()
        self.head_inverse = ridge_inverse(self.sums.head, self.ridge)

    def residual(self, update: Update | None = None) -> float:
        """``|(G_S + ridge I) s(S) - (b_S - ridge u)| / |b_S - ridge u|``, now or after an ``update``: 0 if exact."""
        rhs, step = self.sums.rhs - self.ridge * self.displacement, self.step
        if update is None:
            return relative(rhs - self._apply(step), rhs)
        rows, step = cast(Rows, update.rows), step + update.change
        jacobian = rows.jacobian.to(torch.float64)
        error = self._error(rows, step).view_as(rows.residual)
        left = rhs - self._apply(step) + update.sign * jacobian.rmatvec(error)
        return relative(left, rhs + update.sign * jacobian.rmatvec(rows.residual.double()))

    @property
    def limit(self) -> float:
        """Of the residual, above which the inverse is made anew: rounding has gathered in it."""
        return 1e-9 if self.inverse.dtype == torch.float64 else 1e-4

    def anew(self) -> "PrimalSolution":
        """Solved anew from the sums, which takes off the rounding of all updates so far."""
        return PrimalSolution.of(self.sums, self.displacement, self.ridge)

    @staticmethod
    def _error(rows: Rows, step: Float[Tensor, " p"]) -> Float[Tensor, " rows"]:
        """``r_F - J_F s``."""
        return (rows.residual.double() - rows.jacobian.to(torch.float64).matvec(step)).flatten()

    def resolve(
        self, positions: Int[Tensor, " samples"], rows: RowsOf, displacement: Float[Tensor, " p"], ridge: float
    ) -> Float[Tensor, " p"]:
        """``s(S - F)`` for any displacement and ridge: conjugate gradients on the sums, preconditioned by ``B``."""
        update = self.update(positions, rows, -1)
        upper, solved, factor = update.low_rank
        forgotten = cast(Rows, update.rows)
        jacobian = forgotten.jacobian.to(torch.float64)

        def apply(v: Tensor) -> Tensor:
            return self.sums.matvec(v) + ridge * v - jacobian.rmatvec(jacobian.matvec(v))

        def precondition(v: Tensor) -> Tensor:
            image = self.solve(v)
            weights = torch.cholesky_solve(jacobian.matvec(image).flatten()[:, None].to(factor), factor)[:, 0]
            return image + self._lift(upper, solved, weights)

        rhs = self.sums.rhs - jacobian.rmatvec(forgotten.residual.to(self.step)) - ridge * displacement
        return conjugate_gradients(apply, rhs, precondition)


@dataclass
class DualSolution:
    """``A``, ``a`` and the rows of a set S that samples leave; ``s(S) = J_S' a - u``.

    Samples that have left have zeros in every array.

    Attributes:
        rows: of S.
        displacement: ``u``.
        ridge: a total.
        kernel: ``K_S = J_S J_S'``.
        inverse: ``A = (K_S + ridge I)^-1``.
        coefficients: ``a = A (r_S + J_S u)``.
    """

    form: ClassVar[Literal["dual"]] = "dual"
    limit: ClassVar[float] = 1e-9
    rows: Rows
    displacement: Float[Tensor, " p"]
    ridge: float
    kernel: Float[Tensor, "rows rows"]
    inverse: Float[Tensor, "rows rows"]
    coefficients: Float[Tensor, " rows"]

    @classmethod
    def of(
        cls,
        rows: Rows,
        displacement: Float[Tensor, " p"],
        ridge: float,
        kernel: Float[Tensor, "rows rows"] | None = None,
    ) -> "DualSolution":
        """Solve for the set whose ``rows`` are given, and its ``kernel`` where that is known already."""
        kernel = rows.kernel() if kernel is None else kernel
        inverse = ridge_inverse(kernel, ridge)
        return cls(rows, displacement, ridge, kernel, inverse, inverse @ targets(rows, displacement))

    def tensors(self) -> dict[str, Tensor]:
        """Everything but the ridge, by name."""
        jacobian = {f"rows.{field.name}": getattr(self.rows.jacobian, field.name) for field in fields(Jacobian)}
        own = {name: getattr(self, name) for name in ("displacement", "kernel", "inverse", "coefficients")}
        return {**jacobian, "rows.residual": self.rows.residual, **own}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], ridge: float) -> "DualSolution":
        """The reverse of ``tensors``."""
        jacobian = Jacobian(*(tensors[f"rows.{field.name}"] for field in fields(Jacobian)))
        rows = Rows(jacobian, tensors["rows.residual"])
        return cls(rows, tensors["displacement"], ridge, tensors["kernel"], tensors["inverse"], tensors["coefficients"])

    @property
    def step(self) -> Float[Tensor, " p"]:
        """``s(S)``."""
        return self.rows.jacobian.rmatvec(self.coefficients.view_as(self.rows.residual)) - self.displacement

    def update(self, positions: Int[Tensor, " samples"], rows: RowsOf, sign: int) -> Update:
        """What adding the samples at ``positions`` to S (``sign`` 1), or taking them out (-1), would change."""
        return self._leaving(positions) if sign < 0 else self._joining(positions, rows(positions))

    def _leaving(self, positions: Tensor) -> Update:
        """``low_rank``: the change of ``a``, ``A_SF`` and the Cholesky factor of ``A_FF``."""
        gone = self._rows(positions)
        columns = self.inverse[:, gone]
        factor = factorised(columns[gone])
        change_of_a = -columns @ torch.cholesky_solve(self.coefficients[gone, None], factor)[:, 0]
        change = self.rows.jacobian.rmatvec(change_of_a.view_as(self.rows.residual))
        return Update(change, positions, -1, None, (change_of_a, columns, factor))

    def _joining(self, positions: Tensor, rows: Rows) -> Update:
        """``low_rank``: ``a_F``, ``A K_SF``, the Cholesky factor of ``K_FF + ridge I - K_FS A K_SF``, and ``K_SF``."""
        across = self.rows.kernel_with(rows)
        lifted = self.inverse @ across
        core = rows.kernel() - across.T @ lifted
        core.diagonal().add_(self.ridge)
        factor = factorised(core)
        error = targets(rows, self.displacement) - across.T @ self.coefficients
        joining = torch.cholesky_solve(error[:, None], factor)[:, 0]
        staying = -(lifted @ joining)
        change = rows.jacobian.rmatvec(joining.view_as(rows.residual))
        change = change + self.rows.jacobian.rmatvec(staying.view_as(self.rows.residual))
        return Update(change, positions, 1, rows, (joining, lifted, factor, across))

    def alone(self, positions: Int[Tensor, " samples"], rows: RowsOf) -> Float[Tensor, "samples classes"]:
        """``J_i (s(S - i) - s(S)) = ridge a_i - A_ii^-1 a_i``, for each sample i; ``rows`` are not needed.

        It is what forgetting a sample alone changes of its own logits, to first order.
        """
        places = self._rows(positions).view(len(positions), -1)
        blocks, own = self.inverse[places[:, :, None], places[:, None, :]], self.coefficients[places]
        return self.ridge * own - torch.linalg.solve(blocks, own[..., None])[..., 0]

    def apply_(self, update: Update) -> None:
        """Add the samples of an ``update`` to S, or take them out, in place."""
        if update.sign < 0:
            self._leave_(update)
        else:
            self._join_(update)
        mirror_(self.inverse)

    def _leave_(self, update: Update) -> None:
        change_of_a, columns, factor = update.low_rank
        rows = self._rows(update.positions)
        add_product_(self.inverse, columns, torch.cholesky_solve(columns.T, factor).T, sign=-1)
        self.coefficients += change_of_a
        self.coefficients[rows] = 0
        for square in (self.inverse, self.kernel):
            square[rows] = 0
            square[:, rows] = 0
        for stored in (self.rows.jacobian.rest, self.rows.jacobian.features, self.rows.residual):
            stored[update.positions] = 0

    def _join_(self, update: Update) -> None:
        joining, lifted, factor, across = update.low_rank
        joined = cast(Rows, update.rows)
        self._grow_(int(update.positions.max()) + 1 - len(self.rows.residual))
        rows, old = self._rows(update.positions), len(lifted)
        solved = torch.cholesky_solve(lifted.T, factor)
        add_product_(self.inverse[:old, :old], lifted, solved.T)
        self.inverse[:old, rows], self.inverse[rows, :old] = -solved.T, -solved
        self.inverse[rows[:, None], rows] = torch.cholesky_inverse(factor)
        self.kernel[:old, rows], self.kernel[rows, :old] = across, across.T
        self.kernel[rows[:, None], rows] = joined.kernel()
        self.coefficients[:old] -= lifted @ joining
        self.coefficients[rows] = joining
        self.rows.jacobian.rest[update.positions] = joined.jacobian.rest
        self.rows.jacobian.features[update.positions] = joined.jacobian.features
        self.rows.residual[update.positions] = joined.residual

    def _grow_(self, samples: int) -> None:
        """Room for more samples at the end, of zeros."""
        if samples > 0:
            rows = samples * self.rows.residual.shape[1]
            self.kernel, self.inverse = (F.pad(square, (0, rows, 0, rows)) for square in (self.kernel, self.inverse))
            self.coefficients = F.pad(self.coefficients, (0, rows))
            room = self.rows[torch.zeros(samples, dtype=torch.long)]
            for part in (room.jacobian.rest, room.jacobian.features, room.residual):
                part.zero_()
            self.rows = self.rows + room

    def residual(self, update: Update | None = None) -> float:
        """``|(K_S + ridge I) a - (r_S + J_S u)| / |r_S + J_S u|``, now or after an ``update``: 0 if exact."""
        target, a = targets(self.rows, self.displacement), self.coefficients
        if update is None:
            return relative(self.kernel @ a + self.ridge * a - target, target)
        if update.sign < 0:
            gone = self._rows(update.positions)
            a, target = (a + update.low_rank[0]).index_fill(0, gone, 0), target.index_fill(0, gone, 0)
            left = (self.kernel @ a).index_fill(0, gone, 0) + self.ridge * a - target
            return relative(left, target)
        joining, lifted, _, across = update.low_rank
        joined = cast(Rows, update.rows)
        a, more = a - lifted @ joining, targets(joined, self.displacement)
        left = self.kernel @ a + across @ joining + self.ridge * a - target
        right = across.T @ a + joined.kernel() @ joining + self.ridge * joining - more
        return relative(torch.cat([left, right]), torch.cat([target, more]))

    def anew(self) -> "DualSolution":
        """Solved anew from the kernel, which takes off the rounding of all updates so far."""
        return DualSolution.of(self.rows, self.displacement, self.ridge, self.kernel)

    def _rows(self, positions: Tensor) -> Tensor:
        """The rows of the kernel that belong to the samples at ``positions``."""
        classes = self.rows.residual.shape[1]
        first = positions.to(self.inverse.device)[:, None] * classes
        return (first + torch.arange(classes, device=first.device)).flatten()

    def resolve(
        self, positions: Int[Tensor, " samples"], rows: RowsOf, displacement: Float[Tensor, " p"], ridge: float
    ) -> Float[Tensor, " p"]:
        """``s(S - F)`` for any displacement and ridge: conjugate gradients on the kernel, preconditioned by ``A``."""
        _, columns, factor = self._leaving(positions).low_rank
        gone = self._rows(positions)

        def apply(v: Tensor) -> Tensor:
            return (self.kernel @ v + ridge * v).index_fill_(0, gone, 0)

        def precondition(v: Tensor) -> Tensor:
            return self.inverse @ v - columns @ torch.cholesky_solve((columns.T @ v)[:, None], factor)[:, 0]

        target = targets(self.rows, displacement).index_fill_(0, gone, 0)
        coefficients = conjugate_gradients(apply, target, precondition)
        return self.rows.jacobian.rmatvec(coefficients.view_as(self.rows.residual)) - displacement
