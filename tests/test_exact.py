"""A fit that forgets exactly: what it has forgotten, it is as if it had never been given."""

import copy
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from cases import CASES
from memories import close
from runs import MODEL, RATE, refuse, succeed
from torch.func import functional_call, jacrev
from torch.utils.data import Subset, TensorDataset

import fastntk
from fastntk.cli.run import Run
from fastntk.common.files import read_tensors
from fastntk.evidence.methods import Problem, Retrain
from fastntk.memory import exact
from fastntk.memory.exact import Removal, chosen_on, fit_exact, noise
from fastntk.memory.prepare import linearised
from fastntk.solve.solution import Ownership
from fastntk.tuning.parameters import snapshot, tuned

CORE = [0, 1, 2, 3, 4]
RECIPE = fastntk.Recipe(epochs=3, batch_size=2, learning_rate=1e-2)
LOSSES = [fastntk.CrossEntropy(), fastntk.CrossEntropy(smoothing=0.1), fastntk.SquaredLoss()]


class Named(TensorDataset):
    """Samples that keep their names whoever else is there."""

    def __init__(self, names):
        images, labels = (tensor[list(names)] for tensor in CASES["bn+head"].data(18).tensors)
        super().__init__(images, labels)
        self.ids = list(names)


def made(names=range(14), loss=LOSSES[0], **more):
    recipe = fastntk.Recipe(epochs=3, batch_size=2, learning_rate=1e-2, loss=loss)
    return fit_exact(CASES["bn+head"].model(), Named(names), CORE, recipe, **more)


def without(*gone):
    return [each for each in range(14) if each not in gone]


@pytest.mark.parametrize("classes", ["auto", "all"])
@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_the_weights_are_those_of_the_fit_on_what_stays(loss, classes, tmp_path):
    """After one request, after several in any order, a purge, and learning and forgetting again."""
    memory, never = made(loss=loss, classes=classes), made(without(7, 9), loss, classes=classes)
    memory.save(tmp_path / "m")
    answer = memory.forget([7, 9])
    close(answer.parameters, never.parameters, 1e-9)
    assert answer.certificate.verdict == "exact"
    memory.remember([9])
    memory.forget([12])
    memory.purge()
    again = fastntk.load(tmp_path / "m", memory.model, Named(range(14)))
    again.forget([9])
    again.remember([12])
    close(again.parameters, never.parameters, 1e-8)
    again.remember([7])
    again.remember([9])
    close(again.parameters, made(loss=loss, classes=classes).parameters, 1e-8)


def test_what_solving_makes_of_the_accuracy_is_told(caplog):
    caplog.set_level("INFO")
    memory, (images, labels) = made(), Named(range(5, 14)).tensors
    was, now = (
        100 * float((functional_call(memory.model, each, images).argmax(1) == labels).double().mean())
        for each in (memory.anchor, memory.parameters)
    )
    told = caplog.text
    assert f"of 9 samples that are not of the core its weights classify {was:.1f} % rightly" in told
    assert f"the solved ones {now:.1f} %" in told


@pytest.mark.parametrize(
    ("lost", "won", "level"), [(4, 0, "INFO"), (5, 0, "WARNING"), (9, 3, "INFO"), (12, 3, "WARNING")]
)
def test_a_loss_beyond_chance_is_a_warning(lost, won, level, monkeypatch, caplog):
    labels = torch.zeros(20, dtype=torch.long)
    before, after = torch.zeros(2, 20, 2, dtype=torch.float64)
    before[:won, 1] = after[won : won + lost, 1] = 1
    memory = made()
    monkeypatch.setattr(exact, "logits_around", lambda *_: (before, after, labels))
    caplog.clear()
    with caplog.at_level("INFO"):
        exact._tell_of(memory.state)
    assert [record.levelname for record in caplog.records] == [level]


