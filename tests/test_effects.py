"""What effects of heads say: rankings, rechecked screens, comparisons with the exact map, tables and figures."""

import dataclasses
import math
import re

import numpy as np
import pytest
import torch
from architectures import FASTEST, build, effects_of, means_of, word_prompts
from conftest import needs_hooked, seeded
from scipy.stats import spearmanr

from fvlens.attribution import IndirectEffects, Recheck
from fvlens.models import fingerprint
from fvlens.types import Head

pytestmark = needs_hooked  # as in test_attribution

# --- the result ---


def made_by_hand(tiny, cie, **changes):
    """An IndirectEffects with given numbers."""
    fields = dict(
        cie=cie, baseline=torch.linspace(0.1, 0.2, len(cie)), path="weights", method="exact", positions="last",
        answer="first", complete=True, relation="antonym", labels="permuted", template="qa", n_shots=10,
        data_hash="0" * 16, fingerprint=fingerprint(tiny),
    )  # fmt: skip
    return IndirectEffects(**{**fields, **changes})


def test_mean_and_standard_error_equal_numpy(tiny, generator):
    cie = torch.randn(7, 3, 4, generator=generator)
    got = made_by_hand(tiny, cie)
    np.testing.assert_allclose(got.aie, cie.numpy().mean(axis=0), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(got.stderr, cie.numpy().std(axis=0, ddof=1) / np.sqrt(7), rtol=1e-5)
    alone = made_by_hand(tiny, cie[:1])
    assert alone.stderr.isnan().all()
    assert torch.equal(alone.aie, cie[0])


def test_top_is_by_effect_and_ties_keep_their_order(tiny):
    aie = torch.tensor([[0.0, 0.5, -0.9, 0.2], [0.5, 0.1, 0.2, 0.7], [0.2, -0.1, 0.5, 0.0]])
    got = made_by_hand(tiny, torch.stack([aie + 1, aie - 1]))
    best = [Head(1, 3), Head(0, 1), Head(1, 0), Head(2, 2), Head(0, 3), Head(1, 2), Head(2, 0), Head(1, 1)]
    assert got.top(8) == best
    assert got.top(1) == best[:1]
    assert len(set(got.ranking)) == 12
    assert got.ranking[:8] == best
    assert got.ranking[-2:] == [Head(2, 1), Head(0, 2)]
    assert all(isinstance(head, Head) for head in got.top(3))


def test_heads_that_are_known_to_hurt_are_announced_or_left_out(tiny):
    aie = torch.tensor([[0.0, 0.5, -0.9, 0.2], [0.5, 0.1, 0.2, 0.7], [0.2, -0.1, 0.5, 0.0]])
    got = made_by_hand(tiny, torch.stack([aie + 1, aie - 1]))  # eight heads help
    assert got.caution(8) == "" and got.hurting(8) == []
    assert got.top(8, helping=True) == got.top(8)
    said = (
        "2 of the 10 best heads have an exact AIE of 0 or less (L0H0, L2H3), as only 8 heads have a positive one; take "
        "fewer heads, or only those that help, with top(10, helping=True)."
    )
    with pytest.warns(UserWarning, match=f"^{re.escape(f'top: {said}')}$"):
        assert got.top(10) == got.ranking[:10]
    assert got.caution(10) == said
    assert got.hurting(10) == [Head(0, 0), Head(2, 3)] == got.ranking[8:10]
    assert got.hurting(12) == [Head(0, 0), Head(2, 3), Head(2, 1), Head(0, 2)]
    assert got.top(12, helping=True) == got.top(8)
    assert got.exact_aie == {head: float(got.aie[head]) for head in got.ranking}

    bad = made_by_hand(tiny, -torch.ones(2, 3, 4))
    assert "(L0H0, L0H1, L0H2, L0H3, L1H0, ...), as only 0 heads have a positive one" in bad.caution(12)
    assert bad.top(12, helping=True) == []


@pytest.mark.parametrize("n", [0, -1, 13])
def test_top_wants_a_possible_number(tiny, n):
    with pytest.raises(ValueError, match=re.escape(f"top: expected n between 1 and 12 (all heads), got {n}.")):
        made_by_hand(tiny, torch.zeros(2, 3, 4)).top(n)
    with pytest.raises(ValueError, match=re.escape(f"hurting: expected n between 1 and 12 (all heads), got {n}.")):
        made_by_hand(tiny, torch.zeros(2, 3, 4)).caution(n)


def test_dataframe_holds_every_number_at_its_place(tiny, generator):
    got = made_by_hand(tiny, torch.randn(5, 3, 4, generator=generator))
    frame = got.to_dataframe()
    assert list(frame.columns) == ["prompt", "layer", "head", "cie", "baseline"]
    assert len(frame) == 60
    assert not frame.duplicated(["prompt", "layer", "head"]).any()
    for row in frame.itertuples():
        assert row.cie == got.cie[row.prompt, row.layer, row.head].item()
        assert row.baseline == got.baseline[row.prompt].item()


def test_plot_shows_the_map(tiny, generator):
    got = made_by_hand(tiny, torch.randn(5, 3, 4, generator=generator))
    figure = got.plot(n_top=3)
    heatmap = figure.data[0]
    np.testing.assert_allclose(np.array(heatmap.z), got.aie.numpy(), rtol=1e-6)
    assert -heatmap.zmin == heatmap.zmax == pytest.approx(got.aie.abs().max().item())
    outlined = [Head(round(shape.y0 + 0.5), round(shape.x0 + 0.5)) for shape in figure.layout.shapes]
    assert outlined == got.top(3)
    for layer in range(3):
        for head in range(4):
            text = heatmap.hovertext[layer][head]
            assert text.startswith(f"L{layer}H{head}")
            assert f"AIE: {got.aie[layer, head]:+.4g}" in text
            assert f"{got.stderr[layer, head]:.2g}" in text
    title = figure.layout.title.text
    assert "antonym" in title
    assert "permuted labels, 5 prompts" in title
    n_helping = int((got.aie > 0).sum())
    everything = got.plot(n_top=100)  # no more than there are, and none that does not help
    outlined = [Head(round(shape.y0 + 0.5), round(shape.x0 + 0.5)) for shape in everything.layout.shapes]
    assert 0 < n_helping < 12 and outlined == got.ranking[:n_helping]
    assert f"{12 - n_helping} of the 12 best do not help" in everything.layout.title.text.replace("<br>", " ")
    assert "do not help" not in title
    assert "custom pairs" in made_by_hand(tiny, got.cie, relation="").plot().layout.title.text
    assert "nan" not in "".join(made_by_hand(tiny, got.cie[:1]).plot().layout.title.text)


# --- screens: recheck and comparison ---


@pytest.mark.parametrize(("name", "path"), [("gpt2", None), ("gpt2", "kv"), ("gpt2", "naive"), ("alibi", None)])
@pytest.mark.parametrize("method", ["atp", "ig", "lrp"])
def test_a_recheck_equals_the_exact_effects(generator, name, path, method):
    model = build(name, dtype=torch.float64)  # so that fewer heads at once are no other rounding
    prompts = word_prompts(model, generator, n_shots=2, n_prompts=4)
    means = means_of(model, prompts, stretch=3)
    exact = effects_of(model, prompts, means, path=path)
    screen = effects_of(model, prompts, means, method=method, recheck=5, path=path)
    alone = effects_of(model, prompts, means, method=method, path=path)
    again = screen.recheck
    assert again.heads == tuple(alone.ranking[:5])  # the best of the screen, best first
    assert alone.recheck is None
    assert torch.equal(screen.cie, alone.cie)
    assert again.path == exact.path == {None: FASTEST[name]}.get(path, path)
    for i, (layer, head) in enumerate(again.heads):
        torch.testing.assert_close(again.cie[:, i], exact.cie[:, layer, head], rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(again.aie[i], exact.aie[layer, head], rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(again.stderr[i], exact.stderr[layer, head], rtol=1e-4, atol=1e-7)
    best = sorted(again.heads, key=lambda head: -exact.aie[head])
    others = [head for head in alone.ranking if head not in best]
    n_helping = sum(float(exact.aie[head]) > 0 for head in best)
    assert screen.ranking == best[:n_helping] + others + best[n_helping:]
    everything = effects_of(model, prompts, means, method=method, recheck=12, path=path)
    assert everything.ranking == exact.ranking


def test_a_naive_recheck_is_announced(generator, models):
    model = models("shortformer")
    prompts = word_prompts(model, generator, n_shots=1, n_prompts=2)
    means = means_of(model, prompts)
    assert effects_of(model, prompts, means, method="atp").path == "naive"  # two passes: nothing to announce
    with pytest.warns(UserWarning, match="takes the naive path, one forward pass a head"):
        got = effects_of(model, prompts, means, method="atp", recheck=2)
    assert got.recheck.path == "naive"


def screened_by_hand(tiny, aie, heads, exact, **changes):
    """A screen with given average scores and rechecked heads."""
    spread = torch.tensor([0.1, -0.1])
    again = Recheck(tuple(Head(*head) for head in heads), torch.tensor(exact)[None] + spread[:, None], "kv")
    return made_by_hand(tiny, aie + spread[:, None, None], recheck=again, **{"method": "atp", **changes})


SCORES = torch.tensor([[0.9, 0.8, 0.7, 0.6], [0.5, 0.4, 0.3, 0.2], [0.1, 0.0, -0.1, -0.2]])


def test_top_puts_rechecked_heads_first_and_those_that_hurt_last(tiny):
    got = screened_by_hand(tiny, SCORES, [(0, 0), (0, 1), (0, 2), (0, 3)], [0.01, -0.5, 0.3, 0.0])
    assert got.top(2) == [Head(0, 2), Head(0, 0)]
    assert got.top(5) == [Head(0, 2), Head(0, 0), Head(1, 0), Head(1, 1), Head(1, 2)]
    assert got.top(10) == got.ranking[:10]  # what is not known to hurt needs no warning
    assert got.ranking[-3:] == [Head(2, 3), Head(0, 3), Head(0, 1)]
    assert got.hurting(11) == [Head(0, 3)] and got.hurting(12) == [Head(0, 3), Head(0, 1)]
    said = r"top: 2 of the 12 best heads .* \(L0H3, L0H1\), as only 2 rechecked heads have a positive one"
    with pytest.warns(UserWarning, match=said):
        assert got.top(12) == got.ranking
    assert got.top(12, helping=True) == [Head(0, 2), Head(0, 0)]
    assert got.top(1, helping=True) == [Head(0, 2)]
    torch.testing.assert_close(got.aie, SCORES)


def test_a_screen_alone_knows_of_no_head_that_helps(tiny):
    got = made_by_hand(tiny, SCORES[None] - 1, method="ig", n_steps=8)
    assert got.top(12) == got.ranking and got.caution(12) == "" and got.exact_aie == {}
    said = "top: helping=True needs exact effects, and method='ig' has none; give indirect_effects(..., recheck=3)"
    with pytest.raises(ValueError, match=re.escape(said)):
        got.top(3, helping=True)


def test_quality_of_the_rechecked_heads(tiny):
    heads = [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0)]
    exact = [0.3, 0.5, 0.1, 0.2, 0.05]
    got = screened_by_hand(tiny, SCORES, heads, exact).quality
    assert got.spearman == pytest.approx(spearmanr([0.9, 0.8, 0.7, 0.6, 0.5], exact).statistic)
    assert (got.overlap, got.k, got.n_heads) == (1.0, 2, 5)
    assert (got.interval, got.overlap_rechecked) == (None, None)
    assert screened_by_hand(tiny, SCORES, heads[:1], exact[:1]).quality is None
    assert math.isnan(screened_by_hand(tiny, SCORES, heads, [0.0] * 5).quality.spearman)
    assert made_by_hand(tiny, SCORES[None]).quality is None


def test_comparison_with_the_exact_map(tiny, generator):
    exact = made_by_hand(tiny, torch.randn(8, 3, 4, generator=generator))
    screen = made_by_hand(tiny, exact.cie + torch.randn(8, 3, 4, generator=generator), method="ig", n_steps=8)
    got = screen.compare(exact, k=4)
    ours, theirs = screen.aie.flatten().numpy(), exact.aie.flatten().numpy()
    assert got.spearman == pytest.approx(spearmanr(ours, theirs).statistic)
    shared = set(np.argsort(-ours)[:4].tolist()) & set(np.argsort(-theirs)[:4].tolist())
    assert 0 < len(shared) < 4
    assert (got.overlap, got.k, got.n_heads, got.interval) == (len(shared) / 4, 4, 12, None)
    assert got.overlap_rechecked is None
    assert screen.compare(exact, k=100).k == 12

    best = screen.top(6)
    again = Recheck(tuple(best), torch.stack([exact.cie[(slice(None), *head)] for head in best], dim=1), "kv")
    rechecked = dataclasses.replace(screen, recheck=again).compare(exact, k=4)
    kept = set(sorted(best, key=lambda head: -exact.aie[head])[:4]) & set(exact.top(4))
    assert rechecked.overlap_rechecked == len(kept) / 4 > rechecked.overlap == got.overlap

    spans = [screen.compare(exact, n_resamples=400, generator=seeded(s)).interval for s in (1, 1, 2)]
    assert spans[0] == spans[1] != spans[2]
    rng = np.random.default_rng(0)
    found = []
    for _ in range(400):
        rows = rng.integers(8, size=8)
        ends = screen.cie.numpy()[rows].mean(axis=0), exact.cie.numpy()[rows].mean(axis=0)
        found.append(spearmanr(ends[0].ravel(), ends[1].ravel()).statistic)
    assert spans[0].low == pytest.approx(np.quantile(found, 0.025), abs=0.08)
    assert spans[0].high == pytest.approx(np.quantile(found, 0.975), abs=0.08)
    assert spans[0].level == 0.95


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(method="atp"), "compare: expected effects by method='exact', got method='atp'."),
        (dict(data_hash="1" * 16), f"something else (data_hash: {'0' * 16} / {'1' * 16}); compute both from the same"),
        (dict(means_hash="ab"), "something else (means_hash:  / ab); compute both"),
        (dict(positions="query"), "something else (positions: last / query); compute both"),
        (dict(answer="whole"), "something else (answer: first / whole); compute both"),
        (dict(complete=False), "something else (complete: True / False); compute both"),
        (dict(cie=torch.zeros(3, 3, 4)), "something else (shape: (2, 3, 4) / (3, 3, 4)); compute both"),
    ],
)
def test_comparison_with_something_else_is_refused(tiny, changes, message):
    screen = made_by_hand(tiny, torch.zeros(2, 3, 4), method="atp")
    fields = dict(cie=torch.zeros(2, 3, 4)) | changes
    with pytest.raises(ValueError, match=re.escape(message)):
        screen.compare(made_by_hand(tiny, fields.pop("cie"), **fields))


