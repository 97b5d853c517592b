"""``python -m fastntk``."""

from fastntk.cli import main

main()