@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_they_are_the_optimum(loss):
    """The objective's gradient, by dense Jacobians of the core's model, is as small as the certificate says."""
    memory = made(loss=loss, classes="all")
    certificate = memory.forget([8]).certificate
    anchor, (images, labels) = memory.anchor, Named(without(8)).tensors
    dense = jacrev(lambda parameters: functional_call(memory.model, parameters, (images,)))(anchor)
    logits = functional_call(memory.model, anchor, (images,)).detach()
    change = {name: memory.parameters[name] - anchor[name] for name in anchor}
    moved = sum((dense[name].flatten(2) @ change[name].flatten()) for name in anchor)
    residual = loss.residual(logits + moved.detach(), labels)
    parts = [
        memory.ridge * change[name].flatten() - torch.einsum("nc,ncp->p", residual, dense[name].flatten(2))
        for name in anchor
    ]
    norm = float(torch.cat(parts).norm())
    assert norm <= 2 * certificate.gradient + 1e-9 * memory.ridge
    assert certificate.gradient <= 1e-8 * memory.ridge * float(
        torch.cat([each.flatten() for each in change.values()]).norm()
    )


def test_what_is_chosen_rests_on_the_core_alone():
    """Whatever the other samples are, and whatever the core's labels are."""
    model, loss = CASES["bn+head"].model(), LOSSES[0]
    network = linearised(model, Named(range(14)), loss, fastntk.Numerics())
    found = chosen_on(network, Subset(Named(range(14)), CORE), "auto", "auto")
    other = linearised(model, Named([*CORE, 13]), loss, fastntk.Numerics())
    images, labels = Named(CORE).tensors
    assert chosen_on(other, TensorDataset(images, (labels + 1) % 3), "auto", "auto") == found
    assert chosen_on(other, Named(CORE), 0.25, 2)[:2] == (0.25, 2)
    assert made(without(6)).ridge == made().ridge


def test_no_number_of_who_was_forgotten_stays(tmp_path):
    """What is said of the classes that are left out is of the core alone."""
    memory, never = made(classes=2), made(without(7), classes=2)
    memory.forget([7])
    assert memory.state.tail == never.state.tail > 0


def test_a_model_that_stands_at_the_core_already():
    """And a core of other images, of which no class is known."""
    model, samples = CASES["bn+head"].model(), Named(range(14))
    before = snapshot(tuned(model))
    core = Named(range(14, 18))
    memory = fit_exact(model, samples, core, RECIPE, fitted=True)
    close(memory.anchor, before, 0)
    close(
        memory.forget([0, 9]).parameters,
        fit_exact(model, Named(without(0, 9)), core, RECIPE, fitted=True).parameters,
        1e-9,
    )


def test_nobody_is_both_in_a_core_of_other_images_and_among_those_who_can_be_forgotten(tmp_path):
    """By their pixels, under whatever name: neither from the beginning nor learned later."""
    model = CASES["bn+head"].model()
    for core, count in ((Named(CORE), 5), (Named([13, 14, 15]), 1)):
        with pytest.raises(fastntk.InputError, match=f"{count} of the samples have the very pixels"):
            fit_exact(model, Named(range(14)), core, RECIPE, fitted=True)
    both = Named(range(18))
    both.ids = [f"new {each}" if each > 13 else each for each in range(18)]
    memory = fit_exact(model, Named(range(14)), Named([16, 17]), RECIPE, fitted=True)
    memory.save(tmp_path / "m")
    again = fastntk.load(tmp_path / "m", model, both)
    with pytest.raises(fastntk.InputError, match="1 of the samples have the very pixels of images of the core"):
        again.remember(["new 15", "new 16"])
    assert again.ids == list(range(14))
    assert again.remember(["new 15"]).certificate.retained == 14


def test_nobody_in_a_core_of_ids_has_a_twin_who_can_be_forgotten(tmp_path):
    """Its image would stay in the core, which nothing forgets, and the answer would be called exact."""
    model, twin = CASES["bn+head"].model(), Named([*range(14), 2])
    twin.ids = [*range(14), "twin of 2"]
    with pytest.raises(fastntk.InputError, match="1 of the samples have the very pixels of images of the core"):
        fit_exact(model, twin, CORE, RECIPE)
    close(snapshot(tuned(model)), snapshot(tuned(CASES["bn+head"].model())), 0)
    made().save(tmp_path / "m")
    again = fastntk.load(tmp_path / "m", CASES["bn+head"].model(), twin)
    with pytest.raises(fastntk.InputError, match="1 of the samples have the very pixels of images of the core"):
        again.remember(["twin of 2"])
    assert fit_exact(model, twin, [*CORE, "twin of 2"], RECIPE).forget([9]).certificate.verdict == "exact"


