"""Two runs side by side: what they were made of, their heads, and their scores, query by query."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from fvlens.files import read_text
from fvlens.metrics import Difference, paired_difference
from fvlens.report._differences import PROVENANCE, SETTINGS, RunDifference, differences
from fvlens.report._recorded import RecordedRun, read_run
from fvlens.report._run_tables import ANSWERS_FILE
from fvlens.showing import Shown, number, span
from fvlens.types import Head

if TYPE_CHECKING:
    import pandas as pd

WAYS = {
    "icl": "demonstrations",
    "shuffled": "demonstrations, labels permuted",
    "no_vector": "bare query",
    "vector": "function vector",
    "scale_one": "function vector at scale 1",
    "vector_random": "function vector, heads by random labels",
    "fine_tuned": "fine-tuned vector",
    "random_vector": "random vectors",
    "random_heads": "random heads",
    "other_relation": "vectors of other relations",
    "other_fine_tuned": "fine-tuned vectors of other relations",
}
"""What ``answers.csv`` calls a way to ask -> in words, in the order of the table."""

_COLUMNS = ("what", "query", "answer", "right")


class ScoreDifference(NamedTuple):
    """One way to ask, in two runs.

    Attributes:
        way: in words.
        first, second: top-1 of either run, over all its test queries; the mean over the vectors of a control.
        n: test queries that both runs have, with the same answer.
        difference: second minus first on these, with its 95% bootstrap interval over queries; None if there are none.
    """

    way: str
    first: float
    second: float
    n: int
    difference: Difference | None


class HeadDifference(NamedTuple):
    """A head that is in the vector of one run or of both.

    Attributes:
        head: the head.
        first, second: its place in either vector, from 1, and None where it is not in it.
        first_aie, second_aie: its average indirect effect there; None where it is not in the vector, or was given.
    """

    head: Head
    first: int | None
    second: int | None
    first_aie: float | None
    second_aie: float | None


@dataclass(frozen=True, slots=True, repr=False)
class RunComparison(Shown):
    """Two runs side by side.

    Attributes:
        first, second: their folders.
        settings: what the runs were made of and is not the same.
        heads: every head of either vector, those of both first.
        scores: every way to ask that both runs have.
    """

    first: Path
    second: Path
    settings: tuple[RunDifference, ...]
    heads: tuple[HeadDifference, ...]
    scores: tuple[ScoreDifference, ...]

    def _line(self) -> str:
        both = sum(one.first is not None and one.second is not None for one in self.heads)
        return (
            f"{self.first} and {self.second}: {len(self.settings)} settings differ, {both} heads of "
            f"{len(self.heads)} in both, {len(self.scores)} scores"
        )

    def _cells(self) -> list[tuple[str, ...]]:
        rows = [
            (one.way, number(one.first), number(one.second), str(one.n), *_told(one.difference)) for one in self.scores
        ]
        return [("way", "first", "second", "queries", "difference", "interval"), *rows]

    def to_dataframe(self) -> "pd.DataFrame":
        """One row a way to ask: ``way, first, second, n, difference, low, high``."""
        import pandas as pd

        rows = []
        for one in self.scores:
            found = one.difference
            row = {"way": one.way, "first": one.first, "second": one.second, "n": one.n}
            if found is not None:
                row |= {"difference": found.mean, "low": found.interval.low, "high": found.interval.high}
            rows.append(row)
        return pd.DataFrame(rows, columns=["way", "first", "second", "n", "difference", "low", "high"])


def _told(difference: Difference | None) -> tuple[str, str]:
    if difference is None:
        return "", ""
    return f"{difference.mean:+.3f}", span(*difference.interval[:2])


def compare_runs(first: str | Path, second: str | Path, *, generator: torch.Generator) -> RunComparison:
    """Two runs side by side, from their files. No model is loaded.

    Scores are compared on the test queries that both runs have with the same answer: whole queries are resampled, so
    that what both runs share cancels.

    Args:
        first, second: folders that ``fvlens run`` or :func:`fvlens.report.write_run` wrote.
        generator: draws the intervals.

    Returns:
        :class:`RunComparison`.

    Raises:
        ValueError: what :func:`fvlens.report.read_run` refuses; no ``answers.csv``, or one that is not as it was
            written.
    """
    runs = [read_run(folder) for folder in (first, second)]
    # of one's own pairs the data's hash tells enough
    asked = [name for name in (*SETTINGS, *PROVENANCE) if name != "pairs"]
    old, new = ({name: run.content.get(name) for name in asked} for run in runs)
    answers = [_answers(run) for run in runs]
    ways = [way for way in WAYS if all(way in one for one in answers)]
    return RunComparison(
        runs[0].folder,
        runs[1].folder,
        tuple(differences(old, new)),
        tuple(_heads(*(run.content["heads"] for run in runs))),
        tuple(_score(WAYS[way], answers[0][way], answers[1][way], generator) for way in ways),
    )


_Shares = dict[tuple[str, str], float]
"""Of each query with its answer, the share of vectors under which it is answered."""


def _answers(run: RecordedRun) -> dict[str, _Shares]:
    """The shares of each way to ask, from a run's table of answers."""
    path = run.folder / ANSWERS_FILE
    rows = csv.DictReader(io.StringIO(read_text(path, "answers of a run"), newline=""), strict=True)
    expected = f"{path}: expected the table of answers that `fvlens run` writes"
    found: dict[str, dict[tuple[str, str], list[bool]]] = {}
    try:
        missing = [name for name in _COLUMNS if name not in (rows.fieldnames or ())]
        if missing:
            raise ValueError(f"{expected}, got no column {', '.join(missing)}.")
        for row in rows:
            if row["right"] not in ("True", "False"):
                raise ValueError(f"{expected}, got {row['right']!r} under right in line {rows.line_num}.")
            found.setdefault(row["what"], {}).setdefault((row["query"], row["answer"]), []).append(
                row["right"] == "True"
            )
    except csv.Error as error:
        raise ValueError(f"{expected} ({error}).") from error
    return {
        what: {asked: sum(right) / len(right) for asked, right in queries.items()} for what, queries in found.items()
    }


def _score(way: str, first: _Shares, second: _Shares, generator: torch.Generator) -> ScoreDifference:
    shared = [asked for asked in first if asked in second]
    difference = None
    if shared:
        old, new = (torch.tensor([run[asked] for asked in shared]) for run in (first, second))
        difference = paired_difference(new, old, generator=generator)
    before, after = (sum(run.values()) / len(run) for run in (first, second))
    return ScoreDifference(way, before, after, len(shared), difference)


def _heads(first: Sequence[Sequence[Any]], second: Sequence[Sequence[Any]]) -> list[HeadDifference]:
    """Heads of both, in the order of the first; those of the first alone; those of the second alone."""
    places = [{Head(row[0], row[1]): (i + 1, row[2]) for i, row in enumerate(rows)} for rows in (first, second)]
    in_order = sorted(dict.fromkeys([*places[0], *places[1]]), key=lambda head: sum(head not in one for one in places))
    nowhere = (None, None)
    rows = []
    for head in in_order:
        (place, aie), (other_place, other_aie) = (one.get(head, nowhere) for one in places)
        rows.append(HeadDifference(head, place, other_place, aie, other_aie))
    return rows
