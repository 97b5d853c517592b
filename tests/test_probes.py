import pytest
import torch
from cases import CASES
from memories import close, moved

import fastntk
from fastntk.jacobians.combinations import ClassProbes, error
from fastntk.jacobians.linearised import Linearised
from fastntk.jacobians.numerics import Numerics
from fastntk.jacobians.per_sample import PerSampleJacobian
from fastntk.tuning.parameters import snapshot, tuned


def test_a_draw_is_its_samples_own_and_has_the_identity_for_its_mean():
    probes = ClassProbes(2, seed=3)
    assert torch.equal(probes.draw([5, 9], 3)[1], probes.draw([9], 3)[0])
    draws = probes.draw(range(4000), 3)
    outer = draws @ draws.mT
    torch.testing.assert_close(outer.mean(0), torch.eye(3, dtype=torch.float64), atol=0.06, rtol=0)
    torch.testing.assert_close(draws.mT @ draws, (1.5 * torch.eye(2, dtype=torch.float64)).expand(4000, 2, 2))


@pytest.mark.parametrize("name", ["bn+head", "shared"])
@pytest.mark.parametrize("count", [1, 2])
def test_probed_rows_are_combinations_of_the_classes(name, count):
    case = CASES[name]
    model = case.model()
    jacobian, probes, ids = PerSampleJacobian(model, snapshot(tuned(model))), ClassProbes(count), [4, 0, 11]
    exact, probed = (
        Linearised(jacobian, case.data(), numerics=n).rows(ids) for n in (Numerics(), Numerics(class_probes=count))
    )
    draws = probes.draw(ids, 3)
    torch.testing.assert_close(probed.jacobian.dense(), torch.einsum("nck,ncp->nkp", draws, exact.jacobian.dense()))
    torch.testing.assert_close(probed.residual, torch.einsum("nck,nc->nk", draws, exact.residual))


@pytest.mark.parametrize("form", ["primal", "dual"])
def test_as_many_probes_as_classes_are_exact(form):
    case = CASES["bn+head"]
    model = case.model()
    exact, probed = (
        fastntk.prepare(
            model, case.data(), moved(model), ridge=0.5, form=form, class_probes=k, loss=fastntk.SquaredLoss()
        )
        for k in (None, 3)
    )
    for request in ([3, 8], [5]):
        close(probed.forget(request).parameters, exact.forget(request).parameters)


@pytest.mark.parametrize("form", ["primal", "dual"])
def test_what_forgets_equals_what_never_saw(form):
    case = CASES["bn+head"]
    model, data = case.model(), case.data()
    memory = fastntk.prepare(
        model, data, moved(model), ridge=0.5, form=form, class_probes=2, loss=fastntk.SquaredLoss()
    )
    memory.forget([12, 13])
    few, given = torch.utils.data.Subset(data, range(12)), {"loss": fastntk.SquaredLoss(), "class_probes": 2}
    never = fastntk.prepare(model, few, moved(model), ridge=0.5, form=form, **given)
    torch.testing.assert_close(memory.state.solution.step, never.state.solution.step, rtol=1e-9, atol=1e-10)


def test_the_error_is_that_of_the_gram_matrix():
    case = CASES["bn+head"]
    model = case.model()
    jacobian = PerSampleJacobian(model, snapshot(tuned(model)))
    exact, probed = (
        Linearised(jacobian, case.data(), numerics=n).rows(range(6)).jacobian
        for n in (Numerics(), Numerics(class_probes=2))
    )
    left, right = (j.dense().flatten(0, 1) for j in (exact, probed))
    gram = left.T @ left
    assert error(exact, probed) == pytest.approx(float((right.T @ right - gram).norm() / gram.norm()))


def test_bad_numbers_of_probes():
    case = CASES["bn+head"]
    model = case.model()
    for count in (0, 4):
        with pytest.raises(fastntk.InputError, match="from 1 to the number of classes, 3"):
            fastntk.prepare(model, case.data(), moved(model), class_probes=count)
    with pytest.raises(fastntk.InputError, match="no use for class probes"):
        fastntk.prepare(model, case.data(), moved(model), class_probes=2, form="matrix-free")
