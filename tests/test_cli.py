"""The command line as a user types it."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from runs import MODEL, RATE, refuse, succeed
from safetensors.torch import load_file

from fastntk.cli.run import Run
from fastntk.cli.settings import Settings
from fastntk.common.files import write_json
from fastntk.evidence.auditing import left_out_gain
from fastntk.inputs.models import load_model
from fastntk.inputs.sources import load_data
from fastntk.solve import speeds
from fastntk.tuning.selectors import tune


def test_a_process_of_its_own(tmp_path):
    command = [sys.executable, "-m", "fastntk"]
    done = subprocess.run([*command, "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "prepare" in done.stdout
    done = subprocess.run([*command, "prepare", str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "holds no run" in done.stderr
    assert "Traceback" not in done.stderr


def copied(fitted, tmp_path):
    return shutil.copytree(fitted, tmp_path / "run")


def test_a_run_fitted_to_cross_entropy(colours, tmp_path):
    run = tmp_path / "run"
    succeed("fit", run, *MODEL, "--data", colours, "--epochs", 2, "--loss", "cross-entropy")
    succeed("prepare", run)
    assert "trusted" in succeed("forget", run, "--ids", "3,7")
    refuse(
        "one of squared, cross-entropy, not 'hinge'",
        "fit",
        tmp_path / "other",
        *MODEL,
        "--data",
        colours,
        "--loss",
        "hinge",
    )


def test_a_run_fitted_as_people_do_it_and_one_that_was_fitted_elsewhere(colours, tmp_path):
    run, other = tmp_path / "run", tmp_path / "other"
    how = ["--loss", "cross-entropy", "--label-smoothing", 0.1, "--optimizer", "adamw", "--weight-decay", 0.05]
    how += ["--decay-toward", "zero", "--augment", "flip", "--augment", "crop"]
    given = [*MODEL, "--data", colours]
    fitted = json.loads(succeed("fit", run, *given, *how, "--epochs", 2, "--validation", colours, "--json"))
    assert [len(fitted[each]) for each in ("losses", "accuracies", "validation")] == [2, 2, 2]
    assert json.loads(succeed("prepare", run, "--json"))["form"] == "convex"
    assert "trusted" in succeed("forget", run, "--ids", "3,7")
    for message, wrong in (
        ("--mixup must be off", ["--mixup", "0.2"]),
        ("Take adamw", ["--optimizer", "adam", "--decay-toward", "zero"]),
        ("no augmentation 'spin'", ["--augment", "spin"]),
        ("needs --weights", ["--fitted", run / "model.safetensors"]),
    ):
        refuse(message, "fit", other, *given, *wrong)
    assert not other.exists() or not any(other.iterdir())
    start = tmp_path / "start.safetensors"
    shutil.copy(run / "model.safetensors", start)
    taken = succeed("fit", other, *given, *how, "--weights", start, "--fitted", run / "model.safetensors")
    assert "the start was rebuilt: " in taken
    assert "started from zero" in taken
    succeed("prepare", other)
    assert "witnesses" in succeed("forget", other, "--ids", "3,7")


def test_the_whole_job(fitted, tmp_path):
    folder = copied(fitted, tmp_path)
    before = load_file(folder / "model.safetensors")
    preview = json.loads(succeed("forget", folder, "--ids", "3,17", "--dry-run", "--json"))
    assert json.loads(succeed("ledger", folder, "--json"))["requests"] == []
    answer = json.loads(succeed("forget", folder, "--ids", "3,17", "--json"))
    drawn = {"seconds", "purge_seconds", "request", "salt", "hashes"}
    assert {k: v for k, v in answer.items() if k not in drawn} == {k: v for k, v in preview.items() if k not in drawn}
    assert answer["samples"] == 2
    assert answer["retained"] == 28
    assert answer["purge_seconds"] > 0
    assert "Wrote" in succeed("export", folder)
    load_model("mobilenetv3_small_050", 3)[0].load_state_dict(load_file(folder / "unlearned.safetensors"), strict=True)
    after = load_file(folder / "unlearned.safetensors")
    changed = {name for name in before if not (before[name] == after[name]).all()}
    assert changed
    assert all(re.search(r"bn|norm|classifier", name) for name in changed)
    assert "running" not in "".join(changed)
    succeed("export", folder, "--exact-head", "--out", folder / "exact.safetensors")
    exact = load_file(folder / "exact.safetensors")
    assert {name for name in exact if not (exact[name] == after[name]).all()} == {
        "classifier.weight",
        "classifier.bias",
    }
    (tmp_path / "ids.txt").write_text("0\n5\n6\n")
    text = succeed("forget", folder, "--ids-file", tmp_path / "ids.txt", "--defer-purge")
    assert "forget: 3 samples" in text
    assert "answered, not purged" in text
    refuse("id 17 is not in the memory", "forget", folder, "--ids", "17")
    states = [each["state"] for each in json.loads(succeed("ledger", folder, "--json"))["requests"]]
    assert states == ["purged", "answered"]
    text = succeed("forget", folder, "--class-name", "green", "--full", "--certificate", tmp_path / "c.json")
    assert json.loads((tmp_path / "c.json").read_text())["salt"]
    assert re.search("forget: (9|10) samples", text)
    assert "purged in" in text
    requests = json.loads(succeed("ledger", folder, "--json"))["requests"]
    assert {each["state"] for each in requests} == {"purged"}
    assert requests[2]["certificate"]["error"] < 1e-6
    refuse("no sample of class 'green'", "forget", folder, "--class-name", "green")
    report = json.loads(succeed("evaluate", folder, "--json"))
    rows = report["scenarios"]["forgotten"]["rows"]
    assert list(rows) == ["original", "retrain", "retrain_2", "fastntk", "fastntk_exact_head"]
    assert json.loads((folder / "report.json").read_text())["scenarios"] == report["scenarios"]
    assert "<svg" in (folder / "report.html").read_text()
    the_later_life(folder)


def test_training_images_are_not_taken_for_test_images(fitted, colours, tmp_path):
    folder, arrays = copied(fitted, tmp_path), np.load(colours)
    np.savez(tmp_path / "plain.npz", x=arrays["x_train"], y=arrays["y_train"], classes=arrays["classes"])
    settings = Settings.read(folder / "run.json")
    write_json(folder / "run.json", replace(settings, data=str(tmp_path / "plain.npz")).written())
    succeed("forget", folder, "--ids", "3")
    refuse("has no test split.*--test", "evaluate", folder)
    assert "retrain" in succeed("evaluate", folder, "--test", colours, "--retrained", 0)


def the_later_life(folder):
    """Of a run that has forgotten three times: an audit, remembering, verifying, refreshing."""
    data = json.loads((folder / "run.json").read_text())["data"]
    refuse("a gain comes from an audit", "export", folder, "--gain")
    text = succeed("audit", folder, "--fraction", 0.3, "--test", data)
    assert "unseen ones" in text
    assert re.search(r"the step times \d\.\d\d( is|, the)", text)
    succeed("export", folder, "--gain", "--exact-head", "--out", folder / "gain.safetensors")
    refuse("two gains", "export", folder, "--gain", "--left-out-gain", data)
    written = json.loads(succeed("export", folder, "--left-out-gain", data, "--exact-head", "--json"))
    memory, images = Run(folder).memory()
    assert written["gain"] == left_out_gain(memory, load_data(data, images.preprocessing, split="test"))
    rows = json.loads(succeed("evaluate", folder, "--retrained", 0, "--json"))["scenarios"]["forgotten"]["rows"]
    assert list(rows)[1:] == ["fastntk", "fastntk_gain", "fastntk_exact_head", "fastntk_gain_exact_head"]
    assert re.search(r"The memory (passed|FAILED): audited on \d samples", text)
    audited = json.loads(succeed("audit", folder, "--class-name", "blue", "--json"))
    assert "remember: 1 samples" in succeed("remember", folder, "--ids", "17")
    asked = json.loads(succeed("forget", folder, "--ids", "17", "--dry-run", "--json"))
    assert asked["audit"].items() <= audited.items()
    refuse("id 17 is in the memory already", "remember", folder, "--ids", "17")
    text = succeed("verify", folder, "--full")
    assert "Every file is what was written" in text
    assert "Solved anew" in text
    assert "Refreshed at the step with an exact head, on" in succeed("refresh", folder)
    assert json.loads(succeed("refresh", folder, "--step-alone", "--json"))["exact_head"] is False
    assert [each["kind"] for each in json.loads(succeed("ledger", folder, "--json"))["requests"]] == [
        *["forget"] * 3,
        *["audit"] * 2,
        "remember",
        *["refresh"] * 2,
    ]
    assert "refresh" in succeed("ledger", folder)
    refuse("has answered requests", "prepare", folder)
    assert not list(folder.glob(".*"))


def test_seed_repeats_a_fit(fitted, colours, tmp_path):
    succeed("fit", tmp_path / "again", *MODEL, "--data", colours, "--epochs", 4, "--batch-size", 4, *RATE)
    left, right = (load_file(folder / "model.safetensors") for folder in (fitted, tmp_path / "again"))
    assert all((left[name] == right[name]).all() for name in left)


COMMANDS = [
    "demo", "models", "tunables", "fit", "plan", "prepare", "audit", "forget", "remember", "ledger", "verify",
    "refresh", "export", "evaluate", "bench",
]  # fmt: skip


@pytest.mark.parametrize("command", [[], *([each] for each in COMMANDS)])
def test_help_explains_every_command(command):
    text = succeed(*command, "--help")
    if pattern := {"forget": "*/alice/*", "fit": "*/public/*"}.get("".join(command)):
        assert pattern in text, "as it is to be typed"
    assert "Usage" in text
    assert "--json" in text or not command


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        ("id 99 is not in the memory.*30 samples", ["--ids", "99"]),
        ("id 3 stands twice", ["--ids", "3,4,3"]),
        ("id 'x' is not in the memory", ["--ids", "3,x"]),
        ("every sample", ["--ids", ",".join(map(str, range(30)))]),
        ("no class 'mauve'. The classes are: red, green, blue", ["--class-name", "mauve"]),
        ("exactly one of --ids, --ids-file, --class-name, --owner, --match, --requests", []),
        ("cannot be read as text", ["--ids-file", "/nowhere.txt"]),
        ("--dry-run only shows the verdict", ["--ids", "3", "--dry-run", "--full"]),
        ("device 'cuda:7' is not there", ["--ids", "1", "--device", "cuda:7"]),
        ("device 'abacus' is not there", ["--ids", "1", "--device", "abacus"]),
    ],
)
def test_bad_requests_change_no_file(message, arguments, fitted):
    def times():
        return {
            path.name: path.stat().st_mtime_ns for path in fitted.rglob("*") if path.is_file() and path.name != "lock"
        }

    before = times()
    refuse(message, "forget", fitted, *arguments)
    assert times() == before


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        ("neither timm nor torchvision has a model 'mobilenetv9'", ["--model", "mobilenetv9"]),
        ("no weights file", ["--weights", "/nowhere.pt"]),
        ("'ln' matches no parameter of this model. It offers: bn", ["--select", "ln"]),
        ("epochs .* at least 1", ["--epochs", "0"]),
        ("neither a folder, an .npz file", ["--data", "CIFAR11"]),
        ("Invalid value|not a valid", ["--epochs", "many"]),
    ],
)
def test_bad_fits_leave_no_file(message, arguments, colours, tmp_path):
    refuse(message, "fit", tmp_path / "new", *MODEL, "--data", colours, *arguments)
    assert not list((tmp_path / "new").glob("*"))


def test_bad_folders_and_files(fitted, colours, tmp_path):
    refuse("holds no run", "prepare", tmp_path)
    refuse("holds no run", "evaluate", tmp_path / "none")
    (tmp_path / "file").write_text("")
    refuse("cannot be written", "fit", tmp_path / "file" / "run", *MODEL, "--data", colours)
    refuse("nothing has been forgotten", "evaluate", fitted)
    refuse("must be 'auto' or a number", "prepare", fitted, "--ridge", "big")
    refuse("ridge must be a positive number", "prepare", fitted, "--ridge", "-1")
    folder = copied(fitted, tmp_path)
    [memory] = (folder / "memory").glob("base-*.safetensors")
    memory.write_bytes(memory.read_bytes()[:-9])
    refuse(rf"{memory.name} is damaged", "forget", folder, "--ids", "1")
    refuse(rf"{memory.name} is damaged", "verify", folder)
    refuse("there is no ledger", "ledger", tmp_path)
    initial = bytearray((fitted / "initial.safetensors").read_bytes())
    initial[-5] ^= 4
    (folder / "initial.safetensors").write_bytes(initial)
    for command in ("verify", "prepare", "plan"):
        refuse(r"initial.safetensors is damaged", command, folder)
    (folder / "run.json").write_text("{")
    refuse("run.json cannot be read as JSON", "forget", folder, "--ids", "1")


def test_a_plan_before_and_after_there_is_a_run(colours, fitted, monkeypatch):
    monkeypatch.setattr(speeds, "_AIM", 0.02)  # seconds a trial; what takes how long is not looked at
    monkeypatch.setattr(speeds, "_TRIAL", 256)
    before = json.loads(succeed("plan", *MODEL, "--data", colours, "--form", "primal", "--json"))
    after = json.loads(succeed("plan", fitted, "--form", "primal", "--json"))
    assert before["workload"] == after["workload"]
    assert before["bytes"] == after["bytes"] > 0
    assert "peak memory" in succeed("plan", *MODEL, "--data", colours)
    refuse("either a run folder, or --model and --data", "plan")
    refuse("either a run folder, or --model and --data", "plan", fitted, *MODEL, "--data", colours)
    refuse("either a run folder, or --model and --data", "plan", fitted, "--select", "bn")


def test_what_can_be_named_and_tuned():
    names = json.loads(succeed("models", "vit_tiny", "--json"))["models"]
    assert "timm/vit_tiny_patch16_224" in names
    assert all("vit_tiny" in name for name in names)
    offered = json.loads(succeed("tunables", "mobilenetv3_small_050", "--classes", 3, "--json"))["parameters"]
    assert offered["head"] == 3 * 1025
    assert "prompt" not in offered
    assert "last:1" in succeed("tunables", "mobilenetv3_small_050")


def test_a_run_with_prompts_and_ids_of_its_own(tmp_path):
    """A vision transformer in a user's file, samples named by an array: the exported weights load strictly."""
    (tmp_path / "mine.py").write_text(
        "import fastntk\n"
        "from fastntk.inputs.libraries import timm\n"
        "def vit(classes):\n"
        "    model = timm().create_model('vit_tiny_patch16_224', img_size=16, patch_size=8, embed_dim=8, depth=2,\n"
        "                                num_heads=2, num_classes=classes)\n"
        "    return model, fastntk.Preprocessing(16, (0.5,) * 3, (0.5,) * 3)\n"
    )
    model, run = f"{tmp_path / 'mine.py'}:vit", tmp_path / "run"
    y = np.arange(24) % 3
    x = np.random.default_rng(0).integers(0, 256, (24, 16, 16, 3), dtype=np.uint8)
    np.savez(tmp_path / "d.npz", x=x, y=y, name=np.array([f"0{i}" for i in range(24)]))
    select = ["--select", "prompt:3", "--select", "lora:2", "--select", "head"]
    succeed("fit", run, "--model", model, "--data", tmp_path / "d.npz", "--id-column", "name", "--epochs", 1, *select)
    succeed("prepare", run, "--ridge", "1", "--form", "dual")
    succeed("forget", run, "--ids", "07,010", "--json")
    refuse("id 7 is not in the memory", "forget", run, "--ids", "7")
    succeed("export", run)
    module, _ = load_model(model, 3)
    tune(module, "prompt:3", "lora:2", "head")
    module.load_state_dict(load_file(run / "unlearned.safetensors"), strict=True)
