"""``python -m fastntk``."""

from fastntk.cli.main import main

main()
