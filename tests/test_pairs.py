"""Pairs in every shape and file: read rightly, trimmed with a word about it, or refused with place and remedy."""

import codecs
import collections
import csv
import dataclasses
import io
import itertools
import json
import os
import re
import string
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fvlens
from fvlens.relations import (
    Pair,
    Relation,
    as_pairs,
    as_relation,
    as_relations,
    list_relations,
    load_relation,
    plain_name,
    read_folder,
    read_pairs,
    read_relation,
    reading_of,
    words_of,
)

HOT = [("hot", "cold"), ("big", "small")]
FAMILY = "\U0001f469\u200d\U0001f467"  # joined by a sign without width, which belongs to it
DATA = Path(__file__).parents[1] / ".." / "shared" / "data"
published = pytest.mark.skipif(not DATA.is_dir(), reason="the published sets are not at ../shared/data")


def tuples(pairs):
    return [tuple(pair) for pair in pairs]


def plain(read, *args, **given):
    """What is read, and the warning if there is one."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = read(*args, **given)
    assert len(said) < 2
    return found, str(said[0].message) if said else ""


# --- shapes ---

Named = collections.namedtuple("Named", "first second")


@dataclasses.dataclass
class Entry:
    word: str
    opposite: str


SHAPES = {
    "tuples": HOT,
    "a tuple of lists": tuple(map(list, HOT)),
    "named tuples": [Named(*pair) for pair in HOT],
    "records": [{"x": a, "y": b} for a, b in HOT],
    "records, output first": [{"output": b, "input": a} for a, b in HOT],
    "records in another order of fields": [{"p": "hot", "q": "cold"}, {"q": "small", "p": "big"}],
    "dataclasses": [Entry(*pair) for pair in HOT],
    "a dict": dict(HOT),
    "columns": {"input": ["hot", "big"], "output": np.array(["cold", "small"])},
    "a frame": pd.DataFrame(HOT),
    "a frame with names": pd.DataFrame(HOT, columns=["word", "opposite"], index=["k", "l"]),
    "a series": pd.Series(dict(HOT)),
    "a series of pairs": pd.Series(HOT),
    "an array": np.array(HOT),
    "an array of objects": np.array(HOT, dtype=object),
    "an array of records": np.array(HOT, dtype=[("a", "U9"), ("b", "U9")]),
    "rows of arrays": [np.array(pair) for pair in HOT],
    "numpy's texts": [(np.str_(a), np.str_(b)) for a, b in HOT],
    "dict items": dict(HOT).items(),
    "a relation": Relation("r", tuple(Pair(*pair) for pair in HOT)),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_gives_the_same_pairs(shape):
    found, said = plain(as_relation, SHAPES[shape])
    assert tuples(found.pairs) == HOT and said == ""
    assert all(type(word) is str for pair in found.pairs for word in pair)
    assert found.name == ("r" if shape == "a relation" else "")


def test_iterators_are_gone_through_once():
    for made in (zip("ab", "cd", strict=True), (pair for pair in [("a", "c"), ("b", "d")]), map(tuple, ["ac", "bd"])):
        assert tuples(as_pairs(made)) == [("a", "c"), ("b", "d")]
        assert list(made) == []


def test_names_files_and_paths(tmp_path, monkeypatch):
    (tmp_path / "mine.csv").write_text("hot,cold\nbig,small\n")
    (tmp_path / "antonym").write_text("hot,cold\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for path in ("mine.csv", Path("mine.csv"), str(tmp_path / "mine.csv"), "./mine.csv", "~/mine.csv"):
        found = load_relation(path)
        assert tuples(found.pairs) == HOT and (found.name, found.source) == ("mine", "mine.csv")
        assert Path(found.path).samefile(tmp_path / "mine.csv")
    assert load_relation("antonym").path == "" and len(load_relation("antonym")) > 100  # the library goes first
    assert len(load_relation("./antonym")) == 1
    assert as_relation("mine.csv", name="other").name == "other"
    assert as_relation("antonym") is load_relation("antonym")


@pytest.mark.parametrize(
    "bad, message",
    [
        (["ab", "cd"], "pair 1: expected a pair of two words, got the text 'ab'; give pairs as ('hot', 'cold')"),
        (("hot", "cold"), "pair 1: expected a pair of two words, got the text 'hot'"),
        ([*HOT, "ab"], "pair 3: expected a pair of two words, got the text 'ab'"),
        (np.array(["ab", "cd"]), "expected an array of two columns, [n 2], got the shape [2]; give zip(inputs,"),
        (np.array([["a", "b", "c"]]), "expected an array of two columns, [n 2], got the shape [1, 3]"),
        (np.zeros((1, 2)), "pair 1: expected two words, but the input is the number 0.0; give it as text"),
        ([("a", "b", "c")], "pair 1: expected a pair of two words, got 3 things"),
        ([("a",)], "pair 1: expected a pair of two words, got 1 things"),
        ([{"a", "b"}], "pair 1: expected a pair of two words, got set"),
        ([None], "pair 1: expected a pair of two words, got NoneType"),
        ([{"a": "x"}], "pair 1: expected a record with two fields, input and output, got 1: 'a'; keep the two"),
        ([{}], "pair 1: expected a record with two fields, input and output, got 0: none"),
        ([{"a": "x", "b": "y", "c": "z"}], "expected a record with two fields, input and output, got 3: 'a', 'b', 'c'"),
        ([{"a": "x", "b": "y"}, {"a": "x", "c": "y"}], "pair 2: expected the fields 'a' and 'b' as in the first"),
        ({"input": "hot", "output": "cold"}, "got one record with the fields 'input' and 'output'; put it into a list"),
        ({"input": ["a"], "output": ["b", "c"]}, "expected as many inputs as outputs, got 1 and 2"),
        ({"hot": ["cold", "cool"]}, "entry 'hot': expected a word and its answer, got list"),
        ({"a": {"b": "c"}}, "entry 'a': expected a word and its answer, got dict"),
        ({"hot": None}, "entry 'hot': expected two words, but the output is missing (None); fill it in, or leave the"),
        (pd.DataFrame({"a": ["x"], "b": ["y"], "c": ["z"]}), "expected a table of two columns, input and output, got"),
        (pd.DataFrame({"a": ["x"]}), "expected a table of two columns, input and output, got 1"),
        (pd.DataFrame({"a": ["x", "v"], "b": ["y", None]}), "row 2: expected two words, but the output is missing"),
        (pd.DataFrame({"a": ["x"], "b": [1.0]}), "row 1: expected two words, but the output is the number 1.0; give"),
        (pd.DataFrame({"a": [pd.NA], "b": ["y"]}), "row 1: expected two words, but the input is missing (<NA>)"),
        (pd.Series(["ab", "cd"]), "got a series of str without words in its index"),
        ([("a", float("nan"))], "pair 1: expected two words, but the output is missing (nan)"),
        ([("a", True)], "pair 1: expected two words, but the output is a bool, not a word"),
        ([("a", b"b")], "pair 1: expected two words, but the output is bytes; decode them first"),
        ([("a", ["b"])], "pair 1: expected two words, but the output is a list, not a word"),
        ([("a", "")], "pair 1: expected two words, but the output is blank; fill it in, or leave the pair out."),
        ([("a", " \u200b\n")], "pair 1: expected two words, but the output is blank"),
        ([("a", "b\nc")], r"pair 1: expected two words, but the output holds a line break ('b\nc'); write it in one"),
        ([("a", "b\x00")], "the output holds the control character '\\x00'"),
        ([("a", "\ud800")], "the output holds the control character '\\ud800'"),
        ([("a", "caf\ufffd")], "holds the sign \ufffd of text that was read in a wrong encoding"),
        ([("a", ""), ("b", "x"), ("", "c")], "pair 1: expected two words, but the output is blank; fill it in, or "
         "leave the pair out. 1 more pair cannot be used either."),
        ({("a", "b")}, "expected pairs in an order, got a set, whose order differs from run to run; give sorted(...)."),
        ([], "expected at least one pair, got none."), (iter([]), "expected at least one pair, got none."),
        ({}, "expected at least one pair, got none."), (pd.DataFrame({"a": [], "b": []}), "expected at least one pair"),
        (None, "expected word pairs (a Relation, the name of one, a file, a list of (input, output), of records"),
        (7, "got int: 7."), (True, "got bool: True."), (b"ab", "got bytes: b'ab'."), (object, "got type"),
        (itertools.repeat(("a", "b")), "expected at most 1,000 pairs, got more; give a part of them."),
    ],
)  # fmt: skip
def test_what_is_no_pairs_is_refused_with_place_and_remedy(unchecked, monkeypatch, bad, message):
    monkeypatch.setattr(fvlens.relations._words, "MOST_PAIRS", 1000)
    with pytest.raises(ValueError, match=re.escape(message)) as refusal:
        as_relation(bad, what="finetune: pairs")
    assert str(refusal.value).startswith("finetune: pairs")
    with pytest.raises(ValueError, match=re.escape(message)):
        as_pairs(bad)


def test_other_things_that_are_no_pairs(unchecked, tmp_path):
    split = load_relation("antonym").split(fvlens.relations._relation.torch.Generator())
    with pytest.raises(ValueError, match=r"got a Split; give one of its parts, such as \.train"):
        as_relation(split)
    with (tmp_path / "a.csv").open("w+") as file, pytest.raises(ValueError, match="got an open file; give its path"):
        as_relation(file)
    assert as_pairs(None, may_be_empty=True) == as_pairs([], may_be_empty=True) == ()


@pytest.mark.parametrize(
    "pairs, read, word",
    [
        ([(" hot", "cold\n"), ("big", "small")], HOT, "2 words had white space or invisible signs, which were trimmed"),
        ([("\ufeffhot", "cold"), ("big", "small")], HOT, "1 word had white space or invisible signs, which was"),
        ([("\u202ahot\u202c", "co\u00adld"), ("big", "small")], HOT, "2 words had white space"),
        ([("hot", "ice\u00a0\t cold")], [("hot", "ice cold")], "(first at pair 1)"),
        ([*HOT, ("hot", "cold")], HOT, "1 pair dropped that stood before already (first at pair 3, hot -> cold)"),
        ([*HOT, ("hot", "cool")], HOT, "1 pair dropped whose input stood before with another output, which is kept "
         "(first at pair 3, hot -> cool: another output, 'cold', stands before it)"),
        ([("hot ", "cold"), ("hot", "cold")], HOT[:1], "1 pair dropped that stood before already"),
        ([("a", "nan"), ("b", "c")], [("a", "nan"), ("b", "c")], "1 word may stand for a missing one (first at pair 1"),
        (pd.DataFrame({"output": ["cold"], "input": ["hot"]}), HOT[:1], "by their names (output, input) the second"),
    ],
)  # fmt: skip
def test_what_is_trimmed_or_dropped_is_said(pairs, read, word):
    found, said = plain(as_relation, pairs, what="evaluate: pairs")
    assert tuples(found.pairs) == read
    assert said.startswith("evaluate: pairs: ") and word in said
    silent = reading_of(pairs)
    assert silent.relation == found and len(silent.dropped) == len(pairs) - len(read)


def test_whole_numbers_are_words_in_digits():
    given = [("seven", 7), (np.int64(1789), "year"), (-1, 10**20)]
    assert tuples(as_pairs(given)) == [("seven", "7"), ("1789", "year"), ("-1", "1" + "0" * 20)]


def test_a_relation_trims_and_refuses_too():
    with pytest.warns(
        UserWarning, match="relation 'r': 1 words had white space or invisible signs, which were trimmed"
    ):
        assert Relation("r", (Pair("hot ", "cold"),)).pairs == (Pair("hot", "cold"),)
    with pytest.raises(ValueError, match=r"relation 'r': pair 1, .*: the output holds a line break"):
        Relation("r", (Pair("hot", "co\nld"),))
    twice = Relation("r", (Pair("hot", "cold"), Pair("hot", "cool")), family="f")
    found, said = plain(as_relation, twice)
    assert tuples(found.pairs) == HOT[:1] and found.family == "f" and "another output" in said


WORDS = st.text(st.characters(exclude_categories=("Cs", "Cc", "Cn"), exclude_characters="\ufffd"), min_size=1).filter(
    lambda word: len(word.strip().splitlines()) == 1
)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=6))
def test_any_texts_are_read_alike_or_refused_alike_in_every_shape(pairs):
    """Whatever the words are: the same result of lists, records, frames and JSON, and reading twice changes nothing."""

    def outcome(made):
        try:
            return plain(as_relation, made)[0].pairs
        except ValueError as error:
            return re.sub(r"^.*?expected", "", str(error))

    first = outcome(pairs)
    shapes = [
        [list(p) for p in pairs],
        [{"k": a, "v": b} for a, b in pairs],
        pd.DataFrame(pairs, dtype=object),
        iter(pairs),
    ]
    assert all(outcome(shape) == first for shape in shapes)
    if isinstance(first, tuple):
        again, said = plain(as_relation, first)
        assert again.pairs == first and "trimmed" not in said and "dropped" not in said
        assert all(word == " ".join(word.split()) for pair in first for word in pair)


# --- text files ---


@pytest.mark.parametrize(
    "name, text, pairs, word",
    [
        ("a.csv", "input,output\nhot,cold\nbig,small\n", HOT, ""),
        ("a.csv", "hot,cold\n\n  \nbig, small\r\n", HOT, ""),
        ("a.csv", "hot,cold\n big , small \n", HOT, "a.csv: 2 words had white space"),
        ("a.csv", '\ufeffInput,Output\n"Washington, D.C.","a ""b"""\n', [("Washington, D.C.", 'a "b"')], ""),
        ("a.csv", 'hot, "cold, very"\nbig, small\n', [("hot", "cold, very"), ("big", "small")], ""),
        ("a.tsv", "hot\tcold, very\n", [("hot", "cold, very")], ""),
        ("a.txt", "hot\tcold\n", [("hot", "cold")], ""),
        ("a", "hot,cold\nbig,small\n", HOT, ""),
        ("a.csv", "hot,cold\ninput,output\n", [("hot", "cold"), ("input", "output")], ""),
        ("a.csv", "hot;cold\nbig;small, very\n", [("hot", "cold"), ("big", "small, very")], ""),
        ("a.csv", "hot|cold\nbig|small\n", HOT, ""),
        ("a.csv", "hot:cold\nbig:small\n", HOT, "':' was taken for what sets words apart"),
        ("a.csv", "sep=;\nhot, very;cold\n", [("hot, very", "cold")], ""),
        ("a.csv", "hot,cold\rbig,small\r", HOT, ""),
        ("a.csv", "hot,cold,\nbig,small,\n", HOT, ""),
        ("a.csv", "hot,,cold\nbig,,small\n", HOT, ""),
        ("a.csv", ",input,output\n0,hot,cold\n1,big,small\n", HOT, "the first column holds row numbers"),
        ("a.csv", "output,input\ncold,hot\nsmall,big\n", HOT, "by the heading ('output', 'input') the second column"),
        ("a.csv", "country,capital\nFrance,Paris\n", [("France", "Paris")], "line 1 ('country', 'capital') was taken"),
        ("wort-satz.csv", "Wort,Satz\nhot,cold\n", HOT[:1], "line 1 ('Wort', 'Satz') was taken for a heading; if it"),
        ("a.csv", "Begriff,Gegenteil\nhot,cold\nbig,small\nold,new\n", [*HOT, ("old", "new")], "was taken for a he"),
        ("a.csv", "begriff,ort\nParis,Rom\nBonn,Ulm\nKiel,Au\n", [("Paris", "Rom"), ("Bonn", "Ulm"), ("Kiel", "Au")],
         "line 1 ('begriff', 'ort') was taken for a heading"),
        ("a.csv", "wort,zahl\ncat,3\ndog,3\nbird,4\n", [("cat", "3"), ("dog", "3"), ("bird", "4")], "taken for a hea"),
        ("a.csv", "a,b\nb,c\nx,y\n", [("a", "b"), ("b", "c"), ("x", "y")], ""),
        ("a.csv", "question,answer\nhot,cold\n", HOT[:1], "line 1 ('question', 'answer') was taken for a heading"),
        ("a.tsv", "#\thash\n@\tat\n", [("#", "hash"), ("@", "at")], ""),
        ("a.tsv", "# mine, all mine\nhot\tcold\n# later\nbig\tsmall\n", HOT, "1 lines were left out as comments"),
        ("a.md", "| input | output |\n|---|:--|\n|hot|cold|\n|big|small|\n", HOT, "left out as comments or rules"),
        ("a.csv", "hot,\"co\tld\"\nbig,small\n", [("hot", "co ld"), ("big", "small")], "1 word had white space"),
        ("a.csv", "hot,nan\n", [("hot", "nan")], "1 word may stand for a missing one (first at line 1: 'nan')"),
        ("a.csv", "1,one\n2,two\n", [("1", "one"), ("2", "two")], ""),
        ("a.csv", "hot,cold\nhot,cold\nhot,cool\n", HOT[:1], "1 pair dropped that stood before already (first at"),
        ("a.csv", f"{FAMILY},family\n", [(FAMILY, "family")], ""),
    ],
)  # fmt: skip
def test_text_files(tmp_path, name, text, pairs, word):
    (tmp_path / name).write_text(text, encoding="utf-8", newline="")
    found, said = plain(read_pairs, tmp_path / name)
    assert tuples(found.pairs) == pairs
    assert (found.name, found.source, found.family) == (Path(name).stem, name, "")
    assert word in said and bool(word) == bool(said)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32", "utf-16-le with mark"])
