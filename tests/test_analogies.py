"""Analogies: generation from relations, readers of published sets, and what is held out."""

import itertools
from collections import Counter, defaultdict
from pathlib import Path

import pytest
import torch
from conftest import seeded
from hypothesis import given, settings
from hypothesis import strategies as st

from fvlens.relations import (
    Analogy,
    Pair,
    Relation,
    analogies_within,
    draw_held_out,
    guess_format,
    held_out,
    list_relations,
    load_relation,
    make_analogies,
    read_analogies,
    read_bats,
    read_google,
    read_sat,
    read_scan,
    read_semeval,
    read_tsv,
    read_vat,
    recurring_families,
)

SHARED = Path(__file__).parents[2] / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the published sets are not in this checkout's ../shared")
LIBRARY = [load_relation(name) for name in list_relations()]


def relation(name, family, domain, pairs):
    return Relation(name, tuple(Pair(*pair) for pair in pairs), family=family, domain=domain)


HANDS = relation("body-part", "part", "body", [("hand", "finger"), ("foot", "toe"), ("face", "nose")])
TREES = relation("plant-part", "part", "plant", [("tree", "branch"), ("rose", "thorn"), ("pine", "cone")])
COLOURS = relation("plant-colour", "colour", "plant", [("tree", "green"), ("rose", "red"), ("pine", "green")])


# An analogy


def test_an_analogy_says_itself_and_its_pairs():
    analogy = Analogy("hand", "finger", "tree", "branch", foils=("green",), kind="far")
    assert str(analogy) == "hand : finger :: tree : branch"
    assert analogy.source_pair == ("hand", "finger") and analogy.target_pair == ("tree", "branch")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"b": " "}, r"hand :   :: tree : branch: b is blank"),
        ({"kind": "middling"}, r"kind='middling'; expected near, far or None"),
        ({"foils": ("branch",)}, r"'branch' is a right answer and among the foils"),
        ({"foils": ("bough",), "alternatives": ("bough",)}, r"'bough' is a right answer and among the foils"),
        ({"foils": (("tree", "branch"),)}, r"is a right answer and among the foils"),
    ],
)
def test_a_wrong_analogy_is_refused(unchecked, change, message):
    with pytest.raises(ValueError, match=message):
        Analogy(**{**dict(a="hand", b="finger", c="tree", d="branch"), **change})


# Made of relations


def test_near_stays_in_a_relation_and_far_in_a_family():
    for kind in ("near", "far"):
        made = make_analogies(LIBRARY, kind=kind, n=600, generator=seeded())
        assert len(made) == 600 == len({(a.source_pair, a.target_pair, a.source_relation) for a in made})
        for analogy in made:
            one, two = load_relation(analogy.source_relation), load_relation(analogy.target_relation)
            assert analogy.source_pair in one.pairs and analogy.target_pair in two.pairs
            assert analogy.kind == kind
            assert (one.name == two.name) == (kind == "near")
            assert one.family == two.family
            assert (one.domain == two.domain) == (kind == "near")
            assert not {analogy.a, analogy.b} & {analogy.c, analogy.d}


def test_every_combination_comes_once_and_no_other():
    made = make_analogies([HANDS, TREES, COLOURS], kind="far", generator=seeded(), n_foils=0)
    expected = {(p, q) for one, two in ((HANDS, TREES), (TREES, HANDS)) for p in one.pairs for q in two.pairs}
    assert Counter((a.source_pair, a.target_pair) for a in made) == Counter(expected)
    near = make_analogies([HANDS, TREES], kind="near", generator=seeded(), n_foils=0)
    expected = {(p, q) for one in (HANDS, TREES) for p, q in itertools.permutations(one.pairs, 2)}
    assert Counter((a.source_pair, a.target_pair) for a in near) == Counter(expected)


def test_relations_take_turns():
    made = make_analogies(LIBRARY, kind="far", n=1000, generator=seeded())
    counts = Counter((a.source_relation, a.target_relation) for a in made)
    assert max(counts.values()) - min(counts.values()) <= 1
    near = make_analogies(LIBRARY, kind="near", n=2 * len(LIBRARY), generator=seeded())
    assert set(Counter(a.source_relation for a in near).values()) == {2}


