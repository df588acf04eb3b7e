"""The run: a relation's vector found, fine-tuned, and tested beside its controls.

1. *Find*: the recipe of :mod:`fvlens.find` on the relation, and on the other corruption too where it is asked for.
2. *Others*: vectors of other relations by the same recipe, added after the same layer with the same scale.
3. *Train*: the vector, and the others for comparison.
4. *Test*: everything on the test pairs, which take part in nothing before.
"""

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fvlens.evaluation import SCALES, Evaluation, controls, copied, evaluate
from fvlens.find import RANKINGS, Found, Ranking, find_vector, finished, relation_effects, task_means
from fvlens.metrics import bootstrap_interval
from fvlens.models import fingerprint, load_report
from fvlens.prompts import get_template, template_for
from fvlens.relations import Pairs, Relation, Split, as_relation, disjoint_relations, load_relation
from fvlens.report._provenance import Provenance
from fvlens.report._result import RunResult, Source, Tuned
from fvlens.report._settings import Loading, RunOptions
from fvlens.training import FineTuned, finetune_many
from fvlens.universal import GivenHeads
from fvlens.vectors import FunctionVector, function_vector


def other_relations(relation: Relation, n: int, generator: torch.Generator) -> list[str]:
    """Up to n of :func:`fvlens.relations.disjoint_relations`, at random."""
    names = disjoint_relations(relation)
    order = torch.randperm(len(names), generator=generator).tolist()
    return [names[i] for i in order[:n]]


