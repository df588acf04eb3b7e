"""The recipe: its steps by hand, the choice of layer and scale by a plain loop, and no look at the test pairs."""

import dataclasses
import itertools
import re

import numpy as np
import pytest
import torch
from conftest import seeded

import fvlens
from fvlens import find, find_vector
from fvlens.evaluation import copied
from fvlens.prompts import Template
from fvlens.relations import Pair, Relation, Split

FEW = dict(n_shots=2, n_prompts=6, n_corrupted=3, n_heads=3, progress=False)
SCALES = (0.5, 1.0, 2.0, 3.0)
SHOUT = Template("shout", "{input}! {output}!\n", "{input}!", prefix="Say\n")


@pytest.fixture(scope="module")
def found(model):
    return find_vector(model, fvlens.load_relation("plural"), generator=seeded(), scales=SCALES, **FEW)


def by_hand(model, split, g, labels="permuted", template="qa", relation="plural"):
    """Means, effects and the sum of the best heads' outputs, by the façade's own steps."""
    common = dict(queries=split.valid, n_shots=2, template=template, relation=relation, generator=g)
    clean = fvlens.build_prompts(model, split.train, n_prompts=6, **common)
    corrupted = fvlens.build_prompts(model, split.train, n_prompts=3, labels=labels, **common)
    means = fvlens.mean_head_activations(model, clean, progress=False)
    effects = fvlens.indirect_effects(model, corrupted, means, progress=False)
    order = np.argsort(-effects.cie.double().mean(dim=0).flatten().numpy(), kind="stable")[:3]
    heads = [divmod(int(i), model.cfg.n_heads) for i in order]
    return (
        means,
        effects,
        heads,
        sum(means.z[head] @ model.blocks[head[0]].attn.W_O[head[1]].detach() for head in heads),
    )


def plain_scores(model, pairs, vector, layer, scale, written="Q:{}\nA:"):
    """Right answers and probabilities, one query after another: text, a whole pass, a vector added by hand."""
    right, chances = [], []
    given = fvlens.FunctionVector(vector, layer, (), "", fvlens.fingerprint(model))
    for pair in pairs:
        ids = model.tokenizer(written.format(f" {pair.input}"), add_special_tokens=False)["input_ids"]
        answer = model.tokenizer(f" {pair.output}", add_special_tokens=False)["input_ids"][0]
        with torch.no_grad(), fvlens.inject(model, given, scale=scale):
            logits = model(torch.tensor([[model.tokenizer.bos_token_id, *ids]]))[0, -1]
        right.append(float(logits.argmax() == answer))
        chances.append(float(logits.softmax(dim=-1)[answer]))
    return float(np.mean(right)), float(np.mean(chances))


def choice(table):
    """The best of (layer, scale) -> (top-1, probability)."""
    return min(table, key=lambda place: (-table[place][0], -table[place][1], abs(place[1] - 1), place[0], place[1]))


# --- the numbers ---


def test_every_step_is_the_facades(model, found):
    g = seeded()
    split = fvlens.load_relation("plural").split(g)
    means, effects, heads, vector = by_hand(model, split, g)
    assert found.split == split
    assert torch.equal(found.means.z, means.z) and torch.equal(found.effects.cie, effects.cie)
    assert (found.effects.labels, found.effects.method, len(found.effects.cie)) == ("permuted", "exact", 3)
    assert [tuple(head) for head in found.heads] == heads
    torch.testing.assert_close(found.unscaled.vector, vector, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.vector.vector, found.scale * vector, rtol=1e-4, atol=1e-5)
    assert found.vector.layer == found.unscaled.layer == found.layer
    assert (found.vector.relation, found.vector.template, found.vector.data_hash) == (
        "plural", means.template, means.data_hash
    )  # fmt: skip


@pytest.mark.parametrize("which, n_seeds", [("model", 1), ("tiny", 2)])
def test_choice_is_that_of_a_plain_loop(request, which, n_seeds):
    """On a dozen validation pairs: the plain loop asks each of them in every cell of the sweep."""
    model = request.getfixturevalue(which)
    for seed in range(n_seeds):
        g = seeded(seed)
        whole = fvlens.load_relation("plural").split(g)
        split = dataclasses.replace(whole, valid=whole.valid[:12])
        recipe = find_vector(model, split, generator=g, scales=SCALES, **FEW)
        table = {
            (layer, scale): plain_scores(model, recipe.split.valid, recipe.unscaled.vector, layer, scale)
            for layer, scale in itertools.product(range(model.cfg.n_layers), SCALES)
        }
        assert (recipe.layer, recipe.scale) == choice(table)
        for (layer, scale), (top1, chance) in table.items():
            one = recipe.sweep.at(layer, scale)
            assert one.top1 == pytest.approx(top1) and one.probability == pytest.approx(chance, abs=1e-5)
            assert (one.vector_layer, one.scale) == (layer, scale)
        assert recipe.valid.probability == pytest.approx(table[choice(table)][1], abs=1e-5)
        at_one = choice({place: scores for place, scores in table.items() if place[1] == 1})
        assert recipe.at_scale_one.probability == pytest.approx(table[at_one][1], abs=1e-5)
        assert recipe.vector_at_scale_one.layer == at_one[0]
        assert torch.equal(recipe.vector_at_scale_one.vector, recipe.unscaled.vector)


