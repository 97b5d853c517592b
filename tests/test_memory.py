import contextlib
import copy
from dataclasses import replace

import oracles
import pytest
import torch
from cases import CASES
from memories import LINEAR, close, moved, prepared
from torch import nn
from torch.func import functional_call
from torch.utils.data import Subset, TensorDataset

import fastntk
from fastntk.memory.members import Members
from fastntk.tuning.parameters import tuned


@pytest.mark.parametrize("form", ["primal", "dual"])
def test_a_model_linear_in_its_tuned_parameters_is_returned_as_retrained(form):
    model, data, ridge = LINEAR.model(), LINEAR.data(20), 0.7
    images, labels = data.tensors
    with torch.no_grad():
        features = torch.cat([model.body(images), torch.ones(20, 1, dtype=torch.float64)], 1)
    targets = fastntk.SquaredLoss().targets(labels, 3).double()
    initial = moved(model)
    start = torch.cat([initial["head.weight"], initial["head.bias"][:, None]], 1)
    fitted = oracles.retrained_head(features, targets, start, ridge)
    with torch.no_grad():
        model.head.weight.copy_(fitted[:, :-1])
        model.head.bias.copy_(fitted[:, -1])
    memory = fastntk.prepare(model, data, initial, ridge=ridge, form=form, loss=fastntk.SquaredLoss())
    for request, gone in (([3, 11], [3, 11]), ([0, 19, 5], [3, 11, 0, 19, 5])):
        answer = memory.forget(request)
        keep = [i for i in range(20) if i not in gone]
        expected = oracles.retrained_head(features[keep], targets[keep], start, ridge)
        close(answer.parameters, {"head.weight": expected[:, :-1], "head.bias": expected[:, -1]})
        assert answer.certificate.departure_requested < 1e-9
        assert answer.certificate.departure_retained < 1e-9
        assert answer.certificate.trusted


@pytest.mark.parametrize("name", ["bn+head", "ln+head", "bias", "shared"])
def test_primal_is_dual(name):
    left, right = prepared(name, "primal"), prepared(name, "dual")
    for request in ([1, 12], [4]):
        close(left.forget(request).parameters, right.forget(request).parameters)


@pytest.mark.parametrize("form", ["primal", "dual"])
def test_order_grouping_and_batches_of_requests_do_not_matter(form):
    memories = [prepared(form=form), prepared(form=form), prepared(form=form, batch_size=3)]
    memories[0].forget([2])
    memories[0].forget([9, 5])
    memories[1].forget([5, 2, 9])
    memories[2].forget([9])
    memories[2].forget([5])
    memories[2].forget([2])
    for memory in memories[1:]:
        close(memory.parameters, memories[0].parameters)


def test_order_of_the_samples_does_not_matter():
    case = CASES["bn+head"]
    model, data, order = case.model(), case.data(), torch.randperm(14)
    shuffled = TensorDataset(*(tensor[order] for tensor in data.tensors))
    left = fastntk.prepare(model, data, moved(model), ridge=0.5, loss=fastntk.SquaredLoss())
    right = fastntk.prepare(model, shuffled, moved(model), ridge=0.5, loss=fastntk.SquaredLoss())
    right.forget([order.tolist().index(i) for i in (1, 8)])
    close(left.forget([1, 8]).parameters, right.parameters)


