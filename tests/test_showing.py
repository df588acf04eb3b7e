"""One line and a small table of every value, from what it holds: escaped, of a size that a notebook bears."""

import dataclasses
import importlib
import pkgutil
import subprocess
import sys

import pytest
import torch
from conftest import seeded
from evaluations import PAIRS, made_vector
from every_result import prompts, results, tiny_model

import fvlens
from fvlens.composition import CompositeMap, FitHistory, Gate
from fvlens.composition._gate import SIGNALS
from fvlens.prompts import check_pairs
from fvlens.showing import MOST_CELLS, MOST_ROWS, Shown, map_html, number, table_html

PLAIN = {
    # settings, and what a file, a model or a template is: their fields are what there is to say
    "AnswerTokens", "Analogy", "Dropped", "Edit", "Execution", "Fingerprint", "Fitting", "GivenHeads", "LoadReport",
    "Loading", "Pieces", "Provenance", "RecipeOptions", "RunOptions", "Settings", "Task", "Template", "TensorFile",
    "Theme",
    # parts of engines and of plans, which nobody is handed
    "AnswerEnd", "Batch", "Budget", "Cell", "FigureBlock", "Loaded", "Planned", "Readout", "Request", "Rules", "Screen",
    "Screening", "Slices", "Study", "SuffixRun", "Wants",
}  # fmt: skip


def exported():
    """Every dataclass that a room exports."""
    found = {}
    for info in pkgutil.iter_modules(fvlens.__path__, "fvlens."):
        if info.name not in ("fvlens.cli", "fvlens.zoo"):
            room = importlib.import_module(info.name)
            for name in getattr(room, "__all__", [name for name in vars(room) if not name.startswith("_")]):
                value = getattr(room, name)
                if isinstance(value, type) and dataclasses.is_dataclass(value):
                    found[value] = name
    return found


def test_every_exported_class_shows_itself_in_one_line():
    bad = [
        kind.__qualname__
        for kind, name in exported().items()
        if name not in PLAIN and (not issubclass(kind, Shown) or kind.__repr__ is not Shown.__repr__)
    ]
    assert bad == []
    left_out = PLAIN - set(exported().values())
    assert left_out == set()


def shown():
    """A value of every kind that can be made quickly, by the name of its class."""
    model, g = tiny_model(), seeded()
    vector = made_vector(model)
    basis = fvlens.VectorSet((vector, made_vector(model, seed=1, relation="other")))
    relation = fvlens.Relation("<b>pairs</b>", PAIRS)
    found = results()
    cache = fvlens.activation_cache(model, prompts(), sites=("z",), progress=False)
    values = [
        *found.values(), vector, basis, relation, relation.split(g), prompts(), cache, CompositeMap.plain(basis),
        FitHistory((2.0, 1.0), (float("nan"),) * 2, (0.0, 1.0)),
        Gate("logistic", (0.5,) * len(SIGNALS), 0.1, "one_shot"),
        check_pairs(PAIRS, generator=g), fvlens.TrainableVector(vector), found["FineTuned"].history,
        found["FineTuned"].state, found["Comparison"].rows[0], found["Controls"].rows[0], found["Baseline"].change,
        found["Baseline, LoRA"].change, found["Baseline, untrained"].change, found["FineTuned"].change,
        found["IndirectEffects, rechecked"].recheck, found["IndirectEffects, rechecked"].quality,
        found["BasisStudy"].changes[0], found["AnalogyEvaluation"]["unsteered, zero-shot"],
        found["AnalogyEvaluation"].compare("unsteered, zero-shot", "own vector, zero-shot"),
        fvlens.distributed_vector(model, found["HeadMeans"], heads=[(0, 1)]),
    ]  # fmt: skip
    return values


@pytest.fixture(scope="module")
def values():
    return shown()


def test_one_line_and_a_small_table(values):
    for value in values:
        text, page = repr(value), value._repr_html_()
        name = type(value).__name__
        assert text.startswith(f"{name}(") and text.endswith(")"), name
        assert "\n" not in text and "tensor(" not in text and len(text) < 500, text
        assert len(text) > len(name) + 4, text
        assert len(page) < 60_000 and "<script" not in page and "<b>" not in page, name
        assert page.count("<table") == page.count("</table>") <= 1, name
        assert page.count("<tr>") <= max(MOST_ROWS + 2, 10 * 4), name


def test_the_line_says_sizes_model_and_the_main_number(values):
    found = results()
    score = found["Evaluation"]
    assert f"n={score.n}, top1={score.top1:.3f}" in repr(score)
    effects = found["IndirectEffects"]
    best = effects.ranking[0]
    assert (
        f"3 prompts, 3 layers x 4 heads, model 'custom', best {best} with AIE {float(effects.aie[best]):.3f}"
        in repr(effects)
    )
    sweep = found["LayerSweep"]
    assert f"best {sweep.best_layer} with top1={max(e.top1 for e in sweep.evaluations):.3f}" in repr(sweep)
    vector = made_vector(tiny_model())
    assert repr(vector) == (
        "FunctionVector(made, function: 32 numbers after layer 1, 3 heads, norm 6.000, model 'custom')"
    )
    assert "interrupted" in repr(dataclasses.replace(vector, complete=False))
    assert "interrupted" in repr(dataclasses.replace(effects, complete=False))


def test_a_map_has_a_cell_a_head_and_of_many_heads_a_table():
    effects = results()["IndirectEffects"]
    page = effects._repr_html_()
    assert page.count("<td") == effects.aie.numel() == 12
    assert f"layer 2, head 3: {float(effects.aie[2, 3]):+.4g}" in page
    mark = dataclasses.replace(effects.fingerprint, n_layers=50, n_heads=10)
    large = dataclasses.replace(effects, cie=torch.randn(3, 50, 10, generator=seeded()), fingerprint=mark)
    assert large.aie.numel() > MOST_CELLS
    assert large._repr_html_().count("<tr>") == MOST_ROWS + 1


def test_tables_are_escaped_and_cut():
    page = table_html("a <b>", [("x",), *((f"<i>{i}</i>",) for i in range(MOST_ROWS + 3))])
    assert "<code>a &lt;b&gt;</code>" in page and "&lt;i&gt;0&lt;/i&gt;" in page and "<i>" not in page
    assert "and 3 more" in page and page.count("&lt;i&gt;") == MOST_ROWS
    assert "rgba(178,24,43,1.00)" in map_html("m", [[2.0, -1.0]], row="a", column="b")
    assert "rgba(33,102,172,0.50)" in map_html("m", [[2.0, -1.0]], row="a", column="b")
    assert (number(None), number(float("nan")), number(3), number(0.12345)) == ("-", "-", "3", "0.123")


def test_nothing_is_drawn_for_it():
    code = (
        "import sys, torch, fvlens\n"
        "r = fvlens.load_relation('antonym')\n"
        "assert r._repr_html_() and repr(r.split(torch.Generator().manual_seed(0)))\n"
        "print('plotly' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