def test_comparison_with_another_model_is_refused(tiny):
    other = dataclasses.replace(fingerprint(tiny), weights="f" * 16)
    with pytest.raises(ValueError, match=re.escape("the exact effects are of something else (weights: ")):
        made_by_hand(tiny, torch.zeros(2, 3, 4)).compare(made_by_hand(tiny, torch.zeros(2, 3, 4), fingerprint=other))


@pytest.mark.parametrize("bad", [dict(k=0), dict(n_resamples=0), dict(level=1.0)])
def test_comparison_wants_possible_settings(tiny, bad):
    effects = made_by_hand(tiny, torch.zeros(2, 3, 4))
    with pytest.raises(
        ValueError, match="compare: expected k >= 1, n_resamples >= 1 and a level between 0 and 1, got k="
    ):
        effects.compare(effects, **bad)


def test_screens_say_what_they_are(models, generator):
    model = models("gpt2")
    prompts = word_prompts(model, generator, n_shots=2, n_prompts=3)
    means = means_of(model, prompts, stretch=2)
    short = {"exact": "AIE", "atp": "AtP", "ig": "IG", "lrp": "LRP relevance"}
    titles = {
        "exact": "Average indirect effect, ", "atp": "Attribution patching, ", "ig": "Integrated gradients, ",
        "lrp": "Attention relevance (LRP, in logits), ",
    }  # fmt: skip
    for method, name in short.items():
        got = effects_of(model, prompts, means, method=method)
        assert (got.method, got.score) == (method, name)
        assert got.unit == ("logits" if method == "lrp" else "probability")
        assert got.n_steps == (8 if method == "ig" else None)
        assert got.means_hash == means.data_hash
        assert ("AttnLRP rules" in got.note) == (method == "lrp")
        assert (got.cie >= 0).all() == (method == "lrp")
        figure = got.plot(n_top=2)
        assert figure.layout.title.text.startswith(titles[method])
        assert figure.data[0].colorbar.title.text == name
        assert f"{name}: {got.aie[1, 2]:+.4g}" in figure.data[0].hovertext[1][2]


