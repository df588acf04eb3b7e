"""The whole chain on one relation, its files, a report page that works offline, and the same run again.

:func:`run_relation` goes from word pairs to a controlled function vector, :func:`write_run` writes
``vector.safetensors``, ``vector-finetuned.safetensors``, ``results.json`` and ``report.html``. ``results.json`` names
everything that the numbers depend on, so that :func:`rerun` can repeat the run from it and say what differs.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import math
import platform
import shlex
import time
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Union, get_args, get_origin

import jinja2
import torch

from fvlens.attribution import IndirectEffects
from fvlens.evaluation import SCALES, Controls, Evaluation, Kind, LayerScaleSweep, controls, copied, evaluate
from fvlens.files import read_json, write_json, write_text
from fvlens.find import RANKINGS, Found, Ranking, find_vector, finished, relation_effects, task_means
from fvlens.finetuning import FineTuned, finetune, finetune_many
from fvlens.metrics import Interval, bootstrap_interval
from fvlens.models import Fingerprint, fingerprint, load_model, model_device
from fvlens.prompts import TEMPLATES, Template, get_template, template_from
from fvlens.relations import Relation, Split, list_relations, load_relation
from fvlens.types import as_heads
from fvlens.universal import GivenHeads, file_hash
from fvlens.vectors import FunctionVector, function_vector

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

Source = Literal["permuted", "random", "file"]
"""Where a vector's heads come from: a ranking, or a file of heads."""
Backend = Literal["hooked", "bridge"]
Precision = Literal["float32", "bfloat16", "float16", "float64"]
PACKAGES = ("fvlens", "torch", "transformer-lens", "transformers", "tokenizers", "numpy")
SCHEMA = 4
"""Version of ``results.json``: which fields it has and what they mean. 3: fvlens 0.1."""
VECTOR_FILE, TUNED_FILE = "vector.safetensors", "vector-finetuned.safetensors"


@dataclass(frozen=True, slots=True)
class Loading:
    """How the model was loaded: the arguments of :func:`fvlens.load_model`, as given.

    Attributes:
        model: a name, or a folder as it was written.
        device, dtype, revision, backend: None where :func:`fvlens.load_model` chooses.
    """

    model: str = "rel-small"
    device: str | None = None
    dtype: Precision | None = None
    revision: str | None = None
    backend: Backend | None = None

    def load(self) -> Any:
        """The model."""
        given = {key: value for key, value in asdict(self).items() if key != "model" and value is not None}
        if "dtype" in given:
            given["dtype"] = getattr(torch, given["dtype"])
        return load_model(self.model, **given)


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
        both_labels: also rank heads on the other corruption, for comparison; it moves no other number.
        layer: inject after this layer; by default the best one on the validation pairs.
        scale: factor on the vector; by default the best one on the validation pairs, chosen with the layer.
        template: how prompts are written: the name of a built-in template, or a template itself.
        n_random: random vectors of the same norm, and random sets of heads, among the controls.
        n_others: vectors of other relations (with disjoint outputs) among the controls.
        n_train: pairs that the fine-tuned vector is trained on, the first of the train part.
        epochs: passes over them; 0 leaves the training out.
    """

    seed: int = 0
    n_shots: int = 10
    n_prompts: int = 100
    n_corrupted: int = 25
    n_heads: int = 10
    labels: Ranking = "permuted"
    both_labels: bool = False
    layer: int | None = None
    scale: float | None = None
    template: str | Template = "qa"
    n_random: int = 10
    n_others: int = 3
    n_train: int = 20
    epochs: int = 20

    def __post_init__(self) -> None:
        if self.labels not in RANKINGS:
            raise ValueError(f"labels={self.labels!r}; expected one of {', '.join(RANKINGS)}.")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed: expected 0 to 2**63 - 1, got {self.seed}.")
        for name in ("n_shots", "n_prompts", "n_heads", "n_random", "n_train"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}.")
        if self.n_corrupted < 2:
            raise ValueError(
                f"n_corrupted: expected at least 2, got {self.n_corrupted}; a standard error needs two prompts."
            )
        if self.n_others < 0:
            raise ValueError(f"n_others: expected 0 or more, got {self.n_others}.")
        if self.epochs < 0:
            raise ValueError(f"epochs: expected 0 or more, got {self.epochs}; 0 leaves the training out.")
        if self.scale is not None:
            if not math.isfinite(self.scale):
                raise ValueError(f"scale: expected a finite number, got {self.scale}.")
            object.__setattr__(self, "scale", float(self.scale))
        get_template(self.template)


@dataclass(frozen=True, slots=True)
class Provenance:
    """What a run's numbers depend on beside its settings and its model.

    Attributes:
        versions: of the packages in :data:`PACKAGES` and of Python.
        code_hash: of fvlens' own Python files, since a version may stay while the code changes.
        platform: class and device of the model, operating system, processor, CUDA version, and threads of torch.
        relations: hash of the pairs of every relation that took part, by name.
        library_hash: of the whole library, from which random labels and other relations are drawn.
    """

    versions: dict[str, str]
    code_hash: str
    platform: dict[str, Any]
    relations: dict[str, str]
    library_hash: str

    @classmethod
    def of(cls, model: Any, relations: Mapping[str, str]) -> "Provenance":
        """As things are now."""
        device = model_device(model)
        code = hashlib.sha256()
        package = Path(str(resources.files("fvlens")))
        for file in sorted(package.rglob("*.py"), key=lambda file: file.relative_to(package).as_posix()):
            code.update(f"{file.relative_to(package).as_posix()}\n".encode() + file.read_bytes())
        library = [
            f"{name}\t{load_relation(name).family}\t{load_relation(name).data_hash}" for name in list_relations()
        ]
        return cls(
            versions={name: importlib.metadata.version(name) for name in PACKAGES}
            | {"python": platform.python_version()},
            code_hash=code.hexdigest()[:16],
            platform={
                "model_class": type(model).__name__,
                "system": platform.platform(),
                "processor": _processor(),
                "device": f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device),
                "cuda": torch.version.cuda,
                "threads": torch.get_num_threads(),
            },
            relations=dict(relations),
            library_hash=hashlib.sha256("\n".join(library).encode()).hexdigest()[:16],
        )


def _processor() -> str:
    """Name of the CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


