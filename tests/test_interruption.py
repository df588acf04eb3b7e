"""Loops that are interrupted: what is finished is kept, and says so."""

import warnings

import pandas as pd
import pytest

from fvlens.interruption import keeping, marked, titled


def run(interrupted_at, error=KeyboardInterrupt, least=1):
    done = []
    with keeping(lambda: len(done), 3, "example", "squares are finished", least=least) as loop:
        for i in range(3):
            if i == interrupted_at:
                raise error
            done.append(i * i)
    return done, loop.complete


def test_a_loop_that_ends_is_complete():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run(None) == ([0, 1, 4], True)


def test_an_interruption_keeps_what_is_finished_and_warns():
    with pytest.warns(UserWarning, match=r"example was interrupted: 2 of 3 squares are finished\."):
        assert run(2) == ([0, 1], False)


def test_with_too_little_finished_the_interruption_goes_on():
    with pytest.raises(KeyboardInterrupt):
        run(0)
    with pytest.raises(KeyboardInterrupt):
        run(2, least=3)


def test_other_errors_go_on():
    with pytest.raises(OSError, match="disk"):
        run(2, error=OSError("disk"))


def test_parts_say_that_they_are():
    frame = pd.DataFrame({"x": [1, 2]})
    assert marked(frame, True) is frame
    assert marked(frame, False).to_dict("list") == {"x": [1, 2], "complete": [False, False]}
    assert titled("Sweep", True) == "Sweep"
    assert titled("Sweep", False) == "Sweep (interrupted: a part of the whole)"
