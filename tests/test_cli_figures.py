"""``--figure``: what a command shows, as a figure in a file, its place checked before the work."""

import json
import re

import pytest
import torch

import fvlens
from fvlens.cli import _figures
from fvlens.plots import _save as saving


@pytest.fixture
def no_model(monkeypatch):
    def load(*args, **how):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("fvlens.report._settings.load_model", load)


def drawn(path):
    """Traces and layout of the figure in a page."""
    text = path.read_text(encoding="utf-8")
    after = text[text.index("Plotly.newPlot(") :]
    data, end = json.JSONDecoder().raw_decode(after, after.index("["))
    layout, _ = json.JSONDecoder().raw_decode(after, after.index("{", end))
    return data, layout


def test_heads_are_drawn_as_the_table_says(call, tmp_path):
    path = tmp_path / "heads.html"
    code, out, err = call(
        "heads", "antonym", "--n-prompts", 4, "--n-corrupted", 2, "--n-heads", 3, "--figure", path, "--width", "column",
        "--dark", "--quiet",
    )  # fmt: skip
    assert (code, err) == (0, "") and out.splitlines()[-1] == f"wrote {path}"
    data, layout = drawn(path)
    top = re.findall(r"^\s*(L\d+H\d+) ", out, re.MULTILINE)
    assert len(top) == 3 and layout["width"] == 317 and "antonym" in layout["title"]["text"]
    assert set(top) >= {note["text"] for note in layout["annotations"]} != set()
    assert data[0]["type"] == "heatmap" and layout["template"]["layout"]["paper_bgcolor"] == "#1b1b1b"


def test_inject_draws_tokens_without_and_with_the_vector(call, model, saved, tmp_path):
    path = tmp_path / "tokens.html"
    code, out, _ = call("inject", saved, "hot", "--top", 2, "--figure", path)
    assert code == 0 and out.splitlines()[-1] == f"wrote {path}"
    (before, after), layout = drawn(path)
    vector = fvlens.FunctionVector.load(saved)
    ids = model.tokenizer("Q: hot\nA:", add_special_tokens=False)["input_ids"]
    tokens = torch.tensor([[model.tokenizer.bos_token_id, *ids]])
    with torch.no_grad():
        plain = model(tokens)[0, -1].softmax(dim=-1)
        with fvlens.inject(model, vector):
            steered = model(tokens)[0, -1].softmax(dim=-1)
    shown = {*plain.topk(2).indices.tolist(), *steered.topk(2).indices.tolist()}
    words = {repr(model.tokenizer.decode([token])): token for token in shown}
    assert set(layout["yaxis"]["ticktext"]) == set(words)
    places = [words[word] for word in layout["yaxis"]["ticktext"]]
    assert before["x"] == pytest.approx(plain[places].tolist(), abs=1e-5)
    assert after["x"] == pytest.approx(steered[places].tolist(), abs=1e-5)
    largest = torch.maximum(plain, steered)[places].tolist()
    assert largest == sorted(largest, reverse=True)


COMMANDS = [
    ("run", "antonym"),
    ("heads", "antonym"),
    ("universal", "antonym"),
    ("inject", "VECTOR", "hot"),
    ("analogy", "a", "b", "c"),
    ("analogies", "FILE"),
]


@pytest.mark.parametrize("command", COMMANDS, ids=[command[0] for command in COMMANDS])
def test_where_a_figure_goes_is_checked_before_the_work(call, no_model, saved, tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    questions = tmp_path / "questions.txt"
    questions.write_text(": capitals\nAthens Greece Oslo Norway\n")
    line = [{"VECTOR": saved, "FILE": questions}.get(word, word) for word in command]
    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr(saving, "missing_for_pictures", lambda: "Chromium")
    for given, told in (
        (
            ("--figure", "a.eps"),
            "--figure a.eps: a figure is written as .html, .svg, .pdf, .png; give a name with such",
        ),
        (("--figure", "none/a.html"), "--figure none/a.html: folder none does not exist; create it first."),
        (
            ("--figure", "a.png"),
            "--figure a.png: Chromium is missing; expected pip install 'fvlens[figures]' and a Chr",
        ),
        (("--width", "column"), "--width and --dark are of a figure; say where it goes with --figure FILE."),
    ):
        code, out, err = call(*line, *given)
        assert (code, out) == (2, "") and told in " ".join(err.split())
    assert sorted(tmp_path.iterdir()) == before


def test_without_a_file_nothing_is_drawn():
    def made():
        raise AssertionError("a figure was made")

    assert _figures.Drawing().draw(made) == []