@dataclass(frozen=True, slots=True)
class Tuned:
    """The fine-tuned vector of a run, and what it does on the test pairs.

    Attributes:
        run: the training.
        vector: what it gave.
        evaluation: its scores on bare queries.
        others: the same queries under each fine-tuned vector of another relation.
        other: mean top-1 under those and its 95% interval over queries; None without other relations.
        decoded: the tokens it decodes to, with their logits.
    """

    run: FineTuned
    vector: FunctionVector
    evaluation: Evaluation
    others: tuple[Evaluation, ...]
    other: tuple[float, Interval] | None
    decoded: tuple[tuple[str, float], ...]

    @property
    def epochs(self) -> int:
        """Epochs that were run."""
        return len(self.run.history) - 1


@dataclass(frozen=True, slots=True)
class RunResult:
    """Everything a run found.

    ``vectors``, ``steered`` and ``sweeps`` are keyed by where the heads come from: the ranking asked for, after it the
    other one if both were, or ``"file"`` alone if the heads were given. The vectors have their scale in them.
    ``effects`` has the rankings, and is empty for given heads. ``at_scale_one`` are the scores of the saved vector at
    scale 1, at its best layer for that; None if a scale was given. ``tuned`` is None if ``options.epochs`` is 0.
    ``cautions`` says of each ranking, and of the vectors of other relations, if heads were taken that do not help
    (:meth:`~fvlens.attribution.IndirectEffects.caution`).
    """

    relation: str
    model_name: str
    options: RunOptions
    split: Split
    icl: Evaluation
    shuffled: Evaluation
    zero_shot: Evaluation
    steered: dict[Source, Evaluation]
    vectors: dict[Source, FunctionVector]
    effects: dict[Ranking, IndirectEffects]
    sweeps: dict[Source, LayerScaleSweep]
    at_scale_one: Evaluation | None
    controls: Controls
    others: tuple[str, ...]
    decoded: tuple[tuple[str, float], ...]
    fingerprint: Fingerprint
    data_hash: str
    seconds: float
    provenance: Provenance
    given: GivenHeads | None = None
    loading: Loading | None = None
    command: tuple[str, ...] | None = None
    tuned: Tuned | None = None
    cautions: tuple[str, ...] = ()

    @property
    def source(self) -> Source:
        """Where the saved vector's heads come from: ``options.labels``, or ``"file"``."""
        return self.options.labels if self.given is None else "file"

    @property
    def vector(self) -> FunctionVector:
        """The vector that is saved."""
        return self.vectors[self.source]

    @property
    def scale(self) -> float:
        """The scale that the saved vector has in it."""
        return self.sweeps[self.source].best_scale

    def described(self, source: Source) -> str:
        """Where heads come from, in words."""
        if self.given is None or source != "file":
            return f"heads by {source} labels"
        return f"heads from {Path(self.given.path).name}"

    @property
    def n_test(self) -> int:
        """Number of test pairs."""
        return len(self.split.test)

    @property
    def n_trained(self) -> int:
        """Number of pairs that the fine-tuned vector was trained on."""
        return len(self.split.train[: self.options.n_train])

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
        for source, vector in self.vectors.items():
            score, scale = self.steered[source], self.sweeps[source].best_scale
            text = f"function vector, {len(vector.heads)} {self.described(source)}, layer {vector.layer}"
            rows.append((f"{text}, scale {scale:g}", score.top1, score.interval))
            one = self.at_scale_one
            if source == self.source and scale != 1 and one is not None:
                rows.append((f"the same at scale 1, layer {one.vector_layer}", one.top1, one.interval))
        tuned = self.tuned
        if tuned is not None:
            text = f"fine-tuned vector, {self.n_trained} pairs, {tuned.epochs} epochs, layer {tuned.vector.layer}"
            rows.append((text, tuned.evaluation.top1, tuned.evaluation.interval))
        rows.append((f"{self.options.n_random} random vectors of the same norm", *self.control("random_vector")))
        if self.others:
            rows.append((f"vectors of other relations ({', '.join(self.others)})", *self.control("other_relation")))
        if tuned is not None and tuned.other is not None:
            rows.append(("fine-tuned vectors of the same other relations", *tuned.other))
        rows.append((f"{self.options.n_random} sets of random heads", *self.control("random_heads")))
        return rows


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
    heads: GivenHeads | None = None,
    model_name: str | None = None,
    loading: Loading | None = None,
    command: Sequence[str] | None = None,
    progress: bool = True,
) -> RunResult:
    """Find a relation's function vector (:func:`fvlens.find_vector`), fine-tune it, and test both beside controls.

    Controls are added after the same layer with the same scale. The fine-tuned vector starts from the function vector
    and stays at its layer; its epoch is chosen on valid too. The other relations' vectors are trained the same way, as
    its control. Training draws from generators of its own, so all
    other numbers are the same without it.

    Args:
        model: the model.
        relation: the word pairs.
        options: settings; :class:`RunOptions` gives the defaults.
        heads: build all vectors of these heads, from :func:`fvlens.universal.read_heads`, and rank none; ``n_heads``
            is then their number, and ``labels`` and ``n_corrupted`` play no part.
        model_name: name for the report; by default that of ``loading``, or the model's own.
        loading: how the model was loaded, recorded so that :func:`rerun` can load it again.
        command: the command line, recorded as it is.
        progress: show progress bars.

    Returns:
        :class:`RunResult`. Test pairs are used for nothing but the final scores.

    Raises:
        ValueError: more heads wanted than half of the model's, a layer outside the model, or a relation too small.
    """
    began = time.monotonic()
    options = options or RunOptions()
    if heads is not None:
        options = dataclasses.replace(options, n_heads=len(heads.heads))
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
    drawn: dict[str, Any] = {"n_shots": options.n_shots, "n_prompts": options.n_prompts, "template": options.template}
    recipe: dict[str, Any] = {
        "n_heads": options.n_heads,
        "n_corrupted": options.n_corrupted,
        "relation": relation.name,
        "layers": None if options.layer is None else [options.layer],
        "scales": SCALES if options.scale is None else [options.scale],
        "seed": options.seed,
        "progress": progress,
        **drawn,
    }
    source: Source = options.labels if heads is None else "file"
    given = None if heads is None else heads.heads
    main = find_vector(model, split, labels=options.labels, heads=given, generator=generator, **recipe)
    found: dict[Source, Found] = {source: main}
    if heads is None and options.both_labels:
        other_labels: Ranking = next(ranking for ranking in RANKINGS if ranking != options.labels)
        # from a copy of the generator, so that a comparison moves no other number
        found[other_labels] = find_vector(
            model, split, labels=other_labels, means=main.means, generator=copied(generator), **recipe
        )
    cautions = [(f"{name} labels", text) for name, one in found.items() for text in one.cautions]
    common: dict[str, Any] = {"template": options.template, "relation": relation.name, "generator": generator}

    used = {relation.name: relation.data_hash}
    others: list[FunctionVector] = []
    other_splits: dict[str, Split] = {}
    for name in other_relations(relation, options.n_others, generator):
        other = load_relation(name)
        used[name] = other.data_hash
        other_splits[name] = other.split(generator)
        of_other: dict[str, Any] = {"relation": name, "generator": generator, "progress": progress, **drawn}
        if heads is None:
            means, effects = relation_effects(
                model, other_splits[name], labels=options.labels, n_corrupted=options.n_corrupted, **of_other
            )
            chosen = effects.ranking[: options.n_heads]
            cautions.append((f"vector of {name}", effects.caution(options.n_heads)))
        else:
            means, chosen = task_means(model, other_splits[name], **of_other), heads.heads
        others.append(function_vector(model, means, heads=chosen, layer=main.layer))

    scaled = [main.scale * other for other in others]
    trained = _train(model, split, options, main.vector, other_splits, scaled, progress) if options.epochs else None

    in_context: dict[str, Any] = {"demonstrations": split.train, "n_shots": options.n_shots, **common}
    table = finished(
        controls(
            model,
            split.test,
            main.unscaled,
            others=others,
            means=main.means,
            scale=main.scale,
            n_random=options.n_random,
            progress=progress,
            **in_context,
        )
    )
    # the table's own scores, so that the page gives one number for one thing
    scores = {row.kind: row.evaluations[0] for row in table.rows}
    steered: dict[Source, Evaluation] = {
        name: scores["vector"]
        if name == source
        else evaluate(model, split.test, vector=one.vector, setting="zero_shot", **common)
        for name, one in found.items()
    }
    plain = main.vector_at_scale_one
    if plain is None:
        at_scale_one = None
    elif main.scale == 1:
        at_scale_one = scores["vector"]
    else:
        asked = {**common, "generator": copied(generator)}
        at_scale_one = evaluate(model, split.test, vector=plain, setting="zero_shot", **asked)
    return RunResult(
        relation=relation.name,
        model_name=model_name or (str(model.cfg.model_name) if loading is None else loading.model),
        options=options,
        split=split,
        icl=scores["icl"],
        shuffled=scores["shuffled"],
        zero_shot=scores["no_vector"],
        steered=steered,
        vectors={name: one.vector for name, one in found.items()},
        effects={name: one.effects for name, one in found.items() if name != "file" and one.effects is not None},
        sweeps={name: one.sweep for name, one in found.items()},
        at_scale_one=at_scale_one,
        controls=table,
        others=tuple(other.relation for other in others),
        decoded=tuple(main.vector.decode(model, k=10)),
        fingerprint=fingerprint(model),
        data_hash=relation.data_hash,
        seconds=time.monotonic() - began,
        provenance=Provenance.of(model, used),
        given=heads,
        loading=loading,
        command=None if command is None else tuple(command),
        tuned=None if trained is None else _tuned(model, split, options, *trained),
        cautions=tuple(f"{where}: {text}" for where, text in cautions if text),
    )