def test_encodings_that_say_what_they_are(tmp_path, encoding):
    text = "Köln,Deutschland\n日本,東京\n"
    data = codecs.BOM_UTF16_LE + text.encode("utf-16-le") if "mark" in encoding else text.encode(encoding)
    (tmp_path / "a.csv").write_bytes(data)
    assert tuples(read_pairs(tmp_path / "a.csv").pairs) == [("Köln", "Deutschland"), ("日本", "東京")]


@pytest.mark.parametrize(
    "name, data, message",
    [
        ("a.csv", b"", "a.csv: expected a line 'input,output' for each pair, got an empty file."),
        ("a.csv", b" \n\n", "a.csv: expected a line 'input,output' for each pair, got an empty file."),
        ("a.csv", b"input,output\n", "a.csv: expected a line 'input,output' for each pair, got a header alone."),
        ("a.csv", b"# note\n# note\n", "a.csv: expected at least one pair, got none."),
        ("a.csv", b"a,b\nc\n", "a.csv, line 2: expected two words, input','output, got ['c']. Add the other one."),
        ("a.csv", b"a,b\n\nc,d,e\n", "a.csv, line 3: expected two words, input','output, got ['c', 'd', 'e']. Words"),
        ("a.csv", b"a,b,c\n", "a.csv, line 1: expected two words, input','output, got ['a', 'b', 'c']. Set the words"),
        ("a.csv", b"hot cold\nbig small\n", "a.csv, line 1: expected two words"),
        ("a.csv", b"well-known\nself-made\n", "a.csv, line 1: expected two words"),
        ("a.csv", b"a,b\nc, \nd,\n", "a.csv, line 2: expected two words, but the output is blank; fill it in, or leave "
         "the pair out. 1 more pair cannot be used either."),
        ("a.csv", b'a,"b\n', "a.csv, line 1: unexpected end of data. Close the quotes"),
        ("a.csv", b'a,b\n"c","d"e\n', "a.csv, line 2: ',' expected after '\"'. Close the quotes"),
        ("a.csv", b'a,"b\nc"\n', "a.csv, line 1: expected two words, but the output holds a line break"),
        ("a.csv", b"a;b, c\nd;e, f\n", "a.csv: every line has two words under a comma and a semicolon, so it cannot"),
        ("a.csv", b"a,b\nc,\xe9\n", "a.csv, line 2: expected UTF-8 text, but byte 6 is none (in Windows-1252 it"),
        ("a.csv", "a,b\n".encode("utf-16-le"), "a.csv, line 1: expected a text, got a NUL byte"),
        ("a.csv", b"a,b\nc,d\x00\n", "a.csv, line 2: expected a text, got a NUL byte"),
        ("a.csv", b"\xff\xfea", "a.csv, line 1: expected UTF-16 text, but byte"),
        ("a.csv", b"a," + b"b" * 200_000 + b"\n", "a.csv, line 1: field larger than field limit"),
        ("a.csv.gz", b"\x1f\x8b\x08", "a.csv.gz: expected a text, JSON or .xlsx, got packed or binary data; unpack it"),
        ("a.pkl", b"\x80\x04\x95", "a.pkl: expected a text, JSON or .xlsx, got packed or binary data"),
        ("a.ods", b"PK\x03\x04", "a.ods: expected a text, JSON or .xlsx, got .ods; save it as .xlsx or CSV."),
        ("a.json", b"", "a.json, line 1: not JSON, or cut off"),
        ("a.json", b"[]", "a.json: expected at least one pair, got none."),
        ("a.json", b"3", "a.json: expected a list of pairs, or an object of words and answers, got 3."),
        ("a.json", b'["hot", "cold"]', "a.json, entry 1: expected a pair of two words, got the text 'hot'"),
        ("a.json", b'[\n["hot", "cold"],\n', "a.json, line 3: not JSON, or cut off"),
        ("a.json", b'[["hot", null]]', "a.json, entry 1: expected two words, but the output is missing (None)"),
        ("a.json", b'[["hot", 1.5]]', "a.json, entry 1: expected two words, but the output is the number 1.5"),
        ("a.json", b'[["hot", NaN]]', "a.json: JSON that says more than one thing (NaN is not a number)"),
        ("a.json", b'{"hot": "cold", "hot": "cool"}', "(the key 'hot' comes twice); give a list of pairs."),
        ("a.json", b'{"all": {"hot": "cold"}}', "a.json, entry 'all': expected a word and its answer, got dict"),
        ("a.json", b'{"input": "hot", "output": "cold"}', "a.json: expected pairs, got one record"),
        ("a.jsonl", b'["a", "b"]\n\n["c"]\n', "a.jsonl, line 3: expected a pair of two words, got 1 things"),
        ("a.jsonl", b'["a", "b"]\n\n{c\n', "a.jsonl, line 3: not a line of JSON"),
    ],
)  # fmt: skip
def test_files_that_are_none_are_refused_with_place_and_remedy(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=re.escape(message)):
        read_pairs(tmp_path / name)