def test_domains_limit_far_analogies():
    made = make_analogies(
        [HANDS, TREES], kind="far", generator=seeded(), domains={"part": [("body", "plant")]}, n_foils=0
    )
    assert {(a.source_relation, a.target_relation) for a in made} == {("body-part", "plant-part")}
    assert len(made) == 9


def test_foils_are_wrong_answers_of_both_sorts():
    made = make_analogies([HANDS, TREES, COLOURS], kind="far", generator=seeded(), n_foils=3)
    for analogy in made:
        assert len(analogy.foils) == len(set(analogy.foils))
        if analogy.target_relation == "plant-part":
            others = {p.output for p in COLOURS.pairs if p.input == analogy.c}
            assert others <= set(analogy.foils)  # what c is under another relation
            assert set(analogy.foils) - others <= {p.output for p in TREES.pairs} - {analogy.d}
    library = make_analogies(LIBRARY, kind="far", n=400, generator=seeded())
    right = defaultdict(set)
    for one in LIBRARY:
        for x, y in one.pairs:
            right[one.name, x].add(y)
    assert all(len(a.foils) == 3 and not set(a.foils) & right[a.target_relation, a.c] for a in library)


def test_another_right_answer_is_an_alternative_not_a_foil():
    two = relation("two", "part", "body", [("hand", "finger"), ("hand", "palm"), ("foot", "toe")])
    made = make_analogies([two], kind="near", generator=seeded())
    asked = {a.d: a for a in made if a.c == "hand"}
    assert asked["finger"].alternatives == ("palm",) and asked["palm"].alternatives == ("finger",)
    assert all("palm" not in a.foils and "finger" not in a.foils for a in asked.values())


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31), kind=st.sampled_from(["near", "far"]), n=st.integers(1, 300))
def test_analogies_follow_from_their_generator(seed, kind, n):
    one, two = seeded(seed), seeded(seed)
    made = make_analogies(LIBRARY[::7], kind=kind, n=n, generator=one) if kind == "near" else None
    if made is None:
        made = make_analogies(LIBRARY, kind=kind, n=n, generator=one)
        again = make_analogies(LIBRARY, kind=kind, n=n, generator=two)
    else:
        again = make_analogies(LIBRARY[::7], kind=kind, n=n, generator=two)
    assert made == again and len(made) == n
    assert torch.equal(one.get_state(), two.get_state())


@pytest.mark.parametrize(
    ("given_relations", "options", "message"),
    [
        ([HANDS], {"kind": "mid"}, "kind='mid'; expected near or far"),
        ([HANDS], {"kind": "near", "n": 0}, "expected n of at least 1 and n_foils of at least 0, got 0 and 3"),
        ([HANDS], {"kind": "near", "n_foils": -1}, "got None and -1"),
        ([HANDS], {"kind": "far"}, "no far analogy among 1 relations; it takes two of one family in two domains"),
        ([HANDS, COLOURS], {"kind": "far"}, "no far analogy among 2 relations"),
        ([], {"kind": "near"}, "no near analogy among 0 relations; it takes one with two pairs"),
    ],
)
def test_what_gives_no_analogy_is_refused(unchecked, given_relations, options, message):
    with pytest.raises(ValueError, match=message):
        make_analogies(given_relations, generator=seeded(), **options)


# What is held out


def test_the_division_in_the_file_is_the_draw_of_its_seed():
    division = held_out()
    assert division == draw_held_out(division.seed)
    assert division != draw_held_out(division.seed + 1)


def test_families_recur_widely_enough():
    families = recurring_families()
    assert len(families) >= 18
    assert len(LIBRARY) >= 140
    for family, domains in families.items():
        assert domains == sorted({one.domain for one in LIBRARY if one.family == family})
        assert len(domains) >= 4