def _fresh(options: RunOptions) -> torch.Generator:
    """A generator of its own for one part of the fine-tuning, so that it moves no other number of the run."""
    return torch.Generator().manual_seed(options.seed)


def _train(
    model: Any,
    split: Split,
    options: RunOptions,
    vector: FunctionVector,
    other_splits: Mapping[str, Split],
    others: Sequence[FunctionVector],
    progress: bool,
) -> tuple[FineTuned, list[FunctionVector]]:
    """The vector's training at its own layer, and the other relations' vectors after the same training."""
    how: dict[str, Any] = {"epochs": options.epochs, "template": options.template, "progress": progress}
    pairs = split.train[: options.n_train]
    run = finished(finetune(model, pairs, init=vector, valid=split.valid, generator=_fresh(options), **how))
    if not others:
        return run, []
    many = finetune_many(model, other_splits, init=others, n_train=options.n_train, generator=_fresh(options), **how)
    return run, list(finished(many).vectors)


def _tuned(model: Any, split: Split, options: RunOptions, run: FineTuned, others: Sequence[FunctionVector]) -> Tuned:
    """The scores of trained vectors on the test pairs."""
    assert isinstance(run.vector, FunctionVector)

    def score(vector: FunctionVector) -> Evaluation:
        return evaluate(
            model,
            split.test,
            vector=vector,
            template=options.template,
            relation=run.relation,
            generator=_fresh(options),
        )

    evaluation, controls = score(run.vector), tuple(score(other) for other in others)
    other = None
    if controls:
        scores = torch.stack([one.correct.double() for one in controls]).mean(dim=0)
        other = (scores.mean().item(), bootstrap_interval(scores, generator=_fresh(options)))
    return Tuned(run, run.vector, evaluation, controls, other, tuple(run.vector.decode(model, k=10)))


def _options_json(options: RunOptions) -> dict[str, Any]:
    """Options as plain JSON values; of a template of one's own the name, and the whole of it as ``template_text``."""
    template = get_template(options.template)
    found = asdict(options) | {"template": template.name}
    if TEMPLATES.get(template.name) != template:
        found["template_text"] = template.to_json()
    return found


