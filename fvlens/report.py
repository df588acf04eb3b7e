"""The whole chain on one relation, its files, and a report page that works offline.

:func:`run_relation` goes from word pairs to a controlled function vector, :func:`write_run` writes
``vector.safetensors``, ``results.json`` and ``report.html``.
"""

import importlib.metadata
import json
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import jinja2
import torch

from fvlens.activations import HeadMeans, mean_head_activations
from fvlens.attribution import IndirectEffects, indirect_effects
from fvlens.evaluation import Controls, Evaluation, Kind, LayerSweep, controls, evaluate, layer_sweep
from fvlens.metrics import Interval
from fvlens.models import Fingerprint, fingerprint
from fvlens.prompts import build_prompts, get_template
from fvlens.relations import Relation, Split, list_relations, load_relation
from fvlens.vectors import FunctionVector, function_vector

if TYPE_CHECKING:
    import plotly.graph_objects as go

Ranking = Literal["permuted", "random"]
RANKINGS: tuple[Ranking, ...] = ("permuted", "random")
_Part = TypeVar("_Part", IndirectEffects, LayerSweep, Controls)
PACKAGES = ("fvlens", "torch", "transformer-lens", "transformers", "numpy")


@dataclass(frozen=True, slots=True)
class RunOptions:
    """Settings of a run.

    Attributes:
        seed: seed of everything random.
        n_shots: demonstrations in an in-context prompt.
        n_prompts: clean prompts behind the task means.
        n_corrupted: corrupted prompts behind each indirect effect.
        n_heads: heads in the function vector.
        labels: the corruption on which the saved vector's heads are ranked.
        layer: inject after this layer; by default the best one on the validation pairs.
        template: how prompts are written.
        n_random: random vectors of the same norm, and random sets of heads, among the controls.
        n_others: vectors of other relations (with disjoint outputs) among the controls.
    """

    seed: int = 0
    n_shots: int = 10
    n_prompts: int = 100
    n_corrupted: int = 25
    n_heads: int = 10
    labels: Ranking = "permuted"
    layer: int | None = None
    template: str = "qa"
    n_random: int = 10
    n_others: int = 3

    def __post_init__(self) -> None:
        if self.labels not in RANKINGS:
            raise ValueError(f"labels={self.labels!r}; expected one of {', '.join(RANKINGS)}.")
        for name in ("n_shots", "n_prompts", "n_heads", "n_random"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}.")
        if self.n_corrupted < 2:
            raise ValueError(
                f"n_corrupted: expected at least 2, got {self.n_corrupted}; a standard error needs two prompts."
            )
        if self.n_others < 0:
            raise ValueError(f"n_others: expected 0 or more, got {self.n_others}.")
        get_template(self.template)


@dataclass(frozen=True, slots=True)
class RunResult:
    """Everything a run found. ``vectors``, ``effects`` and ``sweeps`` are keyed by the ranking of the heads."""

    relation: str
    model_name: str
    options: RunOptions
    split: Split
    icl: Evaluation
    shuffled: Evaluation
    zero_shot: Evaluation
    steered: dict[Ranking, Evaluation]
    vectors: dict[Ranking, FunctionVector]
    effects: dict[Ranking, IndirectEffects]
    sweeps: dict[Ranking, LayerSweep]
    controls: Controls
    others: tuple[str, ...]
    decoded: tuple[tuple[str, float], ...]
    fingerprint: Fingerprint
    data_hash: str
    seconds: float
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def vector(self) -> FunctionVector:
        """The vector that is saved: heads ranked as ``options.labels`` says."""
        return self.vectors[self.options.labels]

    @property
    def n_test(self) -> int:
        """Number of test pairs."""
        return len(self.split.test)

    def control(self, kind: Kind) -> tuple[float, Interval]:
        """Mean top-1 and interval of one kind of control, ``"random_vector"`` or ``"other_relation"``."""
        return self.controls.summary(kind)

    def summary(self) -> list[tuple[str, float, Interval | None]]:
        """Rows (name, top-1, 95% interval) of the table that the command line and the report show."""
        shots = self.options.n_shots
        rows: list[tuple[str, float, Interval | None]] = [
            (f"{shots} clean demonstrations", self.icl.top1, self.icl.interval),
            (f"{shots} demonstrations, labels permuted", self.shuffled.top1, self.shuffled.interval),
            ("bare query", self.zero_shot.top1, self.zero_shot.interval),
        ]
        for ranking in RANKINGS:
            vector, score = self.vectors[ranking], self.steered[ranking]
            text = f"function vector, {len(vector.heads)} heads by {ranking} labels, layer {vector.layer}"
            rows.append((text, score.top1, score.interval))
        rows.append((f"{self.options.n_random} random vectors of the same norm", *self.control("random_vector")))
        if self.others:
            rows.append((f"vectors of other relations ({', '.join(self.others)})", *self.control("other_relation")))
        rows.append((f"{self.options.n_random} sets of random heads", *self.control("random_heads")))
        return rows