CELLS = st.text(string.ascii_letters + " ,;|\"'.#:=é日", min_size=1, max_size=8).filter(
    lambda word: word == " ".join(word.split()) and not word.startswith("#") and word not in ("nan", "NA")
)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(CELLS, CELLS), min_size=1, max_size=8, unique_by=lambda pair: pair[0]),
    st.sampled_from(",;\t|"),
    st.sampled_from(["\n", "\r\n"]),
)
def test_any_words_are_read_back_from_a_table_that_quotes_them(tmp_path_factory, pairs, delimiter, end):
    """What the standard library writes is read as it was, or refused; never read as something else."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter=delimiter, lineterminator=end, quoting=csv.QUOTE_ALL)
    writer.writerow(("input", "output"))
    writer.writerows(pairs)
    path = tmp_path_factory.getbasetemp() / "any.csv"
    path.write_bytes(text.getvalue().encode())
    assert tuples(plain(read_pairs, path)[0].pairs) == pairs


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=80), st.sampled_from([".csv", ".tsv", ".json", ".jsonl", ".xlsx", ""]))
def test_any_bytes_are_read_or_refused(tmp_path_factory, data, suffix):
    path = tmp_path_factory.getbasetemp() / f"bytes{suffix}"
    path.write_bytes(data)
    refused, found = "", ()
    try:
        found = plain(read_pairs, path)[0].pairs
    except ValueError as error:
        refused = str(error)
    assert (f"bytes{suffix}" in refused) != bool(found)
    assert all(word and word == " ".join(word.split()) for pair in found for word in pair)


def test_the_librarys_format_whole_and_in_part(tmp_path):
    keys = ("category", "family", "domain", "direction", "compiled")
    text = "# name: mine\n" + "".join(f"# {key}: {key}\n" for key in keys) + "input\toutput\nhot\tcold\n"
    (tmp_path / "other.tsv").write_text(text)
    found = read_pairs(str(tmp_path / "other.tsv"))
    assert found == read_relation(tmp_path / "other.tsv") and (found.name, found.family) == ("mine", "family")
    assert len(found) == 2  # a file with the whole header has no other heading
    (tmp_path / "part.tsv").write_text("# name: words\n# by me\n\ninput\toutput\nhot\tcold\n")
    found = read_pairs(tmp_path / "part.tsv")
    assert (found.name, found.category, tuples(found.pairs)) == ("words", "", HOT[:1])


def test_every_file_of_the_library_is_read_by_the_reader_of_users(tmp_path):
    folder = Path(fvlens.relations.__file__).parent / "data"
    readings = read_folder(folder)
    assert [reading.relation for reading in readings] == [load_relation(name) for name in list_relations()]
    assert not any(reading.notes or reading.dropped for reading in readings)


# --- JSON ---


@pytest.mark.parametrize(
    "name, content",
    [
        ("a.json", [{"input": a, "output": b} for a, b in HOT]),
        ("a.json", [{"output": b, "input": a} for a, b in HOT]),
        ("a.json", [list(pair) for pair in HOT]),
        ("a.json", dict(HOT)),
        ("a.json", {"input": ["hot", "big"], "output": ["cold", "small"]}),
        ("a.json", {"pairs": [list(pair) for pair in HOT]}),
        ("a", [list(pair) for pair in HOT]),
        ("a.jsonl", [list(pair) for pair in HOT]),
    ],
)
def test_json(tmp_path, name, content):
    (tmp_path / name).write_text(json.dumps(content))
    found, said = plain(read_pairs, tmp_path / name)
    assert tuples(found.pairs) == HOT and said == ""


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.json"])
def test_json_lines(tmp_path, name):
    lines = [json.dumps({"word": a, "opposite": b}) for a, b in HOT]
    (tmp_path / name).write_text(f"\n{lines[0]}\n\n \n{lines[1]}\n")
    assert tuples(read_pairs(tmp_path / name).pairs) == HOT
    (tmp_path / "one.jsonl").write_text('["hot", "cold"]')
    assert tuples(read_pairs(tmp_path / "one.jsonl").pairs) == HOT[:1]


@published
@pytest.mark.parametrize("pattern, n_files", [("todd2024/*.json", 27), ("lre/data/*/*.json", 47)])
def test_published_files_are_read_as_they_are(pattern, n_files):
    """Against the standard library's JSON: the first output of every input, words trimmed."""
    files = sorted(DATA.glob(pattern))
    assert len(files) == n_files
    for file in files:
        content = json.loads(file.read_text(encoding="utf-8"))
        records = content if isinstance(content, list) else content["samples"]
        names = ("input", "output") if isinstance(content, list) else ("subject", "object")
        expected = {}
        for record in records:
            expected.setdefault(*(record[name].strip() for name in names))
        reading = reading_of(file)
        assert tuples(reading.relation.pairs) == list(expected.items()), file
        assert len(reading.dropped) == len(records) - len(expected)
        assert reading.relation.category == ("" if isinstance(content, list) else file.parent.name)