def results_json(result: RunResult) -> dict[str, Any]:
    """The numbers of a run, and everything they depend on, as plain JSON values.

    ``fv_top1``, ``layer``, ``scale`` and ``heads`` are those of the saved vector, and so are the controls; ``rankings``
    has the ranking asked for, and the other one if both were. ``choice`` tells what the validation pairs said of the
    layer and scale chosen, and of scale 1 at its best layer; ``fv_scale_one_top1`` is top-1 there on the test pairs,
    null if a scale was given. A head is ``[layer, head, AIE, standard error]``, the last two null for heads from a
    file. What begins with ``ffv`` belongs to the fine-tuned vector and is null where none was trained; ``ffv_cosine``
    is that to the function vector.
    """

    def heads(source: Source) -> list[list[int | float | None]]:
        if source == "file":
            return [[head.layer, head.head, None, None] for head in result.vectors[source].heads]
        effects = result.effects[source]
        stderr, aie = effects.stderr, effects.aie
        return [[h.layer, h.head, float(aie[h]), float(stderr[h])] for h in effects.ranking[: result.options.n_heads]]

    def span(interval: Interval) -> list[float]:
        return [interval.low, interval.high]

    main, random, one = result.steered[result.source], result.steered.get("random"), result.at_scale_one
    random_vector, random_vector_interval = result.control("random_vector")
    other = result.control("other_relation") if result.others else None
    provenance, given, tuned = result.provenance, result.given, result.tuned
    return {
        "schema": SCHEMA,
        "relation": result.relation,
        "model": result.model_name,
        "seed": result.options.seed,
        "icl_top1": result.icl.top1,
        "zero_shot_top1": result.zero_shot.top1,
        "shuffled_top1": result.shuffled.top1,
        "fv_top1": main.top1,
        "fv_random_labels_top1": None if random is None else random.top1,
        "ffv_top1": None if tuned is None else tuned.evaluation.top1,
        "random_vector_top1": random_vector,
        "other_relation_top1": None if other is None else other[0],
        "other_relation_ffv_top1": None if tuned is None or tuned.other is None else tuned.other[0],
        "random_heads_top1": result.control("random_heads")[0],
        "fv_scale_one_top1": None if one is None else one.top1,
        "layer": result.vector.layer,
        "scale": result.scale,
        "choice": _choice(result.sweeps[result.source]),
        "ffv_layer": None if tuned is None else tuned.vector.layer,
        "ffv_epochs": None if tuned is None else tuned.epochs,
        "ffv_best_epoch": None if tuned is None else tuned.run.best_epoch,
        "ffv_lr": None if tuned is None else tuned.run.lr,
        "ffv_n_train": None if tuned is None else result.n_trained,
        "ffv_cosine": None if tuned is None else tuned.vector.cosine(result.vector),
        "fv_norm": result.vector.norm(),
        "ffv_norm": None if tuned is None else tuned.vector.norm(),
        "heads_source": "ranking" if given is None else "file",
        "heads": heads(result.source),
        "n_test": result.n_test,
        "intervals": {
            "level": main.interval.level,
            "icl_top1": span(result.icl.interval),
            "zero_shot_top1": span(result.zero_shot.interval),
            "shuffled_top1": span(result.shuffled.interval),
            "fv_top1": span(main.interval),
            "fv_random_labels_top1": None if random is None else span(random.interval),
            "fv_scale_one_top1": None if one is None else span(one.interval),
            "ffv_top1": None if tuned is None else span(tuned.evaluation.interval),
            "random_vector_top1": span(random_vector_interval),
            "other_relation_top1": None if other is None else span(other[1]),
            "other_relation_ffv_top1": None if tuned is None or tuned.other is None else span(tuned.other[1]),
        },
        "rankings": {
            ranking: {
                "fv_top1": result.steered[ranking].top1,
                "interval": span(result.steered[ranking].interval),
                "layer": result.vectors[ranking].layer,
                "scale": result.sweeps[ranking].best_scale,
                "heads": heads(ranking),
            }
            for ranking in result.effects
        },
        "icl_probability": result.icl.probability,
        "shuffled_probability": result.shuffled.probability,
        "other_relations": list(result.others),
        "path": next((effects.path for effects in result.effects.values()), None),
        "ffv_path": None if tuned is None else tuned.run.path,
        "cautions": list(result.cautions),
        "decoded": [list(pair) for pair in result.decoded],
        "ffv_decoded": None if tuned is None else [list(pair) for pair in tuned.decoded],
        "options": _options_json(result.options) | {"heads_file": None if given is None else given.path},
        "loading": None if result.loading is None else asdict(result.loading),
        "command": None if result.command is None else list(result.command),
        "fingerprint": asdict(result.fingerprint),
        "data_hash": result.data_hash,
        "data": {
            "relations": provenance.relations,
            "library": provenance.library_hash,
            "heads_file": None if given is None else given.hash,
        },
        "heads_note": None if given is None else given.note,
        "split_disjoint": result.split.disjoint,
        "versions": provenance.versions,
        "code_hash": provenance.code_hash,
        "platform": provenance.platform,
        "ffv_seconds": None if tuned is None else tuned.run.seconds,
        "seconds": result.seconds,
    }


def _choice(sweep: LayerScaleSweep) -> dict[str, Any]:
    """Layer, scale and validation top-1: of the cell that was chosen, and of scale 1 at its best layer."""
    rows: dict[str, Any] = {"layer": sweep.best_layer, "scale": sweep.best_scale, "valid_top1": sweep.best.top1}
    rows["n_valid"] = sweep.best.n
    rows["scale_one"] = None
    if 1 in sweep.scales:
        plain = sweep.at_scale(1)
        layer = plain.best_layer
        rows["scale_one"] = {"layer": layer, "valid_top1": sweep.at(layer, 1).top1}
    return rows


