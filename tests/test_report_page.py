"""The page of a run: offline, the numbers, nothing taken for markup."""

import dataclasses
import json
import re

import pytest
import torch
from runs import TINY, Page, page_of

import fvlens
from fvlens import Relation
from fvlens.relations import Pair
from fvlens.report import run_relation, write_report, write_run
from fvlens.report._page import _controls

# --- how the run goes ---


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_page_says_what_half_precision_does_to_ranks(tiny, tmp_path, dtype):
    options = dataclasses.replace(TINY, n_others=1, epochs=0)
    found = run_relation(tiny, fvlens.load_relation("antonym"), options=options, progress=False)
    found = dataclasses.replace(found, fingerprint=dataclasses.replace(found.fingerprint, dtype=dtype))
    page = write_run(found, tmp_path)[-1].read_text()
    said = f"The model computes in bfloat16: how many prompts run together (here\nup to {found.zero_shot.batch_size} of"
    assert (said in page) == (dtype == "bfloat16")


# --- the fine-tuned vector ---


def test_page_shows_the_training(page, result, numbers):
    assert "Fine-tuned vector" in page.texts["h2"]
    span = lambda key: "{:.3f} to {:.3f}".format(*numbers["intervals"][key])  # noqa: E731
    expected = {
        "bare query": "zero_shot_top1",
        "function vector": "fv_top1",
        "fine-tuned vector": "ffv_top1",
        f"fine-tuned vectors of other relations ({result.others[0]})": "other_relation_ffv_top1",
        "10 clean demonstrations": "icl_top1",
    }
    assert page.tables["tuned"][1:] == [[name, f"{numbers[key]:.3f}", span(key)] for name, key in expected.items()]
    rows = zip(numbers["decoded"], numbers["ffv_decoded"], strict=True)
    assert page.tables["decoded"][1:] == [
        [str(i), repr(a), f"{x:.2f}", repr(b), f"{y:.2f}"] for i, ((a, x), (b, y)) in enumerate(rows, start=1)
    ]
    (text,) = [" ".join(text.split()) for text in page.texts["p"] if "trained further" in text]
    for part in (
        "bare queries of 20 training pairs",
        f"Chosen on the {len(result.split.valid)} validation pairs: epoch {numbers['ffv_best_epoch']} of 20.",
        f"Added after layer {numbers['ffv_layer']}",
        f"cosine similarity to it {numbers['ffv_cosine']:.2f};",
        f"norm {numbers['ffv_norm']:.2f}, of the function vector {numbers['fv_norm']:.2f}.",
        f"Trained in {numbers['ffv_seconds']:.1f} s.",
    ):
        assert part in text
    ours = [script for script in page.texts["script"] if "Training of antonym" in script]
    (curves,) = ours
    for name in ("training pairs", "validation pairs", "validation top-1", "norm", "cosine"):
        assert f'"name":"{name}"' in curves
    told = dict(page.tables["provenance"])["fine-tuned vector"]
    run = result.tuned.run
    assert told == (
        f"20 pairs, epoch {run.best_epoch} of 20, learning rate {run.lr:.3g}, order of pairs by seed {run.seed}, "
        f"path {run.path}, {run.seconds:.1f} seconds"
    )


def test_page_says_where_training_gained_nothing(result, tmp_path):
    stayed = dataclasses.replace(result.tuned.run, best_epoch=0)
    page = page_of(dataclasses.replace(result, tuned=dataclasses.replace(result.tuned, run=stayed)), tmp_path)
    assert any("epoch 0 of 20, the start: none was better." in " ".join(text.split()) for text in page.texts["p"])


# --- heads from a file ---


def test_page_shows_given_heads_instead_of_heatmaps(given, tmp_path):
    path = write_report(tmp_path / "report.html", given)
    page = Page(path.read_text(encoding="utf-8"))
    assert "L2H3, L0H1, L1H1" in page.texts["p"]
    assert not any("Which heads carry" in text for text in page.texts["h2"])
    assert "Where the vector works (heads from heads.json)" in page.texts["h2"]
    told = dict(page.tables["provenance"])
    assert told["heads"].startswith(f"L2H3, L0H1, L1H1, from {given.given.path} (file ")
    assert told["attribution path"] == "none: the heads were given"


