"""Pages as a browser shows them, to be looked at: make screens.

    python tests/screens.py PAGE.html ... --out runs/screens

Each is drawn by headless Chromium, where that is installed, 1,300 and 400 pixels wide, and as a PDF for print.
"""

import argparse
import shutil
import subprocess
import tempfile
from pathlib import Path

WIDTHS, HEIGHT = (1300, 400), 2400
_QUIET = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --hide-scrollbars"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/screens"))
    arguments = parser.parse_args()
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        parser.error("no Chromium is there. Install it: on Debian, apt-get install chromium.")
    pages = [page for page in arguments.pages if page.is_file()]
    if not pages:
        parser.error(f"none of the pages is there: {', '.join(map(str, arguments.pages))}. Make the demo's: make demo.")
    for page in arguments.pages:
        if page not in pages:
            print(f"{page} is not there and was left out")
    arguments.out.mkdir(parents=True, exist_ok=True)
    for page in pages:
        name = f"{page.parent.name}-{page.stem}"
        shown = [(f"--window-size={w},{HEIGHT}", f"--screenshot={arguments.out / name}-{w}.png") for w in WIDTHS]
        shown.append(("--no-pdf-header-footer", f"--print-to-pdf={arguments.out / name}.pdf"))
        for options in shown:
            with tempfile.TemporaryDirectory() as profile:
                command = [browser, *_QUIET.split(), f"--user-data-dir={profile}", *options, page.resolve().as_uri()]
                subprocess.run(command, check=True, capture_output=True, timeout=120)
        print(f"{page}: {arguments.out / name}-*")


if __name__ == "__main__":
    main()