def write_run(result: RunResult, folder: str | Path) -> list[Path]:
    """Write ``vector.safetensors``, ``vector-finetuned.safetensors``, ``results.json`` and ``report.html``.

    Other files in the folder stay. An earlier run's fine-tuned vector is removed where this run trained none, so that
    the files are those of one run.

    Returns:
        The files written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files = [result.vector.save(folder / VECTOR_FILE)]
    if result.tuned is not None:
        files.append(result.tuned.vector.save(folder / TUNED_FILE))
    else:
        (folder / TUNED_FILE).unlink(missing_ok=True)
    files.append(write_json(folder / "results.json", results_json(result), indent=2))
    return [*files, write_report(folder / "report.html", result)]


def write_figure(path: str | Path, figure: "go.Figure") -> Path:
    """Write one figure as an HTML page that works offline. Replaces an existing file at once."""
    page = figure.to_html(include_plotlyjs=True, config={"displayModeBar": False}, div_id="figure")
    return write_text(Path(path), page)


@dataclass(frozen=True, slots=True)
class _Sample:
    query: str
    expected: str
    answers: tuple[tuple[str, bool], ...]
    """Predicted word and whether it is right: bare, with the function vector, fine-tuned if there is one, and shown."""


def _samples(result: RunResult, n: int = 15) -> list[_Sample]:
    tuned = () if result.tuned is None else (result.tuned.evaluation,)
    shown = (result.zero_shot, result.steered[result.source], *tuned, result.icl)
    columns = [list(zip(one.predictions, one.correct.tolist(), strict=True)) for one in shown]
    return [
        _Sample(pair.input, pair.output, tuple((words[i][0].strip(), words[i][1]) for words in columns))
        for i, pair in enumerate(result.split.test[:n])
    ]


def write_report(path: str | Path, result: RunResult) -> Path:
    """Write the report page: one HTML file with its figures and scripts inside, readable without a network."""
    from fvlens import plots

    figures: list[tuple[str, str, go.Figure]] = []
    for ranking, effects in result.effects.items():
        figures.append(
            (
                f"Which heads carry the task ({ranking} labels)",
                "Each cell is one head: how much the answer's probability rises on a corrupted prompt when the head's "
                "output is replaced by its mean over clean prompts. Hover for the value and its standard error.",
                effects.plot(n_top=result.options.n_heads),
            )
        )
    for source, sweep in result.sweeps.items():
        figures.append(
            (
                f"Where the vector works ({result.described(source)})",
                "Zero-shot top-1 on the validation pairs with the vector, times each scale, added after each layer.",
                sweep.plot(),
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

    def drawn(figure: "go.Figure", first: bool = False) -> str:
        # the first figure brings plotly's script along, so that the page needs no network
        return figure.to_html(full_html=False, include_plotlyjs=first, config={"displayModeBar": False})

    blocks = [
        {"title": title, "text": text, "html": drawn(figure, first=index == 0)}
        for index, (title, text, figure) in enumerate(figures)
    ]
    rows = [_row(*row) for row in result.summary()]
    page_folder = Path(path).parent
    page = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(_PAGE)
    text = page.render(
        result=result,
        rows=rows,
        figures=blocks,
        tuned=None if result.tuned is None else _tuned_section(result, result.tuned, drawn),
        samples=_samples(result),
        provenance=_told(result, page_folder),
    )
    return write_text(Path(path), text)


def _row(name: str, value: float, interval: Interval | None) -> tuple[str, str, str]:
    return name, f"{value:.3f}", "" if interval is None else f"{interval.low:.3f} to {interval.high:.3f}"


def _tuned_section(result: RunResult, tuned: Tuned, drawn: Callable[["go.Figure"], str]) -> dict[str, Any]:
    """What the page shows of the fine-tuned vector."""
    run, untuned, score = tuned.run, result.steered[result.source], tuned.evaluation
    rows: list[tuple[str, float, Interval | None]] = [
        ("bare query", result.zero_shot.top1, result.zero_shot.interval),
        ("function vector", untuned.top1, untuned.interval),
        ("fine-tuned vector", score.top1, score.interval),
    ]
    if tuned.other is not None:
        rows.append((f"fine-tuned vectors of other relations ({', '.join(result.others)})", *tuned.other))
    rows.append((f"{result.options.n_shots} clean demonstrations", result.icl.top1, result.icl.interval))
    chosen = f"epoch {run.best_epoch} of {tuned.epochs}" + ("" if run.best_epoch else ", the start: none was better")
    return {
        "text": f"The function vector, trained further on the bare queries of {result.n_trained} training pairs; the "
        f"model stays as it is. Chosen on the {len(result.split.valid)} validation pairs: {chosen}. Added "
        f"after layer {tuned.vector.layer}, as the function vector is; cosine similarity to it "
        f"{tuned.vector.cosine(result.vector):.2f}; norm {tuned.vector.norm():.2f}, of the function vector "
        f"{result.vector.norm():.2f}. Trained in {run.seconds:.1f}\N{NO-BREAK SPACE}s.",
        "rows": [_row(*row) for row in rows],
        "curves": drawn(run.plot()),
        "decoded": [
            ((repr(before), f"{a:.2f}"), (repr(after), f"{b:.2f}"))
            for (before, a), (after, b) in zip(result.decoded, tuned.decoded, strict=True)
        ],
    }


def _told(result: RunResult, folder: Path) -> dict[str, str]:
    """Where the numbers come from, row by row, and how to get them again from the files in a folder."""
    numbers = results_json(result)
    mark, source, loading = result.fingerprint, result.provenance, result.loading
    shared = "word" if result.split.disjoint == "both" else "input word"
    rows = {
        "model": f"{result.model_name} (revision {mark.revision}, weights {mark.weights}, {mark.dtype})",
        "relation": f"{result.relation} (data {result.data_hash}; no {shared} in two parts of its split)",
        "pairs": f"{len(result.split.train)} train, {len(result.split.valid)} valid, {result.n_test} test",
        "other data": ", ".join(
            [f"{name} {digest}" for name, digest in source.relations.items() if name != result.relation]
            + [f"whole library {source.library_hash}"]
        ),
    }
    if result.given is not None:
        names = ", ".join(map(str, result.given.heads))
        rows["heads"] = f"{names}, from {result.given.path} (file {result.given.hash}; {result.given.note})"
    rows["options"] = json.dumps(numbers["options"])
    if loading is not None:
        rows["loaded with"] = ", ".join(f"{key} {value}" for key, value in asdict(loading).items() if value is not None)
    rows |= {
        "attribution path": numbers["path"] or "none: the heads were given",
        "vector": f"{len(result.vector.heads)} heads, after layer {result.vector.layer}, scale {result.scale:g}, "
        f"norm {result.vector.norm():.2f}",
    }
    if result.tuned is not None:
        run = result.tuned.run
        rows["fine-tuned vector"] = (
            f"{result.n_trained} pairs, epoch {run.best_epoch} of {result.tuned.epochs}, learning rate {run.lr:.3g}, "
            f"order of pairs by seed {run.seed}, path {run.path}, {run.seconds:.1f} seconds"
        )
    rows |= {
        "versions": ", ".join(f"{name} {version}" for name, version in source.versions.items())
        + f" (code {source.code_hash})",
        "machine": ", ".join(f"{key} {value}" for key, value in source.platform.items() if value is not None),
        "seconds": f"{result.seconds:.1f}",
    }
    if result.command is not None:
        rows["command"] = shlex.join(result.command)
    again = shlex.quote(folder.as_posix())
    rows["again"] = (
        f"fvlens rerun {again}" if loading is not None else f"fvlens.report.rerun({str(folder)!r}, model=model)"
    )
    return rows


# --- the same run again ---

_PROVENANCE = {
    "fingerprint": "model",
    "data_hash": "data",
    "data": "data",
    "versions": "version",
    "code_hash": "version",
    "platform": "platform",
}
"""Fields of ``results.json`` that say what the numbers depend on, and what kind of thing each is."""
_SETTINGS = ("schema", "relation", "model", "seed", "options", "loading", "heads_source", "heads_note")
_NOT_COMPARED = ("seconds", "ffv_seconds", "command", "cautions")
"""Times, and what follows from the numbers: files of fvlens 0.1 have no ``cautions``."""
_ABSENT = "(absent)"


class Difference(NamedTuple):
    """One thing that is not the same in two runs.

    Attributes:
        kind: ``"model"``, ``"data"``, ``"version"``, ``"platform"`` and ``"setting"``: what the numbers depend on;
            ``"number"``; or ``"result"``: a word or an entry that is not the same.
        name: the field of ``results.json``, such as ``versions.torch`` or ``heads[0][2]``.
        old, new: its values.
        size: for numbers, ``|old - new| / max(1, |old|, |new|)``: absolute below 1, relative above.
    """

    kind: str
    name: str
    old: Any
    new: Any
    size: float | None = None


@dataclass(frozen=True, slots=True)
class RecordedRun:
    """A run as ``results.json`` tells it, checked.

    Attributes:
        folder: where the file is.
        relation, options, loading, heads: what :func:`run_relation` needs to run again.
        content: the whole file.
    """

    folder: Path
    relation: Relation
    options: RunOptions
    loading: Loading | None
    heads: GivenHeads | None
    content: dict[str, Any]

    def changes(self, model: Any) -> list[Difference]:
        """What the numbers depend on and is not as it was: model, data, versions, platform."""
        known = set(list_relations())
        names = [name for name in self.content["data"]["relations"] if name in known]
        now = Provenance.of(model, {name: load_relation(name).data_hash for name in names})
        new = {
            "fingerprint": asdict(fingerprint(model)),
            "data_hash": self.relation.data_hash,
            "data": {"relations": now.relations, "library": now.library_hash, "heads_file": self._heads_file_now()},
            "versions": now.versions,
            "code_hash": now.code_hash,
            "platform": now.platform,
        }
        return _differences({key: self.content[key] for key in new}, new)

    def _heads_file_now(self) -> str | None:
        if self.heads is None:
            return None
        try:
            return file_hash(self.heads.path)
        except ValueError:
            return _ABSENT


@dataclass(frozen=True, slots=True)
class Rerun:
    """A run repeated from its files, and what differs.

    Attributes:
        folder: the files of the first run.
        out: the files of the second.
        tolerance: largest :attr:`Difference.size` at which two numbers count as the same.
        n_numbers: numbers compared.
        differences: everything that is not exactly the same: what the numbers depend on first, then the numbers.
        result: the second run.
        files: the files written.
    """

    folder: Path
    out: Path
    tolerance: float
    n_numbers: int
    differences: tuple[Difference, ...]
    result: RunResult
    files: tuple[Path, ...]

    @property
    def largest(self) -> float:
        """Largest :attr:`Difference.size`; 0 if all numbers are equal."""
        return max((one.size for one in self.differences if one.size is not None), default=0.0)

    @property
    def agrees(self) -> bool:
        """Whether every result is the same, numbers within the tolerance."""
        return self.largest <= self.tolerance and not any(one.kind == "result" for one in self.differences)

    def to_dataframe(self) -> "pd.DataFrame":
        """One row a difference: ``kind, name, old, new, size``."""
        import pandas as pd

        return pd.DataFrame(list(self.differences), columns=list(Difference._fields))


def read_run(folder: str | Path) -> RecordedRun:
    """Read and check the ``results.json`` of a run. Nothing in the file is executed.

    Raises:
        ValueError: no such file; not JSON; another schema than ours; a field that is missing or of the wrong type; a
            setting out of range; or a relation that the library does not have. The message names file and field.
    """
    folder = Path(folder)
    path = folder / "results.json"
    content = read_json(path, "results of a finished `fvlens run`")
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(content).__name__}.")
    schema = content.get("schema")
    if schema != SCHEMA or isinstance(schema, bool):
        raise ValueError(
            f"{path}: schema: expected {SCHEMA}, got {schema!r}; the file is of another version of fvlens, whose runs "
            f"draw and choose otherwise, so make the run again with {_made_by(content)}."
        )

    def field(name: str, expected: Any) -> Any:
        return _field(path, content, name, expected)

    named = field("relation", str)
    try:
        relation = load_relation(named)
    except ValueError as error:
        raise ValueError(f"{path}: relation: {error}") from error
    recorded = field("options", dict)
    heads_file = _field(path, recorded, "heads_file", str | None, "options.")
    fields = {key: recorded[key] for key in recorded if key not in ("heads_file", "template_text")}
    if "template_text" in recorded:
        try:
            fields["template"] = template_from(recorded)
        except (KeyError, ValueError) as error:
            raise ValueError(f"{path}: options.template_text: {error}") from error
    options = _made(path, RunOptions, fields, "options")
    if field("seed", int) != options.seed:
        raise ValueError(f"{path}: seed: {content['seed']}, but options.seed is {options.seed}; expected one seed.")
    loading = field("loading", dict | None)
    loading = None if loading is None else _made(path, Loading, loading, "loading")
    if loading is not None and loading.device is not None:
        try:
            torch.device(loading.device)
        except RuntimeError as error:
            raise ValueError(f"{path}: loading.device: {loading.device!r} is not a device.") from error
    mark = _made(path, Fingerprint, field("fingerprint", dict), "fingerprint")
    field("data_hash", str)
    data = field("data", dict)
    for name, digest in _field(path, data, "relations", dict, "data.").items():
        if not isinstance(digest, str):
            raise ValueError(f"{path}: data.relations.{name}: expected str, got {digest!r}.")
    _field(path, data, "library", str, "data.")
    digest = _field(path, data, "heads_file", str | None, "data.")
    for name in ("versions", "platform"):
        for key, value in field(name, dict).items():
            if not isinstance(value, str | int | None):
                raise ValueError(f"{path}: {name}.{key}: expected a text or a number, got {value!r}.")
    field("code_hash", str)
    heads = None
    if field("heads_source", Literal["ranking", "file"]) == "file":
        if heads_file is None or digest is None:
            raise ValueError(f"{path}: heads_source is 'file', but options.heads_file or data.heads_file is null.")
        listed = field("heads", list)
        pairs = [entry[:2] if isinstance(entry, list) and len(entry) == 4 else entry for entry in listed]
        try:
            chosen = as_heads(pairs, mark.n_layers, mark.n_heads)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        if len(chosen) != options.n_heads:
            raise ValueError(f"{path}: heads: expected options.n_heads, {options.n_heads} heads, got {len(chosen)}.")
        heads = GivenHeads(tuple(chosen), heads_file, digest, field("heads_note", str))
    return RecordedRun(folder, relation, options, loading, heads, content)


def _made_by(content: Mapping[str, Any]) -> str:
    """The command that made a run's files, as far as they tell."""
    command = content.get("command")
    told = isinstance(command, list) and all(isinstance(word, str) for word in command)
    return f"`{shlex.join(command if told and command else ['fvlens', 'run'])}`"


