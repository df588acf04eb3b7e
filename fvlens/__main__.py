"""``python -m fvlens``: the commands."""

from fvlens.cli import main

if __name__ == "__main__":
    main()