# --- the page ---


FETCHING = ("src", "href", "srcset", "xlink:href", "action", "formaction", "poster", "background", "data", "ping")


@pytest.fixture(scope="session")
def page(result, tmp_path_factory):
    return page_of(result, tmp_path_factory.mktemp("page"))


def test_page_needs_nothing_from_elsewhere(page):
    for tag, attrs in page.tags:
        assert tag not in ("base", "iframe", "object", "embed", "img", "form"), tag
        assert attrs.get("http-equiv") in (None, "Content-Security-Policy")
        for name in FETCHING:
            beside = tag == "a" and attrs.get(name) in (
                "heads.csv",
                "effects.csv",
                "answers.csv",
            )  # a link to a table, which nobody need follow
            assert beside or (attrs.get(name) or "data:").startswith(("data:", "#")), (tag, name, attrs[name])
    for style in (*page.styles, *page.texts["style"]):
        assert "url(" not in style
        assert "@import" not in style
    data, scripts = [], []
    for text, kind in zip(page.texts["script"], page.attributes("script", "type"), strict=True):
        (data if kind == "application/json" else scripts).append(text)
    library, own = scripts
    assert "plotly.js (cartesian" in library[:200]
    for script in (own, *data):  # the library names servers, for maps that are not drawn; our part names none
        assert not re.search(r"https?:|fetch\(|import\(", script)
    assert len(data) == 7


def test_page_shows_the_numbers(page, result, numbers):
    assert page.texts["title"] == ["antonym: function vector on rel-small"]
    assert page.texts["h1"] == ["antonym"]
    assert page.tables["summary"][1:] == [
        [name, f"{value:.3f}", f"{interval.low:.3f} to {interval.high:.3f}"]
        for name, value, interval in result.summary()
    ]
    text = dict(page.tables["provenance"])
    assert numbers["fingerprint"]["weights"] in text["model"]
    assert text["relation"] == f"antonym (data {numbers['data_hash']}; no word in two parts of its split)"
    assert text["pairs"].endswith(f"{numbers['n_test']} test")
    assert json.loads(text["options"]) == numbers["options"]
    assert text["attribution path"] == numbers["path"]
    apart = numbers["loaded"]["head_writes"]
    assert (
        text["heads' writes"] == f"their sum plus the bias is what attention adds, to {apart:.1e} of the largest value"
    )
    assert not {"weights stored as", "said while loading"} & set(text)  # floats, and nothing to say
    assert f"torch {torch.__version__.split('+')[0]}" in text["versions"]
    lead = page.texts["p"][0]
    assert f"10 heads, scale\n{numbers['scale']:g}, added after layer {numbers['layer']};" in lead
    assert f"{numbers['n_test']} test pairs" in lead


def test_every_query_is_shown_and_those_that_are_missed_first(page, result):
    columns = (result.zero_shot, result.steered["permuted"], result.tuned.evaluation, result.icl)
    expected = []
    for i, pair in enumerate(result.split.test):
        cells = [one.predictions[i] + (" ✓" if one.predictions[i] == pair.output else "") for one in columns]
        expected.append([pair.input, pair.output, *cells])
    missed = [row for row in expected if "✓" not in row[4]]
    assert 0 < len(missed) < len(expected)
    assert page.tables["samples"][1:] == missed + [row for row in expected if row not in missed]
    assert page.tables["samples"][0] == ["query", "answer", "bare", "function vector", "fine-tuned", "10-shot"]
    assert sum(attrs.get("data-missed") == "yes" for tag, attrs in page.tags if tag == "tr") == len(missed)
    shots = sum("✓" in row[5] for row in missed)
    said = (
        f"The fine-tuned vector misses {len(missed)} of the {result.n_test} test queries; {shots} of these are answered"
        " after 10 demonstrations."
    )
    assert said in page.texts["p"]


