"""The numbers of a run and all that they depend on, as ``results.json`` has them."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from fvlens.evaluation import LayerScaleSweep
from fvlens.metrics import Interval
from fvlens.prompts import TEMPLATES, get_template
from fvlens.relations import Relation, library_relation, list_relations
from fvlens.report._result import RunResult, Source
from fvlens.report._run_tables import table_files
from fvlens.universal import file_hash

SCHEMA = 4
"""Version of ``results.json``: which fields it has and what they mean. 3: fvlens 0.1."""


def results_json(result: RunResult) -> dict[str, Any]:
    """The numbers of a run, and everything they depend on, as plain JSON values.

    ``fv_top1``, ``layer``, ``scale`` and ``heads`` are those of the saved vector, and so are the controls; ``rankings``
    has the ranking asked for, and the other one if both were. ``choice`` tells what the validation pairs said of the
    layer and scale chosen, and of scale 1 at its best layer; ``fv_scale_one_top1`` is top-1 there on the test pairs,
    null if a scale was given. A head is ``[layer, head, AIE, standard error]``, the last two null for heads from a
    file. ``exact`` has the shares of whole answers that are right, ``n_first_tokens`` the different first tokens of the
    test answers. ``tables`` names the files beside it that hold every head, every effect and every answer
    (:func:`fvlens.report.run_tables`). ``pairs`` is null for a relation of the library; else it has the pairs, and file
    and hash if they came from one. What begins with ``ffv`` belongs to the fine-tuned vector and
    is null where none was trained; ``ffv_cosine`` is that to the function vector.
    """

    def heads(source: Source) -> list[list[int | float | None]]:
        if source == "file":
            return [[head.layer, head.head, None, None] for head in result.vectors[source].heads]
        effects = result.effects[source]
        stderr, aie = effects.stderr, effects.aie
        return [[h.layer, h.head, float(aie[h]), float(stderr[h])] for h in effects.ranking[: result.options.n_heads]]

    def span(interval: Interval) -> list[float]:
        return [interval.low, interval.high]

    main, random = result.steered[result.source], result.steered.get("random")
    unscaled = result.at_scale_one
    random_vector, random_vector_interval = result.control("random_vector")
    other = result.control("other_relation") if result.others else None
    provenance, given, tuned = result.provenance, result.given, result.tuned
    return {
        "schema": SCHEMA,
        "relation": result.relation,
        "model": result.model_name,
        "seed": result.options.seed,
        # the scores that the page's first table shows
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
        "fv_scale_one_top1": None if unscaled is None else unscaled.top1,
        # where the vectors act, and what they are made of
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
        "heads_source": "ranking" if given is None else "file" if given.path else "named",
        "heads": heads(result.source),
        "n_test": result.n_test,
        # the intervals of the scores, and what each ranking alone gave
        "intervals": {
            "level": main.interval.level,
            "icl_top1": span(result.icl.interval),
            "zero_shot_top1": span(result.zero_shot.interval),
            "shuffled_top1": span(result.shuffled.interval),
            "fv_top1": span(main.interval),
            "fv_random_labels_top1": None if random is None else span(random.interval),
            "fv_scale_one_top1": None if unscaled is None else span(unscaled.interval),
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
        # what else was found
        "icl_probability": result.icl.probability,
        "shuffled_probability": result.shuffled.probability,
        "other_relations": list(result.others),
        "path": result.path,
        "ffv_path": None if tuned is None else tuned.run.path,
        "cautions": list(result.cautions),
        "exact": _exact(result),
        "n_first_tokens": result.zero_shot.n_first_tokens,
        "tables": table_files(result),
        "decoded": [list(pair) for pair in result.decoded],
        "ffv_decoded": None if tuned is None else [list(pair) for pair in tuned.decoded],
        # what all of it depends on
        "options": options_json(result),
        "loading": None if result.loading is None else result.loading.recorded(),
        "command": None if result.command is None else list(result.command),
        "fingerprint": asdict(result.fingerprint),
        "loaded": None if result.loaded is None else asdict(result.loaded) | {"notes": list(result.loaded.notes)},
        "data_hash": result.data_hash,
        "data": {
            "relations": provenance.relations,
            "library": provenance.library_hash,
            "heads_file": None if given is None else given.hash or None,
        },
        "pairs": _pairs(result.data),
        "heads_note": None if given is None else given.note,
        "split_disjoint": result.split.disjoint,
        "versions": provenance.versions,
        "code_hash": provenance.code_hash,
        "platform": provenance.platform,
        # times
        "ffv_seconds": None if tuned is None else tuned.run.seconds,
        "seconds": result.seconds,
    }


def _exact(result: RunResult) -> dict[str, float | None]:
    """Shares of whole answers that are right, under the names of the top-1 scores that they belong to."""
    tuned, unscaled = result.tuned, result.at_scale_one
    random = result.steered.get("random")
    return {
        "icl": result.icl.exact,
        "zero_shot": result.zero_shot.exact,
        "shuffled": result.shuffled.exact,
        "fv": result.steered[result.source].exact,
        "fv_random_labels": None if random is None else random.exact,
        "fv_scale_one": None if unscaled is None else unscaled.exact,
        "ffv": None if tuned is None else tuned.evaluation.exact,
        "random_vector": result.control_exact("random_vector"),
        "other_relation": result.control_exact("other_relation") if result.others else None,
        "other_relation_ffv": None if tuned is None or tuned.other is None else tuned.other_exact,
        "random_heads": result.control_exact("random_heads"),
    }


def _pairs(relation: Relation | None) -> dict[str, Any] | None:
    """Pairs that are not the library's, so that they can be run again, and where they came from."""
    if relation is None or is_of_library(relation):
        return None
    return {
        "file": str(Path(relation.path).absolute()) if relation.path else None,
        "file_hash": _hash_of(relation.path),
        "family": relation.family,
        "list": [list(pair) for pair in relation.pairs],
    }


def _hash_of(path: str) -> str | None:
    """Hash of a file of pairs; None where there is none any more, as in a run that is made again without it."""
    try:
        return file_hash(path) if path else None
    except ValueError:
        return None


def is_of_library(relation: Relation) -> bool:
    """Whether the library has these pairs under this name."""
    return relation.name in list_relations() and library_relation(relation.name).data_hash == relation.data_hash


def options_json(result: RunResult) -> dict[str, Any]:
    """The options as plain values; of a template of one's own the name, and the whole of it as ``template_text``."""
    template = get_template(result.options.template)
    values = asdict(result.options) | {"template": template.name, "bos": template.bos}
    built_in = TEMPLATES.get(template.name)
    if built_in is None or built_in.with_bos(template.bos) != template:
        values["template_text"] = template.to_json()
    return values | {"heads_file": None if result.given is None else result.given.path or None}


def _choice(sweep: LayerScaleSweep) -> dict[str, Any]:
    """Layer, scale and validation top-1: of the cell that was chosen, and of scale 1 at its best layer."""
    scale_one = None
    if 1 in sweep.scales:
        layer = sweep.at_scale(1).best_layer
        scale_one = {"layer": layer, "valid_top1": sweep.at(layer, 1).top1}
    return {
        "layer": sweep.best_layer,
        "scale": sweep.best_scale,
        "valid_top1": sweep.best.top1,
        "n_valid": sweep.best.n,
        "scale_one": scale_one,
    }
