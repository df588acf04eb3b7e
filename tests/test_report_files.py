"""The files of a run, and what they say that its numbers depend on."""

import hashlib
import os
import platform
import re

import pytest
import torch
from runs import FILES, file_hash

import fvlens
from fvlens import FunctionVector, report
from fvlens.report import (
    Loading,
    write_report,
    write_run,
)

# --- provenance ---


def test_provenance_names_what_the_numbers_depend_on(result, numbers, model):
    source = result.provenance
    assert numbers["versions"].keys() == {
        "fvlens", "torch", "transformer-lens", "transformers", "tokenizers", "numpy", "python"
    }  # fmt: skip
    lines = []
    for name in fvlens.list_relations():
        lines.append(f"{name}\t{fvlens.load_relation(name).family}\t{file_hash(name)}")
    assert source.library_hash == hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
    assert source.platform["threads"] == torch.get_num_threads()
    assert source.platform["device"] == "cpu"
    assert source.platform["system"] == platform.platform()
    assert source.platform["processor"]
    assert source.platform["model_class"] == type(model).__name__
    assert numbers["fingerprint"]["revision"] == "local"
    assert re.fullmatch("[0-9a-f]{16}", source.code_hash)


def test_code_hash_changes_with_any_file_of_the_package(model, monkeypatch, tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.py").write_text("1")
    (tmp_path / "sub" / "b.py").write_text("2")
    (tmp_path / "data.txt").write_text("3")
    monkeypatch.setattr(report._provenance.resources, "files", lambda name: tmp_path)
    digest = lambda: report.Provenance.of(model, {}).code_hash  # noqa: E731
    first = digest()
    (tmp_path / "data.txt").write_text("4")
    assert digest() == first
    (tmp_path / "sub" / "b.py").write_text("3")
    assert digest() != first
    (tmp_path / "sub" / "b.py").write_text("2")
    assert digest() == first
    (tmp_path / "a.py").rename(tmp_path / "c.py")
    assert digest() != first


@pytest.mark.parametrize(
    ("loading", "expected"),
    [
        (Loading(), ("rel-small", {})),
        (Loading("x", device="cpu", revision="main"), ("x", {"device": "cpu", "revision": "main"})),
        (
            Loading("y", dtype="bfloat16", backend="bridge"),
            ("y", {"dtype": torch.bfloat16, "backend": "bridge"}),
        ),
    ],
)
def test_loading_passes_on_what_was_given_and_nothing_else(monkeypatch, loading, expected):
    monkeypatch.setattr(report._settings, "load_model", lambda name, **options: (name, options))
    assert loading.load() == expected


# --- files ---


def test_files_are_written_beside_what_is_there(result, tmp_path):
    folder = tmp_path / "new" / "folder"
    folder.mkdir(parents=True)
    (folder / "notes.txt").write_text("mine")
    (folder / "results.json").write_text("old")
    (folder / "sub").mkdir()
    files = write_run(result, folder)
    assert [file.name for file in files] == list(FILES)
    assert {file.name for file in folder.iterdir()} == {"notes.txt", "sub", *(file.name for file in files)}
    assert (folder / "notes.txt").read_text() == "mine"
    loaded = FunctionVector.load(folder / "vector.safetensors")
    assert torch.equal(loaded.vector, result.vector.vector)
    assert (loaded.layer, loaded.heads, loaded.relation) == (result.vector.layer, result.vector.heads, "antonym")


def test_missing_folders_are_made(tiny_result, tmp_path):
    files = write_run(tiny_result, str(tmp_path / "a" / "b"))
    assert all(file.is_file() and file.parent == tmp_path / "a" / "b" for file in files)


def test_files_are_replaced_at_once(tiny_result, tmp_path, monkeypatch):
    for name in FILES:
        (tmp_path / name).write_text(f"old {name}")
    readers = {name: (tmp_path / name).open() for name in ("results.json", "report.html")}
    try:
        write_run(tiny_result, tmp_path)
        for name, reader in readers.items():  # whoever had the old file open still reads all of it
            assert reader.read() == f"old {name}"
    finally:
        for reader in readers.values():
            reader.close()
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def broken(*args):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises(OSError, match="disk full"):
        write_run(tiny_result, tmp_path)
    with pytest.raises(OSError, match="disk full"):
        write_report(tmp_path / "report.html", tiny_result)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
