"""The same run again, from its files."""

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fvlens.files import as_path, check_destination
from fvlens.models import is_known
from fvlens.report._differences import RunDifference, comparable, count_numbers, differences, vector_differences
from fvlens.report._fields import Fields
from fvlens.report._files import RESULTS_FILE, TUNED_FILE, VECTOR_FILE, write_run
from fvlens.report._recorded import RecordedRun, read_run
from fvlens.report._result import RunResult
from fvlens.report._run import run_relation
from fvlens.report._settings import Loading
from fvlens.showing import Shown
from fvlens.vectors import FunctionVector

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, slots=True, repr=False)
class Rerun(Shown):
    """A run repeated from its files, and what differs.

    Attributes:
        folder: the files of the first run.
        out: the files of the second.
        tolerance: largest :attr:`RunDifference.size` at which two numbers count as the same.
        n_numbers: numbers compared.
        differences: everything that is not exactly the same: what the numbers depend on first, then the numbers.
        result: the second run.
        files: the files written.
    """

    folder: Path
    out: Path
    tolerance: float
    n_numbers: int
    differences: tuple[RunDifference, ...]
    result: RunResult
    files: tuple[Path, ...]

    @property
    def largest(self) -> float:
        """Largest :attr:`RunDifference.size`; 0 if all numbers are equal."""
        sizes = [difference.size for difference in self.differences if difference.size is not None]
        return max(sizes, default=0.0)

    @property
    def agrees(self) -> bool:
        """Whether every result is the same, numbers within the tolerance."""
        return self.largest <= self.tolerance and not any(row.kind == "result" for row in self.differences)

    def _line(self) -> str:
        verdict = "the same" if self.agrees else "not the same"
        return f"{self.n_numbers} numbers, {verdict}: {len(self.differences)} differences, largest {self.largest:.3g}"

    def _cells(self) -> list[tuple[str, ...]]:
        return [("what", "name", "old", "new"), *(tuple(map(str, row[:4])) for row in self.differences)]

    def to_dataframe(self) -> "pd.DataFrame":
        """One row a difference: ``kind, name, old, new, size``."""
        import pandas as pd

        return pd.DataFrame(list(self.differences), columns=list(RunDifference._fields))


def rerun(
    folder: str | Path,
    *,
    out: str | Path | None = None,
    model: Any = None,
    loading: Loading | None = None,
    trust: bool = False,
    tolerance: float = 1e-5,
    announce: Callable[[Sequence[RunDifference]], None] | None = None,
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
        model: the model; by default it is loaded.
        loading: how to load it; by default as ``results.json`` says, if the model that it names is one that comes with
            fvlens or by a hash that fvlens knows.
        trust: load whatever model ``results.json`` names, and look at the file of heads that it names.
        tolerance: numbers a and b count as the same if ``|a - b| <= tolerance * max(1, |a|, |b|)``.
        announce: called before the run with what it depends on and is not as it was.
        command: the command line, recorded as it is.
        progress: show progress bars.

    Returns:
        :class:`Rerun`, its ``.differences`` in the order: what the numbers depend on, then the numbers.

    Raises:
        ValueError: what :func:`read_run` refuses; a damaged vector file; ``out`` is ``folder`` or a file; a bad
            ``tolerance``; a run that names no model, when none is given; one that names another than those fvlens
            knows, without ``trust``; or a model that cannot be loaded.
    """
    # everything that can be refused is read and checked before the model is loaded and run
    folder = as_path(folder)
    recorded = read_run(folder)
    if not (math.isfinite(tolerance) and tolerance >= 0):
        raise ValueError(f"rerun: tolerance: expected a number of at least 0, got {tolerance}.")
    out = _folder_of_second(folder, out)
    names = [VECTOR_FILE, *([TUNED_FILE] if recorded.options.epochs else [])]
    old_vectors = {name: FunctionVector.load(folder / name) if (folder / name).exists() else None for name in names}
    how = recorded.loading if loading is None else loading
    if model is None:
        model = _model_of(recorded, trust) if loading is None else loading.load()

    changes = recorded.changes(model, trust=trust)
    if announce is not None:
        announce(changes)
    result = run_relation(
        model,
        recorded.relation,
        options=recorded.options,
        heads=recorded.heads,
        model_name=Fields(folder / RESULTS_FILE, recorded.content).get("model", str),
        loading=how,
        command=command,
        progress=progress,
    )
    files = write_run(result, out)

    # the second run's numbers as its file has them, since the first one's come from a file too
    old, new = comparable(recorded.content, json.loads((out / RESULTS_FILE).read_bytes()))
    differing = [*changes, *differences(old, new)]
    new_vectors = [result.vector, *([] if result.tuned is None else [result.tuned.vector])]
    for (name, before), after in zip(old_vectors.items(), new_vectors, strict=True):
        differing += vector_differences(name, before, after)
    n_numbers = count_numbers(new) + sum(len(vector.vector) for vector in old_vectors.values() if vector is not None)
    return Rerun(folder, out, float(tolerance), n_numbers, tuple(differing), result, tuple(files))


def _folder_of_second(folder: Path, out: str | Path | None) -> Path:
    """Where the second run's files go: not where the first one's are."""
    if out is None:
        # ".." has no name of its own
        whole = folder.resolve() if folder.name in ("", "..") else folder
        out = whole.with_name(f"{whole.name}-rerun")
    out = check_destination(out, "rerun:")
    if out.resolve() == folder.resolve():
        raise ValueError(f"rerun: {out} holds the run itself; give another folder for the second one.")
    return out


def _model_of(recorded: RecordedRun, trust: bool) -> Any:
    """The model that the run names, loaded as it was, if that may be."""
    if recorded.loading is None:
        raise ValueError(
            f"{recorded.folder / RESULTS_FILE}: loading: the run was started from Python and names no model to load; "
            "say which one it was with --model (in Python, model=)."
        )
    named = [name for name in (recorded.loading.model, recorded.loading.base) if name is not None]
    if not trust and not all(map(is_known, named)):
        raise ValueError(
            f"{recorded.folder / RESULTS_FILE}: loading: the file names the model {' and '.join(map(repr, named))}, "
            "and a file does not choose what is loaded; say it yourself with --model (in Python, loading=), or load "
            "what the file names with --trust (in Python, trust=True)."
        )
    return dataclasses.replace(recorded.loading, trust=trust).load()
