"""Figures of results: every kind shows the result's own numbers, in the words of people."""

import math
import re

import pytest
import torch
from conftest import random_model, seeded
from evaluations import DEMONSTRATIONS, PAIRS, made_vector

import fvlens
from fvlens.attribution import attention_patterns, direct_effects, logit_lens
from fvlens.evaluation import layer_scale_sweep
from fvlens.training import VectorSet
from fvlens.vectors import FunctionVector


@pytest.fixture(scope="module")
def found():
    """Results on a random-weight model, by class."""
    model, quiet = random_model(), {"progress": False}
    clean = fvlens.build_prompts(model, DEMONSTRATIONS, n_shots=2, n_prompts=4, generator=seeded(3))
    shuffled = fvlens.build_prompts(
        model, DEMONSTRATIONS, n_shots=2, n_prompts=3, labels="permuted", generator=seeded(1)
    )
    means = fvlens.mean_head_activations(model, clean, **quiet)
    vector, g = made_vector(model), seeded()
    made = [
        fvlens.indirect_effects(model, shuffled, means, **quiet),
        direct_effects(model, shuffled, **quiet),
        attention_patterns(model, shuffled, [(0, 1), (1, 2)], right="query", **quiet),
        logit_lens(model, shuffled, positions=None, k=2, **quiet),
        fvlens.evaluate(model, PAIRS, vector=vector, generator=g),
        fvlens.generate_answers(model, PAIRS, vector=vector, generator=g),
        fvlens.layer_sweep(model, PAIRS, vector, generator=g, **quiet),
        layer_scale_sweep(model, PAIRS, vector, scales=(1, 2), generator=g, **quiet),
    ]
    return {type(one).__name__: one for one in made}


def test_effects_as_bars_have_the_heads_and_their_intervals(found):
    effects = found["IndirectEffects"]
    figure = effects.plot(kind="top", n_top=3)
    shown = [head for head in effects.ranking[:3] if head not in effects.hurting(3)] or effects.ranking[:3]
    assert list(figure.layout.yaxis.ticktext) == list(map(str, shown))
    torch.testing.assert_close(torch.tensor(figure.data[0].x), torch.stack([effects.aie[head] for head in shown]))
    errors = torch.stack([effects.cie[:, h.layer, h.head].std() / len(effects.cie) ** 0.5 for h in shown])
    torch.testing.assert_close(torch.tensor(figure.data[0].error_x.array).float(), 1.96 * errors, rtol=1e-4, atol=1e-6)
    assert "95% interval" in figure.layout.title.subtitle.text and figure.layout.xaxis.title.text == effects.score


def test_effects_on_every_prompt(found):
    effects, direct = found["IndirectEffects"], found["DirectEffects"]
    figure = effects.plot(kind="prompts", n_top=2)
    first = effects.ranking[0]
    own = effects.cie[:, first.layer, first.head]
    torch.testing.assert_close(torch.tensor(figure.data[0].x[: len(own)]), own)
    figure = direct.plot(kind="prompts", n_top=2)
    place = int(direct.mean.abs().argmax())
    own = direct.heads.flatten(1)[:, place]
    torch.testing.assert_close(torch.tensor(figure.data[0].x[: len(own)]), own)
    assert len(figure.layout.yaxis.ticktext) == 2


def test_direct_effects_as_bars_are_the_largest_of_either_sign(found):
    direct = found["DirectEffects"]
    figure = direct.plot(kind="top", n_top=4)
    largest = direct.mean.flatten()[direct.mean.abs().flatten().argsort(descending=True)[:4]]
    torch.testing.assert_close(torch.tensor(figure.data[0].x), largest)
    assert len(set(figure.data[0].marker.color)) == (2 if bool((largest < 0).any() & (largest > 0).any()) else 1)


def test_maps_take_the_end_of_their_scale(found):
    assert found["IndirectEffects"].plot(zmax=0.5).data[0].zmax == 0.5
    assert found["DirectEffects"].plot(zmax=0.25).data[0].zmax == 0.25


def test_attention_of_one_head_from_the_last_token(found):
    patterns = found["AttentionPatterns"]
    figure = patterns.plot(prompt=1, head=patterns.heads[0], full=False)
    real = patterns.groups[1] >= 0
    heights = torch.zeros(int(real.sum()))
    for trace in figure.data:
        heights[list(trace.x)] = torch.tensor(trace.y)
    torch.testing.assert_close(heights, patterns.last[1, 0][real])
    assert float(heights.sum()) == pytest.approx(1, abs=1e-5)
    assert "last token" in {trace.name for trace in figure.data}


def test_what_each_layer_adds_sums_to_the_probability(found):
    lens = found["LogitLens"]
    figure = lens.plot(prompt=0, change=True)
    kept = lens.mask[0]
    torch.testing.assert_close(
        torch.tensor(figure.data[0].z).sum(dim=0), lens.probability[-1, 0][kept], atol=1e-5, rtol=1e-4
    )
    assert list(figure.layout.yaxis.ticktext)[-1] == f"layer {lens.layers[0]}"
    assert "<br>rank " in figure.data[0].hovertext[0][0]


def test_a_map_of_vectors_has_all_of_them_by_category(found):
    mark = found["IndirectEffects"].fingerprint
    angles = [0.0, 0.1, 1.5, 1.6]
    vectors = []
    for name, angle in zip("abcd", angles, strict=True):
        values = torch.zeros(mark.d_model)
        values[:2] = torch.tensor([math.cos(angle), math.sin(angle)]) * (3 if name == "a" else 1)
        vectors.append(FunctionVector(values, 1, (), name, mark))
    figure = VectorSet(tuple(vectors), ("x", "x", "y", "y")).plot(kind="map")
    x, y = figure.data
    places = torch.tensor([[*x.x, *y.x], [*x.y, *y.y]]).T
    # chords of the unit circle: the plane holds them, whatever the lengths are
    chord = [[2 * math.sin(abs(a - b) / 2) for b in angles] for a in angles]
    torch.testing.assert_close(torch.cdist(places, places), torch.tensor(chord), atol=2e-3, rtol=0)
    assert (x.name, y.name) == ("x", "y") and "stress 0.00" in figure.layout.title.subtitle.text
    assert len(VectorSet(tuple(vectors), ("", "", "", "")).plot(kind="map").data) == 1


def test_titles_say_settings_as_people_do(found):
    titles = {name: str(result.plot().layout.title.text) for name, result in found.items()}
    assert not [name for name, title in titles.items() if re.search("[a-z]_[a-z]", title)]
    scored = ("Evaluation", "GeneratedAnswers", "LayerSweep", "LayerScaleSweep")
    assert all("zero-shot" in titles[name] for name in scored)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("IndirectEffects", dict(kind="pie"), "plot: kind='pie'; expected one of 'map', 'top', 'prompts'."),
        ("IndirectEffects", dict(kind="top", zmax=1), "plot: zmax=1 ends the scale of a map, and kind='top' has none"),
        ("DirectEffects", dict(kind="prompts", prompt=0), "plot: prompt=0 is for a map, and kind='prompts' shows all"),
        (
            "AttentionPatterns",
            dict(prompt=0, full=False),
            "plot: full=False is for the pattern of one head; give prompt",
        ),
        ("LogitLens", dict(change=True), "plot: change=True is for the map of one prompt; give prompt=, too."),
    ],
)
def test_what_a_result_does_not_show_is_refused(unchecked, found, name, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        found[name].plot(**options)
