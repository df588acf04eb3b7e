"""Record the numbers: ``python tests/golden/record.py [CASE | CASE/GROUP ...]`` from the root; all cases by default.

What is not named stays as it is in the files. Every number is made several times, on one thread and two and with other
instruction sets: where float32 rounds differently there, the file gets a tolerance of its own; whole numbers and texts
must not move at all. ``--keep-tolerances`` makes them once and leaves tolerances as they are. A number that is recorded
again has its reason in the changelog.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
REPEATS = {
    "two threads": {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE"},
    "AVX2": {"ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    "SSE4": {"ATEN_CPU_CAPABILITY": "default", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2", "ONEDNN_MAX_CPU_ISA": "SSE41"},
}
"""Settings that change how sums are rounded, and nothing else."""
FACTOR = 3
"""A tolerance is so many times what was measured."""

Found = dict[str, dict[str, dict[str, list]]]


def chosen(names: list[str]) -> dict[str, list[str]]:
    """Case -> groups of what was named."""
    from golden.cases import CASES

    wanted: dict[str, list[str]] = {}
    for name in names or CASES:
        case, _, group = name.partition("/")
        if case not in CASES or (group and group not in CASES[case].groups):
            raise SystemExit(f"no case {name!r}; there are {', '.join(CASES)}, each with groups CASE/GROUP.")
        wanted.setdefault(case, []).extend([group] if group else CASES[case].groups)
    return wanted


def compute(wanted: dict[str, list[str]]) -> Found:
    """The numbers, here and now."""
    from golden.cases import CASES

    found: Found = {}
    for case, groups in wanted.items():
        began = time.monotonic()
        found[case] = {group: CASES[case].groups[group]() for group in groups}
        print(f"{case}: {time.monotonic() - began:.1f} s", flush=True)
    return found


def repeat(names: list[str], settings: dict[str, str]) -> Found:
    """The numbers in another process under other settings."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "found.json"
        command = [sys.executable, str(Path(__file__)), "--raw", str(file), *names]
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1", **settings})
        return json.loads(file.read_text(encoding="utf-8"))


def tolerance(measured: float) -> float:
    """A tolerance of one digit."""
    from golden.files import TOLERANCE

    if FACTOR * measured <= TOLERANCE:
        return TOLERANCE
    power = 10.0 ** math.floor(math.log10(FACTOR * measured))
    return float(f"{math.ceil(FACTOR * measured / power) * power:.0e}")


def measure(found: Found, repeats: dict[str, Found]) -> dict[str, dict[str, dict[str, list[float]]]]:
    """Tolerances by case, group and name, where they are not the usual one."""
    from golden.files import TOLERANCE, differences, spread

    made: dict[str, dict[str, dict[str, list[float]]]] = {}
    for case, groups in found.items():
        for group, values in groups.items():
            own = made.setdefault(case, {}).setdefault(group, {})
            for name, numbers in values.items():
                spreads = []
                for setting, other in repeats.items():
                    moved = spread(numbers, other[case][group][name])
                    if moved is None:
                        told = differences(case, {name: numbers}, {name: other[case][group][name]}, {name: [1.0, 1.0]})
                        raise SystemExit(f"{group}, {setting}: not the same everywhere: {'; '.join(told)}")
                    spreads.append(moved)
                both = [tolerance(max(column)) for column in zip(*spreads, strict=True)]
                if both != [TOLERANCE, TOLERANCE]:
                    own[name] = both
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description="Record the numbers that later versions must reproduce.")
    parser.add_argument("names", nargs="*", metavar="CASE[/GROUP]")
    parser.add_argument("--keep-tolerances", action="store_true", help="leave the files' tolerances as they are")
    parser.add_argument("--raw", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.path.insert(0, str(TESTS))

    import conftest  # noqa: F401 (offline, before anything is loaded)
    import jaxtyping

    jaxtyping.config.update("jaxtyping_disable", True)
    warnings.simplefilter("ignore")
    from golden.cases import CASES
    from golden.files import path_of, read, write

    wanted = chosen(given.names)
    found = compute(wanted)
    if given.raw is not None:
        given.raw.write_text(json.dumps(found), encoding="utf-8")
        return
    repeats = {} if given.keep_tolerances else {name: repeat(given.names, how) for name, how in REPEATS.items()}
    tolerances = measure(found, repeats) if repeats else {}
    for case, groups in found.items():
        old = read(case) if path_of(case).exists() else {"groups": {}, "tolerances": {}}
        content = {
            "options": CASES[case].options,
            "groups": {group: groups.get(group, old["groups"].get(group, {})) for group in CASES[case].groups},
            "tolerances": {
                group: tolerances.get(case, {}).get(group, old["tolerances"].get(group, {}))
                for group in CASES[case].groups
            },
        }
        path = write(case, content)
        print(f"wrote {path.name}, {path.stat().st_size / 1000:.0f} KB")


if __name__ == "__main__":
    main()
