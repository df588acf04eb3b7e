"""Gates: their signals, their fits, their files, and what they protect."""

import dataclasses
import functools
import math

import numpy as np
import pytest
import torch
from conftest import seeded
from scipy.optimize import minimize

from composition.whole_passes import NAMES, naive_log_prob
from fvlens.composition import (
    SIGNALS,
    CompositeMap,
    Gate,
    evaluate_analogies,
    fit_gate,
    gate_signals,
    library_analogies,
    source_scores,
)
from fvlens.composition._gate import GATE_FORMAT
from fvlens.files import read_tensors, write_tensors
from fvlens.prompts import render_prompts


def test_a_gate_comes_back_from_its_file(tiny, fitted, for_gate, tmp_path, unchecked):
    gate = fit_gate(tiny, fitted, for_gate, kind="threshold", generator=seeded(), progress=False).gate("one_shot")
    file = gate.save(tmp_path / "gate.safetensors")
    assert Gate.load(file) == gate
    with pytest.raises(ValueError, match="expected 'fvlens-gate-1'"):
        Gate.load(fitted.save(tmp_path / "map.safetensors"))
    _, header = read_tensors(file, GATE_FORMAT)
    for change, told in [
        (dict(signals=["entropy"]), "expected slopes of entropy, source gain, .*, got those of"),
        (dict(slopes=[1.0]), "Gate: expected 7 slopes"),
        (dict(kind="open"), "Gate: kind='open'"),
        (dict(slopes=None), "slopes: expected a list, got None"),
    ]:
        write_tensors(file, {"slopes": torch.zeros(1)}, header | change, GATE_FORMAT)
        with pytest.raises(ValueError, match=f"gate.safetensors: damaged gate \\(.*{told}"):
            Gate.load(file)


@pytest.mark.parametrize("setting", ["zero_shot", "one_shot"])
def test_signals_are_those_of_whole_passes(tiny, fitted, for_gate, setting):
    found = gate_signals(tiny, fitted, for_gate, setting=setting)
    assert found.shape == (len(for_gate), len(SIGNALS))
    for one, signals in zip(for_gate[:4], found.tolist(), strict=False):
        values = dict(zip(SIGNALS, signals, strict=True))
        weights = fitted.weights(tiny, one.a, one.b)
        entropy = -sum(w * math.log(w) for w in weights.tolist() if w > 0)
        assert values["entropy"] == pytest.approx(entropy, abs=1e-5)
        vector = fitted.vector_for(tiny, one.a, one.b).vector
        source = one.source_pair
        plain, steered = (naive_log_prob(tiny, source, [], v)[0] for v in (torch.zeros_like(vector), vector))
        assert values["source gain"] == pytest.approx(float(steered - plain), abs=1e-5)
        shown = [source] if setting == "one_shot" else []
        for added, end in ((torch.zeros_like(vector), ""), (vector, ", steered")):
            said = naive_log_prob(tiny, one.target_pair, shown, added)[1].log_softmax(-1).max(-1)
            if not end:
                assert values["confidence"] == pytest.approx(float(said.values), abs=1e-5)
            scores = torch.tensor(
                [
                    float(naive_log_prob(tiny, one.target_pair, [], v.vector)[1].log_softmax(-1)[said.indices])
                    for v in fitted.basis
                ]
            )
            others = (fitted.matrix @ scores + fitted.shift).softmax(-1)
            assert values["same relation" + end] == pytest.approx(math.log(float(weights @ others)), abs=1e-4)
            mixed = others @ fitted.basis.matrix
            cosine = float(mixed @ vector / mixed.norm() / vector.norm())
            assert values["likeness" + end] == pytest.approx(cosine, abs=1e-5)


def test_a_right_answer_is_likelier_to_look_like_its_source(model, real):
    """What the gate checks answers by: on the embedded model, right answers are more alike than wrong ones."""
    composite, asked = real[0], library_analogies("valid", n=60, names=NAMES, generator=seeded(2))
    options = dict(settings=["one_shot"], controls=[], allow_leak=True, generator=seeded(), progress=False)
    right = evaluate_analogies(model, asked, composite, **options)["unsteered, one-shot"].right
    same = gate_signals(model, composite, asked)[:, SIGNALS.index("same relation")]
    assert 0 < int(right.sum()) < len(asked)
    assert same[right].mean() > same[~right].mean()