def test_what_no_fit_would_make_right_is_refused_before_it():
    """The model stays as it was."""
    model = CASES["bn+head"].model()
    before = snapshot(tuned(model))
    for wrong, why in (
        ({"classes": "many"}, "must be 'auto', 'all' or a number from 2"),
        ({"classes": 1}, "number from 2, not 1"),
        ({"classes": 2.5}, "number from 2, not 2.5"),
        ({"classes": True}, "number from 2, not True"),
        ({"ridge": -1}, "the ridge must be a positive number"),
        ({"removal": Removal(0.0, 0.1)}, "eps above 0 and at most 1, and delta between"),
    ):
        with pytest.raises(fastntk.InputError, match=why):
            fit_exact(model, Named(range(14)), CORE, RECIPE, **wrong)
    close(snapshot(tuned(model)), before, 0)


def test_what_has_no_place_is_refused():
    memory = made()
    state = memory.state
    for ids in ([2], [8, 2]):
        with pytest.raises(fastntk.InputError, match="1 of the . samples, 2 first, are of the core"):
            memory.forget(ids)
    for call, why in (
        (lambda: fastntk.refresh(memory), "no anchor to be moved"),
        (lambda: fastntk.exact_head(memory), "would make them others"),
        (lambda: fastntk.finished(memory, gain=2.0), "would make them others"),
        (lambda: fastntk.audit(memory, RECIPE), "audit_exact does that fit anew"),
    ):
        with pytest.raises(fastntk.InputError, match=f"forgets exactly.*{why}"):
            call()
    assert memory.state is state
    with pytest.raises(fastntk.InputError, match="the core is empty"):
        fit_exact(CASES["bn+head"].model(), Named(range(14)), [], RECIPE)
    with pytest.raises(fastntk.InputError, match="must be fitted already"):
        fit_exact(CASES["bn+head"].model(), Named(range(14)), Named(CORE), RECIPE)


def test_an_audit_is_the_same_fit_anew(monkeypatch):
    """On what would stay; and an answer that is another one fails it."""
    memory = made()
    memory.forget([9])
    before = memory.parameters
    found = fastntk.audit_exact(memory, fraction=0.5, seed=1)
    assert (found.samples, found.passed) == (4, True)
    assert found.difference < 1e-8
    by_hand = fastntk.audit_exact(memory, ids=[7, 8])
    answered, never = memory.preview([7, 8]).parameters, made(without(7, 8, 9)).parameters
    assert by_hand.samples == 2
    close(answered, never, 1e-8)
    close(memory.parameters, before, 0)
    monkeypatch.setattr("fastntk.evidence.auditing.solved_anew", lambda state, gone: state.anchor)
    failed = fastntk.audit_exact(memory, ids=[7, 8])
    flat = [torch.cat([each.flatten() for each in some.values()]) for some in (answered, before, memory.anchor)]
    assert failed.moved == pytest.approx(float((flat[0] - flat[1]).norm() / flat[2].norm()))
    core, ours = (torch.cat([each.flatten() for each in some.values()]) for some in (memory.anchor, answered))
    assert failed.difference == pytest.approx(float((ours - core).norm() / core.norm()))
    assert (failed.passed, failed.to_dict()["verdict"]) == (False, "not exact")
    with pytest.raises(fastntk.InputError, match="use fastntk.audit, which retrains"):
        fastntk.audit_exact(ordinary())
    with pytest.raises(fastntk.InputError, match="1 of the . samples, 2 first, are of the core"):
        fastntk.audit_exact(memory, ids=[2])
    for empty in ({"ids": []}, {"fraction": 0.01}):
        with pytest.raises(fastntk.InputError, match="request is empty"):
            fastntk.audit_exact(memory, **empty)


