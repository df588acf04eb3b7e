"""The files of numbers: read, written, and compared with what is found now."""

import json
import math
from pathlib import Path
from typing import Any

from golden.values import Values

FOLDER = Path(__file__).parent
TOLERANCE = 1e-6
"""Two floats are the same up to this, relative above 1; and so are two lists on average."""
WHY = (
    "where float32 rounds more: three times the largest difference that other instruction sets, numbers of threads and "
    "machines make, [of each number, of the mean over the list], relative above 1"
)


def path_of(case: str) -> Path:
    """The file of a case."""
    return FOLDER / f"{case}.json"


def read(case: str) -> dict[str, Any]:
    """A file: ``options``, ``groups`` and ``tolerances``."""
    return json.loads(path_of(case).read_text(encoding="utf-8"))


def rounded(value: Any) -> Any:
    """A float to nine significant digits."""
    return float(f"{value:.9g}") if isinstance(value, float) else value


def write(case: str, content: dict[str, Any]) -> Path:
    """Write a file, one line a list."""

    def line(name: str, value: Any) -> str:
        return f"{json.dumps(name)}: {json.dumps(value, separators=(',', ':'), ensure_ascii=False, allow_nan=False)}"

    def block(name: str, inner: list[str], indent: str) -> str:
        body = "\n" + ",\n".join(inner) + f"\n{indent}" if inner else ""
        return f"{indent}{json.dumps(name)}: {{{body}}}"

    groups = [
        block(group, [f"   {line(name, [rounded(one) for one in found])}" for name, found in values.items()], "  ")
        for group, values in content["groups"].items()
    ]
    tolerances = [
        block(group, [f"   {line(name, both)}" for name, both in found.items()], "  ")
        for group, found in content["tolerances"].items()
        if found
    ]
    text = ",\n".join(
        [
            f" {line('case', case)}",
            f" {line('options', content['options'])}",
            block("groups", groups, " "),
            f" {line('why tolerances', WHY)}",
            block("tolerances", tolerances, " "),
        ]
    )
    path = path_of(case)
    path.write_text(f"{{\n{text}\n}}\n", encoding="utf-8")
    return path


def _both_floats(one: Any, other: Any) -> bool:
    return type(one) is float and type(other) is float


def off(one: float, other: float) -> float:
    """Signed difference of two numbers, relative above 1."""
    return (other - one) / max(1.0, abs(one), abs(other))


def spread(one: list[Any], other: list[Any]) -> tuple[float, float] | None:
    """Largest difference of the floats of two lists and that of their means; None where anything else differs."""
    if len(one) != len(other):
        return None
    found = []
    for a, b in zip(one, other, strict=True):
        if _both_floats(a, b):
            found.append(off(a, b))
        elif a != b or type(a) is not type(b):
            return None
    if not found:
        return 0.0, 0.0
    return max(map(abs, found)), abs(math.fsum(found) / len(found))


def differences(where: str, expected: Values, got: Values, tolerances: dict[str, list[float]]) -> list[str]:
    """Everything in which a group differs from its file, a line each.

    Args:
        where: case and group, for the lines.
        expected: the file's numbers.
        got: those found now.
        tolerances: name -> tolerance of each number and of the mean, where they are not :data:`TOLERANCE`.
    """
    lines = [f"{where}: {name!r}: expected, but not found" for name in expected if name not in got]
    lines += [f"{where}: {name!r}: found, but not in the file" for name in got if name not in expected]
    for name, wanted in expected.items():
        found = got.get(name, wanted)
        if len(found) != len(wanted):
            lines.append(f"{where}: {name!r}: expected {len(wanted)} values, got {len(found)}")
            continue
        each, mean = tolerances.get(name, (TOLERANCE, TOLERANCE))
        moved = []
        for i, (a, b) in enumerate(zip(wanted, found, strict=True)):
            if not _both_floats(a, b):
                if a != b or type(a) is not type(b):
                    lines.append(f"{where}: {name!r}[{i}]: expected {a!r}, got {b!r}")
                continue
            moved.append(off(a, b))
            if not abs(moved[-1]) <= each:
                lines.append(f"{where}: {name!r}[{i}]: expected {a!r}, got {b!r}, off by {moved[-1]:.1e} (> {each:g})")
        average = math.fsum(moved) / max(1, len(moved))
        if not abs(average) <= mean:
            lines.append(f"{where}: {name!r}: off by {average:.1e} on average (> {mean:g})")
    return lines