# --- spreadsheets ---


def workbook(path, *sheets, formats=()):
    """A spreadsheet of (title, rows)."""
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    book.remove(book.active)
    for title, rows in sheets:
        sheet = book.create_sheet(title)
        for row in rows:
            sheet.append(row)
        for cell, how in formats:
            sheet[cell].number_format = how
    book.save(path)
    return path


@pytest.mark.parametrize(
    "rows, pairs",
    [
        (HOT, HOT), ([("input", "output"), *HOT], HOT), ([("output", "input"), ("cold", "hot")], HOT[:1]),
        ([(None, None, None), (None, "hot", "cold"), (None, "big", "small")], HOT),
        ([("seven", 7), ("eight", 8)], [("seven", "7"), ("eight", "8")]),
        ([(None, "input", "output"), (0, "hot", "cold"), (1, "big", "small")], HOT),
    ],
)  # fmt: skip
def test_sheets(tmp_path, rows, pairs):
    path = workbook(tmp_path / "a.xlsx", ("Words", rows), ("Empty", []))
    assert tuples(plain(read_pairs, path)[0].pairs) == pairs
    path.rename(tmp_path / "a.csv")  # told by its contents
    assert tuples(plain(read_pairs, tmp_path / "a.csv")[0].pairs) == pairs