def test_retraining_is_the_same_fit_on_what_stays():
    """Of members, and of samples that have left."""
    memory = made()
    never = made(without(7, 9)).parameters
    close(Retrain(3)(Problem(memory, [7, 9], RECIPE)).parameters, never, 1e-8)
    for left in (7, 9):
        memory.forget([left])
        close(Retrain(3)(Problem(memory, [7, 9], RECIPE)).parameters, never, 1e-8)


def ordinary():
    """The memory of another fit."""
    model = CASES["bn+head"].model()
    fitted = fastntk.fit(model, Named(range(14)), RECIPE)
    return fastntk.prepare(model, Named(range(14)), fitted.initial)


def test_noise_for_certified_removal(tmp_path):
    """Of the scale that the theorem asks for, in the objective; it costs nothing, and requests keep it."""
    asked = Removal(1.0, 1e-5)
    drawn = noise(asked, 3.0, 200_000)
    assert float(drawn.std()) == pytest.approx(3.0 * (2 * torch.log(torch.tensor(1.5e5))).sqrt().item(), rel=0.02)
    assert not torch.equal(drawn, noise(asked, 3.0, 200_000))
    for eps, delta in ((0.0, 0.1), (1.0, 0.0), (1.0, 1.0), (1.1, 0.1)):
        with pytest.raises(fastntk.InputError, match="eps above 0 and at most 1, and delta between"):
            made(removal=Removal(eps, delta))
    memory, plain = made(removal=asked), made()
    assert memory.state.displacement.norm() > 0
    close(memory.parameters, plain.parameters, 1e-4)
    with_noise = copy.deepcopy(memory.state.displacement)
    certificate = memory.forget([8]).certificate
    assert torch.equal(memory.state.displacement, with_noise)
    assert certificate.gradient <= 1e-6 * memory.ridge
    assert certificate.removal == asked
    assert certificate.certified
    assert "it is an (1, 1e-05)-certified removal" in certificate.explanation
    assert certificate.to_dict()["removal"] == {"eps": 1.0, "delta": 1e-5, "certified": True}
    more = replace(certificate, gradient=2e-6 * memory.ridge)
    assert not more.certified
    assert "It is no (1, 1e-05)-certified removal" in more.explanation
    assert plain.forget([8]).certificate.to_dict()["removal"] is None
    memory.save(tmp_path / "m")
    again = fastntk.load(tmp_path / "m", memory.model, memory.state.members.source)
    assert again.preview([10]).certificate.removal == asked
    assert memory.remember([8]).certificate.certified is False
    single = fit_exact(
        CASES["bn+head"].model().float(),
        TensorDataset(CASES["bn+head"].data().tensors[0].float(), CASES["bn+head"].data().tensors[1]),
        CORE,
        RECIPE,
        removal=asked,
    )
    assert (single.state.displacement != 0).all()
    center = single.state.center  # float32 would round the noise
    assert (center != center.float().double()).double().mean() > 0.99
    for ids in ([8], [10, 11]):
        certificate = single.forget(ids).certificate
        assert certificate.gradient == pytest.approx(gradient_of(single), rel=1e-3)
        assert certificate.allowed == pytest.approx(1e-6 * single.ridge)
        assert certificate.certified
    single.save(tmp_path / "single")
    again = fastntk.load(tmp_path / "single", single.model, single.state.members.source)
    assert again.preview([9]).certificate.certified
    assert again.state.solution.inexactness() <= 1e-9
    rounded = replace(again.state.solution, exactly=False, known=None, ownership=Ownership())
    assert rounded.inexactness() <= 1e-9 < replace(rounded, known=rounded.optimum, exactly=True).inexactness()


def gradient_of(memory):
    """The norm of the objective's gradient at the parameters, in float64, by autograd over the rows written out."""
    solution, state = memory.state.solution, memory.state
    d = (state.vector - state.layout.flatten(state.anchor)).requires_grad_()
    rows, over = solution.rows, solution.over
    jacobian = rows.jacobian.to(torch.float64).dense()[over]
    point = solution.point_of(rows)[over]
    z = point.z.double() + torch.einsum("nop,p->no", jacobian, d)
    value = solution.loss.value_of(z, point.kept).sum() + state.ridge / 2 * (d + state.displacement).square().sum()
    return float(torch.autograd.grad(value, d)[0].norm())