def test_the_levels_are_large_and_apart():
    division = held_out()
    unseen, seen = division.relations(unseen=True), division.relations()
    assert sorted(unseen + seen) == list_relations()
    assert len(division.families) >= 4 and len(unseen) >= 20
    assert len(seen) >= 118  # the paper's basis
    fitted = division.fitted_domain_pairs()
    assert set(fitted) == set(recurring_families()) - set(division.families) == set(division.domain_pairs)
    for family, domains in recurring_families().items():
        if family in division.families:
            continue
        held = set(division.domain_pairs[family])
        assert held.isdisjoint(fitted[family])
        assert held | set(fitted[family]) == set(itertools.permutations(domains, 2))
        assert held == {(b, a) for a, b in held}  # both orders, so the reverse does not give it away
        assert 0.1 <= len(held) / (len(held) + len(fitted[family])) <= 1 / 3  # a quarter, of few pairs rounded
        assert {a for a, _ in fitted[family]} == set(domains)
    for one in LIBRARY[::10]:
        split = division.split(one)
        assert split == division.split(one) and not set(split.train) & set(split.test)


# Readers


def write(tmp_path, name, text):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


SAT = """# comment
190 FROM REAL SATs
ostrich bird n:n
lion cat n:n
goose flock n:n
ewe sheep n:n
cub bear n:n
primate monkey n:n
a
"""


def test_google(tmp_path):
    path = write(
        tmp_path, "q.txt", ": capitals\nAthens Greece Baghdad Iraq\n\n: family\nboy girl step_son step_daughter\n"
    )
    one, two = read_google(path)
    assert (one.source_pair, one.target_pair, one.source_relation) == (
        ("Athens", "Greece"), ("Baghdad", "Iraq"), "capitals",
    )  # fmt: skip
    assert two.d == "step daughter" and two.target_relation == "family" and two.kind is None
    assert one.source == "q.txt"


def test_bats(tmp_path):
    write(tmp_path, "4_Lexicographic/L01 [hypernyms - animals].txt", "ant\tinsect/arthropod\nape\tprimate\n")
    write(tmp_path, "1_Inflectional/I01 [noun - plural_reg].txt", "album\talbums\n")
    write(tmp_path, "metadata.json", "{}")
    plurals, hypernyms = read_bats(tmp_path)
    assert plurals.name == "I01 noun - plural_reg" and plurals.pairs == (("album", "albums"),)
    assert plurals.category == "1_Inflectional"
    assert hypernyms.pairs == (("ant", "insect"), ("ant", "arthropod"), ("ape", "primate"))
    one, two = sorted(analogies_within([hypernyms], generator=seeded()), key=lambda a: a.c)
    assert str(one) == "ape : primate :: ant : insect" and one.alternatives == ("arthropod",)
    assert str(two) == "ant : insect :: ape : primate" and two.kind is None
    assert two.source == "L01 [hypernyms - animals].txt"


def test_sat(tmp_path):
    (one,) = read_sat(write(tmp_path, "sat.txt", SAT))
    assert str(one) == "ostrich : bird :: lion : cat"
    assert one.foils == (("goose", "flock"), ("ewe", "sheep"), ("cub", "bear"), ("primate", "monkey"))
    assert one.source == "sat.txt: 190 FROM REAL SATs"
    two = SAT.replace("\na\n", "\ne\n")
    assert [str(a) for a in read_sat(write(tmp_path, "two.txt", SAT + "\n" + two))] == [
        "ostrich : bird :: lion : cat",
        "ostrich : bird :: primate : monkey",
    ]


def test_semeval(tmp_path):
    head = "subcat\tclass\tsubclass\tsplit\tword1\tword2\tgold_maxdiff\n"
    rows = "1a\tCLASS\tTaxonomic\ttrain\ttree\toak\t38.8\n1a\tCLASS\tTaxonomic\ttrain\tweapon\tspear\t50\n"
    rows += "1a\tCLASS\tTaxonomic\ttrain\toak\ttree\t-60\n2b\tPART\tX\ttest\ta\tb\t-1\n"
    path = write(tmp_path, "gold.tsv", head + rows)
    (one,) = read_semeval(path)
    assert (one.name, one.category, one.pairs) == ("1a Taxonomic", "CLASS", (("weapon", "spear"), ("tree", "oak")))
    assert len(read_semeval(path, min_rating=-100.0)) == 2