@pytest.mark.parametrize(
    "rows, formats, message",
    [
        ([("hot", "=A1")], (), "sheet 'S', cell B1: holds a formula without a stored value; open the file in a spread"),
        ([("half", 0.5)], (), "sheet 'S', cell B1: expected a word, got the number 0.5; format the column as text"),
        ([("seven", 7)], [("B1", "0000")], "sheet 'S', cell B1: expected a word, got the number 7 in the format"),
        ([("day", pd.Timestamp("2020-01-02").to_pydatetime())], (), "sheet 'S', cell B1: expected a word, got a"),
        ([("x", "y"), ("t", True)], (), "sheet 'S', cell B2: expected a word, got the truth value TRUE"),
        ([("a", "#N/A")], (), "sheet 'S', cell B1: expected a word, got the error #N/A"),
        ([("hot", "cold"), ("big", None)], (), "sheet 'S', row 2: expected two words, but the output is missing"),
        ([("a", "b", "c")], (), "sheet 'S', cell A1: expected a sheet of two columns, input and output"),
        ([], (), "expected rows of two words, got an empty workbook."),
        ([("=1", "=2")], (), "its formulas have no stored values"),
    ],
)  # fmt: skip
def test_cells_whose_text_cannot_be_told_are_refused_by_name(tmp_path, rows, formats, message):
    path = workbook(tmp_path / "a.xlsx", ("S", rows), formats=formats)
    with pytest.raises(ValueError, match=re.escape(message)) as refusal:
        read_pairs(path)
    assert str(refusal.value).startswith("a.xlsx")