@pytest.mark.parametrize("form", ["primal", "dual"])
def test_what_forgets_equals_what_never_saw(form):
    case = CASES["bn+head"]
    model, data, initial = case.model(), case.data(), moved(case.model())
    memory = fastntk.prepare(model, data, initial, ridge=0.5, form=form, loss=fastntk.SquaredLoss())
    memory.forget([4, 13])
    others = Subset(data, [i for i in range(14) if i not in (4, 13)])
    never = fastntk.prepare(model, others, initial, ridge=0.5, form=form, loss=fastntk.SquaredLoss())
    torch.testing.assert_close(memory.state.solution.step, never.state.solution.step, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("form", ["primal", "dual"])
def test_empty_request_changes_nothing(form):
    memory = prepared(form=form)
    before = memory.parameters
    answer = memory.forget([])
    for name, tensor in before.items():
        assert torch.equal(tensor, answer.parameters[name])
        assert torch.equal(tensor, memory.parameters[name])
    assert answer.certificate.departure_requested == 0
    assert int(memory.state.members.present.sum()) == 14


@pytest.mark.parametrize("form", ["primal", "dual", "matrix-free"])
def test_an_empty_request_reads_none_of_those_who_left(form):
    memory = prepared(form=form)
    memory.forget([0])
    answer = memory.forget([])
    close(answer.parameters, memory.parameters, 0)
    assert answer.certificate.retained == 13


def test_the_model_and_its_data_are_not_touched():
    case = CASES["fused bn+head"]
    model, data = case.model(), case.data()
    state = copy.deepcopy(model.state_dict())
    flags = [(p.requires_grad, p.grad) for p in model.parameters()]
    images = data.tensors[0].clone()
    fastntk.prepare(model, data, moved(model), ridge=0.5, loss=fastntk.SquaredLoss()).forget([0, 3])
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert [(p.requires_grad, p.grad) for p in model.parameters()] == flags
    assert not model.training
    assert torch.equal(images, data.tensors[0])


def test_preview_is_forget_without_the_change():
    memory = prepared()
    previewed, before = memory.preview([3, 4]), memory.parameters
    close(memory.parameters, before)
    close(memory.forget([3, 4]).parameters, previewed.parameters)


def test_certificate_measures_what_it_says():
    memory = prepared()
    certificate = memory.preview([3, 4]).certificate
    new, old = memory.preview([3, 4]).parameters, memory.parameters
    images = memory.state.members.source.tensors[0]
    change = functional_call(memory.model, new, (images,)) - functional_call(memory.model, old, (images,))
    dense = oracles.jacobian(memory.model, old, memory.state.layout, images)
    step = memory.state.layout.flatten(new) - memory.state.layout.flatten(old)
    predicted = dense @ step
    forgotten, retained = torch.tensor([3, 4]), torch.tensor([i for i in range(14) if i not in (3, 4)])

    def rms(values):
        return values.square().sum(1).mean().sqrt().item()

    unit = rms(predicted[forgotten])
    assert certificate.departure_requested == pytest.approx(rms((change - predicted)[forgotten]) / unit)
    assert certificate.departure_retained == pytest.approx(rms((change - predicted)[retained]) / unit)
    assert certificate.samples == 2
    assert certificate.retained == 12


def test_a_request_is_checked_on_retained_samples_whichever_they_are():
    """Also when the request holds the very samples that were drawn first."""
    memory = prepared(witnesses=3)
    first = memory.state.order[:5].tolist()
    assert memory.forget(first).certificate.departure_retained > 0
    assert memory.forget(memory.state.order[5:8].tolist()).certificate.departure_retained > 0


@pytest.mark.parametrize("form", ["primal", "dual"])
def test_saved_and_loaded_it_goes_on(form, tmp_path):
    memory = prepared(form=form, ridge="auto")
    memory.forget([1])
    memory.save(tmp_path / "memory")
    again = fastntk.load(tmp_path / "memory", memory.model, memory.state.members.source)
    assert again.calibration == memory.calibration
    close(again.parameters, memory.parameters, 0)
    close(again.preview([2, 6]).parameters, memory.forget([2, 6]).parameters, 1e-13)
    with pytest.raises(fastntk.InputError, match="id 1 is not in the memory"):
        again.forget([1])


@pytest.mark.parametrize("form", ["primal", "dual"])
def test_forgetting_and_remembering_changes_nothing(form):
    memory, never = prepared(form=form), prepared(form=form)
    before = memory.parameters
    memory.forget([3, 9])
    answer = memory.remember([9, 3])
    close(answer.parameters, before)
    assert answer.certificate.kind == "remember"
    assert sorted(memory.ids) == sorted(never.ids)
    close(memory.forget([3, 5]).parameters, never.forget([3, 5]).parameters)


@pytest.mark.parametrize("form", ["primal", "dual"])
def test_new_samples_are_remembered_as_if_they_had_been_there(form):
    case = CASES["bn+head"]
    model, data = case.model(), case.data()
    part = TensorDataset(*(tensor[:10] for tensor in data.tensors))
    memory = fastntk.prepare(model, part, moved(model), ridge=0.5, form=form, loss=fastntk.SquaredLoss())
    memory.state = memory.state.with_members(Members(data, memory.ids))
    memory.remember([10, 13])
    memory.remember([11, 12])
    whole = fastntk.prepare(model, data, moved(model), ridge=0.5, form=form, loss=fastntk.SquaredLoss())
    torch.testing.assert_close(memory.state.solution.step, whole.state.solution.step, rtol=1e-9, atol=1e-10)
    with pytest.raises(fastntk.InputError, match="id 13 is in the memory already"):
        memory.remember([13])
    with pytest.raises(fastntk.InputError, match="no sample 14"):
        memory.remember([14])
    assert len(memory.ids) == 14


def test_gathered_rounding_is_taken_off():
    memory, exact = prepared(form="primal"), prepared(form="primal")
    solution = memory.state.solution
    memory.state = replace(memory.state, solution=replace(solution, step=(1 + 1e-6) * solution.step))
    answer = memory.forget([2, 6])
    assert answer.certificate.inexactness < 1e-10
    close(answer.parameters, exact.forget([2, 6]).parameters)


@pytest.mark.parametrize("ridge", [1e-2, 1e-4, 1e-6])
def test_with_little_ridge_and_coarse_sums_a_request_is_refused_or_durable(ridge, tmp_path):
    torch.manual_seed(0)
    images, labels = torch.randn(60, 40) * torch.logspace(1, -3, 40), torch.arange(60) % 3
    model, data = nn.Linear(40, 3), TensorDataset(images, labels)
    memory = fastntk.prepare(
        model, data, moved(model), ridge=ridge, form="primal", loss=fastntk.SquaredLoss(), dtype=torch.float32
    )
    memory.save(tmp_path / "memory")
    answered = []
    for ids in torch.randperm(60)[:54].view(3, 18).tolist():
        with contextlib.suppress(fastntk.InputError):
            memory.forget(ids)
            answered += ids
        again = fastntk.load(tmp_path / "memory", model, data)
        assert sorted([*again.ids, *answered]) == list(range(60))
        close(again.parameters, memory.parameters)
    assert len(answered) == 54 or ridge < 1e-4
    again.purge()
    close(fastntk.load(tmp_path / "memory", model, data).parameters, memory.parameters)


def test_the_error_to_a_full_solve_is_measured_where_asked():
    memory = prepared()
    assert memory.forget([1]).certificate.error is None
    assert memory.forget([2], full=True).certificate.error < 1e-10
    memory.state = replace(memory.state, solution=replace(memory.state.solution, step=1.1 * memory.state.solution.step))
    assert memory.state.error() == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([99], "id 99 is not in the memory.*14 samples"),
        ([-1], "id -1 is not in the memory"),
        (["a"], "id 'a' is not in the memory"),
        ([2, 2], "id 2 stands twice"),
        (range(14), "every sample"),
    ],
)
def test_bad_requests_change_nothing(ids, message):
    memory = prepared()
    before = memory.parameters
    with pytest.raises(fastntk.InputError, match=message):
        memory.forget(ids)
    close(memory.parameters, before, 0)
    assert memory.state.members.present.all()


