"""One small run of the whole chain, shared by the tests of the report, the command line and the page."""

import functools

import fvlens
from fvlens.report import RunOptions, RunResult, run_relation

SMALL = RunOptions(n_prompts=20, n_corrupted=8, n_random=2, n_others=1, both_labels=True)


@functools.cache
def small_run(model) -> RunResult:
    """The run of :data:`SMALL` on antonym, made once per model and session."""
    return run_relation(model, fvlens.load_relation("antonym"), options=SMALL, progress=False)