def find_heads(
    model: Any,
    split: Split,
    options: RunOptions,
    relation: str,
    generator: torch.Generator,
    *,
    rankings: Sequence[Ranking] = RANKINGS,
    progress: bool = True,
) -> tuple[HeadMeans, dict[Ranking, IndirectEffects]]:
    """Task means over clean prompts and the indirect effects under each corruption.

    Demonstrations come from the train pairs, queries from the validation pairs; test pairs take no part.
    """
    shared: dict[str, Any] = {
        "queries": split.valid,
        "n_shots": options.n_shots,
        "template": options.template,
        "relation": relation,
        "generator": generator,
    }
    clean = build_prompts(model, split.train, n_prompts=options.n_prompts, **shared)
    means = mean_head_activations(model, clean, progress=progress)
    effects = {}
    for ranking in rankings:
        corrupted = build_prompts(model, split.train, n_prompts=options.n_corrupted, labels=ranking, **shared)
        effects[ranking] = _finished(indirect_effects(model, corrupted, means, progress=progress))
    return means, effects


def _finished(part: _Part) -> _Part:
    """The part, unless it was interrupted: a run must not pass off a part of its prompts or layers as all of them."""
    if not part.complete:
        raise KeyboardInterrupt
    return part


def other_relations(relation: Relation, n: int, generator: torch.Generator) -> list[str]:
    """Up to n library relations of other families that share no output with this one, at random."""
    outputs = set(relation.outputs)
    names = [
        name
        for name in list_relations()
        if name != relation.name
        and load_relation(name).family != relation.family
        and not outputs & set(load_relation(name).outputs)
    ]
    order = torch.randperm(len(names), generator=generator).tolist()
    return [names[i] for i in order[:n]]