def test_a_recheck_is_in_the_table_and_in_the_figure(tiny):
    got = screened_by_hand(tiny, SCORES, [(0, 0), (0, 1), (0, 2)], [0.01, -0.5, 0.3])
    frame = got.to_dataframe()
    assert list(frame.columns) == ["prompt", "layer", "head", "cie", "baseline", "exact_cie"]
    for row in frame.itertuples():
        head = Head(row.layer, row.head)
        if head in got.recheck.heads:
            assert row.exact_cie == got.recheck.cie[row.prompt, got.recheck.heads.index(head)].item()
        else:
            assert math.isnan(row.exact_cie)
    figure = got.plot(n_top=3)
    text = figure.data[0].hovertext
    assert text[0][1].endswith("exact AIE: -0.5")
    assert text[0][3].endswith("not rechecked")
    outlined = [Head(round(shape.y0 + 0.5), round(shape.x0 + 0.5)) for shape in figure.layout.shapes]
    assert outlined == [Head(0, 2), Head(0, 0), Head(0, 3)]
    every = got.plot(n_top=12)
    assert len(every.layout.shapes) == 11 and "1 of the 12 best do not help" in every.layout.title.text.replace(
        "<br>", " "
    )
    assert "top heads (rechecked exactly first)" in figure.to_json()