def test_a_vector_that_misses_nothing_says_so(result, tmp_path):
    evaluation = dataclasses.replace(result.tuned.evaluation, ranks=torch.zeros(result.n_test, dtype=torch.long))
    found = dataclasses.replace(result, tuned=dataclasses.replace(result.tuned, evaluation=evaluation))
    text = f"The fine-tuned vector misses none of the {result.n_test} test queries."
    assert text in page_of(found, tmp_path).texts["p"]


def test_controls_show_the_fine_tuned_vector(result):
    figure = _controls(result)
    (bars,) = figure.data
    names = [" ".join(re.sub(r"<br ?/?>", " ", str(name)).split()) for name in (figure.layout.yaxis.ticktext or bars.y)]
    tuned = result.tuned.evaluation
    place = names.index(f"fine-tuned vector, layer {tuned.vector_layer}")
    assert bars.x[place] == pytest.approx(tuned.top1)
    assert len(bars.x) == len(result.controls.rows) + 1


def test_heads_can_be_copied_as_the_command_takes_them(page, result):
    from fvlens.types import as_heads

    (text,) = [text for text in page.texts["code"] if text.startswith("L")]
    assert tuple(as_heads(text.split(","), 4, 8)) == result.vector.heads


def test_the_beginning_of_an_answer_is_not_the_answer(result, tmp_path):
    """A wrong token that the answer begins with gets no tick, a right first token of a longer answer gets one."""
    (pair, *_), n = result.zero_shot.queries, result.zero_shot.n
    prefix = (pair.output[:1], *result.zero_shot.predictions[1:])
    wrong = dataclasses.replace(result.zero_shot, predictions=prefix, ranks=torch.full((n,), 7))
    first = dataclasses.replace(result.icl, predictions=prefix, ranks=torch.zeros(n, dtype=torch.long))
    rows = page_of(dataclasses.replace(result, zero_shot=wrong, icl=first), tmp_path).tables["samples"]
    (row,) = [row for row in rows if row[0] == pair.input]
    assert row[2] == pair.output[:1]
    assert row[5] == f"{pair.output[:1]} ✓"


def test_figures_name_the_relation(page):
    ours = "\n".join(script for script in page.texts["script"] if "plotly.js (" not in script[:200])
    assert "custom pairs" not in ours
    assert ours.count("antonym") >= 5


def test_odd_names_and_words_are_text(tiny, tiny_result, tmp_path):
    name = '</title></script><script>alert("1")</script> & <b>'
    odd = ["<script>x</script>", "a&amp;b", '"q"', "</td>", "x'y", "<!--", "{{ 7 * 7 }}", "${y}", "<img src=x>"]
    pairs = tuple(Pair(f"{word}{i}", f"{word}out{i}") for i in range(4) for word in odd)
    relation = Relation(name=name, pairs=pairs)
    with pytest.warns(UserWarning, match="different answers share their first token with another"):
        found = run_relation(tiny, relation, options=TINY, model_name="<i>m</i>", progress=False)
    assert [caution.partition(": ")[0] for caution in found.cautions][-1] == "answers"
    decoded = (("</script><b>", 2.0), (" <i>", 1.0))
    found = dataclasses.replace(found, decoded=decoded, tuned=dataclasses.replace(found.tuned, decoded=decoded))
    page = page_of(found, tmp_path)
    assert page.texts["h1"] == [name]
    assert page.texts["title"] == [f"{name}: function vector on <i>m</i>"]
    shown = [row[:2] for row in page.tables["samples"][1:]]
    assert sorted(shown) == sorted(list(pair) for pair in found.split.test)
    plain = page_of(tiny_result, tmp_path)
    count = lambda page, tag: sum(name == tag for name, _ in page.tags)  # noqa: E731
    for tag in ("script", "b", "i", "img", "h2", "table", "title"):
        assert count(page, tag) == count(plain, tag), tag
