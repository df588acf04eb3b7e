"""The memory of a process against the bound that it was given, for whatever takes one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux sets the high-water mark back"),
]


@pytest.fixture(scope="module")
def peaks():
    """What `peak_memory.py` prints: by what was measured, pairs of a bound and a peak."""
    script = Path(__file__).with_name("peak_memory.py")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=600, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("what", ["effects, weights", "effects, kv", "effects, bridge", "training"])
def test_work_stays_inside_its_bound_and_puts_it_to_use(peaks, what):
    """With every larger block given back to the system, as the bound counts."""
    (low, least), (high, most) = peaks[what]
    assert least <= 1.1 * low and most <= 1.1 * high, peaks
    assert most >= 2 * least  # more memory is put to use
    assert most >= 0.5 * high, peaks


def test_what_glibc_keeps_by_itself_is_limited(peaks):
    """It differs between equal runs: in 24 of them 1.4 to 2.1 times the lower bound."""
    (low, least), (high, most) = peaks["effects, weights, freed as glibc likes"]
    assert least <= 2.5 * low and most <= 2.5 * high, peaks
    assert most >= 2 * least and most >= 0.5 * high, peaks


@pytest.mark.parametrize("step", ["make", "mean", "save", "load"])
def test_caches_stay_inside_their_bound(peaks, step):
    found = peaks[f"cache, {step}"]
    assert all(peak <= 1.1 * bound for bound, peak in found), peaks
    if step == "make":
        high, most = found[1]
        assert most >= 0.5 * high, peaks  # and puts it to use
