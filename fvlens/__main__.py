"""``python -m fvlens``: the commands."""

from fvlens.cli import main

main()
