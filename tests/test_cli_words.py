"""What the command line says of itself: first steps, version, completion, and the words that it explains."""

import importlib.metadata
import re

import pytest
from commands import process

from fvlens import cli
from fvlens.cli._glossary import _LISTED, GLOSSARY, OF_COMMANDS, term
from fvlens.composition._gate import GATES
from fvlens.composition._map import MAPS
from fvlens.prompts import LABELS
from fvlens.screens import SCREENS


def flat(text):
    return " ".join(text.split())


def test_without_arguments_it_says_what_to_do_first(call, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    code, out, err = call()
    assert (code, err) == (0, "")
    commands = re.findall(r"^  (fvlens .*)$", out, re.MULTILINE)
    assert [line.split()[1] for line in commands] == ["run", "relations", "run"]
    assert max(map(len, out.splitlines())) <= 80
    assert call("--debug") == (code, out, err)
    for line in commands:  # each is a command with these options
        assert call(*line.split()[1:3], "--help")[0] == 0


def test_the_version_is_that_of_the_package(call):
    code, out, err = call("--version")
    assert (code, err) == (0, "")
    of = importlib.metadata.version
    assert out.startswith(f"fvlens {of('fvlens')} (Python 3.")
    assert out.endswith(
        f"torch {of('torch')}, TransformerLens {of('transformer-lens')}, transformers {of('transformers')})\n"
    )


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("rela", ["relations"]),
        ("run country-cu", ["country-currency"]),
        ("explain comp", ["composite"]),
        ("study lay", ["layer"]),
        ("heads antonym --labels perm", ["permuted"]),
        ("heads antonym --model smol", ["smollm2-135m"]),
        ("heads antonym --template co", ["colon"]),
    ],
)
def test_words_are_completed(capsys, monkeypatch, line, expected):
    """What a shell asks, as typer's own scripts do."""
    words = ["fvlens", *line.split()]
    for name, value in {"_FVLENS_COMPLETE": "complete_bash", "COMP_WORDS": " ".join(words),
                        "COMP_CWORD": str(len(words) - 1)}.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit):
        cli.main([])
    assert capsys.readouterr().out.split() == expected


def test_completion_is_shown_for_a_shell():
    done = process("--show-completion", "bash", _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1")
    assert done.returncode == 0 and done.stderr == ""
    assert "_FVLENS_COMPLETE=complete_bash" in done.stdout and done.stdout.rstrip().endswith("fvlens")


# --- words ---


def test_terms_are_listed_and_explained(call):
    code, out, err = call("explain")
    assert (code, err) == (0, "")
    for name in "AIE CIE permuted random deranged scale map gate layer top-1 exact composite".split():
        assert re.search(rf"^ {name}  ", out, re.MULTILINE), name
    code, out, err = call("explain", "gate")
    assert (code, err) == (0, "")
    assert out.splitlines()[0] == "gate (threshold, logistic, learned, strength)"
    assert flat(GLOSSARY["gate"].text) in flat(out) and "See also composite, map." in out


def test_other_names_and_spellings_are_understood(call):
    for words in (["aie"], ["average", "indirect", "effect"], ["Average-Indirect_Effect"], ["AIE"]):
        assert call("explain", *words)[1].startswith("AIE (")
    assert term("zero_shot") is term("zero-shot") is GLOSSARY["bare query"]


def test_an_unknown_term_gets_the_nearest(refused):
    assert refused("explain", "gtae").startswith("fvlens: no term 'gtae'; did you mean gate")
    assert refused("explain", "qqqqq") == "fvlens: no term 'qqqqq'; `fvlens explain` lists the terms."


def test_the_glossary_is_whole():
    """One meaning a word, no word that leads nowhere, and every choice of an option explained."""
    assert len(GLOSSARY) == len(_LISTED)
    names = [name.casefold() for one in _LISTED for name in (one.name, *one.also)]
    assert sorted(name for name in names if names.count(name) > 1) == []
    assert [(one.name, other) for one in _LISTED for other in one.see if other not in GLOSSARY] == []
    assert [one.name for one in _LISTED if one.first not in f"{one.text} " or not one.text.endswith(".")] == []
    assert [name for names in OF_COMMANDS.values() for name in names if name not in GLOSSARY] == []
    for name in (*LABELS, *MAPS, *GATES, *SCREENS, "exact"):
        assert term(name).name in GLOSSARY


def test_help_pages_end_with_the_words_they_use(call):
    for command, names in OF_COMMANDS.items():
        line = {"check": ["relations", "check"], "study": ["study", "layer"]}.get(command, [command])
        told = flat(call(*line, "--help")[1])
        for name in names:
            assert flat(f"{name}: {GLOSSARY[name].first}") in told, (command, name)
        assert told.endswith("`fvlens explain TERM` says more.")
