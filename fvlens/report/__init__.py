"""The whole chain on one relation, its files, a report page that works offline, and the same run again.

:func:`run_relation` goes from word pairs to a controlled function vector, :func:`write_run` writes
``vector.safetensors``, ``vector-finetuned.safetensors``, ``results.json``, ``report.html`` and, as tables, every head,
every effect and every answer. ``results.json`` names everything that the numbers depend on, so that :func:`rerun` can
repeat the run from it and say what differs. :func:`compare_runs` puts two runs side by side.
"""

from fvlens.report._diff import HeadDifference, RunComparison, ScoreDifference, compare_runs
from fvlens.report._differences import RunDifference
from fvlens.report._files import RESULTS_FILE, TUNED_FILE, VECTOR_FILE, write_run
from fvlens.report._numbers import SCHEMA, results_json
from fvlens.report._page import write_report
from fvlens.report._provenance import PACKAGES, Provenance
from fvlens.report._recorded import RecordedRun, read_run
from fvlens.report._rerun import Rerun, rerun
from fvlens.report._result import RunResult, Source, Tuned
from fvlens.report._run import other_relations, run_relation
from fvlens.report._run_tables import ANSWERS_FILE, EFFECTS_FILE, HEADS_FILE, run_tables
from fvlens.report._settings import Loading, Precision, RecipeOptions, RunOptions, at_least_one

__all__ = [
    "ANSWERS_FILE",
    "EFFECTS_FILE",
    "HEADS_FILE",
    "PACKAGES",
    "RESULTS_FILE",
    "SCHEMA",
    "TUNED_FILE",
    "VECTOR_FILE",
    "HeadDifference",
    "Loading",
    "Precision",
    "Provenance",
    "RecipeOptions",
    "RecordedRun",
    "Rerun",
    "RunComparison",
    "RunDifference",
    "RunOptions",
    "RunResult",
    "ScoreDifference",
    "Source",
    "Tuned",
    "at_least_one",
    "compare_runs",
    "other_relations",
    "read_run",
    "rerun",
    "results_json",
    "run_relation",
    "run_tables",
    "write_report",
    "write_run",
]