def test_bad_preparations():
    case = CASES["bn+head"]
    model, data = case.model(), case.data()
    initial = moved(model)
    for ridge in (0.0, -1.0, float("nan"), "large"):
        with pytest.raises(fastntk.InputError, match="ridge must be"):
            fastntk.prepare(model, data, initial, ridge=ridge)
    with pytest.raises(fastntk.InputError, match="own parameters, not a copy"):
        fastntk.prepare(model, data, dict(tuned(model)))
    with pytest.raises(fastntk.InputError, match="differ in"):
        fastntk.prepare(model, data, {})
    with pytest.raises(fastntk.InputError, match="form must be"):
        fastntk.prepare(model, data, initial, form="best")
    with pytest.raises(fastntk.InputError, match="training mode"):
        fastntk.prepare(copy.deepcopy(model).train(), data, initial)
    broken = TensorDataset(data.tensors[0].clone(), data.tensors[1])
    broken.tensors[0][11, 0, 0, 0] = float("nan")
    with pytest.raises(fastntk.InputError, match="NaN"):
        fastntk.prepare(model, broken, initial)
    with pytest.raises(fastntk.InputError, match="label . is outside"):
        fastntk.prepare(model, TensorDataset(data.tensors[0], data.tensors[1] + 5), initial)


def test_another_members_image_is_refused_though_the_network_says_the_same_of_it(tmp_path, caplog):
    images, labels = CASES["bn+head"].data(16).tensors[0], torch.zeros(16, dtype=torch.long)
    model = CASES["bn+head"].model()
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.bias.copy_(torch.tensor([40.0, 0.0, 0.0]))
    memory = fastntk.prepare(model, TensorDataset(images, labels), moved(model), ridge=1.0)
    memory.save(tmp_path / "m")
    shifted = TensorDataset(images.roll(-1, 0), labels)
    with pytest.raises(fastntk.InputError, match="another member's image under id"):
        fastntk.load(tmp_path / "m", model, shifted)
    replaced = images.clone()
    replaced[3] += 1
    with caplog.at_level("WARNING"):
        fastntk.load(tmp_path / "m", model, TensorDataset(replaced, labels))
    assert "1 of 8 images that were compared are not pixel by pixel" in caplog.text