def test_whole_passes_find_the_same(tiny):
    pairs = fvlens.load_relation("plural").pairs[:40]
    fast, whole = (find_vector(tiny, pairs, path=path, generator=seeded(), **FEW) for path in (None, "naive"))
    assert (fast.layer, fast.scale, fast.heads) == (whole.layer, whole.scale, whole.heads)
    assert (whole.valid.path, whole.effects.path) == ("naive", "naive") != (fast.valid.path, fast.effects.path)
    torch.testing.assert_close(fast.sweep.probability, whole.sweep.probability, rtol=0, atol=1e-5)
    assert torch.equal(fast.sweep.top1, whole.sweep.top1)


def test_the_vector_has_its_scale_in_it(model, found):
    again = fvlens.evaluate(model, found.split.valid, vector=found.vector, generator=seeded())
    assert torch.equal(again.ranks, found.valid.ranks)
    torch.testing.assert_close(again.probabilities, found.valid.probabilities)
    assert torch.equal(found.vector.vector, (found.scale * found.unscaled).vector)


@pytest.mark.parametrize("labels", ["deranged", "random"])
def test_heads_are_ranked_by_the_one_corruption_that_is_asked_for(model, monkeypatch, labels):
    asked = []
    own = find.indirect_effects

    def watched(model, prompts, *args, **given):
        asked.append(prompts.labels)
        return own(model, prompts, *args, **given)

    monkeypatch.setattr(find, "indirect_effects", watched)
    recipe = find_vector(model, "plural", labels=labels, generator=seeded(), **FEW)
    g = seeded()
    _, effects, heads, _ = by_hand(model, fvlens.load_relation("plural").split(g), g, labels)
    assert asked == [labels] and torch.equal(recipe.effects.cie, effects.cie)
    assert [tuple(head) for head in recipe.heads] == heads


def test_a_template_of_ones_own_travels(model):
    recipe = find_vector(model, "plural", template=SHOUT, scales=(1, 2), generator=seeded(), **FEW)
    g = seeded()
    split = fvlens.load_relation("plural").split(g)
    means, effects, _, _ = by_hand(model, split, g, template=SHOUT)
    assert torch.equal(recipe.means.z, means.z) and torch.equal(recipe.effects.cie, effects.cie)
    assert recipe.vector.template == recipe.means.template == recipe.valid.template == SHOUT
    vector, place = recipe.unscaled.vector, (recipe.layer, recipe.scale)
    _, chance = plain_scores(model, split.valid, vector, *place, written="Say\n{}!")
    assert recipe.valid.probability == pytest.approx(chance, abs=1e-5)
    # and with the means, where none is named
    again = find_vector(model, recipe.split, means=recipe.means, generator=seeded(), **FEW)
    assert again.valid.template == again.effects.template == SHOUT


def test_layers_and_scales_that_are_given(model, found):
    recipe = find_vector(model, "plural", layers=[2], scales=[2], generator=seeded(), **FEW)
    assert (recipe.layer, recipe.scale, recipe.at_scale_one, recipe.vector_at_scale_one) == (2, 2.0, None, None)
    assert torch.equal(recipe.effects.cie, found.effects.cie)
    assert recipe.valid.probability == pytest.approx(found.sweep.at(2, 2).probability, abs=1e-6)
    assert "at scale 1" not in repr(recipe) and "at scale 1 " in repr(found)


def test_given_heads_are_not_ranked(tiny, monkeypatch):
    def never(*args, **given):
        raise AssertionError("heads were ranked")

    monkeypatch.setattr(find, "indirect_effects", never)
    recipe = find_vector(tiny, "plural", heads=[(2, 1), (0, 3)], generator=seeded(), **{**FEW, "n_heads": 10})
    g = seeded()
    means, _, _, _ = by_hand(tiny, fvlens.load_relation("plural").split(g), g)
    assert torch.equal(recipe.means.z, means.z)
    expected = fvlens.function_vector(tiny, means, heads=[(2, 1), (0, 3)], layer=recipe.layer)
    assert torch.equal(recipe.unscaled.vector, expected.vector)
    assert (recipe.effects, recipe.cautions) == (None, ())


