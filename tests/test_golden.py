"""The numbers of ``tests/golden``: what version 0.1 found must be found again, rank by rank."""

import copy
import json

import pytest
from conftest import HAS_HOOKED
from golden.cases import CASES, is_hooked
from golden.files import FOLDER, TOLERANCE, differences, read, rounded, spread
from matrix import BACKENDS

ALL = [(case, group) for case, made in CASES.items() for group in made.groups]


@pytest.fixture(autouse=True)
def _as_in_use(unchecked):
    """Numbers are compared here; shapes are checked by all other tests."""


@pytest.mark.parametrize(("case", "group"), ALL, ids=["/".join(pair) for pair in ALL])
def test_numbers_are_found_again(case, group):
    """Whole numbers, texts and choices exactly; floats to 1e-6, or to what the file says of them."""
    if is_hooked(case, group) and not HAS_HOOKED:
        pytest.skip("HookedTransformer is gone from TransformerLens 4 on")
    recorded = read(case)
    tolerances = recorded["tolerances"].get(group, {})
    found = CASES[case].groups[group]()
    told = differences(f"{case}/{group}", recorded["groups"][group], found, tolerances)
    assert not told, "\n".join([f"{len(told)} numbers are not those recorded:", *told])


def test_files_and_cases_belong_together():
    """A file a case, its groups and options those of the table, small enough to be looked at."""
    files = sorted(FOLDER.glob("*.json"))
    assert [file.stem for file in files] == sorted(CASES)
    assert max(file.stat().st_size for file in files) < 200_000
    assert sum(file.stat().st_size for file in files) < 1_000_000
    for case, made in CASES.items():
        recorded = read(case)
        assert recorded["options"] == json.loads(json.dumps(made.options)), case
        assert list(recorded["groups"]) == list(made.groups), case
        assert all(recorded["groups"].values()), case
        for group, names in recorded["tolerances"].items():
            assert set(names) <= set(recorded["groups"][group]), (case, group)


def test_both_classes_are_recorded_for_every_architecture():
    groups = [set(made.groups) for case, made in CASES.items() if case.startswith("effects-")]
    assert len(groups) == 12
    for names in groups:
        assert {name.partition("-")[0] for name in names} == {"hooked", "bridge"} >= set(BACKENDS)


def test_hooked_and_bridge_were_recorded_with_the_same_effects():
    """Two implementations of one model: the files agree with each other, far beyond what a mistake would leave."""
    for case in CASES:
        if case.startswith("effects-"):
            groups = read(case)["groups"]
            for name in ("cie", "baseline", "label cie", "label baseline"):
                hooked, bridge = groups["hooked-effects"][name], groups["bridge-effects"][name]
                assert max(map(abs, hooked)) > 1e-3
                assert hooked == pytest.approx(bridge, abs=2e-5), (case, name)


# --- the comparison itself ---

SMALL = {
    "ranks": [0, 3, 12],
    "probabilities": [0.25, 0.5, 0.125],
    "loss": [12.5],
    "words": ["cold", "sad"],
    "cosine": [None, 1.0],
}


def changed(name, place, value):
    got = copy.deepcopy(SMALL)
    got[name][place] = value
    return got


def test_equal_numbers_have_no_differences():
    assert differences("run/x", SMALL, copy.deepcopy(SMALL), {}) == []


@pytest.mark.parametrize(
    ("name", "place", "value"),
    [
        ("ranks", 1, 4),
        ("ranks", 1, 3.0000001),
        ("probabilities", 0, 0.25 + 3e-6),
        ("probabilities", 0, float("nan")),
        ("probabilities", 0, None),
        ("loss", 0, 12.5 + 2e-5),
        ("words", 1, "Sad"),
        ("cosine", 0, 1.0),
    ],
)
def test_a_changed_number_is_told_with_its_place(name, place, value):
    told = differences("run/x", SMALL, changed(name, place, value), {})
    assert told[0].startswith(f"run/x: {name!r}[{place}]: expected {SMALL[name][place]!r}, got {value!r}")


@pytest.mark.parametrize(("name", "place", "value"), [("probabilities", 0, 0.25 + 5e-7), ("loss", 0, 12.5 + 5e-6)])
def test_rounding_is_no_change(name, place, value):
    assert differences("run/x", SMALL, changed(name, place, value), {}) == []


def test_all_differences_are_told():
    got = changed("ranks", 0, 1) | {"probabilities": [0.25, 0.6, 0.2], "words": ["cold"], "more": [1]}
    del got["loss"]
    told = differences("run/x", SMALL, got, {})
    assert told == [
        "run/x: 'loss': expected, but not found",
        "run/x: 'more': found, but not in the file",
        "run/x: 'ranks'[0]: expected 0, got 1",
        "run/x: 'probabilities'[1]: expected 0.5, got 0.6, off by 1.0e-01 (> 1e-06)",
        "run/x: 'probabilities'[2]: expected 0.125, got 0.2, off by 7.5e-02 (> 1e-06)",
        "run/x: 'probabilities': off by 5.8e-02 on average (> 1e-06)",
        "run/x: 'words': expected 2 values, got 1",
    ]


def test_a_tolerance_of_its_own_holds_for_each_number_and_another_for_the_mean():
    one, all_of_them = changed("probabilities", 0, 0.25 + 2.5e-6), copy.deepcopy(SMALL)
    all_of_them["probabilities"] = [value + 2.5e-6 for value in SMALL["probabilities"]]
    own = {"probabilities": [4e-6, TOLERANCE]}
    assert differences("run/x", SMALL, one, own) == []
    assert differences("run/x", SMALL, all_of_them, own) == [
        "run/x: 'probabilities': off by 2.5e-06 on average (> 1e-06)"
    ]


def test_spread_of_two_recordings():
    assert spread([0.5, 0.25, 3], [0.5, 0.25 + 1e-6, 3]) == pytest.approx((1e-6, 5e-7))
    assert spread([1, "a"], [1, "a"]) == (0.0, 0.0)
    assert spread([1, 2], [1, 3]) is None
    assert spread([1.0], [1.0, 2.0]) is None


@pytest.mark.parametrize("case", ["run", "effects-gemma2"])
def test_a_change_in_a_recorded_file_is_noticed(case):
    """Every list of every group of a file: its first number moved by a little."""
    recorded = read(case)
    for group, values in recorded["groups"].items():
        tolerances = recorded["tolerances"].get(group, {})
        assert differences(case, values, copy.deepcopy(values), tolerances) == []
        for name, numbers in values.items():
            first = numbers[0]
            if isinstance(first, float):
                slack = tolerances.get(name, [TOLERANCE])[0]
                other = first + 1.5 * slack * max(1.0, abs(first))
            else:
                other = None if isinstance(first, str) else (first or 0) + 1
            told = differences(case, values, values | {name: [other, *numbers[1:]]}, tolerances)
            assert any(f"{name!r}[0]" in line for line in told), (group, name)


def test_nine_digits_are_kept():
    assert rounded(0.12345678949) == 0.123456789
    assert rounded(3) == 3 and rounded("word") == "word" and rounded(None) is None
