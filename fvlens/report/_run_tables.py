"""The tables beside a run's page: every head, every head on every prompt, every answer to every query."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from fvlens.evaluation import Evaluation
from fvlens.report._result import RunResult

if TYPE_CHECKING:
    import pandas as pd

HEADS_FILE, EFFECTS_FILE, ANSWERS_FILE = "heads.csv", "effects.csv", "answers.csv"
_HALF = 1.959963984540054
"""Standard errors from the middle of a 95% interval of a normal distribution to its end."""


def table_files(result: RunResult) -> dict[str, str | None]:
    """The files of the tables, by what they hold; None where heads were given, so that no effects were measured."""
    return {
        "heads": HEADS_FILE if result.effects else None,
        "effects": EFFECTS_FILE if result.effects else None,
        "answers": ANSWERS_FILE,
    }


def run_tables(result: RunResult) -> "dict[str, pd.DataFrame]":
    """The tables, by the names of :func:`table_files`.

    ``heads`` has one row a ranking and head: ``labels, layer, head, aie, stderr, low, high, place, in_vector``; ``low``
    and ``high`` are the ends of a 95% interval over prompts, ``aie -+ 1.96 stderr``, empty for a single prompt;
    ``place`` counts from 1 for the best head. ``effects`` has one row a ranking, corrupted prompt and head: ``labels,
    prompt, layer, head, cie, baseline``. ``answers`` has one row a way of asking and test query: ``what, run, layer,
    scale, query, answer, predicted, right, rank, probability, log_probability, exact``; ``run`` counts the vectors of
    one control, and ``what`` is a control's kind, ``vector_random`` for the other ranking's vector, ``scale_one``,
    ``fine_tuned`` or ``other_fine_tuned``.
    """
    import pandas as pd

    tables = {"answers": pd.concat([_answers(*row) for row in _evaluations(result)], ignore_index=True)}
    if result.effects:
        heads, effects = [], []
        for ranking, found in result.effects.items():
            place = {head: i + 1 for i, head in enumerate(found.ranking)}
            aie, stderr, inside = found.aie, found.stderr, set(result.vectors[ranking].heads)
            heads += [
                {
                    "labels": ranking,
                    "layer": head.layer,
                    "head": head.head,
                    "aie": float(aie[head]),
                    "stderr": float(stderr[head]),
                    "low": float(aie[head] - _HALF * stderr[head]),
                    "high": float(aie[head] + _HALF * stderr[head]),
                    "place": place[head],
                    "in_vector": head in inside,
                }
                for head in sorted(place)
            ]
            each = found.to_dataframe()
            each.insert(0, "labels", ranking)
            effects.append(each)
        tables |= {"heads": pd.DataFrame(heads), "effects": pd.concat(effects, ignore_index=True)}
    return tables


def _evaluations(result: RunResult) -> Iterator[tuple[str, int, Evaluation]]:
    """Every set of answers to the test queries: what was done, which of several, and the answers."""
    for kind in dict.fromkeys(row.kind for row in result.controls.rows):
        same = [one for row in result.controls.rows if row.kind == kind for one in row.evaluations]
        yield from ((kind, run, one) for run, one in enumerate(same))
    for source, one in result.steered.items():
        if source != result.source:
            yield f"vector_{source}", 0, one
    if result.at_scale_one is not None and result.scale != 1:
        yield "scale_one", 0, result.at_scale_one
    if result.tuned is not None:
        yield "fine_tuned", 0, result.tuned.evaluation
        yield from (("other_fine_tuned", run, one) for run, one in enumerate(result.tuned.others))


def _answers(what: str, run: int, found: Evaluation) -> "pd.DataFrame":
    import pandas as pd

    return pd.DataFrame(
        {
            "what": what,
            "run": run,
            "layer": pd.array([found.vector_layer] * found.n, dtype="Int64"),
            "scale": found.scale,
            "query": [pair.input for pair in found.queries],
            "answer": [pair.output for pair in found.queries],
            "predicted": list(found.predictions),
            "right": found.correct.numpy(),
            "rank": found.ranks.numpy(),
            "probability": found.probabilities.numpy(),
            "log_probability": found.log_probabilities.numpy(),
            "exact": found.whole.numpy(),
        }
    )