def test_scan(tmp_path):
    head = "target,source,targ_word,src_word,alternatives,analogy_type\n"
    path = write(tmp_path, "scan.csv", head + 'atom,solar system,nucleus,sun,"core, middle",science\n')
    (one,) = read_scan(path)
    assert str(one) == "solar system : sun :: atom : nucleus"
    assert one.kind == "far" and one.alternatives == ("core", "middle") and one.source == "scan.csv: science"


def test_vat(tmp_path):
    path = write(tmp_path, "vat.csv", "relation,A,B,C,D,D'\nopposite,love,hate,rich,poor,wealthy\n")
    (one,) = read_vat(path)
    assert str(one) == "love : hate :: rich : poor" and one.foils == ("wealthy",)
    assert one.source_relation == one.target_relation == "opposite"


def test_tsv(tmp_path):
    path = write(tmp_path, "mine.tsv", "# mine\na\tb\tc\td\ne\tf\tg\th\tx|y\tfar\n")
    one, two = read_tsv(path)
    assert str(one) == "a : b :: c : d" and one.foils == () and one.kind is None
    assert two.foils == ("x", "y") and two.kind == "far" and two.source == "mine.tsv"


BAD = [
    (read_google, "q.txt", "Athens Greece Baghdad Iraq\n", "line 1: expected four words below a ': category'"),
    (read_google, "q.txt", ": x\na b c\n", "line 2: expected four words below a ': category' line, got 'a b c'"),
    (read_google, "q.txt", ":\n", "line 1: expected ': category', got ':'"),
    (read_google, "q.txt", ": x\n", "q.txt: no questions in it"),
    (
        read_sat, "s.txt", SAT.replace("primate monkey n:n\n", ""),
        "line 2: expected a block of 8 lines .* got '7 lines'",
    ),
    (
        read_sat, "s.txt", SAT.replace("lion cat n:n", "lion cat"),
        "line 4: expected 'word word pos:pos', got 'lion cat'",
    ),
    (
        read_sat, "s.txt", SAT.replace("\na\n", "\nf\n"),
        "line 9: expected the letter of the right choice, a to e, got 'f'",
    ),
    (read_sat, "s.txt", SAT.replace("lion cat", "ewe sheep"), "line 2: .*among the foils"),
    (read_sat, "s.txt", "# nothing\n", "s.txt: no questions in it"),
    (read_semeval, "g.tsv", "subcat\tclass\n", "line 1: expected a header with subcat, class, subclass, word1"),
    (read_semeval, "g.tsv", "", "expected a header with subcat, .* got an empty file"),
    (
        read_semeval, "g.tsv", "subcat\tclass\tsubclass\tword1\tword2\tgold_maxdiff\n1a\tC\tT\ta\tb\tmany\n",
        "line 2: expected a number in gold_maxdiff, got 'many'",
    ),
    (
        read_semeval, "g.tsv", "subcat\tclass\tsubclass\tword1\tword2\tgold_maxdiff\n1a\tC\tT\ta\t\t3\n",
        "line 2: expected two words, got",
    ),
    (
        read_semeval, "g.tsv", "subcat\tclass\tsubclass\tword1\tword2\tgold_maxdiff\n1a\tC\tT\ta\tb\t-3\n",
        "g.tsv: no pairs rated above 0 in it",
    ),
    (
        read_scan, "s.csv", "target,source,targ_word,src_word,alternatives,analogy_type\na,b\n",
        "line 2: expected 6 cells, got 'a,b'",
    ),
    (
        read_scan, "s.csv", "target,source,targ_word,src_word,alternatives,analogy_type\na,b,,d,,x\n",
        "line 2: analogy .*d is blank",
    ),
    (
        read_vat, "v.csv", "relation,A,B,C\n",
        "line 1: expected a header with relation, A, B, C, D, D', got 'relation,A,B,C'",
    ),
    (read_tsv, "m.tsv", "a\tb\tc\n", "line 1: expected 'a<TAB>b<TAB>c<TAB>d', then perhaps foils and kind, got"),
    (read_tsv, "m.tsv", "a\tb\tc\td\t\tmid\n", "line 1: analogy .*kind='mid'; expected near, far or None"),
    (read_tsv, "m.tsv", "# only a comment\n", "m.tsv: no analogies in it"),
]  # fmt: skip


