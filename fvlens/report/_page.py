"""The page of a run: what ``templates/run.html`` shows, figure by figure and table by table."""

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fvlens.evaluation import Evaluation
from fvlens.pages import FigureBlock, write_page
from fvlens.report._numbers import is_of_library, options_json
from fvlens.report._result import Row, RunResult, Tuned
from fvlens.report._run_tables import table_files

if TYPE_CHECKING:
    from fvlens import plots


def write_report(path: str | Path, result: RunResult) -> Path:
    """Write the report page: one HTML file with its figures and scripts inside, readable without a network.

    Args:
        path: the file; one that is there is replaced at once.
        result: the run.

    Returns:
        The file.

    Raises:
        ValueError: the folder does not exist.
    """
    tuned = result.tuned
    decoded = () if tuned is None else zip(result.decoded, tuned.decoded, strict=True)
    return write_page(
        path,
        "report/run.html",
        result=result,
        figures=_figures(result),
        training="" if tuned is None else _training(result, tuned),
        tuned_rows=[] if tuned is None else [row[:3] for row in _tuned_rows(result, tuned)],
        tuned_exact=None if tuned is None else _differing(_tuned_rows(result, tuned)),
        decoded=list(decoded),
        command=_command(result),
        failures=_failures(result),
        samples=_samples(result),
        tables=_tables(result),
        provenance=_provenance(result, Path(path).parent),
    )


def _figures(result: RunResult) -> list[FigureBlock]:
    """The figures in the order of the chain: heads, place, controls, decoded words."""
    from fvlens import plots

    command = _command(result)
    figures = [
        FigureBlock(
            f"Which heads carry the task ({ranking} labels)",
            "Each cell is one head: how much the answer's probability rises on a corrupted prompt when the head's "
            "output is replaced by its mean over clean prompts. Hover for the value and its standard error.",
            effects.plot(n_top=result.options.n_heads),
            command,
        )
        for ranking, effects in result.effects.items()
    ]
    figures += [
        FigureBlock(
            f"Where the vector works ({result.described(source)})",
            "Zero-shot top-1 on the validation pairs with the vector, times each scale, added after each layer.",
            sweep.plot(),
            command,
        )
        for source, sweep in result.sweeps.items()
    ]
    controls = FigureBlock(
        "The vector against its controls",
        "Top-1 on the test pairs with 95% bootstrap intervals.",
        _controls(result),
        command,
    )
    words, scores = zip(*result.decoded, strict=True)
    decoded = FigureBlock(
        "What the vector decodes to",
        "Tokens whose unembedding the vector points to most. Descriptive only: a vector can steer without decoding "
        "to readable words.",
        plots.decoded(list(words), list(scores)),
        command,
    )
    return [*figures, controls, decoded]


def _controls(result: RunResult) -> "plots.Figure":
    """Top-1 of the vectors and of each control, the fine-tuned vector among them, as bars with intervals."""
    from fvlens import plots

    bars = [(row.name, row.top1, row.interval, row.kind == "vector") for row in result.controls.rows]
    if result.tuned is not None:
        tuned = result.tuned.evaluation
        place = next(i for i, bar in enumerate(bars) if bar[3])
        bars.insert(place + 1, (f"fine-tuned vector, layer {tuned.vector_layer}", tuned.top1, tuned.interval, True))
    names, values, intervals, own = zip(*bars, strict=True)
    return plots.bars(
        names,
        values,
        [one.low for one in intervals],
        [one.high for one in intervals],
        x_title="Top-1",
        title=f"{result.relation}: vectors and controls ({result.n_test} bare queries)",
        level=intervals[0].level,
        highlighted=[name for name, shown in zip(names, own, strict=True) if shown],
    )


def _training(result: RunResult, tuned: Tuned) -> str:
    """How the fine-tuned vector came about, in words."""
    run, vector = tuned.run, tuned.vector
    epoch = f"epoch {run.best_epoch} of {tuned.epochs}" + ("" if run.best_epoch else ", the start: none was better")
    return (
        f"The function vector, trained further on the bare queries of {result.n_trained} training pairs; the "
        f"model stays as it is. Chosen on the {len(result.split.valid)} validation pairs: {epoch}. Added "
        f"after layer {vector.layer}, as the function vector is; cosine similarity to it "
        f"{vector.cosine(result.vector):.2f}; norm {vector.norm():.2f}, of the function vector "
        f"{result.vector.norm():.2f}. Trained in {run.seconds:.1f}\N{NO-BREAK SPACE}s."
    )


def _differing(rows: Sequence[Row]) -> list[float] | None:
    """Shares of whole answers that are right; None where all are as top-1."""
    return [row.exact for row in rows] if any(abs(row.exact - row.top1) > 1e-9 for row in rows) else None


def _tuned_rows(result: RunResult, tuned: Tuned) -> list[Row]:
    """The fine-tuned vector between the bare query and the demonstrations."""
    rows = [
        Row.of("bare query", result.zero_shot),
        Row.of("function vector", result.steered[result.source]),
        Row.of("fine-tuned vector", tuned.evaluation),
    ]
    if tuned.other is not None:
        name = f"fine-tuned vectors of other relations ({', '.join(result.others)})"
        rows.append(Row(name, *tuned.other, tuned.other_exact))
    rows.append(Row.of(f"{result.options.n_shots} clean demonstrations", result.icl))
    return rows


@dataclass(frozen=True, slots=True)
class _Sample:
    """A test query, its answer, and what the model says to it.

    Attributes:
        query, expected: the pair.
        answers: predicted word and whether it is right: bare, with the function vector, fine-tuned if there is one, and
            after demonstrations.
        missed: whether the best vector, fine-tuned if there is one, misses it.
    """

    query: str
    expected: str
    answers: tuple[tuple[str, bool], ...]
    missed: bool