@pytest.mark.parametrize("form", ["primal", "dual", "matrix-free", "convex"])
def test_logits_that_are_not_finite_are_refused(form):
    """Nothing is prepared with them, and nobody is remembered."""
    case = CASES["bn+head"]
    model, (images, labels) = case.model(), case.data().tensors

    def divided(_, arguments, logits):
        return logits / (arguments[0].flatten(1)[:, :1] != 7)

    odd = images.clone()
    odd[4, 0, 0, 0] = 7
    model.register_forward_hook(divided)
    loss = fastntk.CrossEntropy() if form == "convex" else fastntk.SquaredLoss()
    with pytest.raises(fastntk.InputError, match="logits of an image are NaN or infinite .number"):
        fastntk.prepare(model, TensorDataset(odd, labels), moved(model), ridge=0.5, form=form, loss=loss)
    whole = TensorDataset(torch.cat([images, odd[4:5]]), torch.cat([labels, labels[:1]]))
    memory = fastntk.prepare(model, TensorDataset(images, labels), moved(model), ridge=0.5, form=form, loss=loss)
    memory.state = memory.state.with_members(Members(whole, memory.ids))
    before = memory.parameters
    with pytest.raises(fastntk.InputError, match="logits of an image are NaN or infinite"):
        memory.remember([14])
    close(memory.parameters, before, 0)
    assert 14 not in memory.ids
    start = moved(model)
    start["head.bias"][0] = torch.nan
    with pytest.raises(fastntk.InputError, match="has NaN or infinite values in 'head.bias'"):
        fastntk.prepare(model, TensorDataset(images, labels), start, ridge=0.5, form=form, loss=loss)


