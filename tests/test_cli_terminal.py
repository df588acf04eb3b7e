"""Terminals of few columns and few signs, and files in the place of a terminal."""

import io
import sys

import pytest
import typer
from commands import process

from fvlens import cli
from fvlens.cli._app import say_page
from fvlens.cli._terminal import readable
from fvlens.studies import STUDIES

QUICK = ("--n-prompts", 4, "--n-shots", 2)
RUN = ("run", "antonym", *QUICK, "--n-others", 1, "--n-random", 1, "--epochs", 1, "--n-heads", 3, "--out")
GERMAN = "schön\thässlich\nüber\tunter\ngroß\tklein\nheiß\tkalt\n"


@pytest.fixture
def narrow(call, monkeypatch):
    """Run a command on a terminal of 80 columns; all that it printed but names of files, line by line."""

    def run(*args, code=0):
        monkeypatch.setenv("COLUMNS", "80")
        ended, out, err = call(*args)
        assert ended == code, err
        return [line for line in out.splitlines() if not line.startswith("wrote ")]

    return run


@pytest.mark.parametrize(
    "args",
    [
        ("explain",),
        ("explain", "AIE"),
        ("models", "--filter", "smol"),
        ("relations", "--family", "kind"),
        ("relations", "check", "antonym", "--model", "rel-small"),
        ("study",),
        ("heads", "antonym", *QUICK, "--n-corrupted", 2, "--method", "atp", "--recheck", 3, "--quiet"),
        ("inject", "VECTOR", "hot", "--generate", 3),
    ],
    ids=lambda args: " ".join(map(str, args[:2])),
)
def test_summaries_fit_80_columns(narrow, saved, tmp_path, args):
    lines = narrow(*({"OUT": tmp_path / "out", "VECTOR": saved}.get(part, part) for part in args))
    assert lines
    assert [line for line in lines if len(line) > 80 or "\N{HORIZONTAL ELLIPSIS}" in line] == []


def test_help_pages_fit_80_columns(narrow):
    def commands(app, *before):
        for name, one in app.commands.items():
            yield from commands(one, *before, name) if hasattr(one, "commands") else [(*before, name)]

    tree = typer.main.get_command(cli.app)
    names = [*commands(tree), *(("study", name) for name in STUDIES)]
    assert len(names) > 20
    long = [(name, line) for name in names for line in narrow(*name, "--help") if len(line) > 80]
    assert long == []


def test_wide_tables_of_studies_are_folded(capsys, monkeypatch):
    page = "A line.\n\n| way | " + " | ".join(f"number {i} of many" for i in range(6)) + " |\n" + "| --- " * 7 + "|\n"
    page += "| one | " + " | ".join(["0.123 [0.100, 0.150]"] * 6) + " |\n\nAfter it."
    for console in (cli.out, cli.err):
        monkeypatch.setattr(console, "_width", None)
    monkeypatch.setenv("COLUMNS", "200")
    say_page(page)
    assert capsys.readouterr().out == f"{page}\n"
    monkeypatch.setenv("COLUMNS", "80")
    say_page(page)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80 and lines[0] == "A line." and lines[-1] == "After it."
    words = " ".join(lines).split()
    assert words.count("0.123") == words.count("[0.100,") == 6 and "|" not in words


def test_lines_are_broken_between_words_and_names_of_files_are_not(narrow, call, monkeypatch, tmp_path):
    long = " ".join(["word"] * 40)
    monkeypatch.setenv("COLUMNS", "80")
    from fvlens.cli._app import say, wrote

    stream = io.StringIO()
    monkeypatch.setattr(cli.out, "_file", stream)
    monkeypatch.setattr(cli.out, "_width", None)
    say(long)
    assert max(map(len, stream.getvalue().splitlines())) <= 80 and stream.getvalue().split() == long.split()
    stream.truncate(0), stream.seek(0)
    wrote([tmp_path / long])
    assert stream.getvalue() == f"wrote {tmp_path / long}\n"


# --- few signs ---


@pytest.fixture
def encoded(monkeypatch):
    """Run a command on a terminal of this encoding: exit code, and what it shows."""

    def run(encoding, *args):
        stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict", write_through=True)
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", stream)
            patch.setattr(sys, "stderr", stream)
            patch.setenv("COLUMNS", "100")
            with pytest.raises(SystemExit) as end:
                cli.main([str(arg) for arg in args])
            assert stream.errors == "strict"  # as it was
        return end.value.code, stream.buffer.getvalue().decode(encoding)

    return run


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_any_command_prints_on_terminals_of_few_signs(encoded, saved, tmp_path, encoding):
    (tmp_path / "german.tsv").write_text(GERMAN, encoding="utf-8")
    for args in (
        ("--help",),
        ("explain",),
        ("relations",),
        ("relations", "check", tmp_path / "german.tsv"),
        ("study",),
        ("inject", saved, "schön → \N{SNOWMAN}", "--raw"),
    ):
        code, shown = encoded(encoding, *args)
        assert code == 0 and shown.strip(), (args, shown)
    code, shown = encoded(encoding, "run", "schön → …")
    assert code == 2
    assert {"ascii": r"sch\xf6n -> ...", "cp1252": "schön -> …"}[encoding] in shown


def test_signs_are_replaced_and_letters_are_told(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True)
    monkeypatch.setattr(sys, "stdout", stream)
    with readable():
        print("a\N{NO-BREAK SPACE}× b … − ü \udcff \N{SNOWMAN}")
    assert stream.buffer.getvalue().decode() == "a x b ... - \\xfc \\udcff \\u2603\n"
    with pytest.raises(UnicodeEncodeError):
        print("ü")


# --- files ---


def test_a_run_in_a_narrow_terminal_of_few_signs_draws_nothing_into_files(tmp_path):
    """Standard output and error of a process are pipes here."""
    done = process(*RUN, tmp_path / "out", PYTHONIOENCODING="ascii", COLUMNS="80")
    assert done.returncode == 0, done.stderr
    assert done.stderr == "" and "\r" not in done.stdout
    lines = [line for line in done.stdout.splitlines() if not line.startswith("wrote ")]
    assert len(lines) > 5 and max(map(len, lines)) <= 80