def _field(path: Path, content: dict[str, Any], name: str, expected: Any, prefix: str = "") -> Any:
    """A field of the file, of the expected type."""
    if name not in content:
        raise ValueError(f"{path}: {prefix}{name}: the field is missing.")
    if not _fits(content[name], expected):
        raise ValueError(f"{path}: {prefix}{name}: expected {_type_text(expected)}, got {content[name]!r}.")
    return content[name]


def _fits(value: Any, expected: Any) -> bool:
    if get_origin(expected) is Literal:
        return isinstance(value, str) and value in get_args(expected)
    if isinstance(expected, types.UnionType) or get_origin(expected) is Union:
        return any(_fits(value, one) for one in get_args(expected))
    return type(value) is expected


def _type_text(expected: Any) -> str:
    if get_origin(expected) is Literal:
        return "one of " + ", ".join(map(repr, get_args(expected)))
    if isinstance(expected, types.UnionType) or get_origin(expected) is Union:
        return " or ".join(map(_type_text, get_args(expected)))
    return "null" if expected is types.NoneType else expected.__name__


def _made(path: Path, kind: Any, found: dict[str, Any], name: str) -> Any:
    """A dataclass from the file: its fields, each of its declared type, none too many, through its own checks."""
    expected = {field.name: field.type for field in dataclasses.fields(kind)}
    for key in found:
        if key not in expected:
            raise ValueError(f"{path}: {name}.{key}: not a field of this schema; expected {', '.join(expected)}.")
    fields = {key: _field(path, found, key, wanted, f"{name}.") for key, wanted in expected.items()}
    try:
        return kind(**fields)
    except ValueError as error:
        raise ValueError(f"{path}: {name}: {error}") from error


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Every number, text, truth value or null of a JSON value, with its place."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield from _leaves(inner, f"{name}[{i}]")
    else:
        yield name, value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[Difference]:
    """What is not the same in two parts of ``results.json``, in the order of the first."""
    before, after = dict(_leaves(old)), dict(_leaves(new))
    found = []
    for name in dict.fromkeys([*before, *after]):
        a, b = before.get(name, _ABSENT), after.get(name, _ABSENT)
        kind = (_PROVENANCE | {"path": "setting", "ffv_path": "setting"}).get(name.replace("[", ".").partition(".")[0])
        if a == b and type(a) is type(b):
            continue
        if kind is None and _is_number(a) and _is_number(b):
            if a != b:
                found.append(Difference("number", name, a, b, abs(a - b) / max(1.0, abs(a), abs(b))))
        else:
            found.append(Difference(kind or "result", name, a, b))
    return found