def test_several_sheets_damaged_ones_and_none_installed(tmp_path, monkeypatch):
    path = workbook(tmp_path / "a.xlsx", ("A", HOT), ("B", [("x", "y")]))
    with pytest.raises(
        ValueError, match=r"a.xlsx: expected one sheet with pairs, got 2: 'A', 'B'; keep one in the file"
    ):
        read_pairs(path)
    assert tuples(read_pairs(path, sheet="B").pairs) == [("x", "y")]
    with pytest.raises(ValueError, match=r"a.xlsx: no sheet 'C' with anything in it; there are 'A', 'B'"):
        read_pairs(path, sheet="C")
    (tmp_path / "t.csv").write_text("a,b\n")
    with pytest.raises(ValueError, match=r"t.csv: sheet='A', but only a spreadsheet has sheets"):
        read_pairs(tmp_path / "t.csv", sheet="A")
    (tmp_path / "b.xlsx").write_bytes(path.read_bytes()[:300])
    with pytest.raises(ValueError, match=r"b.xlsx: not an .xlsx spreadsheet, or a damaged one"):
        read_pairs(tmp_path / "b.xlsx")
    (tmp_path / "c.xls").write_bytes(b"\xd0\xcf\x11\xe0old")
    with pytest.raises(
        ValueError, match=r"c.xls: an old or encrypted spreadsheet; save it as .xlsx without a password"
    ):
        read_pairs(tmp_path / "c.xls")
    monkeypatch.setattr(fvlens.relations._sheets, "_MOST_UNPACKED", 100)
    with pytest.raises(ValueError, match=r"a.xlsx: expected a spreadsheet of at most 100 bytes unpacked"):
        read_pairs(path)
    monkeypatch.setitem(__import__("sys").modules, "openpyxl", None)
    with pytest.raises(ValueError, match=r"not installed: pip install 'fvlens\[sheets\]', or save the sheet as CSV"):
        read_pairs(path)


