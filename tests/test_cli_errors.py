"""What a command guesses it says; what an error advises can be done where it is said."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from commands import cells
from runs import small_run

import fvlens
from fvlens import FunctionVector, Head
from fvlens.cli._errors import in_options
from fvlens.files import as_path, path_hint
from fvlens.models import fingerprint
from fvlens.report import Loading, RunOptions, read_run, rerun, run_relation, write_run
from fvlens.types import as_heads
from fvlens.universal import name_heads

# --- arguments of Python become options ---


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("n_heads=33: expected at most 16", "--n-heads 33: expected at most 16"),
        ("layer=4: expected 0..3.", "--layer 4: expected 0..3."),
        ("scale=1.5.", "--scale 1.5."),
        ("use backend='bridge', or path=None.", "use --backend bridge, or path=None."),
        ("revision='a b' is", "--revision 'a b' is"),
        ("score all the same with allow_leak=True.", "score all the same with --allow-leak."),
        ("say it with --base (in Python, base=).", "say it with --base."),
        ("or with --trust (in Python, trust=True)", "or with --trust"),
        ("keep one (in Python, read_pairs('a', sheet='b') takes one).", "keep one."),
        ("leave revision out.", "leave --revision out."),
        ("leave it out; leave where out.", "leave it out; leave where out."),
        ("see fvlens.list_relations().", "see `fvlens relations`."),
        ("no file /data/layer=3/x and --layer=3", "no file /data/layer=3/x and --layer=3"),
        ("labels={other}", "--labels {other}"),
    ],
)
def test_arguments_become_options(text, expected):
    names = {"n_heads", "layer", "scale", "backend", "revision", "allow_leak", "base", "trust", "labels"}
    assert in_options(text, names) == expected


def test_errors_of_commands_name_options(refused, tmp_path):
    assert "--recheck 3 runs the best heads of a screen again; --method exact needs none" in refused(
        "heads", "antonym", "--recheck", 3, "--n-prompts", 4, "--n-corrupted", 2, "--quiet"
    )
    assert "leave --revision out" in refused("heads", "antonym", "--model", tmp_path, "--revision", "main")
    assert "see `fvlens relations`." in refused("run", "qqqqqqqq")


# --- guesses ---


def test_a_word_or_text_is_said_and_an_option_decides(call, saved):
    def asked(prompt, *options):
        code, out, err = call("inject", saved, prompt, "--model", "rel-small", *options)
        assert code == 0
        return out.splitlines()[0], err

    bare, raw = r"prompt 'Q: hot\nA:'", "prompt 'hot'"
    assert asked("hot") == (bare, "the prompt 'hot' is a word, asked in template qa; --raw takes it as text\n")
    assert asked("hot", "--word") == (bare, "")
    assert asked("hot", "--raw") == (raw, "")
    line, err = asked("hot water")
    assert (line, err) == (
        "prompt 'hot water'", "the prompt 'hot water' is text, as it is; --word asks it in template qa\n"
    )  # fmt: skip
    assert asked("hot water", "--word") == (r"prompt 'Q: hot water\nA:'", "")


def test_a_name_that_is_a_relation_and_a_file_is_said(call, monkeypatch, tmp_path):
    monkeypatch.setattr("fvlens.report._settings.load_model", lambda *args, **how: 1 / 0)
    monkeypatch.chdir(tmp_path)
    Path("antonym").write_text("hot\tcold\nbig\tsmall\n")
    assert call("heads", "antonym")[2].splitlines()[0] == (
        "antonym is the library's relation; what is here under that name is given as ./antonym"
    )
    assert call("heads", "./antonym")[2].splitlines()[0] == "antonym: a file of 2 word pairs, the relation antonym"
    assert "library" not in call("heads", "plural")[2]


def test_a_vector_can_be_used_on_another_model_if_that_is_asked_for(call, refused, model, tmp_path):
    """A file that says it was made on other weights, of the same shape."""
    mark = dataclasses.replace(fingerprint(model), weights="0" * 16)
    vector = FunctionVector(
        vector=torch.ones(model.cfg.d_model), layer=1, heads=(), relation="antonym", fingerprint=mark
    )
    file = vector.save(tmp_path / "v.safetensors")
    assert refused("inject", file, "hot", "--word").endswith(", or use it all the same with --no-check.")
    code, out, err = call("inject", file, "hot", "--word", "--no-check")
    assert code == 0 and "was made on model 'rel-small', not on this one (file / model: weights: " in err
    with fvlens.inject(model, vector, check=False):
        ids = [0, *model.tokenizer("Q: hot\nA:", add_special_tokens=False)["input_ids"]]
        assert model.tokenizer.bos_token_id == 0
        best = int(model(torch.tensor([ids]))[0, -1].argmax())
    assert cells(out)[2][2].startswith(repr(model.tokenizer.decode([best])))


# --- paths ---


def test_home_folders_are_understood(call, monkeypatch, tmp_path, model):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "pairs.csv").write_text("hot,cold\nbig,small\n")
    assert fvlens.load_relation("~/pairs.csv").outputs == ("cold", "small")
    file = small_run(model).vector.save("~/v.safetensors")
    assert (tmp_path / "v.safetensors").is_file()
    assert FunctionVector.load("~/v.safetensors").layer == FunctionVector.load(file).layer
    assert call("inject", "~/v.safetensors", "hot")[0] == 0
    assert "~/none: there" not in call("inject", "~/none", "hot")[2]
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ValueError, match=rf"folder {tmp_path / 'nothing'} holds no config\.json"):
        fvlens.load_model("~/nothing")
    with pytest.raises(ValueError, match=r"^~nobody-at-all/x: there is no such home folder; write the whole path"):
        as_path("~nobody-at-all/x")


@pytest.mark.parametrize(
    ("path", "said"),
    [
        (r"C:\Users\me\pairs.csv", "under WSL it is /mnt/c/Users/me/pairs.csv."),
        ("D:/data/pairs.csv", "under WSL it is /mnt/d/data/pairs.csv."),
        ("C:Usersmepairs.csv", "in quotes if a shell took its backslashes away; under WSL it begins with /mnt/c/."),
    ],
)
def test_a_path_of_windows_elsewhere_is_told_what_to_do(refused, path, said):
    for message in (refused("run", path), refused("inject", path, "hot"), refused("heads", "antonym", "--model", path)):
        assert "It is a path of Windows, and this system has other ones" in message
        assert message.endswith(said)
    assert path_hint("/a/C:/x") == path_hint("http://x") == path_hint("pairs.csv") == ""


# --- heads by name ---


def test_heads_may_be_named():
    assert as_heads(["L1H2", (0, 3), Head(2, 1), " l0h1 "], 3, 4) == [(1, 2), (0, 3), (2, 1), (0, 1)]
    assert as_heads("L1H2, L0H3", 3, 4) == [(1, 2), (0, 3)]
    for wrong in ("L1", "1H2", "L1H2x", "", "L1H2 L0H3", "L1H\N{SUPERSCRIPT TWO}"):
        with pytest.raises(
            ValueError, match=r"expected \(layer, head\) pairs of integers, got .*; by name a head is 'L1H2'\."
        ):
            as_heads([wrong], 3, 4)
    with pytest.raises(ValueError, match=r"heads: L3H0 does not exist: the model has layers 0\.\.2 and heads 0\.\.3"):
        as_heads(["L3H0"], 3, 4)
    with pytest.raises(ValueError, match="heads: L1H2 is listed twice"):
        as_heads(["L1H2", (1, 2)], 3, 4)


TINY = RunOptions(n_shots=2, n_prompts=4, n_corrupted=3, n_heads=3, n_random=2, n_others=0, epochs=0)


def test_a_run_takes_heads_by_name(call, refused, tmp_path):
    args = (
        "run",
        "antonym",
        "--n-prompts",
        4,
        "--n-shots",
        2,
        "--n-others",
        0,
        "--n-random",
        1,
        "--epochs",
        0,
        "--quiet",
    )
    code, out, err = call(*args, "--heads", "L1H2,l0h3", "--out", tmp_path)
    assert (code, err) == (0, "") and out.startswith("2 heads named one by one\n")
    assert "function vector, 2 heads that were named" in " ".join(out.split())
    read = json.loads((tmp_path / "results.json").read_text())
    assert (read["heads_source"], read["options"]["heads_file"], read["data"]["heads_file"]) == ("named", None, None)
    assert [entry[:2] for entry in read["heads"]] == [[1, 2], [0, 3]]
    assert "Named one by one; none was ranked in this run." in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "heads: L9H0 does not exist" in refused(*args, "--heads", "L9H0", "--out", tmp_path)
    assert "no file of heads at L1H2,H3" in refused(*args, "--heads", "L1H2,H3", "--out", tmp_path)


def test_a_run_with_named_heads_can_be_repeated(tiny, tmp_path):
    heads = name_heads("L1H2,L0H3", tiny)
    result = run_relation(tiny, fvlens.load_relation("antonym"), options=TINY, heads=heads, progress=False)
    write_run(result, tmp_path / "first")
    assert read_run(tmp_path / "first").heads == heads
    done = rerun(tmp_path / "first", model=tiny, loading=Loading(), progress=False)
    assert done.agrees and done.differences == ()
    with pytest.raises(ValueError, match="heads: expected at least one head, such as L1H2, got none"):
        name_heads([], tiny)
