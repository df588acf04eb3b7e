"""The explorer in headless Chromium: clicks and keys change what the model predicts, and errors are said in words."""

import pytest
from chromium import opened_browser
from explorer_page import Seen
from jupyter import lab, run_cell

import fvlens
from fvlens.explorer import Session, Settings

pytestmark = [pytest.mark.browser, pytest.mark.slow]

for name in ("ipywidgets", "anywidget", "jupyterlab"):
    pytest.importorskip(name, reason=f"the extra notebooks is not installed ({name})")

CELL = """import fvlens
from fvlens.explorer import Settings
model = fvlens.load_model("rel-small", device="cpu")
settings = Settings(n_prompts=12, n_corrupted=4, n_heads=5, n_shots=5)
fvlens.explore(model, "antonym", settings=settings, folder=".")"""


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lab")
    with opened_browser() as browser, lab(folder, CELL) as address:
        page = browser.new_page(viewport={"width": 1700, "height": 1600})
        page.set_default_timeout(90_000)
        run_cell(page, address)
        opened = Seen(page).wait()
        opened.folder = folder
        yield opened


@pytest.fixture(scope="module")
def session(model):
    """The same without a page; tests do to it what they do to the page, in their order."""
    settings = Settings(n_prompts=12, n_corrupted=4, n_heads=5, n_shots=5)
    return Session(model, "antonym", settings=settings)


def check_shown(seen, session):
    own = session.next_tokens()
    rows = own.probability.tolist()
    expected = [{repr(word): value for word, value in zip(own.words, row, strict=True)} for row in rows]
    for _ in range(50):  # a figure is drawn a moment after its numbers are there
        if seen.shown() == [pytest.approx(row, abs=1e-4) for row in expected]:
            break
        seen.page.wait_for_timeout(200)
    assert seen.shown() == [pytest.approx(row, abs=1e-4) for row in expected]


def test_it_is_there(seen, session):
    check_shown(seen, session)
    assert "5 heads in the vector" in seen.text(".fvlens-heads")
    assert seen.cut_off() == []
    assert len(seen.page.query_selector_all(".fvlens-token")) == len(session.view().words)


def test_a_click_on_a_head_changes_the_predictions(seen, session):
    head = session.heads[0]
    before = seen.shown()
    seen.click_head(*head)
    seen.changed(before)
    session.toggle(head)
    check_shown(seen, session)
    assert "4 heads in the vector" in seen.text(".fvlens-heads")
    shares = [float(token.get_attribute("data-share")) for token in seen.page.query_selector_all(".fvlens-token")]
    assert shares == pytest.approx(session.view().attention.tolist(), abs=1e-4)


def test_keys_on_the_sliders_change_the_predictions(seen, session):
    for name, where in (("scale", {"scale": session.scale + 0.25}), ("layer", {"layer": session.layer + 1})):
        before = seen.shown()
        seen.slider(name).press("ArrowRight")
        seen.changed(before)
        session.move(**where)
        check_shown(seen, session)


def test_typing_another_word_changes_the_predictions(seen, session):
    before = seen.shown()
    seen.type("hot")
    seen.changed(before)
    session.type("hot")
    check_shown(seen, session)


def test_what_goes_wrong_is_said_on_the_page(seen, session):
    seen.type("hot " * 400)
    seen.page.wait_for_selector(".fvlens-error")
    assert "the model's context holds 160; shorten it" in seen.text(".fvlens-error")
    check_shown(seen, session)
    seen.type("cold")
    seen.page.wait_for_selector(".fvlens-error", state="detached")
    session.type("cold")


def test_a_vector_is_saved_and_kept_beside(seen, session, model):
    page = seen.page
    page.get_by_placeholder("name", exact=True).fill("mine")
    page.get_by_role("button", name="save vector").click()
    page.wait_for_function("document.querySelector('.fvlens-explorer').innerText.includes('wrote')")
    saved = fvlens.FunctionVector.load(seen.folder / "mine.safetensors", model=model)
    assert saved.cosine(session.vector) == pytest.approx(1, abs=1e-5)
    before = seen.shown()
    page.get_by_role("button", name="keep beside").click()
    seen.changed(before)
    session.keep_beside()
    check_shown(seen, session)
    assert "Two vectors side by side" in seen.text()
