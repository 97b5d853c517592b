from dataclasses import replace

import pytest
import torch
from cases import CASES
from torch.utils.data import TensorDataset
from torch.utils.flop_counter import FlopCounterMode

import fastntk
from fastntk.common.machine import peak_tensors
from fastntk.memory.prepare import linearised
from fastntk.solve.forms import FORMS, chosen
from fastntk.solve.prices import Workload, image_bytes
from fastntk.solve.speeds import Speeds

FREE = 10**12


def work(samples, outputs, rest, features=0, **options):
    return Workload(samples, outputs, rest, features, **options)


def test_the_cheaper_form_is_chosen():
    assert chosen(work(100_000, 10, 10_000), FREE).form == "primal"
    assert chosen(work(500, 10, 50_000), FREE).form == "dual"


def test_the_form_that_fits_is_chosen():
    w = work(3_000, 10, 20_000)
    primal, dual = FORMS["primal"].price(w), FORMS["dual"].price(w)
    assert primal.operations < dual.operations
    assert (primal.bytes > dual.bytes) == (chosen(w, min(primal.bytes, dual.bytes)).form == "dual")
    assert chosen(w, FREE).form == "primal"
    assert chosen(work(200_000, 10, 35_000), 40 * 10**9).form == "primal"
    assert chosen(work(200_000, 10, 35_000), 10 * 10**9).form == "matrix-free"


def test_rows_go_to_disk_where_no_matrix_fits_and_the_disk_has_room():
    w = work(50_000, 1000, 34_000, 1281, kept=3, contrasted=True, curved=True)
    price = FORMS["convex-disk"].price(w)
    assert price.bytes < 3 * 10**9
    assert price.disk == 50_000 * (2 * 2 * 34_000 + 4 * 1281)
    assert chosen(w, 16 * 10**9, room=10**10).form == "convex-disk"
    assert chosen(w, 16 * 10**9, room=10**9).form == "matrix-free"
    assert chosen(w, FREE, room=10**12).form == "convex"
    with pytest.raises(
        fastntk.InputError, match=r"the convex-disk form .* GB and 7\.1 GB of disk; .* and 1\.0 GB of disk"
    ):
        chosen(w, 16 * 10**9, "convex-disk", 10**9)


def test_the_primal_form_does_not_grow_with_the_samples():
    assert FORMS["primal"].price(work(50_000, 10, 9_600)).bytes == FORMS["primal"].price(work(500, 10, 9_600)).bytes


def test_what_does_not_fit_says_what_to_do():
    w = work(90_000, 10, 100_000)
    message = r"100,000 tuned.*90,000 samples.*primal form .* GB.*dual form .* GB.*0\.0 GB are free.*tune fewer"
    with pytest.raises(fastntk.InputError, match=message):
        chosen(w, 8 * 10**6)
    with pytest.raises(fastntk.InputError, match=r"it needs the primal form .*float32 sums take half"):
        chosen(work(100, 10, 100_000), 8 * 10**9, "primal")
    with pytest.raises(fastntk.InputError, match="form must be"):
        chosen(w, FREE, "best")


@pytest.mark.parametrize("form", ["primal", "dual", "convex-disk", "matrix-free"])
def test_a_plan_names_every_phase(form):
    case = CASES["bn+head"]
    plan = fastntk.plan(case.model(), case.data(), form=form)
    assert plan.form == form
    assert plan.workload.parameters == sum(p.numel() for p in case.model().parameters() if p.requires_grad)
    assert plan.workload.features == 5
    assert plan.operations > 0
    assert all(seconds > 0 for seconds in plan.seconds.values())
    assert plan.total_seconds == sum(plan.seconds.values())


def test_a_plan_has_what_every_form_would_take():
    case = CASES["bn+head"]
    plan = fastntk.plan(case.model(), case.data(), loss=fastntk.CrossEntropy(), epochs=3)
    assert [each.form for each in plan.offers] == list(FORMS)
    [taken] = [each for each in plan.offers if each.form == plan.form]
    assert (taken.bytes, taken.but) == (plan.bytes, "")
    assert taken.seconds + plan.seconds["trial"] == pytest.approx(plan.total_seconds)
    assert plan.epochs == 3
    assert plan.retraining > 0
    assert {each.form: each.but for each in plan.offers}["primal"] == "answers by one step"
    lines = plan.text().splitlines()
    assert [line.split()[0] for line in lines[-len(FORMS) :]] == list(FORMS)
    assert sum(line.endswith("taken") for line in lines) == 1


@pytest.mark.parametrize("loss", [fastntk.SquaredLoss(), fastntk.CrossEntropy()])
def test_rows_that_are_not_timed_are_counted_from_those_that_are(loss):
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(144, 9))
    fastntk.tune(model, "all")
    data = TensorDataset(torch.randn(3, 3, 8, 8), torch.arange(3))
    network = linearised(model, data, loss, fastntk.Numerics())
    network.layout  # noqa: B018 (its trial run is not counted)
    for outputs in (1, 3, 7):
        with FlopCounterMode(display=False) as counter:
            replace(network, keep=outputs + loss.contrasted).rows(range(1))
        assert Speeds(network, 3).rows(outputs).operations == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_the_most_that_tensors_held_at_once():
    def work():
        kept = torch.zeros(1000)
        for _ in range(3):
            kept = kept + torch.ones(1000)  # the old one, the ones, and their sum
        return kept.view(10, 100)

    assert peak_tensors(work, torch.device("cpu")) == 3 * 4000


def test_a_network_holds_for_every_image_more_what_its_backward_passes_need():
    layers = [torch.nn.Linear(200, 200) for _ in range(5)]
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 200), *layers, torch.nn.Linear(200, 9))
    fastntk.tune(model, r"^1\.bias")
    data = TensorDataset(torch.randn(3, 3, 8, 8), torch.arange(3))
    network = linearised(model, data, fastntk.SquaredLoss(), fastntk.Numerics())
    outputs = 4 * (6 * 200 + 9)
    assert outputs <= image_bytes(network) <= 2 * outputs


def test_batches_shrink_where_jacobians_are_large():
    assert work(100, 3, 100, itemsize=8).batch_size == 64
    assert work(100, 3, 4_000_000, itemsize=8).batch_size == 11
    assert work(100, 3, 40_000_000, itemsize=8).batch_size == 1


def test_a_plan_refuses_what_preparing_refuses():
    case = CASES["bn+head"]
    with pytest.raises(fastntk.InputError, match="no use for class probes"):
        fastntk.plan(case.model(), case.data(), form="matrix-free", class_probes=2)
    with pytest.raises(fastntk.InputError, match="from 1 to the number of classes, 3"):
        fastntk.plan(case.model(), case.data(), class_probes=0)


def test_a_curved_loss_leaves_the_head_its_structure_in_the_convex_forms_alone():
    case = CASES["bn+head"]
    plan = fastntk.plan(case.model(), case.data(), loss=fastntk.CrossEntropy(), form="convex")
    w = plan.workload
    assert (w.features, w.kept_rows) == (5, w.kept - 1)
    assert (w.written.rest, w.written.features) == (w.parameters, 0)
    few, many = (work(1000, c, 9_600, 513, kept=4, contrasted=True, curved=True) for c in (10, 1000))
    for form in ("convex", "convex-disk"):
        assert FORMS[form].price(many).bytes < 1.3 * FORMS[form].price(few).bytes
    assert FORMS["dual"].price(many).bytes > 1000 * FORMS["dual"].price(few).bytes
