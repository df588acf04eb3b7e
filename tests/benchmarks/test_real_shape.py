"""The bars on a real architecture's shape: 70% of each, so that a busy machine does not fail them.

Run with ``pytest -m benchmark -s tests/benchmarks/test_real_shape.py``. The rows, and how to measure them whole and by
themselves, are in ``real_shape.py`` beside this.
"""

import jaxtyping
import pytest
from conftest import needs_hooked
from real_shapes import real_shape

from benchmarks.machine import measure_machine
from benchmarks.real_shape import ROWS

pytestmark = [pytest.mark.benchmark, needs_hooked]
SHARE = 0.7
"""Of each bar, in CI."""


@pytest.fixture(scope="module")
def real():
    """The model of the shape, and the same in plain Hugging Face; without runtime type checking, as in ordinary use."""
    jaxtyping.config.update("jaxtyping_disable", True)
    with real_shape() as made:
        yield made
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.parametrize("name", ROWS)
def test_a_row_of_the_table(real, name, capsys):
    machine = measure_machine()
    row = ROWS[name](real)
    machine = machine.averaged(measure_machine())
    with capsys.disabled():
        print(f"{row.report(machine)}\n  {machine}")
    for what, (found, bound) in row.differences.items():
        assert found <= bound, what
    for what, (found, least) in row.movements.items():
        assert found >= least, what
    for comparison in row.comparisons:
        assert comparison.ratio >= SHARE * comparison.bar, comparison.title