def _results(content: dict[str, Any]) -> dict[str, Any]:
    """The part of ``results.json`` that a run finds out, without what goes into it."""
    return {key: content[key] for key in content if key not in (*_PROVENANCE, *_SETTINGS, *_NOT_COMPARED)}


def _compare_vectors(name: str, old: FunctionVector | None, new: FunctionVector) -> list[Difference]:
    """What differs in two vector files of this name, one row for all numbers of the vector."""
    if old is None:
        return [Difference("data", name, _ABSENT, "written")]
    if old.vector.shape != new.vector.shape:
        return [Difference("result", f"{name}: length", len(old.vector), len(new.vector))]
    if torch.equal(old.vector, new.vector):
        return []
    a, b = old.vector.double(), new.vector.double()
    size = (a - b).abs() / torch.stack([a.abs(), b.abs(), torch.ones_like(a)]).amax(dim=0)
    return [Difference("number", f"{name}: norm", old.norm(), new.norm(), float(size.max()))]


def rerun(
    folder: str | Path,
    *,
    out: str | Path | None = None,
    model: Any = None,
    tolerance: float = 1e-5,
    announce: Callable[[Sequence[Difference]], None] | None = None,
    command: Sequence[str] | None = None,
    progress: bool = True,
) -> Rerun:
    """Repeat a run from its files, with the same settings and seed, and compare every number.

    On the same machine and versions all numbers come out equal, as long as the batches do. The vectors' files are
    compared too. Heads that came from a file are taken from ``results.json``, so a file that has changed or gone is
    only reported.

    Args:
        folder: what ``fvlens run`` or :func:`write_run` wrote.
        out: folder for the files of the second run; by default the first one's name with ``-rerun``.
        model: the model; by default the one that ``results.json`` names is loaded as it was.
        tolerance: numbers a and b count as the same if ``|a - b| <= tolerance * max(1, |a|, |b|)``.
        announce: called before the run with what it depends on and is not as it was.
        command: the command line, recorded as it is.
        progress: show progress bars.

    Returns:
        :class:`Rerun`, its ``.differences`` in the order: what the numbers depend on, then the numbers.

    Raises:
        ValueError: what :func:`read_run` refuses; a damaged vector file; ``out`` is ``folder`` or a file; a bad
            ``tolerance``; a run that names no model, when none is given; or a model that cannot be loaded.
    """
    folder = Path(folder)
    recorded = read_run(folder)
    if not (math.isfinite(tolerance) and tolerance >= 0):
        raise ValueError(f"rerun: tolerance: expected a number of at least 0, got {tolerance}.")
    if out is None:
        whole = folder.resolve() if folder.name in ("", "..") else folder  # ".." has no name of its own
        out = whole.with_name(f"{whole.name}-rerun")
    out = Path(out)
    if out.resolve() == folder.resolve():
        raise ValueError(f"rerun: {out} holds the run itself; give another folder for the second one.")
    if out.exists() and not out.is_dir():
        raise ValueError(f"rerun: {out} is a file; give a folder.")
    names = [VECTOR_FILE, *([TUNED_FILE] if recorded.options.epochs else [])]
    saved = {name: FunctionVector.load(folder / name) if (folder / name).exists() else None for name in names}
    if model is None:
        if recorded.loading is None:
            raise ValueError(
                f"{folder / 'results.json'}: loading: the run was started from Python and names no model to load; call "
                "fvlens.report.rerun(folder, model=model)."
            )
        model = recorded.loading.load()
    changes = recorded.changes(model)
    if announce is not None:
        announce(changes)
    result = run_relation(
        model,
        recorded.relation,
        options=recorded.options,
        heads=recorded.heads,
        model_name=_field(folder / "results.json", recorded.content, "model", str),
        loading=recorded.loading,
        command=command,
        progress=progress,
    )
    files = write_run(result, out)
    # through JSON, as the first run's numbers went
    old, new = _results(recorded.content), _results(json.loads(json.dumps(results_json(result))))
    differences = [*changes, *_differences(old, new)]
    made = [result.vector, *([] if result.tuned is None else [result.tuned.vector])]
    for (name, before), vector in zip(saved.items(), made, strict=True):
        differences += _compare_vectors(name, before, vector)
    n_numbers = sum(_is_number(value) for _, value in _leaves(new))
    n_numbers += sum(len(vector.vector) for vector in saved.values() if vector is not None)
    return Rerun(folder, out, float(tolerance), n_numbers, tuple(differences), result, tuple(files))


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
  h3 { font-size: 1rem; margin: 1.6rem 0 .2rem; }
  p.lead, p.note, ul.note { color: #555; margin-top: .2rem; }
  table { border-collapse: collapse; width: 100%; font-size: .92rem; }
  th, td { text-align: left; padding: .3rem .6rem .3rem 0; border-bottom: 1px solid #e6e6e6; vertical-align: top; }
  .number { font-variant-numeric: tabular-nums; white-space: nowrap; }
  td.right { color: #00664b; white-space: nowrap; } td.wrong { color: #9c4a00; }
  td.value { overflow-wrap: anywhere; }
  .figure { overflow-x: auto; margin-top: .8rem; }
  @media (max-width: 600px) { table { display: block; overflow-x: auto; font-size: .85rem; }
                              th, td { padding-right: .4rem; } }
</style>
</head>
<body>
<h1>{{ result.relation }}</h1>
<p class="lead">Function vector on {{ result.model_name }}: {{ result.vector.heads | length }} heads, scale
{{ "%g" | format(result.scale) }}, added after layer {{ result.vector.layer }}; {{ result.n_test }} test pairs that
took no part in finding it.</p>

<h2>Summary</h2>
<table id="summary">
<thead><tr><th>zero-shot on test unless said otherwise</th><th class="number">top-1</th>
<th class="number">95% interval</th></tr></thead>
<tbody>
{% for name, value, interval in rows %}<tr><td>{{ name }}</td><td class="number">{{ value }}</td>
<td class="number">{{ interval }}</td></tr>
{% endfor %}</tbody>
</table>

{% if result.cautions %}
<p class="note">Heads that do not help were taken all the same:</p>
<ul id="cautions" class="note">
{% for text in result.cautions %}<li>{{ text }}</li>
{% endfor %}</ul>
{% endif %}

{% if result.given %}
<h2>The heads</h2>
<p id="given">{{ result.given.heads | join(", ") }}</p>
<p class="note">Given by {{ result.given.path }} ({{ result.given.note }}); none was ranked in this run.</p>
{% endif %}

{% for figure in figures %}
<h2>{{ figure.title }}</h2>
<p class="note">{{ figure.text }}</p>
<div class="figure">{{ figure.html | safe }}</div>
{% endfor %}

{% if tuned %}
<h2>Fine-tuned vector</h2>
<p id="training" class="note">{{ tuned.text }}</p>
<table id="tuned">
<thead><tr><th>zero-shot on test unless said otherwise</th><th class="number">top-1</th>
<th class="number">95% interval</th></tr></thead>
<tbody>
{% for name, value, interval in tuned.rows %}<tr><td>{{ name }}</td><td class="number">{{ value }}</td>
<td class="number">{{ interval }}</td></tr>
{% endfor %}</tbody>
</table>

<div class="figure">{{ tuned.curves | safe }}</div>

<h3>What both vectors decode to</h3>
<p class="note">Tokens whose unembedding each vector points to most, with their logits. Descriptive only.</p>
<table id="decoded">
<thead><tr><th></th><th>function vector</th><th>logit</th><th>fine-tuned</th><th>logit</th></tr></thead>
<tbody>
{% for pair in tuned.decoded %}<tr><td class="number">{{ loop.index }}</td>
{% for word, logit in pair %}<td>{{ word }}</td><td class="number">{{ logit }}</td>
{% endfor %}</tr>
{% endfor %}</tbody>
</table>

<h3>Before and after</h3>
{% else %}
<h2>Sample predictions</h2>
{% endif %}
{% if result.fingerprint.dtype in ("bfloat16", "float16") %}
<p id="precision" class="note">The model computes in {{ result.fingerprint.dtype }}: how many prompts run together (here
up to {{ result.zero_shot.batch_size }} of the bare queries) moves its rounding, and with it some ranks.</p>
{% endif %}
<p class="note">Test queries in their split order. &#10003; marks an answer whose first token is right.</p>
<table id="samples">
<thead><tr><th>query</th><th>answer</th><th>bare</th><th>function vector</th>
{% if tuned %}<th>fine-tuned</th>{% endif %}
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