def run_relation(
    model: Any,
    relation: Relation,
    *,
    options: RunOptions | None = None,
    model_name: str | None = None,
    progress: bool = True,
) -> RunResult:
    """Find the heads of a relation, build its function vector, choose its layer on valid, and test it against controls.

    Args:
        model: the model.
        relation: the word pairs.
        options: settings; :class:`RunOptions` gives the defaults.
        model_name: name for the report; by default the model's own.
        progress: show progress bars.

    Returns:
        :class:`RunResult`. Test pairs are used for nothing but the final scores.

    Raises:
        ValueError: more heads wanted than half of the model's, a layer outside the model, or a relation too small.
    """
    began = time.monotonic()
    options = options or RunOptions()
    n_cells = model.cfg.n_layers * model.cfg.n_heads
    if options.n_heads > n_cells // 2:
        raise ValueError(
            f"n_heads={options.n_heads}: expected at most {n_cells // 2}, half of the model's {n_cells} heads, so that "
            "as many others can be drawn as a control."
        )
    if options.layer is not None and not 0 <= options.layer < model.cfg.n_layers:
        raise ValueError(f"layer={options.layer}: expected 0..{model.cfg.n_layers - 1}.")
    generator = torch.Generator().manual_seed(options.seed)
    split = relation.split(generator)
    means, effects = find_heads(model, split, options, relation.name, generator, progress=progress)
    common: dict[str, Any] = {"template": options.template, "relation": relation.name, "generator": generator}

    vectors: dict[Ranking, FunctionVector] = {}
    sweeps: dict[Ranking, LayerSweep] = {}
    for ranking in RANKINGS:
        vector = function_vector(
            model, means, heads=effects[ranking].top(options.n_heads), layer=options.layer or 0, seed=options.seed
        )
        sweeps[ranking] = _finished(layer_sweep(model, split.valid, vector, progress=progress, **common))
        layer = sweeps[ranking].best_layer if options.layer is None else options.layer
        vectors[ranking] = vector.at_layer(layer)

    others = []
    for name in other_relations(relation, options.n_others, generator):
        other = load_relation(name)
        other_means, other_effects = find_heads(
            model, other.split(generator), options, name, generator, rankings=(options.labels,), progress=progress
        )
        heads = other_effects[options.labels].top(options.n_heads)
        others.append(function_vector(model, other_means, heads=heads, layer=vectors[options.labels].layer))

    in_context: dict[str, Any] = {"demonstrations": split.train, "n_shots": options.n_shots, **common}
    vector = vectors[options.labels]
    table = _finished(
        controls(
            model,
            split.test,
            vector,
            others=others,
            means=means,
            n_random=options.n_random,
            progress=progress,
            **in_context,
        )
    )
    # the table's own scores, so that the page gives one number for one thing
    scores = {row.kind: row.evaluations[0] for row in table.rows}
    steered: dict[Ranking, Evaluation] = {
        ranking: scores["vector"]
        if ranking == options.labels
        else evaluate(model, split.test, vector=vectors[ranking], setting="zero_shot", **common)
        for ranking in RANKINGS
    }
    return RunResult(
        relation=relation.name,
        model_name=model_name or str(model.cfg.model_name),
        options=options,
        split=split,
        icl=scores["icl"],
        shuffled=scores["shuffled"],
        zero_shot=scores["no_vector"],
        steered=steered,
        vectors=vectors,
        effects=effects,
        sweeps=sweeps,
        controls=table,
        others=tuple(other.relation for other in others),
        decoded=tuple(vector.decode(model, k=10)),
        fingerprint=fingerprint(model),
        data_hash=relation.data_hash,
        seconds=time.monotonic() - began,
        versions={name: importlib.metadata.version(name) for name in PACKAGES} | {"python": platform.python_version()},
    )


def results_json(result: RunResult) -> dict[str, Any]:
    """The numbers of a run as plain JSON values."""

    def heads(effects: IndirectEffects) -> list[list[int | float]]:
        stderr, aie = effects.stderr, effects.aie
        return [[h.layer, h.head, float(aie[h]), float(stderr[h])] for h in effects.top(result.options.n_heads)]

    def span(interval: Interval) -> list[float]:
        return [interval.low, interval.high]

    main, random = result.steered["permuted"], result.steered["random"]
    random_vector, random_vector_interval = result.control("random_vector")
    other = result.control("other_relation") if result.others else None
    return {
        "relation": result.relation,
        "model": result.model_name,
        "seed": result.options.seed,
        "icl_top1": result.icl.top1,
        "zero_shot_top1": result.zero_shot.top1,
        "shuffled_top1": result.shuffled.top1,
        "fv_top1": main.top1,
        "fv_random_labels_top1": random.top1,
        "random_vector_top1": random_vector,
        "other_relation_top1": None if other is None else other[0],
        "random_heads_top1": result.control("random_heads")[0],
        "layer": result.vectors["permuted"].layer,
        "layer_random_labels": result.vectors["random"].layer,
        "heads": heads(result.effects["permuted"]),
        "heads_random_labels": heads(result.effects["random"]),
        "n_test": result.n_test,
        "intervals": {
            "level": main.interval.level,
            "icl_top1": span(result.icl.interval),
            "zero_shot_top1": span(result.zero_shot.interval),
            "shuffled_top1": span(result.shuffled.interval),
            "fv_top1": span(main.interval),
            "fv_random_labels_top1": span(random.interval),
            "random_vector_top1": span(random_vector_interval),
            "other_relation_top1": None if other is None else span(other[1]),
        },
        "icl_probability": result.icl.probability,
        "shuffled_probability": result.shuffled.probability,
        "other_relations": list(result.others),
        "path": result.effects["permuted"].path,
        "decoded": [list(pair) for pair in result.decoded],
        "options": asdict(result.options),
        "fingerprint": asdict(result.fingerprint),
        "data_hash": result.data_hash,
        "split_disjoint": result.split.disjoint,
        "versions": result.versions,
        "seconds": result.seconds,
    }