@pytest.mark.parametrize(("reader", "name", "text", "message"), BAD)
def test_bad_rows_are_refused_with_file_and_line(unchecked, tmp_path, reader, name, text, message):
    with pytest.raises(ValueError, match=message) as error:
        reader(write(tmp_path, name, text))
    assert name in str(error.value)


def test_bad_bats_folders_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no folder nowhere; expected BATS files"):
        read_bats(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no BATS files"):
        read_bats(tmp_path)
    path = write(tmp_path, "E01 [country - capital].txt", "Athens Greece\n")
    with pytest.raises(ValueError, match=r"E01 \[country - capital\].txt, line 1: expected 'word<TAB>answer1/answer2'"):
        read_bats(tmp_path)
    path.write_text("\n")
    with pytest.raises(ValueError, match="no pairs in it"):
        read_bats(tmp_path)


def test_files_that_cannot_be_read_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no set of analogies at .*gone\.txt\."):
        read_google(tmp_path / "gone.txt")
    with pytest.raises(ValueError, match=r"no set of analogies at .*\. It is a folder; give the name of a file\."):
        read_google(tmp_path)
    path = tmp_path / "latin.txt"
    path.write_bytes(b": x\ncaf\xe9 a b c\n")
    with pytest.raises(ValueError, match=r"latin\.txt: expected UTF-8 text, but byte 7 is none"):
        read_google(path)
    quotes = write(tmp_path, "q.csv", "relation,A,B,C,D,D'\n" + "x" * 200_000 + "\n")
    with pytest.raises(ValueError, match=r"q.csv, line 2: field larger than field limit"):
        read_vat(quotes)


@pytest.mark.parametrize(
    ("name", "text", "format"),
    [
        ("a.txt", ": x\na b c d\n", "google"),
        ("b.txt", SAT, "sat"),
        ("c.tsv", "subcat\tclass\n", "semeval"),
        ("d.csv", "target,source,targ_word,src_word,alternatives,analogy_type\n", "scan"),
        ("e.csv", "relation,A,B,C,D,D'\n", "vat"),
        ("f.tsv", "# x\na\tb\tc\td\n", "tsv"),
    ],
)
def test_formats_are_known_by_their_looks(tmp_path, name, text, format):
    assert guess_format(write(tmp_path, name, text)) == format
    assert guess_format(tmp_path) == "bats"


def test_what_looks_like_nothing_is_refused(tmp_path):
    path = write(tmp_path, "x.txt", "some prose\n")
    with pytest.raises(
        ValueError, match=r"x\.txt: .*; say with --format \(in Python, format=\) which it is of google, b"
    ):
        read_analogies(path, generator=seeded())
    with pytest.raises(ValueError, match="format='doc'; expected one of google"):
        read_analogies(path, format="doc", generator=seeded())
    with pytest.raises(ValueError, match="line 1: expected four words"):
        read_analogies(path, format="google", generator=seeded())


def test_some_of_a_file_keep_their_order(tmp_path):
    path = write(tmp_path, "m.tsv", "".join(f"a{i}\tb\tc\td\n" for i in range(50)))
    some = read_analogies(path, n=10, generator=seeded())
    index = [int(a.a[1:]) for a in some]
    assert len(index) == 10 and index == sorted(index)
    assert some == read_analogies(path, n=10, generator=seeded()) != read_analogies(path, n=10, generator=seeded(1))
    assert len(read_analogies(path, n=99, generator=seeded())) == 50


@needs_shared
def test_the_published_sets_hold_what_their_papers_say():
    google = read_analogies(SHARED / "google_analogies" / "questions-words.txt", generator=seeded())
    assert len(google) == 19_544 and len({a.source_relation for a in google}) == 14
    scan = read_analogies(SHARED / "scan" / "data" / "SCAN_dataset.csv", generator=seeded())
    assert len(scan) == 451 and len({(a.a, a.c) for a in scan}) == 65
    gold = SHARED / "semeval2012_task2" / "derived_gold.tsv"
    assert len(read_semeval(gold, min_rating=-1000.0)) == 79
    assert sum(map(len, read_semeval(gold, min_rating=-1000.0))) == 3_218
    assert len(read_analogies(gold, n=500, generator=seeded())) == 500