def test_sources_of_a_gate_can_be_given(tiny, fitted, for_gate):
    sources = source_scores(tiny, fitted.basis, [one.source_pair for one in for_gate])
    assert torch.equal(gate_signals(tiny, fitted, for_gate, sources=sources), gate_signals(tiny, fitted, for_gate))
    options = dict(generator=seeded(), progress=False)
    assert fit_gate(tiny, fitted, for_gate, sources=sources, **options) == fit_gate(tiny, fitted, for_gate, **options)
    for name, call in (("gate_signals", gate_signals), ("fit_gate", functools.partial(fit_gate, generator=seeded()))):
        with pytest.raises(ValueError, match=f"{name}: expected sources of 3 analogies under 5 vectors, got"):
            call(tiny, fitted, for_gate[:3], sources=sources)


def test_signals_do_not_know_the_answer(tiny, fitted, for_gate):
    others = [dataclasses.replace(one, d="other", foils=(), alternatives=()) for one in for_gate]
    assert torch.equal(gate_signals(tiny, fitted, for_gate), gate_signals(tiny, fitted, others))


def test_a_learned_gate_lowers_the_loss_of_its_own_formula(tiny, fitted, for_gate):
    """The loss of the fitted gate is below that of every constant factor between never and always."""
    options = dict(kind="learned", l2=0.0, epochs=60, batch_size=100, progress=False)
    gate = fit_gate(tiny, fitted, for_gate, generator=seeded(), **options).gate("one_shot")

    def loss(factors):
        total = 0.0
        for one, factor in zip(for_gate, factors, strict=True):
            vector = float(factor) * fitted.vector_for(tiny, one.a, one.b).vector
            prompts = render_prompts(tiny, [one.target_pair], [[one.source_pair]], n_shots=1)
            total -= float(naive_log_prob(tiny, one.target_pair, [one.source_pair], vector)[0]) * int(
                prompts.answer_mask.sum()
            )
        return total / len(for_gate)

    fitted_loss = loss(gate.strength(gate_signals(tiny, fitted, for_gate)))
    assert all(fitted_loss < loss([constant] * len(for_gate)) for constant in (0.0, 0.25, 0.5, 0.75, 1.0))


def test_a_threshold_gate_is_the_best_single_cut(tiny, fitted, for_gate):
    gate = fit_gate(tiny, fitted, for_gate, kind="threshold", generator=seeded(), progress=False).gate("one_shot")
    signals = gate_signals(tiny, fitted, for_gate)
    ungated = evaluate_analogies(
        tiny, for_gate, fitted, settings=["one_shot"], controls=[], generator=seeded(), progress=False
    )
    plain, steered = ungated["unsteered, one-shot"].ranks == 0, ungated["composite, one-shot"].ranks == 0
    opened = gate.strength(signals) > 0
    best = 0
    for which in range(len(SIGNALS)):
        for cut in [-math.inf, *signals[:, which].tolist()]:
            for chosen in (signals[:, which] > cut, signals[:, which] <= cut):
                best = max(best, int(torch.where(chosen, steered, plain).sum()))
    assert int(torch.where(opened, steered, plain).sum()) == best


def test_a_threshold_by_hand():
    from fvlens.composition._fit_gate import _threshold

    signals = torch.zeros(4, len(SIGNALS))
    signals[:, 1:3] = torch.tensor([[1.0, 5.0], [2.0, 1.0], [3.0, 4.0], [4.0, 2.0]])
    plain, steered = torch.tensor([True, True, False, False]), torch.tensor([False, True, True, True])
    nothing = torch.zeros(4, dtype=torch.bool)
    gate = _threshold(signals, plain, steered, nothing, "one_shot")
    assert gate.slopes == (0.0, 1.0, *[0.0] * 5) and gate.offset == -2.5
    assert gate.strength(signals).tolist() == [0, 0, 1, 1]
    assert gate.describe() == "1 where +1 source gain -2.5 > 0, else 0"
    never = _threshold(signals, plain, nothing, nothing, "one_shot")
    assert never.strength(signals).tolist() == [0, 0, 0, 0]
    # a cut that loses near analogies does not count
    lost = torch.tensor([False, False, True, True])
    open_to_all = _threshold(signals, nothing, lost, nothing, "one_shot")
    assert open_to_all.strength(signals).tolist() == [0, 0, 1, 1]
    only = signals[:, [2] * len(SIGNALS)]
    protected = _threshold(only, plain, lost, torch.tensor([False, True, False, False]), "one_shot")
    assert protected.strength(only)[1] == 0


