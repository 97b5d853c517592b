"""The release as a stranger gets it: make package.

    python tests/package.py [--site URL] [--out dist]

Builds a wheel and an sdist, has twine check them, installs the wheel into an empty environment outside the repository,
runs the README's Python there, and then times what the README says on a folder of 500 images: from pip install to an
exported model. The last line is JSON. With --site the description's links lead to the repository's files under that
address; without one, its pictures and links are left out, since they would lead nowhere.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
_IMAGES, _FOLDER = 500, "photos"
_PICTURES = """
import sys
from pathlib import Path
from PIL import Image
from fastntk.inputs.packaged import mnist
pixels, labels = mnist()
for number, (each, label) in enumerate(zip(pixels[::10], labels[::10])):
    place = Path(sys.argv[1]) / str(label) / f"{number}.png"
    place.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(each).resize((64, 64)).save(place)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--site", help="address of the repository's files, as https://HOST/OWNER/NAME/blob/v0.1.0")
    parser.add_argument("--out", type=Path, default=Path("dist"))
    parser.add_argument("--only-build", action="store_true", help="and check, without installing")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        source = copied(place / "source", arguments.site)
        out = arguments.out.absolute()
        shutil.rmtree(out, ignore_errors=True)
        run([sys.executable, "-m", "build", "--outdir", out, source], place)
        built = sorted(out.iterdir())
        run([sys.executable, "-m", "twine", "check", "--strict", *built], place)
        [wheel] = (each for each in built if each.suffix == ".whl")
        found = {} if arguments.only_build else tried(wheel, place)
        print(json.dumps({"built": [each.name for each in built], **found}))


def copied(place: Path, site: str | None) -> Path:
    """The tracked files, with a README whose links work where it is not beside them."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, place / name)
    (place / "README.md").write_text(described((ROOT / "README.md").read_text(), site))
    return place


def described(readme: str, site: str | None) -> str:
    """The README with absolute links, or without those that are relative."""
    here = r"\]\((?!https?:|#)([^)]+)\)"
    if site:
        raw = site.replace("/blob/", "/raw/")
        readme = re.sub(r"(!\[[^\]]*)" + here, lambda found: f"{found[1]}]({raw}/{found[2]})", readme)
        return re.sub(here, lambda found: f"]({site}/{found[1]})", readme)
    readme = re.sub(r"!\[[^\]]*" + here + r"\n\n(\*[^*]+\*\n\n)?", "", readme)
    return re.sub(r"\[([^\]]+)" + here, r"\1", readme)


def tried(wheel: Path, place: Path) -> dict[str, object]:
    """The wheel in an environment of its own: the README's Python, and its commands on a folder of images."""
    away, started = place / "away", time.perf_counter()
    away.mkdir()
    run([sys.executable, "-m", "venv", away / "env"], place)
    python, command = away / "env" / "bin" / "python", away / "env" / "bin" / "fastntk"
    constraints = ["--constraint", ROOT / "constraints.txt"]
    run([python, "-m", "pip", "install", "--quiet", *constraints, f"{wheel}[demo]"], away)
    seconds = {"install": time.perf_counter() - started}
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    run([python, "-c", code], away)
    run([python, "-c", _PICTURES, _FOLDER], away)
    fit = ["fit", "runs/photos", "--model", "mobilenetv2_100", "--data", _FOLDER, "--image-size", "128"]
    commands = {
        "fit": fit,
        "prepare": ["prepare", "runs/photos"],
        "forget": ["forget", "runs/photos", "--ids", "3/150.png,3/151.png"],
        "export": ["export", "runs/photos", "--exact-head"],
    }
    for name, words in commands.items():
        began = time.perf_counter()
        run([command, *words], away)
        seconds[name] = time.perf_counter() - began
    if not (away / "runs" / "photos" / "unlearned.safetensors").is_file():
        raise SystemExit("no model was exported")
    rounded = {name: round(each, 1) for name, each in seconds.items()}
    return {"images": _IMAGES, "seconds": rounded, "minutes": round(sum(seconds.values()) / 60, 1)}


def run(command: list[object], place: Path) -> None:
    """A command in a folder, seeing nothing of the repository."""
    words = list(map(str, command))
    print("$", " ".join(words if len(words[-1]) < 200 else words[:-1]), flush=True)
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    subprocess.run(words, cwd=place, check=True, env=clean)


if __name__ == "__main__":
    main()