def test_whether_the_model_knows_its_samples_is_told(caplog):
    """The labels that it gives itself, and others than it gives."""
    case = CASES["bn+head"]
    model, images = case.model(), case.data().tensors[0]
    own = model(images).argmax(1)
    for labels, level, share in ((own, "INFO", "100.0"), ((own + 1) % 3, "WARNING", "0.0")):
        caplog.clear()
        with caplog.at_level("INFO"):
            fastntk.prepare(model, TensorDataset(images, labels), moved(model), ridge=0.5)
        [told] = [record for record in caplog.records if "the model classifies" in record.getMessage()]
        assert (told.levelname, f"classifies {share} % rightly" in told.getMessage()) == (level, True)


@pytest.mark.parametrize(
    ("form", "loss"),
    [
        *((form, fastntk.SquaredLoss()) for form in ("primal", "dual", "matrix-free")),
        *((form, fastntk.CrossEntropy()) for form in ("primal", "matrix-free", "convex", "convex-disk", "layerwise")),
    ],
)
def test_a_certificate_says_what_the_solve_is_no_optimum_of(form, loss, tmp_path):
    certificate = prepared(form=form, loss=loss, checkpoint=tmp_path / "rows").preview([2]).certificate
    one_step = loss == fastntk.CrossEntropy() and form in ("primal", "matrix-free")
    expected = "one step" if one_step else ""  # on disk rows in float64 are not rounded
    assert certificate.form == form
    assert certificate.approximation.startswith(expected)
    assert bool(certificate.approximation) == bool(expected)
    assert (f", by {certificate.approximation}" in certificate.explanation) == bool(expected)


def test_rows_on_disk_of_a_network_in_float32_are_rounded_and_said_to_be(tmp_path):
    model, (images, labels) = CASES["bn+head"].model().float(), CASES["bn+head"].data(12).tensors
    data = TensorDataset(images.float(), labels)
    memory = fastntk.prepare(model, data, moved(model), ridge=0.5, form="convex-disk", checkpoint=tmp_path / "rows")
    assert "by rows that are rounded to bfloat16" in memory.preview([2]).certificate.explanation


@pytest.mark.parametrize(
    ("form", "loss"),
    [
        *((form, fastntk.SquaredLoss()) for form in ("primal", "dual", "matrix-free")),
        *((form, fastntk.CrossEntropy()) for form in ("convex", "convex-disk", "layerwise")),
    ],
)
def test_a_sample_whose_image_is_gone_can_leave_where_its_rows_are_held(form, loss, tmp_path):
    """As it would with its image, and from a folder; nothing is measured on it."""
    memory = prepared(form=form, loss=loss, checkpoint=tmp_path / "rows")
    memory.save(tmp_path / "m")
    source = memory.state.members.source
    fewer = Kept(source, [each for each in range(len(source)) if each not in (2, 6)])
    again = fastntk.load(tmp_path / "m", memory.model, fewer)
    if form not in ("dual", "convex", "convex-disk"):
        with pytest.raises(fastntk.InputError, match=r"no sample 2, which must be read once more.* convex"):
            again.forget([2])
        return
    wanted = prepared(form=form, loss=loss, checkpoint=tmp_path / "other").forget([2, 5])
    answer = again.forget([2, 5])
    close(answer.parameters, wanted.parameters, 1e-6 if form == "convex-disk" else 1e-9)
    assert (answer.certificate.lost, wanted.certificate.lost) == (1, 0)
    assert "of 1 the image is gone" in answer.certificate.explanation
    assert "lost" not in answer.certificate.to_ledger()
    alone = again.forget([6]).certificate
    assert (alone.lost, alone.departure_requested, alone.trusted) == (1, None, False)
    assert "by an unmeasured part on the samples of the request (of 1 the image is gone" in alone.explanation
    again.purge()
    close(fastntk.load(tmp_path / "m", memory.model, fewer).parameters, again.parameters)


class Kept(Subset):
    """Some samples of a source, under the ids that they have there."""

    @property
    def ids(self):
        return self.indices