def test_a_logistic_gate_is_the_regression_of_its_own_formula():
    """Against scipy on the formula in the docstring, and against what it is for."""
    from fvlens.composition._fit_gate import _logistic

    g = seeded(8)
    signals = torch.randn(60, len(SIGNALS), generator=g, dtype=torch.float64) * torch.arange(1, 8) + 3
    plain = torch.rand(60, generator=g) < 0.5
    steered = torch.where(torch.rand(60, generator=g) < 0.8, signals[:, 4] > 3, plain)
    near = torch.rand(60, generator=g) < 0.4
    standard = ((signals - signals.mean(0)) / signals.std(0, correction=0)).numpy()
    changed = [i for i in range(60) if plain[i] != steered[i]]

    def loss(parameters):
        total = 0.0
        for i in changed:
            value = standard[i] @ parameters[:-1] + parameters[-1]
            total += (5 if near[i] else 1) * np.logaddexp(0, -value if steered[i] else value)
        return total / len(changed) + 0.01 * np.square(parameters[:-1]).sum()

    best = minimize(loss, np.zeros(len(SIGNALS) + 1), method="BFGS", options={"gtol": 1e-8}).x
    gate = _logistic(signals, plain, steered, near, "one_shot")
    value = signals @ torch.tensor(gate.slopes, dtype=torch.float64) + gate.offset
    assert value.numpy() == pytest.approx(standard @ best[:-1] + best[-1], abs=1e-4)
    assert gate.kind == "logistic" and gate.strength(signals).tolist() == (value > 0).double().tolist()
    assert int(torch.where(value > 0, steered, plain).sum()) > max(int(plain.sum()), int(steered.sum()))
    # what a near analogy counts keeps the gate from opening
    harmed = _logistic(signals, plain, steered, near & ~steered, "one_shot").strength(signals)
    assert harmed.sum() < _logistic(signals, plain, steered, near & False, "one_shot").strength(signals).sum()
    for helps, opened in ((torch.ones_like(plain), 60), (torch.zeros_like(plain), 0), (plain, 0)):
        constant = _logistic(signals, plain, helps, near, "one_shot")
        assert int(constant.strength(signals).sum()) == opened and set(constant.slopes) == {0.0}


def test_a_logistic_gate_is_fitted_on_what_steering_changes(model, real):
    """On the embedded model, with a strength that solves some analogies and spoils others."""
    from fvlens.composition._fit_gate import _logistic

    strong = dataclasses.replace(real[0], strength=4.0)
    asked = library_analogies("valid", n=80, names=NAMES, generator=seeded(2))
    found = evaluate_analogies(
        model, asked, strong, settings=["one_shot"], controls=[], allow_leak=True, generator=seeded(), progress=False
    )
    plain, steered = (found[f"{way}, one-shot"].ranks == 0 for way in ("unsteered", "composite"))
    assert bool((plain & ~steered).any()) and bool((steered & ~plain).any())
    signals = gate_signals(model, strong, asked)
    for protect in (True, False):
        near = torch.tensor([protect and one.kind == "near" for one in asked])
        gate = fit_gate(model, strong, asked, protect=protect, generator=seeded(), progress=False).gates[0]
        wanted = _logistic(signals, plain, steered, near, "one_shot")
        assert gate.kind == "logistic" and gate.slopes == pytest.approx(wanted.slopes, rel=1e-4, abs=1e-4)
        assert gate.offset == pytest.approx(wanted.offset, rel=1e-4)


