"""Studies that need no model, in a module that other processes import. Files in the folder MOOD say what cells do."""

import dataclasses
import os
import time
from pathlib import Path

import pandas as pd

from fvlens.studies import Cell, Loaded, Study
from fvlens.studies._tables import markdown, means_over_relations

RELATIONS = ("antonym", "plural", "animal-german")


def mood(cell):
    """What the test asks of a cell, if anything."""
    file = Path(os.environ.get("MOOD", "/nonexistent")) / cell.relation
    return file.read_text() if file.exists() else ""


def cells(settings):
    names = settings.relations or RELATIONS
    return [
        Cell(settings.model, name, settings.seed, settings.threads, (("step", n),)) for n in (1, 2) for name in names
    ]


def load(cell):
    if cell.model == "missing":
        raise ValueError("no such model")
    return Loaded(len(cell.model), {"weights": f"{len(cell.model):016x}", "dtype": "float32"})


def run(cell, model):
    asked = mood(cell)
    if asked == "fail":
        raise RuntimeError("it\nbroke")
    if asked == "interrupt":
        raise KeyboardInterrupt
    if asked == "hang":
        (Path(os.environ["MOOD"]) / "hanging").touch()
        time.sleep(300)
    with open(Path(os.environ["MOOD"]) / "runs", "a") as file:
        file.write(f"{cell}\n")
    seed = cell.seed + 1
    return [
        {"kind": kind, "score": (len(cell.relation) * seed) ** 0.5 / cell["step"] / n, "odd": float("nan")}
        for n, kind in enumerate(("near", "far"), 1)
    ]


def tables(rows):
    return {"means": means_over_relations(rows, ("step", "kind"), ("score",))}


def text(tables):
    return markdown(tables["means"], {"step": "step", "kind": "kind"}, {"score": ("score", 3)})


def figures(rows):
    import plotly.graph_objects as go

    frame = pd.DataFrame(rows)
    return {"scores": go.Figure(go.Bar(x=frame.relation, y=frame.score), layout={"title": "Scores"})}


FAKE = Study("fake", "a study of nothing", 1, cells, run, tables, text, figures, load)


class Root:
    """What cells of SHARING need of one another: the square root of a length."""

    def __init__(self, value):
        self.value = value

    def save(self, path):
        path.write_text(f"root {self.value!r}")
        return path

    @classmethod
    def load(cls, path):
        if not path.exists() or not path.read_text().startswith("root "):
            raise ValueError("no root")
        return cls(float(path.read_text().removeprefix("root ")))


def make_root(name):
    with open(Path(os.environ["MOOD"]) / "made", "a") as file:
        file.write(f"{name}\n")
    return {"root": Root(len(name) ** 0.5)}


def run_sharing(cell, model, shelf):
    """Rows of the relation's own root and that of the next one."""
    rows = run(cell, model)
    following = RELATIONS[(RELATIONS.index(cell.relation) + 1) % len(RELATIONS)]
    for row, name in zip(rows, (cell.relation, following), strict=True):
        whose = dataclasses.replace(cell, relation=name, varies=(("part", "root"),))
        row["score"] = shelf.get(whose, ["root"], Root.load, lambda name=name: make_root(name))["root"].value
    return rows


def excerpt(tables):
    return f"{len(tables['means'])} means"


SHARING = dataclasses.replace(FAKE, name="sharing", run=run_sharing, shares=True, excerpts={"short one": excerpt})
