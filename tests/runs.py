"""Small runs of the whole chain, and how their numbers and pages are read: for tests of report, commands and page."""

import dataclasses
import functools
import hashlib
from collections import defaultdict
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

import fvlens
from fvlens.prompts import Prompts
from fvlens.report import (
    RunOptions,
    RunResult,
    run_relation,
    write_report,
)

SMALL = RunOptions(n_prompts=20, n_corrupted=8, n_random=2, n_others=1, both_labels=True)


@functools.cache
def small_run(model) -> RunResult:
    """The run of :data:`SMALL` on antonym, made once per model and session."""
    return run_relation(model, fvlens.load_relation("antonym"), options=SMALL, progress=False)


TINY = RunOptions(n_shots=2, n_prompts=4, n_corrupted=3, n_heads=3, n_random=2, n_others=0, epochs=2)


FILES = (
    "vector.safetensors", "vector-finetuned.safetensors", "heads.csv", "effects.csv", "answers.csv", "results.json",
    "report.html",
)  # fmt: skip


@dataclasses.dataclass
class Call:
    """One call of build_prompts: from which module, and what it made."""

    module: str
    prompts: Prompts


def right(evaluation):
    """1 where the predicted word is the answer, 0 elsewhere. All answers of the library are one token here."""
    pairs = zip(evaluation.predictions, evaluation.queries, strict=True)
    return np.array([float(prediction == pair.output) for prediction, pair in pairs])


def of_kind(result, kind):
    """Score of each query, averaged over all single vectors of one kind of control."""
    rows = [row for row in result.controls.rows if row.kind == kind]
    return np.mean([right(one) for row in rows for one in row.evaluations], axis=0)


def bootstrap(scores):
    """95% interval of the mean, by another generator and more resamples."""
    rng = np.random.default_rng(1)
    means = rng.choice(scores, (20_000, len(scores))).mean(axis=1)
    return np.quantile(means, [0.025, 0.975])


def ranked(effects, n):
    """The first n heads with their mean effects and standard errors."""
    cie = effects.cie.double().numpy()
    mean, error = cie.mean(axis=0), cie.std(axis=0, ddof=1) / len(cie) ** 0.5
    order = np.argsort(-mean.ravel(), kind="stable")[:n]
    cells = [divmod(int(i), mean.shape[1]) for i in order]
    return [[layer, head, mean[layer, head], error[layer, head]] for layer, head in cells]


def best(sweep, scales=None):
    """Layer and scale of the most right answers; ties by probability, then by |scale - 1|, then the lower layer."""

    def worse(place):
        one = sweep.at(*place)
        return -right(one).sum(), -one.probabilities.double().mean().item(), abs(place[1] - 1), place[0]

    return min(((layer, scale) for layer in sweep.layers for scale in scales or sweep.scales), key=worse)


def file_hash(name):
    """Hash of a relation's pairs, from its file."""
    text = (Path(fvlens.__file__).parent / "relations" / "data" / f"{name}.tsv").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def same(got, expected):
    """Equal, floats up to rounding, at any depth."""
    if isinstance(expected, dict):
        return got.keys() == expected.keys() and all(same(got[key], expected[key]) for key in expected)
    if isinstance(expected, list):
        return len(got) == len(expected) and all(map(same, got, expected))
    if isinstance(expected, float):
        return got == pytest.approx(expected, abs=1e-6)
    return type(got) is type(expected) and got == expected


class Page(HTMLParser):
    """A page's tags, its texts by tag, and its tables by id."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.texts, self.tables, self.styles = [], defaultdict(list), {}, []
        self._open, self._rows = [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append((tag, attrs))
        self.styles.append(attrs.get("style") or "")
        if tag == "table":
            self._rows = self.tables.setdefault(attrs.get("id"), [])
        elif tag == "tr":
            self._rows.append([])
        if tag in ("title", "h1", "h2", "p", "td", "th", "code", "script", "style"):
            self._open.append((tag, []))

    def attributes(self, tag, name):
        """One attribute of every element of a kind, None where it is not given."""
        return [attrs.get(name) for found, attrs in self.tags if found == tag]

    def handle_data(self, data):
        for _, parts in self._open:
            parts.append(data)

    def handle_endtag(self, tag):
        if self._open and self._open[-1][0] == tag:
            text = "".join(self._open.pop()[1]).strip()
            self.texts[tag].append(text)
            if tag in ("td", "th"):
                self._rows[-1].append(text)


def page_of(result, tmp_path):
    return Page(write_report(tmp_path / "page.html", result).read_text(encoding="utf-8"))