def test_near_analogies_limit_a_learned_gate(model, real):
    """A vector that does harm: half of it loses near analogies, the protected gate none."""
    harmful = dataclasses.replace(real[0], strength=-4.0)
    asked = library_analogies("valid", n=60, names=NAMES, generator=seeded(2))
    options = dict(kind="learned", epochs=0, generator=seeded(), progress=False)

    def near(composite):
        found = evaluate_analogies(
            model, asked, composite, settings=["one_shot"], controls=[], allow_leak=True, generator=seeded(),
            progress=False,
        )  # fmt: skip
        return [found.top1(f"{way}, one-shot", kind="near") for way in ("unsteered", "gated composite")]

    free = fit_gate(model, harmful, asked, protect=False, **options)
    assert (free.gates[0].slopes, free.gates[0].offset) == ((0.0,) * len(SIGNALS), 0.0)
    plain, lost = near(free)
    assert lost < plain
    protected = fit_gate(model, harmful, asked, **options)
    plain, kept = near(protected)
    assert kept >= plain and protected.gates[0].offset < 0
    one_less = dataclasses.replace(protected.gates[0], offset=protected.gates[0].offset + 0.25)
    assert near(harmful.with_gate(one_less))[1] < plain
    only_far = [one for one in asked if one.kind == "far"]
    assert fit_gate(model, harmful, only_far, **options).gates[0].offset == 0


def test_a_gate_is_scored_kept_and_known_to_the_leak_check(tiny, fitted, for_gate, test_set, tmp_path):
    half = Gate("learned", (0.0,) * len(SIGNALS), 0.0, "one_shot")
    gated = fitted.with_gate(half, for_gate)
    found = evaluate_analogies(tiny, test_set, gated, controls=["uniform"], generator=seeded(), progress=False)
    assert "gated composite, one-shot" in found.scored and "gated composite, zero-shot" not in found.scored
    one = test_set[0]
    vector = 0.5 * fitted.vector_for(tiny, one.a, one.b).vector
    wanted = naive_log_prob(tiny, one.target_pair, [one.source_pair], vector)[0]
    assert found["gated composite, one-shot"].log_probs[0].item() == pytest.approx(float(wanted), abs=1e-5)
    again = CompositeMap.load(gated.save(tmp_path / "gated.safetensors"))
    assert again.gates == (half,)
    with pytest.raises(ValueError, match="took part in making the composite"):
        evaluate_analogies(tiny, for_gate, gated, generator=seeded(), progress=False)
    never = Gate("threshold", (0.0,) * len(SIGNALS), -1.0, "one_shot")
    assert gated.with_gate(never).gates == (never,)


def test_bad_gates_are_refused(tiny, fitted, for_gate, unchecked):
    with pytest.raises(ValueError, match="kind='soft'; expected one of logistic, threshold, learned"):
        fit_gate(tiny, fitted, for_gate, kind="soft", generator=seeded())
    with pytest.raises(ValueError, match="setting='two_shot'; expected one of zero_shot, one_shot"):
        fit_gate(tiny, fitted, for_gate, setting="two_shot", generator=seeded())
    with pytest.raises(ValueError, match="fit_gate: expected at least one analogy, got none"):
        fit_gate(tiny, fitted, [], generator=seeded())
    with pytest.raises(ValueError, match="expected batch_size of at least 1, got 0"):
        fit_gate(tiny, fitted, for_gate, batch_size=0, generator=seeded())
    with pytest.raises(ValueError, match=r"fit_gate: expected lr over 0, or None for the default, got 0\.0"):
        fit_gate(tiny, fitted, for_gate, lr=0.0, generator=seeded())
    with pytest.raises(ValueError, match="gate_signals: setting='two_shot'; expected one of"):
        gate_signals(tiny, fitted, for_gate, setting="two_shot")
    with pytest.raises(ValueError, match="gate_signals: expected at least one analogy"):
        gate_signals(tiny, fitted, [])
    with pytest.raises(ValueError, match="Gate: kind='soft'; expected one of"):
        Gate("soft", (0.0,) * len(SIGNALS), 0.0, "one_shot")
    with pytest.raises(ValueError, match=r"expected 7 slopes \(entropy, source gain, confidence, .*\), got 1"):
        Gate("learned", (0.0,), 0.0, "one_shot")
    two = Gate("learned", (0.0,) * len(SIGNALS), 0.0, "one_shot")
    with pytest.raises(ValueError, match="expected one gate a setting, got gates for one_shot, one_shot"):
        dataclasses.replace(fitted, gates=(two, two))