# --- what is in the way of a file ---


def test_what_is_no_regular_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.csv")
    (tmp_path / "loop.csv").symlink_to(tmp_path / "loop.csv")
    (tmp_path / "gone.csv").symlink_to(tmp_path / "nothing")
    with (tmp_path / "huge.csv").open("wb") as file:
        file.truncate(10**10)
    (tmp_path / "folder.csv").mkdir()
    for name, message in {
        "pipe.csv": "pipe.csv: expected a regular file, got a pipe, a socket or a device.",
        "loop.csv": "is a link that leads nowhere, or in a circle; give the file itself.",
        "gone.csv": "is a link that leads nowhere, or in a circle",
        "huge.csv": "huge.csv: expected a file of word pairs of at most 50000000 bytes, got 10000000000.",
        "folder.csv": "is a folder with 0 files of word pairs; give one of them.",
        "none.csv": "no file of word pairs at",
    }.items():
        with pytest.raises(ValueError, match=re.escape(message)):
            load_relation(tmp_path / name)
    for name, message in {
        "/dev/zero": "zero: expected a regular file, got a pipe, a socket or a device.",
        "x" * 5000: "(File name too long)",
        "a\0b": "no file 'a\\x00b', and no relation named",
        "": "expected a file of word pairs, got the path ''.",
        "antonyms": "no file 'antonyms', and no relation named 'antonyms' among the",
        "./antonyms": "no file of word pairs at antonyms.",
        "~nobody-of-this-name/a.csv": "no file of word pairs at",
    }.items():
        with pytest.raises(ValueError, match=re.escape(message)):
            load_relation(name)


