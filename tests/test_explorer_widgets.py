"""The explorer's widgets without a browser: events in, traits out."""

import dataclasses

import pytest
import torch

import fvlens
from fvlens.explorer import Session, Settings

pytest.importorskip("ipywidgets", reason="the extra notebooks is not installed (ipywidgets)")
pytest.importorskip("anywidget", reason="the extra notebooks is not installed (anywidget)")

from types import SimpleNamespace

from fvlens.explorer._texts import attention_html, rows_html
from fvlens.explorer._view import TYPED, Explorer

SMALL = Settings(n_prompts=12, n_corrupted=4, n_heads=5, n_shots=5)


@pytest.fixture(scope="module")
def first(model, tmp_path_factory):
    return Session(model, "antonym", settings=SMALL, folder=tmp_path_factory.mktemp("explorer"))


@pytest.fixture
def explorer(first, tmp_path):
    session = Session(first.model, settings=SMALL, folder=tmp_path)
    vars(session).update({**vars(first), "folder": tmp_path, "_seen": {}})
    return Explorer(session)


def click(widget, x, y):
    """A click on a mark, as the page tells it."""
    [told] = widget.data[0]._click_callbacks
    told(widget.data[0], SimpleNamespace(xs=[x], ys=[y]), None)


def shown(explorer, row=1):
    """Next-token probabilities that the bars show, by token."""
    words = explorer.bars.layout.yaxis.ticktext
    return dict(zip(words, explorer.bars.data[row].x, strict=True))


def expected(explorer, row=1):
    seen = explorer.session.next_tokens()
    return {repr(word): value for word, value in zip(seen.words, seen.probability[row].tolist(), strict=True)}


def test_it_begins_with_what_was_found(explorer, first):
    assert explorer.layer.value == first.layer
    assert explorer.scale.value == first.scale
    assert explorer.text.value == first.text
    assert explorer.head.value == first.head
    assert "top1 on" in explorer.said.value
    torch.testing.assert_close(
        torch.tensor(explorer.map.data[0].z), first.found.effects.aie.double(), check_dtype=False
    )
    assert shown(explorer) == pytest.approx(expected(explorer))
    assert [trace.visible for trace in explorer.bars.data] == [True, True, False]
    assert explorer.wrong.value == ""


def test_sliders_move_the_vector_and_the_bars(explorer):
    before = shown(explorer)
    explorer.scale.value = 3
    explorer.layer.value = 2
    assert (explorer.session.scale, explorer.session.layer) == (3, 2)
    assert shown(explorer) == pytest.approx(expected(explorer))
    assert shown(explorer) != before


def test_a_click_on_the_map_puts_a_head_in_and_opens_it(explorer):
    n = len(explorer.session.heads)
    head = next(fvlens.Head(3, i) for i in range(8) if fvlens.Head(3, i) not in explorer.session.heads)
    before = explorer.attention.value, shown(explorer)
    click(explorer.map, head.head, head.layer)
    assert len(explorer.session.heads) == n + 1
    assert f"{n + 1} heads in the vector" in explorer.heads.value
    assert str(head) in explorer.heads.value
    assert explorer.head.value == head
    assert len([shape for shape in explorer.map.layout.shapes if shape.name != "looked at"]) == n + 1
    [mark] = [shape for shape in explorer.map.layout.shapes if shape.name == "looked at"]
    assert ((mark.x0 + mark.x1) / 2, (mark.y0 + mark.y1) / 2) == pytest.approx((head.head, head.layer))
    assert "takes it out" in explorer.map.data[0].hovertext[head.layer][head.head]
    assert (explorer.attention.value, shown(explorer)) != before
    assert explorer.attention.value != before[0]
    click(explorer.map, head.head, head.layer)
    assert f"{n} heads in the vector" in explorer.heads.value


def test_the_last_head_can_go_and_come_back(explorer):
    for head in explorer.session.heads:
        click(explorer.map, head.head, head.layer)
    assert "No head is in the vector" in explorer.heads.value
    assert [trace.visible for trace in explorer.bars.data] == [True, False, False]
    click(explorer.map, 0, 0)
    assert [trace.visible for trace in explorer.bars.data] == [True, True, False]