def write_run(result: RunResult, folder: str | Path) -> list[Path]:
    """Write ``vector.safetensors``, ``results.json`` and ``report.html``; other files in the folder stay.

    Returns:
        The files written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    vector = result.vector.save(folder / "vector.safetensors")
    numbers = _write_text(folder / "results.json", json.dumps(results_json(result), indent=2, allow_nan=False) + "\n")
    return [vector, numbers, write_report(folder / "report.html", result)]


def _write_text(path: Path, text: str) -> Path:
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return path


@dataclass(frozen=True, slots=True)
class _Sample:
    query: str
    expected: str
    answers: tuple[tuple[str, bool], ...]
    """Predicted word and whether it is right: without the vector, with it, with demonstrations."""


def _samples(result: RunResult, n: int = 15) -> list[_Sample]:
    shown = (result.zero_shot, result.steered[result.options.labels], result.icl)
    columns = [list(zip(one.predictions, one.correct.tolist(), strict=True)) for one in shown]
    return [
        _Sample(pair.input, pair.output, tuple((words[i][0].strip(), words[i][1]) for words in columns))
        for i, pair in enumerate(result.split.test[:n])
    ]


def write_report(path: str | Path, result: RunResult) -> Path:
    """Write the report page: one HTML file with its figures and scripts inside, readable without a network."""
    from fvlens import plots

    figures: list[tuple[str, str, go.Figure]] = []
    for ranking in RANKINGS:
        figures.append(
            (
                f"Which heads carry the task ({ranking} labels)",
                "Each cell is one head: how much the answer's probability rises on a corrupted prompt when the head's "
                "output is replaced by its mean over clean prompts. Hover for the value and its standard error.",
                result.effects[ranking].plot(n_top=result.options.n_heads),
            )
        )
    for ranking in RANKINGS:
        figures.append(
            (
                f"Where the vector works (heads by {ranking} labels)",
                "Zero-shot top-1 on the validation pairs with the vector added after each layer.",
                result.sweeps[ranking].plot(),
            )
        )
    figures.append(
        (
            "The vector against its controls",
            "Top-1 on the test pairs with 95% bootstrap intervals.",
            result.controls.plot(),
        )
    )
    words, scores = zip(*result.decoded, strict=True)
    figures.append(
        (
            "What the vector decodes to",
            "Tokens whose unembedding the vector points to most. Descriptive only: a vector can steer without decoding "
            "to readable words.",
            plots.decoded(list(words), list(scores)),
        )
    )
    blocks = [
        {
            "title": title,
            "text": text,
            # the first figure brings plotly's script along, so that the page needs no network
            "html": figure.to_html(full_html=False, include_plotlyjs=index == 0, config={"displayModeBar": False}),
        }
        for index, (title, text, figure) in enumerate(figures)
    ]
    rows = [
        (name, f"{value:.3f}", "" if interval is None else f"{interval.low:.3f} to {interval.high:.3f}")
        for name, value, interval in result.summary()
    ]
    numbers = results_json(result)
    shared = "word" if result.split.disjoint == "both" else "input word"
    provenance = {
        "model": f"{result.model_name} (weights {result.fingerprint.weights}, {result.fingerprint.dtype})",
        "relation": f"{result.relation} (data {result.data_hash}; no {shared} in two parts of its split)",
        "pairs": f"{len(result.split.train)} train, {len(result.split.valid)} valid, {result.n_test} test",
        "options": json.dumps(numbers["options"]),
        "attribution path": numbers["path"],
        "vector": f"{len(result.vector.heads)} heads, after layer {result.vector.layer}, "
        f"norm {result.vector.norm():.2f}",
        "versions": ", ".join(f"{name} {version}" for name, version in result.versions.items()),
        "seconds": f"{result.seconds:.1f}",
    }
    page = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(_PAGE)
    text = page.render(result=result, rows=rows, figures=blocks, samples=_samples(result), provenance=provenance)
    return _write_text(Path(path), text)


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ result.relation }}: function vector on {{ result.model_name }}</title>
<link rel="icon" href="data:,">
<style>
  body { font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, Arial, sans-serif; color: #222; background: #fff;
         max-width: 760px; margin: 2rem auto; padding: 0 1rem; }
  h1 { font-size: 1.6rem; margin-bottom: .2rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
  p.lead, p.note { color: #555; margin-top: .2rem; }
  table { border-collapse: collapse; width: 100%; font-size: .92rem; }
  th, td { text-align: left; padding: .3rem .6rem .3rem 0; border-bottom: 1px solid #e6e6e6; vertical-align: top; }
  td.number { font-variant-numeric: tabular-nums; white-space: nowrap; }
  td.right { color: #00664b; } td.wrong { color: #9c4a00; }
  td.value { overflow-wrap: anywhere; }
  .figure { overflow-x: auto; }
  @media (max-width: 600px) { table { display: block; overflow-x: auto; } }
</style>
</head>
<body>
<h1>{{ result.relation }}</h1>
<p class="lead">Function vector on {{ result.model_name }}: {{ result.vector.heads | length }} heads, added after layer
{{ result.vector.layer }}; {{ result.n_test }} test pairs that took no part in finding it.</p>

<h2>Summary</h2>
<table id="summary">
<thead><tr><th>zero-shot on test unless said otherwise</th><th>top-1</th><th>95% interval</th></tr></thead>
<tbody>
{% for name, value, interval in rows %}<tr><td>{{ name }}</td><td class="number">{{ value }}</td>
<td class="number">{{ interval }}</td></tr>
{% endfor %}</tbody>
</table>

{% for figure in figures %}
<h2>{{ figure.title }}</h2>
<p class="note">{{ figure.text }}</p>
<div class="figure">{{ figure.html | safe }}</div>
{% endfor %}

<h2>Sample predictions</h2>
<p class="note">Test queries in their split order. &#10003; marks an answer whose first token is right.</p>
<table id="samples">
<thead><tr><th>query</th><th>answer</th><th>bare</th><th>with the vector</th>
<th>{{ result.options.n_shots }}-shot</th></tr>
</thead>
<tbody>
{% for row in samples %}<tr><td>{{ row.query }}</td><td>{{ row.expected }}</td>
{% for word, ok in row.answers %}
<td class="{{ 'right' if ok else 'wrong' }}">{{ word }}{% if ok %} &#10003;{% endif %}</td>
{% endfor %}</tr>
{% endfor %}</tbody>
</table>

<h2>Where this comes from</h2>
<table id="provenance">
{% for key, value in provenance.items() %}<tr><th>{{ key }}</th><td class="value">{{ value }}</td></tr>
{% endfor %}</table>
</body>
</html>
"""