# --- many relations ---


def test_folders_are_many_relations(tmp_path):
    (tmp_path / "b.csv").write_text("hot,cold\n")
    (tmp_path / "a.jsonl").write_text('["big", "small"]\n')
    (tmp_path / "LICENSE").write_text("mine")
    (tmp_path / ".hidden.csv").write_text("no")
    (tmp_path / "inner.csv").mkdir()
    assert [one.name for one in as_relations(tmp_path)] == ["a", "b"]
    assert [one.name for one in as_relations(["plural", str(tmp_path), Relation("r", (Pair("x", "y"),))])] == [
        "plural", "a", "b", "r"
    ]  # fmt: skip
    with pytest.raises(ValueError, match="is a folder with 2 files of word pairs; give one of them"):
        load_relation(tmp_path)
    (tmp_path / "a.csv").write_text("hot,cold\n")
    with pytest.raises(
        ValueError, match=r"two relations are named 'a'; names must be unique \(.*a.csv and .*a.jsonl\)"
    ):
        as_relations(tmp_path)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no files of word pairs in this folder \(.tsv, .csv"):
        as_relations(tmp_path / "sub" / "empty")
    (tmp_path / "sub" / "empty" / "a.csv").write_text("a,b")
    with pytest.raises(ValueError, match="there are some in empty below it"):
        as_relations(tmp_path / "sub")


def test_what_is_no_relations_is_refused(unchecked):
    for bad, message in [
        ("antonym", "expected a sequence of relations, got a single one; put it into a list."),
        (load_relation("antonym"), "expected a sequence of relations, got a single one"),
        ([], "expected at least one relation, got none; see fvlens.list_relations()."),
        ([("hot", "cold")], "expected relations, names, files or folders, got ('hot', 'cold')"),
        ({"antonym": 1}, "expected a list of relations, names, files or folders"),
        (None, "expected a list of relations, names, files or folders, got None"),
        (["antonym", "antonym"], "two relations are named 'antonym'"),
    ]:
        with pytest.raises(ValueError, match=re.escape(message)):
            as_relations(bad)
    with pytest.raises(ValueError, match="no folder of word pairs at nowhere"):
        read_folder("nowhere")


# --- words and names ---


def test_lists_of_words():
    assert words_of(["a ", 7], "choices") == ("a", "7")
    for bad, message in [
        ("ab", "choices: expected a list of words, got 'ab'; put them into a list."),
        (None, "choices: expected a list of words, got None"), ({"a"}, "choices: expected a list of words"),
        (["a", None], "choices: word 2 is missing (None)"), (["a", ""], "choices: word 2 is blank"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=re.escape(message)):
            words_of(bad, "choices")


@pytest.mark.parametrize("name, safe", [("a b/c", "a-b-c"), ("../../x", "x"), ("", "pairs"), ("Köln1", "Köln1")])
def test_names_that_can_be_part_of_a_files_name(name, safe):
    assert plain_name(name) == safe