def test_another_head_and_prompt_are_looked_at(explorer):
    session, heads = explorer.session, explorer.session.heads
    explorer.head.value = fvlens.Head(0, 5)
    explorer.kind.value = "clean"
    explorer.prompt.value = 3
    assert (session.head, session.kind, session.prompt) == ((0, 5), "clean", 3)
    assert session.heads == heads
    view = session.view()
    assert explorer.attention.value == attention_html(view.words, view.attention)
    assert explorer.by_prompt.data[1].y == pytest.approx(view.direct.tolist())
    assert not explorer.by_prompt.data[0].y
    explorer.kind.value = "corrupted"
    click(explorer.by_prompt, 2, 0)
    assert (session.kind, session.prompt, explorer.prompt.value) == ("corrupted", 2, 2)
    assert explorer.by_prompt.data[0].y == pytest.approx(session.view().effects.tolist())
    assert len(set(explorer.by_prompt.data[0].marker.color)) == 2
    assert "L0H5" in explorer.decoded.value


def test_a_prompt_is_typed(explorer):
    explorer.asked.value = False
    explorer.text.value = "Q: hot\nA: cold\n\nQ: big\nA:"
    assert explorer.session.asked is False
    assert shown(explorer, 0) == pytest.approx(expected(explorer, 0))


def test_what_goes_wrong_is_said_and_the_session_stays(explorer):
    text, before = explorer.text.value, shown(explorer)
    explorer.text.value = "hot " * 400
    assert "fvlens-error" in explorer.wrong.value
    assert "context holds 160; shorten it" in explorer.wrong.value
    assert explorer.session.text == text
    assert explorer.text.value == "hot " * 400  # to be mended
    explorer.run.click()
    assert "context holds 160" in explorer.wrong.value
    assert shown(explorer) == before
    explorer.scale.value = 2
    assert explorer.wrong.value == ""


def test_errors_of_any_kind_are_shown_in_words(explorer, monkeypatch):
    def fail(**where):
        raise RuntimeError("a <b> broke")

    monkeypatch.setattr(explorer.session, "move", fail)
    explorer.scale.value = 3
    assert "RuntimeError: a &lt;b&gt; broke" in explorer.wrong.value
    assert explorer.scale.value == explorer.session.scale


def test_vectors_and_states_are_saved_and_loaded(explorer, tmp_path):
    explorer.scale.value = 2
    explorer.name.value = "mine"
    explorer.buttons["save vector"].click()
    explorer.buttons["save state"].click()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.json", "mine.safetensors"]
    assert "wrote" in explorer.said.value
    assert explorer.files.options == ("mine.json", "mine.safetensors")
    explorer.scale.value = -1
    explorer.files.value = "mine.safetensors"
    explorer.buttons["load"].click()
    assert explorer.bars.data[2].visible is True
    assert shown(explorer, 2) == pytest.approx(expected(explorer, 2))
    assert "Two vectors side by side" in explorer.compared.value
    assert "-1.000" in explorer.compared.value  # the same direction, turned round
    explorer.buttons["drop beside"].click()
    assert explorer.bars.data[2].visible is False
    explorer.files.value = "mine.json"
    explorer.buttons["load"].click()
    assert explorer.wrong.value == ""
    assert explorer.scale.value == 2
    explorer.name.value = "../mine"
    explorer.buttons["save vector"].click()
    assert "expected a name of letters" in explorer.wrong.value


def test_pairs_are_chosen_and_typed(model, tmp_path):
    explorer = Explorer(
        Session(model, settings=dataclasses.replace(SMALL, n_prompts=4, n_corrupted=2), folder=tmp_path)
    )
    assert explorer.body.children == ()
    assert explorer.typed.layout.display == "none"
    explorer.relation.value = "plural"
    explorer.find.click()
    assert explorer.session.relation.name == "plural"
    assert "plural: 5 heads" in explorer.said.value
    assert len(explorer.body.children) == 3
    explorer.relation.value = TYPED
    assert explorer.typed.layout.display is None
    explorer.typed.value = "hot"
    explorer.find.click()
    assert "line 1: expected two words" in explorer.wrong.value
    assert explorer.find.disabled is False
    assert explorer.relation.value == TYPED
    explorer.typed.value = "\n".join(f"{x}, {y}" for x, y in fvlens.load_relation("antonym").pairs[:24])
    explorer.find.click()
    assert explorer.wrong.value == ""
    assert explorer.session.relation.name == "typed pairs"


def test_explore_is_the_front_of_it(model, tmp_path, monkeypatch):
    explorer = fvlens.explore(model, folder=tmp_path)
    assert explorer.session.folder == tmp_path
    assert explorer.session.settings == Settings()
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "anywidget" else found(name))
    with pytest.raises(ValueError, match=r"the explorer needs anywidget; install the extra: pip install"):
        fvlens.explore(model)


def test_words_are_escaped():
    assert "<script>" not in attention_html(["<script>", "x"], torch.tensor([0.5, 0.5]))
    assert "<script>" not in rows_html([("a",), ("<script>",)], "<script>")