def run_relation(
    model: Any,
    relation: Pairs,
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
    its control. Training draws from generators of its own, so all other numbers are the same without it.

    Args:
        model: the model.
        relation: the word pairs, in any shape (:func:`fvlens.relations.as_relation`).
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
    relation = as_relation(relation, what="run_relation")
    if not relation.name:
        relation = dataclasses.replace(relation, name="custom pairs")
    if heads is not None:
        options = dataclasses.replace(options, n_heads=len(heads.heads))
    if get_template(options.template).needs_tokenizer:  # recorded in full, for when the tokenizer has no such format
        options = dataclasses.replace(options, template=template_for(model, options.template))
    _check(model, options)
    generator = torch.Generator().manual_seed(options.seed)
    split = relation.split(generator)
    common: dict[str, Any] = {"template": options.template, "relation": relation.name, "generator": generator}

    # what is chosen is chosen here, on train and validation pairs
    recipes = _recipes(model, relation, split, options, heads, generator, progress)
    source, main = next(iter(recipes.items()))
    others = _others(model, relation, options, heads, main, generator, progress)
    trained = _train(model, relation, split, options, main.vector, others, progress) if options.epochs else None

    # the first test query is asked here
    table = finished(
        controls(
            model,
            split.test,
            main.unscaled,
            others=others.unscaled,
            means=main.means,
            scale=main.scale,
            n_random=options.n_random,
            demonstrations=split.train,
            n_shots=options.n_shots,
            progress=progress,
            **common,
        )
    )
    # the table's own scores, so that the page gives one number for one thing
    scores = {row.kind: row.evaluations[0] for row in table.rows}
    steered: dict[Source, Evaluation] = {
        name: scores["vector"]
        if name == source
        else evaluate(model, split.test, vector=recipe.vector, setting="zero_shot", **common)
        for name, recipe in recipes.items()
    }
    unscaled = main.vector_at_scale_one
    if unscaled is None:
        at_scale_one = None
    elif main.scale == 1:
        at_scale_one = scores["vector"]
    else:
        # from a copy of the generator, so that it moves no other number
        asked = {**common, "generator": copied(generator)}
        at_scale_one = evaluate(model, split.test, vector=unscaled, setting="zero_shot", **asked)

    cautions = [(f"{name} labels", text) for name, recipe in recipes.items() for text in recipe.cautions]
    cautions += [(f"vector of {name}", text) for name, text in others.cautions.items()]
    cautions.append(("answers", scores["no_vector"].caution))
    return RunResult(
        relation=relation.name,
        model_name=model_name or (str(model.cfg.model_name) if loading is None else loading.model),
        options=options,
        split=split,
        icl=scores["icl"],
        shuffled=scores["shuffled"],
        zero_shot=scores["no_vector"],
        steered=steered,
        vectors={name: recipe.vector for name, recipe in recipes.items()},
        effects={
            name: recipe.effects for name, recipe in recipes.items() if name != "file" and recipe.effects is not None
        },
        sweeps={name: recipe.sweep for name, recipe in recipes.items()},
        at_scale_one=at_scale_one,
        controls=table,
        others=tuple(others.splits),
        decoded=tuple(main.vector.decode(model, k=10)),
        fingerprint=fingerprint(model),
        data_hash=relation.data_hash,
        data=relation,
        seconds=time.monotonic() - began,
        provenance=Provenance.of(model, {relation.name: relation.data_hash, **others.hashes}),
        given=heads,
        loading=loading,
        command=None if command is None else tuple(command),
        tuned=None if trained is None else _tuned(model, split, options, *trained),
        cautions=tuple(f"{where}: {text}" for where, text in cautions if text),
        loaded=load_report(model),
    )


def _check(model: Any, options: RunOptions) -> None:
    """Refuse what the model cannot do."""
    n_cells = model.cfg.n_layers * model.cfg.n_heads
    if options.n_heads > n_cells // 2:
        raise ValueError(
            f"n_heads={options.n_heads}: expected at most {n_cells // 2}, half of the model's {n_cells} heads, so that "
            "as many others can be drawn as a control."
        )
    if options.layer is not None and not 0 <= options.layer < model.cfg.n_layers:
        raise ValueError(f"layer={options.layer}: expected 0..{model.cfg.n_layers - 1}.")


# --- find ---


def _drawn(options: RunOptions) -> dict[str, Any]:
    """How the prompts behind the task means are drawn."""
    return {"n_shots": options.n_shots, "n_prompts": options.n_prompts, "template": options.template}


def _recipes(
    model: Any,
    relation: Relation,
    split: Split,
    options: RunOptions,
    heads: GivenHeads | None,
    generator: torch.Generator,
    progress: bool,
) -> dict[Source, Found]:
    """The recipe with the heads given or the ranking asked for, and after it with the other one if both are wanted."""
    how: dict[str, Any] = {
        "n_heads": options.n_heads,
        "n_corrupted": options.n_corrupted,
        "relation": relation.name,
        "layers": None if options.layer is None else [options.layer],
        "scales": SCALES if options.scale is None else [options.scale],
        "seed": options.seed,
        "progress": progress,
        **_drawn(options),
    }
    source: Source = options.labels if heads is None else "file"
    given = None if heads is None else heads.heads
    main = find_vector(model, split, labels=options.labels, heads=given, generator=generator, **how)
    recipes: dict[Source, Found] = {source: main}
    if heads is None and options.both_labels:
        other: Ranking = next(ranking for ranking in RANKINGS if ranking != options.labels)
        # from a copy of the generator, so that a comparison moves no other number
        compared = copied(generator)
        recipes[other] = find_vector(model, split, labels=other, means=main.means, generator=compared, **how)
    return recipes


@dataclass(frozen=True, slots=True)
class _Others:
    """Vectors of other relations, by name.

    Attributes:
        splits: their pairs.
        hashes: the hash of all their pairs.
        unscaled: the vectors at the layer of the run's own vector.
        scaled: the same with its scale.
        cautions: what must be said of their heads, empty if nothing; no entry for heads that were given.
    """

    splits: dict[str, Split]
    hashes: dict[str, str]
    unscaled: list[FunctionVector]
    scaled: list[FunctionVector]
    cautions: dict[str, str]


def _others(
    model: Any,
    relation: Relation,
    options: RunOptions,
    heads: GivenHeads | None,
    main: Found,
    generator: torch.Generator,
    progress: bool,
) -> _Others:
    """Other relations' vectors by the same recipe; layer and scale are those of the run's own vector."""
    others = _Others({}, {}, [], [], {})
    for name in other_relations(relation, options.n_others, generator):
        other = load_relation(name)
        others.hashes[name] = other.data_hash
        split = others.splits[name] = other.split(generator)
        how: dict[str, Any] = {"relation": name, "generator": generator, "progress": progress, **_drawn(options)}
        if heads is None:
            ranked = {"labels": options.labels, "n_corrupted": options.n_corrupted}
            means, effects = relation_effects(model, split, **ranked, **how)
            best = effects.ranking[: options.n_heads]
            others.cautions[name] = effects.caution(options.n_heads)
        else:
            means, best = task_means(model, split, **how), heads.heads
        vector = function_vector(model, means, heads=best, layer=main.layer)
        others.unscaled.append(vector)
        others.scaled.append(main.scale * vector)
    return others


# --- train ---


def _fresh(options: RunOptions) -> torch.Generator:
    """A generator of its own for one part of the fine-tuning, so that it moves no other number of the run."""
    return torch.Generator().manual_seed(options.seed)


def _train(
    model: Any,
    relation: Relation,
    split: Split,
    options: RunOptions,
    vector: FunctionVector,
    others: _Others,
    progress: bool,
) -> tuple[FineTuned, list[FunctionVector]]:
    """The vector's training at its own layer, and the other relations' vectors after the same training."""
    # all in one training: a step reads the model's weights once, whatever the number of relations
    together = finetune_many(
        model,
        {relation.name: split, **others.splits},
        init=[vector, *others.scaled],
        n_train=options.n_train,
        epochs=options.epochs,
        template=options.template,
        generator=_fresh(options),
        progress=progress,
    )
    run, *rest = finished(together)
    return run, [other.vector for other in rest if isinstance(other.vector, FunctionVector)]


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

    evaluation, of_others = score(run.vector), tuple(score(other) for other in others)
    mean = None
    if of_others:
        # of each query over the vectors first, since the interval is over queries
        correct = torch.stack([other.correct.double() for other in of_others]).mean(dim=0)
        mean = (correct.mean().item(), bootstrap_interval(correct, generator=_fresh(options)))
    return Tuned(run, run.vector, evaluation, of_others, mean, tuple(run.vector.decode(model, k=10)))
