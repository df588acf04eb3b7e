"""The files of a run."""

from pathlib import Path

from fvlens.files import write_json
from fvlens.report._numbers import results_json
from fvlens.report._page import write_report
from fvlens.report._result import RunResult

VECTOR_FILE, TUNED_FILE = "vector.safetensors", "vector-finetuned.safetensors"
RESULTS_FILE, PAGE_FILE = "results.json", "report.html"


def write_run(result: RunResult, folder: str | Path) -> list[Path]:
    """Write ``vector.safetensors``, ``vector-finetuned.safetensors``, ``results.json`` and ``report.html``.

    Other files in the folder stay. An earlier run's fine-tuned vector is removed where this run trained none, so that
    the files are those of one run.

    Args:
        result: the run.
        folder: where the files go; it is made if there is none.

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
    files.append(write_json(folder / RESULTS_FILE, results_json(result), indent=2))
    return [*files, write_report(folder / PAGE_FILE, result)]