def _steered(result: RunResult) -> tuple[str, Evaluation]:
    """The vector that the page is about last, by its name, and its answers."""
    if result.tuned is not None:
        return "fine-tuned vector", result.tuned.evaluation
    return "function vector", result.steered[result.source]


def _failures(result: RunResult) -> str:
    """How many test queries are missed, and by which other way they are answered."""
    name, steered = _steered(result)
    wrong = ~steered.correct
    if not wrong.any():
        return f"The {name} misses none of the {result.n_test} test queries."
    shots = int((wrong & result.icl.correct).sum())
    return (
        f"The {name} misses {int(wrong.sum())} of the {result.n_test} test queries; {shots} of these are answered "
        f"after {result.options.n_shots} demonstrations."
    )


def _samples(result: RunResult) -> list[_Sample]:
    """All test queries, those that are missed first, else in their order."""
    tuned = () if result.tuned is None else (result.tuned.evaluation,)
    evaluations = (result.zero_shot, result.steered[result.source], *tuned, result.icl)
    columns = [list(zip(shown.predictions, shown.correct.tolist(), strict=True)) for shown in evaluations]
    right = _steered(result)[1].correct.tolist()
    samples = [
        _Sample(
            pair.input, pair.output, tuple((column[i][0].strip(), column[i][1]) for column in columns), not right[i]
        )
        for i, pair in enumerate(result.split.test)
    ]
    return sorted(samples, key=lambda one: not one.missed)


def _command(result: RunResult) -> str:
    """The command that makes this page and its figures; empty if it was made in Python."""
    return "" if result.command is None else shlex.join(result.command)


_HELD = {
    "heads": "every head: its effect, standard error, 95% interval and place",
    "effects": "every head on every corrupted prompt",
    "answers": "every test query under every vector and control: the answer, what was predicted, rank and probability",
}


def _tables(result: RunResult) -> list[tuple[str, str]]:
    """The files of tables beside the page, and what they hold."""
    return [(file, _HELD[name]) for name, file in table_files(result).items() if file is not None]


def _origin(result: RunResult) -> str:
    """Where pairs come from that are not the library's."""
    if result.data is None or is_of_library(result.data):
        return ""
    return f"{len(result.data)} pairs from {result.data.path or 'Python'}; "


def _loaded(result: RunResult) -> dict[str, str]:
    """What was found when the model was loaded, row by row."""
    loaded = result.loaded
    if loaded is None:
        return {"heads' writes": "not compared: the model was not loaded by fvlens.load_model"}
    rows = {"weights stored as": f"{loaded.quantization}, unpacked"} if loaded.quantization else {}
    if loaded.head_writes is None:
        rows["heads' writes"] = "not compared: a norm follows attention, or the class shows no heads"
    else:
        rows["heads' writes"] = (
            f"their sum plus the bias is what attention adds, to {loaded.head_writes:.1e} of the largest value"
        )
    return rows | ({"said while loading": "; ".join(loaded.notes)} if loaded.notes else {})


def _provenance(result: RunResult, folder: Path) -> dict[str, str]:
    """Where the numbers come from, row by row, and how to get them again from the files in a folder."""
    mark, source, loading = result.fingerprint, result.provenance, result.loading
    shared = "word" if result.split.disjoint == "both" else "input word"
    other_data = [f"{name} {digest}" for name, digest in source.relations.items() if name != result.relation]
    rows = {
        "model": f"{result.model_name} (revision {mark.revision}, weights {mark.weights}, {mark.dtype})",
        "relation": f"{result.relation} ({_origin(result)}data {result.data_hash}; no {shared} in two parts of its "
        "split)",
        "pairs": f"{len(result.split.train)} train, {len(result.split.valid)} valid, {result.n_test} test",
        "other data": ", ".join([*other_data, f"whole library {source.library_hash}"]),
    }
    if result.given is not None:
        names = ", ".join(map(str, result.given.heads))
        file = f"from {result.given.path} (file {result.given.hash}; {result.given.note})"
        rows["heads"] = f"{names}, {file if result.given.path else result.given.note}"

    # settings and vectors
    rows["options"] = json.dumps(options_json(result))
    if loading is not None:
        rows["loaded with"] = ", ".join(
            f"{key} {value}" for key, value in loading.recorded().items() if value is not None
        )
    rows |= _loaded(result)
    rows |= {
        "attribution path": result.path or "none: the heads were given",
        "vector": f"{len(result.vector.heads)} heads, after layer {result.vector.layer}, scale {result.scale:g}, "
        f"norm {result.vector.norm():.2f}",
    }
    if result.tuned is not None:
        run = result.tuned.run
        rows["fine-tuned vector"] = (
            f"{result.n_trained} pairs, epoch {run.best_epoch} of {result.tuned.epochs}, learning rate {run.lr:.3g}, "
            f"order of pairs by seed {run.seed}, path {run.path}, {run.seconds:.1f} seconds"
        )

    # software, machine, and the run again
    versions = ", ".join(f"{name} {version}" for name, version in source.versions.items())
    rows |= {
        "versions": f"{versions} (code {source.code_hash})",
        "machine": ", ".join(f"{key} {value}" for key, value in source.platform.items() if value is not None),
        "seconds": f"{result.seconds:.1f}",
    }
    if result.command is not None:
        rows["command"] = shlex.join(result.command)
    if loading is not None:
        rows["again"] = f"fvlens rerun {shlex.quote(folder.as_posix())}"
    else:
        rows["again"] = f"fvlens.report.rerun({str(folder)!r}, model=model)"
    return rows
