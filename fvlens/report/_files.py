"""The files of a run."""

from pathlib import Path

from fvlens.files import as_path, write_json, write_table
from fvlens.report._numbers import results_json
from fvlens.report._page import write_report
from fvlens.report._result import RunResult
from fvlens.report._run_tables import ANSWERS_FILE, EFFECTS_FILE, HEADS_FILE, run_tables

VECTOR_FILE, TUNED_FILE = "vector.safetensors", "vector-finetuned.safetensors"
RESULTS_FILE, PAGE_FILE = "results.json", "report.html"


def write_run(result: RunResult, folder: str | Path) -> list[Path]:
    """Write the vectors, ``results.json``, ``report.html``, and the tables that the numbers of both are made of.

    These are ``vector.safetensors`` and ``vector-finetuned.safetensors``; ``heads.csv``, every head with its effect and
    error; ``effects.csv``, every head on every corrupted prompt; ``answers.csv``, every test query under every vector
    and control. Other files in the folder stay. What an earlier run wrote and this one has not (a fine-tuned vector,
    effects of heads) is removed, so that the files are those of one run.

    Args:
        result: the run.
        folder: where the files go; it is made if there is none.

    Returns:
        The files written.
    """
    folder = as_path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files = [result.vector.save(folder / VECTOR_FILE)]
    if result.tuned is not None:
        files.append(result.tuned.vector.save(folder / TUNED_FILE))
    else:
        (folder / TUNED_FILE).unlink(missing_ok=True)
    tables = run_tables(result)
    for name, file in {"heads": HEADS_FILE, "effects": EFFECTS_FILE, "answers": ANSWERS_FILE}.items():
        if name in tables:
            files.append(write_table(folder / file, tables[name]))
        else:
            (folder / file).unlink(missing_ok=True)
    files.append(write_json(folder / RESULTS_FILE, results_json(result), indent=2))
    return [*files, write_report(folder / PAGE_FILE, result)]
