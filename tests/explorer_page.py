"""The explorer as somebody sees it in a browser: what is shown, and where to click."""

from chromium import cut_off

N_FIGURES = 3

FIND = """kind => [...document.querySelectorAll('.fvlens-explorer .js-plotly-plot')].find(
    plot => plot.data[0].type == kind || plot.data[0].orientation == kind)"""

CELL = f"""([layer, head]) => {{
    const plot = ({FIND})('heatmap');
    plot.scrollIntoView({{block: 'center', behavior: 'instant'}});
    const box = plot.getBoundingClientRect();
    const {{xaxis, yaxis}} = plot._fullLayout;
    return [box.left + xaxis._offset + xaxis.l2p(head), box.top + yaxis._offset + yaxis.l2p(layer)];
}}"""

SHOWN = f"""() => {{
    const plot = ({FIND})('h');
    const words = plot.layout.yaxis.ticktext;
    return plot._fullData.filter(trace => trace.visible === true)
        .map(trace => Object.fromEntries(words.map((word, i) => [word, trace.x[i]])));
}}"""
"""Next-token probabilities by word, of each visible trace of the bars."""

CUT_OFF = cut_off(".fvlens-explorer")


class Seen:
    """An explorer on a page."""

    def __init__(self, page):
        self.page = page

    def wait(self):
        """Until all figures are drawn."""
        count = "[...document.querySelectorAll('.fvlens-explorer .js-plotly-plot')].filter(p => p._fullLayout).length"
        self.page.wait_for_function(f"{count} == {N_FIGURES}", timeout=180_000)
        return self

    def shown(self):
        return self.page.evaluate(SHOWN)

    def changed(self, before):
        """What the bars show as soon as it is something else."""
        self.page.wait_for_function(f"before => JSON.stringify(({SHOWN})()) != before", arg=dumped(self.page, before))
        return self.shown()

    def text(self, selector=""):
        return self.page.inner_text(f".fvlens-explorer {selector}")

    def click_head(self, layer, head):
        self.page.mouse.click(*self.page.evaluate(CELL, [layer, head]))

    def type(self, text):
        """A prompt in place of the old one, which counts when the button is clicked."""
        box = self.page.locator(".fvlens-explorer textarea").last
        box.fill(text)
        self.page.get_by_role("button", name="ask", exact=True).click()

    def slider(self, name):
        """The handle of a slider, which takes keys."""
        row = self.page.locator(".fvlens-explorer .widget-slider", has_text=name)
        return row.locator(".noUi-handle").first

    def cut_off(self):
        return self.page.evaluate(CUT_OFF)


def dumped(page, value):
    return page.evaluate("value => JSON.stringify(value)", value)