def test_means_that_are_there_are_taken(tiny):
    """No clean prompts are drawn: the corrupted ones come first."""
    first = find_vector(tiny, "plural", generator=seeded(), **FEW)
    again = find_vector(tiny, first.split, means=first.means, labels="random", relation="x", generator=seeded(5), **FEW)
    assert again.means is first.means and again.vector.relation == "x"
    corrupted = fvlens.build_prompts(
        tiny, first.split.train, queries=first.split.valid, n_prompts=3, n_shots=2, labels="random", relation="x",
        generator=seeded(5),
    )  # fmt: skip
    assert again.effects.data_hash == corrupted.data_hash


def test_a_screen_is_rechecked(tiny):
    recipe = find_vector(tiny, "plural", method="atp", generator=seeded(), **FEW)
    assert recipe.effects.method == "atp" and len(recipe.effects.recheck.heads) == 6  # twice as many
    assert list(recipe.heads) == recipe.effects.ranking[:3]
    assert find_vector(tiny, "plural", method="atp", recheck=0, generator=seeded(), **FEW).effects.recheck is None
    more = find_vector(tiny, "plural", method="atp", generator=seeded(), **{**FEW, "n_heads": 7})
    assert len(more.effects.recheck.heads) == 12  # all there are


def test_heads_that_do_not_help_are_told_of(model):
    recipe = find_vector(model, "plural", generator=seeded(), **{**FEW, "n_heads": 32})
    assert recipe.cautions == (recipe.effects.caution(32),)
    assert re.match(r"\d+ of the 32 best heads have an exact AIE of 0 or less", recipe.cautions[0])
    assert find_vector(model, "plural", generator=seeded(), **{**FEW, "n_heads": 2}).cautions == ()


# --- the pairs ---


class Unread(Pair):
    """A pair that must not be looked at."""

    __slots__ = ()

    def _never(self, *_):
        raise AssertionError("a test pair was read")

    __getitem__ = __iter__ = __eq__ = __hash__ = _never
    input = output = property(_never)


def test_a_split_is_used_as_it_is_and_its_test_part_by_nobody(tiny, monkeypatch):
    whole = fvlens.load_relation("plural").split(seeded())
    guarded = Split(whole.train, whole.valid, tuple(Unread("a", "b") for _ in whole.test), whole.disjoint)
    with pytest.raises(AssertionError, match="a test pair was read"):
        fvlens.evaluate(tiny, guarded.test, generator=seeded())  # the guard works
    seen = []
    build = find.build_prompts

    def watched(model, pairs, **given):
        made = build(model, pairs, **given)
        seen.append((made, given["queries"]))
        return made

    monkeypatch.setattr(find, "build_prompts", watched)
    recipe = find_vector(tiny, guarded, relation="plural", generator=seeded(), **FEW)
    assert recipe.split is guarded
    assert [made.labels for made, _ in seen] == ["true", "permuted"]
    for made, queries in seen:
        assert queries == whole.valid
        shown = {pair.input for row in made.demonstrations for pair in row}
        assert shown <= {pair.input for pair in whole.train}
    assert recipe.valid.queries == whole.valid
    g = seeded()
    _, effects, _, _ = by_hand(tiny, whole, g)  # nothing is drawn for a split
    assert torch.equal(recipe.effects.cie, effects.cie)


def test_pairs_of_every_kind_give_one_vector(tiny, tmp_path):
    """A relation, its name, its pairs, and files of them."""
    relation = fvlens.load_relation("plural")
    expected = find_vector(tiny, relation, generator=seeded(), **FEW)
    table = tmp_path / "plural.csv"
    table.write_text("input,output\n" + "".join(f"{a},{b}\n" for a, b in relation))
    tabs = tmp_path / "words.tsv"
    tabs.write_text("".join(f"{a}\t{b}\n" for a, b in relation))
    library = tmp_path / "library.tsv"
    keys = ("name", "category", "family", "domain", "direction", "compiled")
    library.write_text("".join(f"# {key}: plural\n" for key in keys) + tabs.read_text())
    for given, name in (
        ("plural", "plural"), ([tuple(pair) for pair in relation], ""), (table, "plural"), (str(tabs), "words"),
        (library, "plural"),
    ):  # fmt: skip
        found = find_vector(tiny, given, generator=seeded(), **FEW)
        assert torch.equal(found.vector.vector, expected.vector.vector), given
        assert (found.vector.relation, found.layer, found.scale) == (name, expected.layer, expected.scale)
    assert find_vector(tiny, table, relation="many", generator=seeded(), **FEW).valid.relation == "many"


# --- randomness ---