def test_on_the_command_line(colours, tmp_path):
    """Fitted, asked, learned, exported; what the core is stays, and new images are found again."""
    run, core = tmp_path / "run", tmp_path / "core.txt"
    core.write_text("\n".join(map(str, range(0, 30, 2))))
    given = ["--data", colours, "--epochs", 2, *RATE, "--seed", 3]
    said = succeed("fit", run, *MODEL, *given, "--core", core)
    assert "15 other samples were solved for" in said
    assert f"fastntk forget {run}" in said.replace("\n", "")
    never = shutil.copytree(run, tmp_path / "never")
    told = json.loads(succeed("forget", run, "--ids", "3,5", "--json"))
    assert (told["verdict"], told["exact"]) == ("exact", True)
    refuse("are of the core", "forget", run, "--ids", "4")
    audited = json.loads(succeed("audit", run, "--json"))
    assert (audited["samples"], audited["verdict"], audited["passed"]) == (1, "exact", True)
    assert audited["difference"] < 1e-6
    assert "solved anew from the core's model" in succeed("audit", run, "--fraction", 0.5)
    refuse("are of the core", "audit", run, "--class-name", "red")
    owners = tmp_path / "owners.csv"
    owners.write_text("id,owner\n" + "".join(f"{each},{'ann' if each > 25 else each % 2}\n" for each in range(30)))
    refuse("2 of the 4 samples, 26 first, are of the core", "forget", run, "--owner", "ann", "--owners", owners)
    assert json.loads(succeed("forget", run, "--owner", "1", "--owners", owners, "--dry-run", "--json"))["exact"]
    again = shutil.copytree(run, tmp_path / "again")
    assert json.loads(succeed("remember", again, "--ids", "5", "--json"))["verdict"] == "exact"
    assert json.loads(succeed("plan", run, "--json"))["form"] == "convex"
    refuse("leave out --refresh", "forget", run, "--ids", "7", "--refresh")
    refuse("this fit forgets exactly", "export", run, "--gain")
    asked = tmp_path / "asked.csv"
    asked.write_text("request,ids,date\none,7,2026-11-01\n")
    succeed("forget", run, "--requests", asked, "--out", tmp_path / "november")
    told = (tmp_path / "november" / "summary.html").read_text()
    assert "weights are those of the same fit" in told
    assert "fastntk refresh" not in told
    succeed("export", run, "--hub", tmp_path / "hub")
    told = (tmp_path / "hub" / "README.md").read_text()
    assert "the same fit, from a core that is not forgotten" in told
    assert "linearisation" not in told
    refuse("leave held-out data out", "audit", run, "--test", colours)
    refuse("no anchor to be moved", "refresh", run)
    refuse("the convex form alone", "prepare", never, "--form", "primal")
    core.write_text("0\n2\n")
    refuse("names other samples than when it was fitted", "prepare", never)
    new = tmp_path / "new.npz"
    with np.load(colours) as arrays:
        np.savez(new, x=arrays["x_test"], y=arrays["y_test"], classes=arrays["classes"])
    before = Run(run).memory()[0].parameters
    told = json.loads(succeed("learn", run, "--data", new, "--json"))
    assert (told["kind"], told["samples"], told["verdict"]) == ("remember", 6, "exact")
    refuse("was learned already", "learn", run, "--data", new)
    refuse("no file|neither", "learn", run, "--data", tmp_path / "none.npz")
    elsewhere = colours.rename(tmp_path / "elsewhere.npz")
    refuse("--fitted-to", "learn", never, "--data", new)
    succeed("learn", never, "--data", new, "--fitted-to", elsewhere)
    elsewhere.rename(colours)
    new.rename(elsewhere)
    assert json.loads(succeed("forget", never, "--match", "new.npz/0", "--dry-run", "--json"))["lost"] == 1
    elsewhere.rename(new)
    assert "6 samples" in succeed("forget", run, "--match", "new.npz/*")
    close(Run(run).memory()[0].parameters, before, 1e-6)
    succeed("verify", run)
    succeed("export", run)
    rows = json.loads(succeed("evaluate", run, "--json"))["scenarios"]["forgotten"]["rows"]
    assert list(rows) == ["original", "retrain", "fastntk"]
    assert rows["fastntk"]["forget_distance"] == pytest.approx(0, abs=1e-3)
    refuse("no file or folder, and matches no", "fit", tmp_path / "x", *MODEL, *given, "--core", "public/*")
    core.write_text("0\n99\n")
    refuse("names '99'|names 99", "fit", tmp_path / "x", *MODEL, *given, "--core", core)


