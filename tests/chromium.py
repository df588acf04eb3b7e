"""Headless Chromium for tests, as Debian has it."""

import contextlib
import shutil

import pytest

ARGUMENTS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip


@contextlib.contextmanager
def opened_browser():
    """The browser, closed in the end; the test is skipped where there is none."""
    program = shutil.which("chromium") or shutil.which("chromium-browser")
    if program is None:
        pytest.skip("Chromium is not installed (Debian: apt-get install chromium)")
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (pip install playwright)")
    with api.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=program, headless=True, args=ARGUMENTS)
        try:
            yield opened
        finally:
            opened.close()


def cut_off(inside="body"):
    """Script that tells the texts of figures inside an element that reach beyond their figure."""
    return _CUT_OFF.replace("INSIDE", inside)


_CUT_OFF = """() => [...document.querySelectorAll('INSIDE .js-plotly-plot')].flatMap(plot => {
    const frame = plot.getBoundingClientRect();
    return [...plot.querySelectorAll('svg text')]
        .filter(text => text.textContent.trim() && text.getClientRects().length)
        .map(text => [text.textContent, text.getBoundingClientRect()])
        .filter(([_, box]) => box.left < frame.left - 1 || box.right > frame.right + 1
                           || box.top < frame.top - 1 || box.bottom > frame.bottom + 1)
        .map(([text, _]) => text);
})"""
