"""Bars are drawn on a terminal and nowhere else."""

import io
import sys

import pytest

from fvlens.progress import is_drawn, tqdm


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(("stream", "drawn"), [(Terminal(), True), (io.StringIO(), False)])
def test_bars_are_drawn_on_a_terminal_only(monkeypatch, stream, drawn):
    monkeypatch.setattr(sys, "stderr", stream)
    assert is_drawn() is drawn
    assert list(tqdm(range(3), desc="counting")) == [0, 1, 2]
    with tqdm(total=2, desc="counting") as bar:
        bar.update(2)
    assert ("\r" in stream.getvalue()) is drawn and ("counting" in stream.getvalue()) is drawn


def test_a_bar_can_be_left_out_on_a_terminal_too(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert list(tqdm(range(3), disable=True)) == [0, 1, 2] and sys.stderr.getvalue() == ""


def test_without_a_standard_error_nothing_is_drawn(monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    assert is_drawn() is False
    assert list(tqdm(range(3))) == [0, 1, 2]


def test_in_a_notebook_bars_are_drawn(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    monkeypatch.setitem(sys.modules, "ipykernel.zmqshell", io)
    assert is_drawn() is True
