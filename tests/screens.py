"""Pages as a browser shows them, to be looked at: make screens.

    python tests/screens.py PAGE.html ... --out runs/screens

Each is drawn by headless Chromium, where that is installed, 1,300 pixels wide and as wide as a phone, and as a PDF for
print. Ends with 1 where a page itself, and not a table in it, is wider than what it is shown in.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

WIDTHS, HEIGHT = (1300, 360), 2400
_QUIET = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --hide-scrollbars"
# In a frame, since a window cannot be as narrow as a phone
_FRAME = """<!doctype html><title></title><body style="margin: 0">
<iframe src="{page}" style="width: {width}px; height: {height}px; border: 0"></iframe>
<script>onload = () => document.title = frames[0].document.documentElement.scrollWidth</script>
"""


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
    fitting = [drawn(browser, page, arguments.out / f"{page.parent.name}-{page.stem}") for page in pages]
    if not all(fitting):
        sys.exit(1)


def drawn(browser: str, page: Path, out: Path) -> bool:
    """Whether the page is never wider than what it is shown in."""
    fits = True
    for width in WIDTHS:
        with tempfile.NamedTemporaryFile("w", suffix=".html") as frame:
            frame.write(_FRAME.format(page=page.resolve().as_uri(), width=width, height=HEIGHT))
            frame.flush()
            shown = "--allow-file-access-from-files", f"--window-size={width},{HEIGHT}"
            _run(browser, Path(frame.name), *shown, f"--screenshot={out}-{width}.png")
            found = re.search(r"<title>(\d+)</title>", _run(browser, Path(frame.name), *shown, "--dump-dom"))
        wide = int(found[1]) if found else sys.maxsize
        fits &= wide <= width
        print(f"{page}: {wide} pixels wide in {width}")
    _run(browser, page, "--no-pdf-header-footer", f"--print-to-pdf={out}.pdf")
    print(f"{page}: {out}-*")
    return fits


def _run(browser: str, page: Path, *options: str) -> str:
    with tempfile.TemporaryDirectory() as profile:
        command = [browser, *_QUIET.split(), f"--user-data-dir={profile}", *options, page.resolve().as_uri()]
        return subprocess.run(command, check=True, capture_output=True, timeout=120, text=True).stdout


if __name__ == "__main__":
    main()