def test_a_core_of_other_images(colours, tmp_path):
    """Of the same classes, with their head; or of others, whose backbone alone is taken."""
    with np.load(colours) as arrays:
        x, y, names = arrays["x_train"], arrays["y_train"], arrays["classes"]
    same, other = tmp_path / "same.npz", tmp_path / "other.npz"
    np.savez(same, x=255 - x[:20], y=y[:20], classes=names)
    np.savez(other, x=255 - x[:20], y=y[:20] % 2, classes=["this", "that"])
    given = ["--data", colours, "--epochs", 2, *RATE, "--seed", 3]
    anchors = {}
    for core in (same, other):
        run = tmp_path / core.stem
        succeed("fit", run, *MODEL, *given, "--core", core)
        memory, images = Run(run).memory()
        anchors[core] = memory.anchor
        assert len(memory.ids) == len(images) == len(y)
        assert json.loads(succeed("forget", run, "--ids", "4", "--json"))["verdict"] == "exact"
        assert json.loads(succeed("audit", run, "--json"))["verdict"] == "exact"
    for core in (same, other):
        plain = tmp_path / f"plain-{core.stem}"
        succeed("fit", plain, *MODEL, "--data", core, "--epochs", 2, *RATE, "--seed", 3)
        fitted = read_tensors(plain / "model.safetensors")[0]
        for name, each in anchors[core].items():
            new = core == other and name.startswith("classifier")
            torch.testing.assert_close(each, torch.zeros_like(each) if new else fitted[name])
    succeed("fit", tmp_path / "noisy", *MODEL, *given, "--core", same, "--removal", "0.5,1e-4")
    succeed("prepare", tmp_path / "noisy")
    told = json.loads(succeed("forget", tmp_path / "noisy", "--ids", "4", "--json"))["removal"]
    assert (told["eps"], told["delta"]) == (0.5, 1e-4)
    theirs = tmp_path / "same" / "model.safetensors"
    said = succeed("fit", tmp_path / "taken", *MODEL, "--data", colours, "--core", same, "--fitted", theirs)
    assert "taken for true: the weights were fitted to the core alone" in said.replace("\n", " ")
    close(Run(tmp_path / "taken").memory()[0].anchor, anchors[same], 0)
    away, twice, none = tmp_path / "away", tmp_path / "twice.npz", tmp_path / "none.txt"
    np.savez(twice, x=x[:3], y=y[:3], classes=names)
    none.write_text("\n")
    refuse("3 of the samples have the very pixels", "fit", away, *MODEL, *given, "--core", twice)
    assert not away.exists()  # it was refused before the core was fitted
    refuse("is all of the data", "fit", away, *MODEL, *given, "--core", "*")
    refuse("names no sample", "fit", away, *MODEL, *given, "--core", none)
    refuse("--select must have head", "fit", away, *MODEL, *given, "--core", other, "--select", "bn")
    noisy = "fit", away, *MODEL, *given, "--core", same, "--removal"
    for wrong in ("1", "1,x", "1,1e-5,3"):
        refuse("--removal is eps", *noisy, wrong)
    for wrong in ("0,0.1", "nan,0.1", "2,0.1", "1,1"):
        refuse("eps above 0", *noisy, wrong)
    refuse("--removal goes with --core", "fit", away, *MODEL, "--data", colours, "--removal", "1,1e-5")
    refuse("--validation does not measure", "fit", away, *MODEL, *given, "--core", other, "--validation", colours)
    never = shutil.copytree(tmp_path / "other", tmp_path / "never")
    np.savez(other, x=x[:20] // 2, y=y[:20] % 2, classes=["this", "that"])
    shutil.rmtree(never / "memory")
    refuse("names other samples than when it was fitted", "prepare", never)
