"""Where results will go is checked before the work: no model is loaded for a destination that takes nothing."""

import os
import stat
from pathlib import Path

import pytest
from runs import small_run

from fvlens.files import check_destination
from fvlens.report import write_run


@pytest.fixture
def no_model(monkeypatch):
    """Loading a model is an error of another kind than those that are expected."""

    def load(*args, **how):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("fvlens.report._settings.load_model", load)


@pytest.fixture
def analogies(tmp_path):
    file = tmp_path / "questions.txt"
    file.write_text(": capitals\nAthens Greece Oslo Norway\n")
    return file


COMMANDS = {
    "run": ("run", "antonym"),
    "study": ("study", "layer", "plural"),
    "compare": ("compare", "plural"),
    "sensitivity": ("sensitivity",),
    "analogies": ("analogies", "FILE"),
}
"""Those that write a folder."""


def of(name, file):
    return [str(file) if part == "FILE" else part for part in COMMANDS[name]]


@pytest.mark.parametrize("name", COMMANDS)
def test_a_folder_that_takes_nothing_is_refused_before_a_model_is_loaded(refused, no_model, analogies, tmp_path, name):
    args = of(name, analogies)
    file = tmp_path / "file"
    file.write_text("mine")
    assert refused(*args, "--out", file) == f"fvlens: --out {file} is a file; give a folder."
    assert (
        refused(*args, "--out", file / "in") == f"fvlens: --out {file / 'in'}: {file} is a file; choose another folder."
    )
    wanted = "is the name of a file, and a folder is written; give a name without .json."
    assert refused(*args, "--out", tmp_path / "r.json") == f"fvlens: --out {tmp_path / 'r.json'} {wanted}"
    message = refused(*args, "--out", "/proc/fvlens/results")
    assert message.startswith("fvlens: --out /proc/fvlens/results cannot be written (")
    assert message.endswith("); choose another place.")
    assert file.read_text() == "mine" and {one.name for one in tmp_path.iterdir()} == {"file", analogies.name}


@pytest.mark.parametrize(
    ("args", "suffix"), [(("universal", "antonym"), ".json"), (("compose", "antonym", "plural"), ".safetensors")]
)
def test_a_file_that_cannot_be_written_is_refused_before_a_model_is_loaded(refused, no_model, tmp_path, args, suffix):
    name = f"made{suffix}"
    assert f"--out {tmp_path} is a folder; give the name of a file, such as " in refused(*args, "--out", tmp_path)
    wanted = f"--out {tmp_path / 'no' / name}: folder {tmp_path / 'no'} does not exist; create it first."
    assert wanted in refused(*args, "--out", tmp_path / "no" / name)
    assert f"expected the name of a {suffix} file, such as made{suffix}." in refused(
        *args, "--out", tmp_path / "made.html"
    )
    assert f"--out /proc/{name} cannot be written (" in refused(*args, "--out", f"/proc/{name}")
    assert list(tmp_path.iterdir()) == []


def test_what_universal_writes_beside_its_file_is_checked_too(refused, no_model, tmp_path):
    (tmp_path / "heads-study").write_text("mine")
    message = refused("universal", "antonym", "--out", tmp_path / "heads.json")
    assert message.endswith(f"beside --out, {tmp_path / 'heads-study'} is a file; give a folder.")
    (tmp_path / "heads-study").unlink()
    (tmp_path / "heads.html").mkdir()
    message = refused("universal", "antonym", "--out", tmp_path / "heads.json")
    assert f"the figure beside --out, {tmp_path / 'heads.html'} is a folder" in message


def test_the_second_run_of_a_rerun_is_checked_too(refused, no_model, model, tmp_path):
    write_run(small_run(model), tmp_path / "first")
    (tmp_path / "file").write_text("mine")
    assert refused("rerun", tmp_path / "first", "--out", tmp_path / "file").endswith("file is a file; give a folder.")
    (tmp_path / "first-rerun").write_text("mine")
    assert refused("rerun", tmp_path / "first").endswith("first-rerun is a file; give a folder.")


def test_a_good_destination_is_as_it_was(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "old.json").write_text("old")
    assert check_destination("~/old.json", suffix=".json") == tmp_path / "old.json"
    assert check_destination(tmp_path / "no suffix", suffix=".json") == tmp_path / "no suffix"
    assert check_destination("~/new/folder") == tmp_path / "new" / "folder"
    (tmp_path / "strange.json").mkdir()
    assert check_destination(tmp_path / "strange.json") == tmp_path / "strange.json"  # a folder may be called so
    assert {one.name for one in tmp_path.iterdir()} == {"old.json", "strange.json"}
    assert (tmp_path / "old.json").read_text() == "old"
    monkeypatch.chdir(tmp_path)
    assert check_destination(Path("here")) == Path("here")


def test_a_folder_without_the_right_to_write_is_refused(tmp_path, monkeypatch):
    folder = tmp_path / "closed"
    folder.mkdir()
    folder.chmod(stat.S_IRUSR | stat.S_IXUSR)
    if os.geteuid() == 0:  # who may do everything is refused nothing
        make = os.open

        def no_right(path, *args, **how):
            if Path(path).parent == folder:
                raise PermissionError(13, "Permission denied")
            return make(path, *args, **how)

        monkeypatch.setattr(os, "open", no_right)
    with pytest.raises(ValueError, match=r"--out .*closed.new cannot be written \(Permission denied\); choose another"):
        check_destination(folder / "new")
    with pytest.raises(ValueError, match=r"--out .*h\.json cannot be written \(Permission denied\)"):
        check_destination(folder / "h.json", suffix=".json")
