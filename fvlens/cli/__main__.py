"""``python -m fvlens.cli``."""

from fvlens.cli import main

main()
