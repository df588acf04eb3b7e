"""What the tests of the commands share: a command as a process, printed tables, the library read without fvlens."""

import os
import re
import subprocess
import sys
from pathlib import Path

import fvlens

DATA = Path(fvlens.__file__).parent / "relations" / "data"


def process(*args, **changes):
    """Run a command as a user does."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "200", **changes}
    return subprocess.run(
        [sys.executable, "-m", "fvlens", *map(str, args)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )


def cells(text):
    """Rows of a printed table; its columns are two spaces apart."""
    return [re.split(r" {2,}", line.strip()) for line in text.splitlines() if line.strip()]


def library():
    """Header and number of pairs of every relation file, read without fvlens."""
    found = {}
    for file in DATA.glob("*.tsv"):
        lines = file.read_text(encoding="utf-8").splitlines()
        header = dict(line[1:].strip().split(": ", 1) for line in lines if line.startswith("#"))
        pairs = [line.split("\t") for line in lines if line.strip() and not line.startswith("#")]
        found[header["name"]] = (header, pairs)
    return found