def test_same_seed_same_bits_and_the_global_generator_untouched(tiny):
    before = torch.get_rng_state()
    one, two, other = (find_vector(tiny, "plural", generator=seeded(seed), **FEW) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one.vector.vector, two.vector.vector) and one.sweep.intervals == two.sweep.intervals
    assert one.split != other.split and not torch.equal(one.vector.vector, other.vector.vector)
    assert not any(hook.fwd_hooks or hook.bwd_hooks for hook in tiny.hook_dict.values())


def test_intervals_move_nothing_that_is_drawn_later(tiny):
    g, by_steps = seeded(), seeded()
    recipe = find_vector(tiny, "plural", generator=g, **FEW)
    by_hand(tiny, fvlens.load_relation("plural").split(by_steps), by_steps)
    assert torch.equal(g.get_state(), by_steps.get_state())
    alone = fvlens.evaluate(
        tiny, recipe.split.valid, vector=recipe.vector, generator=copied(g)
    )  # as its interval was drawn
    assert alone.interval == recipe.valid.interval


# --- errors and interruption ---


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(labels="true"), "find_vector: labels='true'; expected a corruption, one of permuted, deranged, random."),
        (dict(labels="odd"), "find_vector: labels='odd'; expected a corruption"),
        (dict(n_heads=0), "find_vector: expected n_heads between 1 and 12 (all heads), got 0."),
        (dict(n_heads=13), "find_vector: expected n_heads between 1 and 12 (all heads), got 13."),
        (dict(heads=[(1, 9)]), "head"),
        (dict(heads=[(1, 1)], method="atp"), "find_vector: method='atp' and recheck=None say how to rank heads, but"),
        (dict(heads=[(1, 1)], recheck=3), "find_vector: method='exact' and recheck=3 say how to rank heads, but"),
        (dict(recheck=3), "recheck=3 runs the best heads of a screen again; method='exact' needs none"),
        (dict(layers=[]), "layer_scale_sweep: expected at least one layer, got none."),
        (dict(layers=[3]), "layer_scale_sweep: no vector for layer 3; the model has layers 0..2"),
        (dict(scales=[]), "layer_scale_sweep: expected at least one scale, all finite, got []."),
        (dict(scales=[float("inf")]), "find_vector: scales: expected a list of finite numbers, got [inf]."),
        (dict(template="nosuch"), "nosuch"),
        (dict(path="fast"), "fast"),
    ],
)
def test_bad_settings_are_refused(tiny, unchecked, change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        find_vector(tiny, "plural", generator=seeded(), **{**FEW, **change})


def test_pairs_that_cannot_be_used_are_refused(tiny, tmp_path):
    empty = Split((), (Pair("a", "b"),), (), "both")
    with pytest.raises(ValueError, match="expected a split with train and validation pairs, got 0 and 1"):
        find_vector(tiny, empty, generator=seeded(), **FEW)
    with pytest.raises(ValueError, match="expected a relation of at least 6 pairs, got 1"):
        find_vector(tiny, Relation("r", (Pair("a", "b"),)), generator=seeded(), **FEW)
    with pytest.raises(ValueError, match="find_vector: no file 'plurals', and no relation named 'plurals'"):
        find_vector(tiny, "plurals", generator=seeded(), **FEW)
    with pytest.raises(ValueError, match=r"no file of word pairs at .*none\.csv"):
        find_vector(tiny, str(tmp_path / "none.csv"), generator=seeded(), **FEW)


@pytest.mark.parametrize("part", ["indirect_effects", "layer_scale_sweep"])
def test_an_interrupted_part_is_not_handed_out_as_the_whole(tiny, monkeypatch, part):
    own = getattr(find, part)
    monkeypatch.setattr(find, part, lambda *a, **k: dataclasses.replace(own(*a, **k), complete=False))
    with pytest.raises(KeyboardInterrupt):
        find_vector(tiny, "plural", generator=seeded(), **FEW)


# --- what it looks like ---


def test_table_figure_and_text(found):
    table = found.to_dataframe()
    assert list(table.columns) == [
        "layer", "scale", "top1", "low", "high", "top5", "mean_rank", "probability", "log_probability", "n",
        "exact",
    ]  # fmt: skip
    assert len(table) == 4 * len(SCALES)
    for row in table.to_dict("records"):
        one = found.sweep.at(row["layer"], row["scale"])
        assert (row["top1"], row["low"], row["high"], row["n"]) == (
            one.top1, one.interval.low, one.interval.high, len(found.split.valid)
        )  # fmt: skip
    figure = found.plot()
    lines = {trace.name: list(trace.y) for trace in figure.data if trace.mode and "lines" in trace.mode and trace.name}
    for i, scale in enumerate(SCALES):
        assert lines[f"{scale:g} v"] == pytest.approx(found.sweep.top1[:, i].tolist())
    assert repr(found).startswith(f"Found(plural: 3 heads, layer {found.layer}, scale {found.scale:g}, top1 on ")
