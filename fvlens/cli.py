"""Commands: ``fvlens run``, ``rerun``, ``universal``, ``compare``, ``study``, ``relations``, ``models``, ``heads``,
``inject``, ``compose``, ``analogy``, ``analogies``, ``sensitivity``.

Errors are one line with a hint and exit code 2; ``--debug``, anywhere on the line, shows the traceback instead.
"""

import sys
from collections.abc import Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from rich.console import Console
from rich.table import Column, Table

from fvlens.files import write_table
from fvlens.models import EMBEDDED_MODELS, official_names
from fvlens.prompts import TEMPLATES, Template, read_template, template_or
from fvlens.relations import list_relations, load_relation

app = typer.Typer(
    name="fvlens",
    help="Find, measure and combine function vectors in transformer language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
out = Console(markup=False, emoji=False)  # names, paths and prompts are shown as they are
err = Console(stderr=True, markup=False, emoji=False)

_command_line: ContextVar[list[str] | None] = ContextVar("command line", default=None)
"""What :func:`main` was given, recorded with a run."""

ModelOption = Annotated[str, typer.Option("--model", help="rel-small, a local folder, or a TransformerLens name.")]
SeedOption = Annotated[int, typer.Option("--seed", help="Seed of everything random.")]
ShotsOption = Annotated[int, typer.Option("--n-shots", min=1, help="Demonstrations in an in-context prompt.")]
PromptsOption = Annotated[int, typer.Option("--n-prompts", min=1, help="Clean prompts behind the task means.")]
HeadsOption = Annotated[int, typer.Option("--n-heads", min=1, help="Heads in the function vector.")]
LabelsOption = Annotated[
    Literal["permuted", "random"], typer.Option("--labels", help="Corruption that heads are ranked on.")
]
TemplateOption = Annotated[
    str, typer.Option("--template", help=f"One of {', '.join(TEMPLATES)}, or a JSON file with a template of your own.")
]
DeviceOption = Annotated[str | None, typer.Option("--device", help="cpu, cuda ...; by default CUDA if there is one.")]
DtypeOption = Annotated[
    Literal["float32", "bfloat16", "float16", "float64"] | None,
    typer.Option("--dtype", help="Precision of the model [default: float32]."),
]
RevisionOption = Annotated[str | None, typer.Option("--revision", help="Revision of the model on the hub.")]
BackendOption = Annotated[
    Literal["hooked", "bridge"] | None,
    typer.Option("--backend", help="HookedTransformer or TransformerBridge [default: as load_model chooses]."),
]
QuietOption = Annotated[bool, typer.Option("--quiet", help="No progress bars.")]


@app.callback()
def _options(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error (anywhere on the line).")
    ] = False,
) -> None:
    """Find, measure and combine function vectors in transformer language models."""


@app.command()
def run(
    relation: Annotated[str, typer.Argument(help="Name of a library relation; see `fvlens relations`.")],
    model: ModelOption = "rel-small",
    folder: Annotated[
        Path | None, typer.Option("--out", help="Folder for the results [default: fvlens-RELATION].")
    ] = None,
    seed: SeedOption = 0,
    n_shots: ShotsOption = 10,
    n_prompts: PromptsOption = 100,
    n_heads: Annotated[
        int | None, typer.Option("--n-heads", min=1, help="Heads in the function vector [default: 10].")
    ] = None,
    labels: Annotated[
        Literal["permuted", "random"] | None,
        typer.Option("--labels", help="Corruption that heads are ranked on [default: permuted]."),
    ] = None,
    heads_file: Annotated[
        Path | None,
        typer.Option("--heads", help="Take the heads of this file (`fvlens universal`, or a JSON list); rank none."),
    ] = None,
    both_labels: Annotated[
        bool, typer.Option("--both-labels", help="Also rank heads on the other corruption, for comparison.")
    ] = False,
    layer: Annotated[
        int | None, typer.Option("--layer", help="Inject after this layer [default: best on valid].")
    ] = None,
    scale: Annotated[
        float | None, typer.Option("--scale", help="Factor on the function vector [default: best on valid].")
    ] = None,
    n_train: Annotated[int, typer.Option("--n-train", min=1, help="Pairs that the vector is fine-tuned on.")] = 20,
    epochs: Annotated[int, typer.Option("--epochs", min=0, help="Passes over them; 0: no fine-tuning.")] = 20,
    template: TemplateOption = "qa",
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    revision: RevisionOption = None,
    backend: BackendOption = None,
    quiet: QuietOption = False,
) -> None:
    """The whole chain on one relation: heads, function vector, fine-tuning, controls, report."""
    from fvlens.report import Loading, RunOptions, run_relation, write_run
    from fvlens.universal import read_heads

    found = load_relation(relation)
    ranked = {"n_heads": n_heads, "labels": labels, "both_labels": both_labels or None}
    chosen: dict[str, Any] = {name: value for name, value in ranked.items() if value is not None}
    options = RunOptions(
        seed=seed,
        n_shots=n_shots,
        n_prompts=n_prompts,
        layer=layer,
        scale=scale,
        template=_template(template),
        n_train=n_train,
        epochs=epochs,
        **chosen,
    )
    if heads_file is not None and chosen:
        option = f"--{next(iter(chosen)).replace('_', '-')}"
        raise ValueError(
            f"{option} says how to rank heads, but --heads {heads_file} gives them; leave one of them out."
        )
    folder = _folder(folder or Path(f"fvlens-{relation}"))
    loading = Loading(model, device, dtype, revision, backend)
    network = loading.load()
    given = None if heads_file is None else read_heads(heads_file, network)
    result = run_relation(
        network,
        found,
        options=options,
        heads=given,
        loading=loading,
        command=_command_line.get(),
        progress=not quiet,
    )
    files = write_run(result, folder)
    if given is not None:
        out.print(f"{len(given.heads)} heads from {given.path} ({given.note})", highlight=False, soft_wrap=True)
    out.print(_summary(result))
    for caution in result.cautions:
        _say(caution)
    _wrote(files)


@app.command()
def rerun(
    folder: Annotated[Path, typer.Argument(help="Folder that `fvlens run` wrote.")],
    again: Annotated[
        Path | None, typer.Option("--out", help="Folder for the second run's results [default: DIR-rerun].")
    ] = None,
    tolerance: Annotated[
        float, typer.Option("--tolerance", help="Numbers count as the same up to this, relative above 1.")
    ] = 1e-5,
    quiet: QuietOption = False,
) -> None:
    """Repeat a run from its files and say what differs; exit code 1 if a number does."""
    from fvlens.report import rerun as run_again

    def announce(changes: Sequence[Any]) -> None:
        told = ", ".join(f"{one.kind} {one.name}" for one in changes) or "nothing that the numbers depend on"
        out.print(f"changed since the first run: {told}", highlight=False, soft_wrap=True)

    done = run_again(
        folder, out=again, tolerance=tolerance, announce=announce, command=_command_line.get(), progress=not quiet
    )
    if done.differences:
        table = Table("what differs", "", "first run", "this run", "difference", title=str(folder), box=None)
        for one in done.differences:
            size = "" if one.size is None else f"{one.size:.1e}"
            table.add_row(one.kind, one.name, str(one.old), str(one.new), size)
        out.print(table)
    _wrote(done.files)
    if done.agrees:
        most = f"largest difference {done.largest:.1e}" if done.largest else "all equal"
        out.print(f"the same run: {done.n_numbers} numbers compared, {most}", highlight=False, soft_wrap=True)
        return
    n_beyond = sum(one.kind == "result" or (one.size or 0) > tolerance for one in done.differences)
    out.print(
        f"not the same run: {n_beyond} results differ beyond {tolerance:g} ({done.n_numbers} numbers compared, largest "
        f"difference {done.largest:.1e})",
        highlight=False,
        soft_wrap=True,
    )
    raise typer.Exit(1)


@app.command()
def universal(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[RELATIONS]...", help="Relations [default: all of the library].")
    ] = None,
    model: ModelOption = "rel-small",
    file: Annotated[Path, typer.Option("--out", help="File for the heads; the figure goes beside it.")] = Path(
        "heads.json"
    ),
    category: Annotated[str | None, typer.Option("--category", help="Only relations of this category.")] = None,
    family: Annotated[str | None, typer.Option("--family", help="Only relations of this family.")] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Only the first ones, by name.")] = None,
    seed: SeedOption = 0,
    n_shots: ShotsOption = 10,
    n_prompts: PromptsOption = 100,
    n_heads: Annotated[int, typer.Option("--n-heads", min=1, help="Heads in the set.")] = 10,
    labels: LabelsOption = "permuted",
    template: TemplateOption = "qa",
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    revision: RevisionOption = None,
    backend: BackendOption = None,
    quiet: QuietOption = False,
) -> None:
    """The heads with the largest effect on average over relations; `fvlens run --heads` uses them."""
    from fvlens.pages import write_figure
    from fvlens.report import Loading
    from fvlens.universal import universal_heads

    if names and (category or family):
        raise ValueError(
            "relations are named, so --category and --family have nothing to choose; give one or the other."
        )
    chosen = list(names or list_relations(category, family=family))[:limit]
    for name in chosen:
        load_relation(name)
    if file.is_dir() or file.suffix == ".html":
        raise ValueError(f"--out {file}: expected a name for a JSON file, such as heads.json.")
    if not file.parent.is_dir():
        raise ValueError(f"--out {file}: folder {file.parent} does not exist; create it first.")
    found = universal_heads(
        Loading(model, device, dtype, revision, backend).load(),
        chosen,
        n_heads,
        n_shots=n_shots,
        n_prompts=n_prompts,
        labels=labels,
        template=_template(template),
        generator=torch.Generator().manual_seed(seed),
        progress=not quiet,
    )
    n_kept = int(found.kept.sum())
    table = Table("head", "mean AIE", "standard error", box=None)
    for head in found.heads:
        table.add_row(str(head), f"{found.mean[head]:.4f}", f"{found.stderr[head]:.4f}" if n_kept > 1 else "")
    out.print(f"mean over {n_kept} relations on {model}, {labels} labels", highlight=False, soft_wrap=True)
    out.print(table)
    if found.caution:
        _say(found.caution)
    left_out = [name for name, kept in zip(found.relations, found.kept.tolist(), strict=True) if not kept]
    if left_out:
        out.print(
            f"left out, {n_shots} demonstrations do not beat the majority label: {', '.join(left_out)}",
            highlight=False,
            soft_wrap=True,
        )
    _wrote([found.save(file), write_figure(file.with_suffix(".html"), found.plot())])
    if not found.complete:
        out.print(f"{len(found.relations)} of {len(chosen)} relations were finished", highlight=False)
        raise typer.Exit(130)


@app.command()
def compare(
    relation: Annotated[str, typer.Argument(help="Name of a library relation; see `fvlens relations`.")],
    model: ModelOption = "rel-small",
    folder: Annotated[
        Path | None, typer.Option("--out", help="Folder for the table [default: fvlens-RELATION].")
    ] = None,
    seed: SeedOption = 0,
    n_train: Annotated[int, typer.Option("--n-train", min=1, help="Training pairs.")] = 20,
    n_shots: ShotsOption = 10,
    n_prompts: PromptsOption = 100,
    n_heads: HeadsOption = 10,
    labels: LabelsOption = "permuted",
    layer: Annotated[
        int | None, typer.Option("--layer", help="Inject after this layer [default: best on valid].")
    ] = None,
    epochs: Annotated[int, typer.Option("--epochs", min=1, help="Passes over the training pairs.")] = 20,
    n_unrelated: Annotated[
        int, typer.Option("--n-unrelated", min=1, help="Prompts behind the collateral change.")
    ] = 200,
    template: TemplateOption = "qa",
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    revision: RevisionOption = None,
    backend: BackendOption = None,
    quiet: QuietOption = False,
) -> None:
    """A fine-tuned vector against prompting, activation addition, soft prompts and LoRA."""
    from fvlens.finetuning import compare as compare_methods
    from fvlens.report import Loading

    found = load_relation(relation)
    folder = _folder(folder or Path(f"fvlens-{relation}"))
    result = compare_methods(
        Loading(model, device, dtype, revision, backend).load(),
        found,
        n_train=n_train,
        n_heads=n_heads,
        labels=labels,
        layer=layer,
        n_shots=n_shots,
        n_prompts=n_prompts,
        epochs=epochs,
        n_unrelated=n_unrelated,
        template=_template(template),
        seed=seed,
        progress=not quiet,
    )
    heading, *body = result.cells()
    numbers = [Column(name, justify="right") for name in heading[1:]]
    table = Table(heading[0], *numbers, box=None, padding=(0, 1, 0, 0))
    for cells in body:
        table.add_row(*cells)
    out.print(table)
    out.print(result.describe(), highlight=False, soft_wrap=True)
    _wrote(result.save(folder))
    if not result.complete:
        raise typer.Exit(130)


@app.command()
def study(
    name: Annotated[str, typer.Argument(metavar="STUDY", help="training-size, layer, scale, l2 or init.")],
    relation: Annotated[str, typer.Argument(help="Name of a library relation; see `fvlens relations`.")],
    model: ModelOption = "rel-small",
    folder: Annotated[
        Path | None, typer.Option("--out", help="Folder for table and figure [default: fvlens-RELATION].")
    ] = None,
    seed: SeedOption = 0,
    n_seeds: Annotated[
        int | None, typer.Option("--n-seeds", min=1, help="Trainings behind each point [default: 3 or 5].")
    ] = None,
    n_train: Annotated[
        int | None, typer.Option("--n-train", min=1, help="Training pairs [default: 20; not for training-size].")
    ] = None,
    n_shots: ShotsOption = 10,
    n_prompts: PromptsOption = 100,
    n_heads: HeadsOption = 10,
    labels: LabelsOption = "permuted",
    layer: Annotated[
        int | None, typer.Option("--layer", help="Inject after this layer [default: best on valid].")
    ] = None,
    epochs: Annotated[int, typer.Option("--epochs", min=1, help="Passes over the training pairs.")] = 20,
    template: TemplateOption = "qa",
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    revision: RevisionOption = None,
    backend: BackendOption = None,
    quiet: QuietOption = False,
) -> None:
    """What a fine-tuned vector depends on: training pairs, layer, scale, l2 or start."""
    from fvlens.find import find_vector
    from fvlens.finetuning import STUDIES, Settings
    from fvlens.pages import write_figure
    from fvlens.report import Loading

    if name not in STUDIES:
        raise ValueError(f"no study named {name!r}; expected one of {', '.join(STUDIES)}.")
    sized = name == "training-size"
    if sized and n_train is not None:
        raise ValueError("--n-train: the number of training pairs is what this study varies; leave it out.")
    found = load_relation(relation)
    folder = _folder(folder or Path(f"fvlens-{relation}"))
    network = Loading(model, device, dtype, revision, backend).load()
    generator = torch.Generator().manual_seed(seed)
    split = found.split(generator, train=0.7 if sized else 0.45)
    recipe = find_vector(
        network, split, labels=labels, n_heads=n_heads, n_shots=n_shots, n_prompts=n_prompts,
        layers=None if layer is None else [layer], template=_template(template), relation=relation, seed=seed,
        generator=generator, progress=not quiet,
    )  # fmt: skip
    # the study of scales multiplies the vector itself, all others start from the best multiple of it
    vector = recipe.unscaled if name == "scale" else recipe.vector
    given = {"n_seeds": n_seeds, "n_train": n_train}
    result = STUDIES[name](
        network, split, init=vector, settings=Settings(epochs=epochs, template=_template(template)), relation=relation,
        generator=generator, progress=not quiet, **{key: value for key, value in given.items() if value is not None},
    )  # fmt: skip
    table = Table(result.x_title, *(Column(line, justify="right") for line in result.lines), box=None)
    for x in sorted({point.x for point in result.points}):
        cells = []
        for line in result.lines:
            at = next(point for point in result.line(line) if point.x == x)
            interval = f" [{at.interval.low:.3f}, {at.interval.high:.3f}]" if len(result.lines) < 3 else ""
            cells.append(f"{at.top1:.3f}{interval}")
        table.add_row(f"{x:g}", *cells)
    out.print(table)
    compared = ", ".join(f"{name} {top1:.3f}" for name, top1 in result.references.items())
    times = "" if name == "scale" else f"times {recipe.scale:g}, "
    seeds = "1 seed" if result.n_seeds == 1 else f"{result.n_seeds} seeds"
    out.print(
        f"top-1 of {relation} on {model}, vector after layer {vector.layer}, {times}{seeds}, "
        f"{result.n_test} test pairs; {compared}; intervals: {result.intervals}",
        highlight=False,
        soft_wrap=True,
    )
    for caution in recipe.cautions:
        _say(caution)
    folder.mkdir(parents=True, exist_ok=True)
    table_file = write_table(folder / f"study-{name}.csv", result.to_dataframe())
    _wrote([table_file, write_figure(folder / f"study-{name}.html", result.plot())])
    if not result.complete:
        raise typer.Exit(130)


@app.command()
def relations(
    category: Annotated[str | None, typer.Option("--category", help="Only this category.")] = None,
    family: Annotated[str | None, typer.Option("--family", help="Only this family.")] = None,
    domain: Annotated[str | None, typer.Option("--domain", help="Only this domain.")] = None,
) -> None:
    """The word-pair library."""
    names = list_relations(category, family=family, domain=domain)
    table = Table(
        Column("relation", no_wrap=True), "category", "family", "pairs", "example", box=None, padding=(0, 1, 0, 0)
    )
    total = 0
    for name in names:
        found = load_relation(name)
        pair = found.pairs[0]
        total += len(found)
        table.add_row(name, found.category, found.family, str(len(found)), f"{pair.input} -> {pair.output}")
    out.print(table)
    out.print(f"{len(names)} relations, {total} pairs", highlight=False)


@app.command()
def models(
    filter: Annotated[str, typer.Option("--filter", help="Only names that contain this.")] = "",
) -> None:
    """Models that can be loaded by name."""
    for name, text in EMBEDDED_MODELS.items():
        if filter.lower() in name.lower():
            out.print(f"{name}  ({text})", highlight=False, soft_wrap=True)
    for name in official_names():
        if filter.lower() in name.lower():
            out.print(name, highlight=False, soft_wrap=True)


@app.command()
def heads(
    relation: Annotated[str, typer.Argument(help="Name of a library relation.")],
    model: ModelOption = "rel-small",
    seed: SeedOption = 0,
    n_shots: ShotsOption = 10,
    n_prompts: PromptsOption = 100,
    n_heads: HeadsOption = 10,
    labels: LabelsOption = "permuted",
    template: TemplateOption = "qa",
    method: Annotated[
        Literal["exact", "atp", "ig", "lrp"], typer.Option("--method", help="Exact effects, or a gradient screen.")
    ] = "exact",
    recheck: Annotated[
        int, typer.Option("--recheck", min=0, help="Run so many of a screen's best heads again exactly.")
    ] = 0,
    device: DeviceOption = None,
    quiet: QuietOption = False,
) -> None:
    """The heads that carry a relation, by average indirect effect or a gradient screen."""
    from fvlens.find import relation_effects

    found = load_relation(relation)
    generator = torch.Generator().manual_seed(seed)
    split = found.split(generator)
    _, chosen = relation_effects(
        _load(model, device), split, relation=found.name, labels=labels, n_shots=n_shots, n_prompts=n_prompts,
        template=_template(template), method=method, recheck=recheck, generator=generator, progress=not quiet,
    )  # fmt: skip
    again = chosen.recheck
    caution = chosen.caution(n_heads)  # first, since it checks the number
    table = Table("head", chosen.score, "standard error", title=f"{relation}, {labels} labels", box=None)
    if again is not None:
        table.add_column("exact AIE")
        table.add_column("standard error")
    for head in chosen.ranking[:n_heads]:
        row = [str(head), f"{chosen.aie[head]:.4f}", f"{chosen.stderr[head]:.4f}"]
        if again is not None and head in again.heads:
            i = again.heads.index(head)
            row += [f"{again.aie[i]:.4f}", f"{again.stderr[i]:.4f}"]
        table.add_row(*row)
    out.print(table)
    if chosen.note:
        _say(chosen.note)
    if caution:
        _say(caution)


@app.command()
def inject(
    vector: Annotated[Path, typer.Argument(help="A vector file written by `fvlens run`.")],
    prompt: Annotated[str, typer.Argument(help="Text; a single word is asked in the vector's own template.")],
    model: ModelOption = "rel-small",
    scale: Annotated[float, typer.Option("--scale", help="Factor on the vector.")] = 1.0,
    top: Annotated[int, typer.Option("--top", min=1, help="Tokens to show.")] = 5,
    generate: Annotated[int, typer.Option("--generate", min=0, help="Also generate this many tokens.")] = 0,
    template: Annotated[
        str | None, typer.Option("--template", help="Instead of the vector's own: a name, or a JSON file.")
    ] = None,
    device: DeviceOption = None,
) -> None:
    """What a prompt continues with, without and with a vector injected at its last token."""
    from fvlens.interventions import inject as injecting
    from fvlens.metrics import best_tokens
    from fvlens.models import bos_token_id, model_device
    from fvlens.vectors import FunctionVector

    loaded = FunctionVector.load(vector, template=None if template is None else _template(template))
    network = _load(model, device)
    loaded.check(network)
    if not prompt.strip():
        raise ValueError("the prompt is empty; give some text.")
    if len(prompt.split()) == 1:
        prompt = template_or(loaded.template).bare(prompt.strip())
    bos = bos_token_id(network)
    ids = network.tokenizer(prompt, add_special_tokens=False)["input_ids"]
    tokens = torch.tensor([[*([] if bos is None else [bos]), *ids]], device=model_device(network))
    if tokens.shape[1] + generate > network.cfg.n_ctx:
        raise ValueError(
            f"the prompt has {tokens.shape[1]} tokens, and --generate asks for {generate} more; the model's context "
            f"holds {network.cfg.n_ctx}."
        )

    def answer() -> tuple[list[str], str]:
        with torch.inference_mode():
            logits = network(tokens)[0, -1].float()
            text = ""
            if generate:
                longer = network.generate(tokens, max_new_tokens=generate, do_sample=False, verbose=False)
                text = network.tokenizer.decode(longer[0, tokens.shape[1] :].tolist())
        best = best_tokens(logits, min(top, len(logits)))
        chances = logits.softmax(dim=-1)[best].tolist()
        words = [
            f"{network.tokenizer.decode([token])!r} {chance:.3f}"
            for token, chance in zip(best.tolist(), chances, strict=True)
        ]
        return words, text

    plain, plain_text = answer()
    with injecting(network, loaded, scale=scale):
        steered, steered_text = answer()
    out.print(f"prompt {prompt!r}", highlight=False, soft_wrap=True)
    table = Table("rank", "plain", f"with {loaded.relation or 'vector'} after layer {loaded.layer}", box=None)
    for i, (before, after) in enumerate(zip(plain, steered, strict=True), start=1):
        table.add_row(str(i), before, after)
    out.print(table)
    if generate:
        out.print(f"plain   {plain_text!r}", highlight=False, soft_wrap=True)
        out.print(f"steered {steered_text!r}", highlight=False, soft_wrap=True)


CompositeOption = Annotated[
    Path | None,
    typer.Option("--composite", help="A file of `fvlens compose`; without one the library's basis is trained first."),
]


@app.command()
def compose(
    file: Annotated[Path, typer.Option("--out", help="File for the composite.")] = Path("composite.safetensors"),
    model: ModelOption = "rel-small",
    seed: SeedOption = 0,
    map: Annotated[
        Literal["none", "diagonal", "full", "lowrank", "transfer"],
        typer.Option("--map", help="From source scores to weights; none needs no analogies."),
    ] = "none",
    gate: Annotated[
        Literal["logistic", "threshold", "learned"] | None,
        typer.Option("--gate", help="What decides whether to steer, or how strongly."),
    ] = None,
    setting: Annotated[
        Literal["zero_shot", "one_shot"], typer.Option("--setting", help="Prompts that map and gate are trained on.")
    ] = "one_shot",
    n_analogies: Annotated[int, typer.Option("--n-analogies", min=4, help="Training analogies of the map.")] = 2430,
    layer: Annotated[
        int | None, typer.Option("--layer", help="Inject after this layer [default: a third of the way up].")
    ] = None,
    n_train: Annotated[int, typer.Option("--n-train", min=1, help="Training pairs of each basis vector.")] = 20,
    epochs: Annotated[int, typer.Option("--epochs", min=1, help="Passes over pairs and analogies.")] = 20,
    template: TemplateOption = "qa",
    device: DeviceOption = None,
    quiet: QuietOption = False,
) -> None:
    """A basis of the library's relations with a map and a gate, for `fvlens analogy --composite`."""
    from fvlens.composition import library_composite

    if file.is_dir() or not file.parent.is_dir():
        raise ValueError(f"--out {file}: expected a name for a file in a folder that exists.")
    made = library_composite(
        _load(model, device), layer=layer, n_train=n_train, map=map, setting=setting, n_analogies=n_analogies,
        epochs=epochs, gate=gate, template=_template(template), generator=torch.Generator().manual_seed(seed),
        progress=not quiet,
    )  # fmt: skip
    out.print(f"{len(made.basis)} vectors after layer {made.basis.layer}, map {map}", highlight=False, soft_wrap=True)
    for found in made.gates:
        out.print(f"gate, {_setting(found.setting)}: {found.describe()}", highlight=False, soft_wrap=True)
    _wrote([made.save(file)])


@app.command()
def analogy(
    a: Annotated[str, typer.Argument(metavar="A", help="A is to B ...")],
    b: Annotated[str, typer.Argument(metavar="B")],
    c: Annotated[str, typer.Argument(metavar="C", help="... as C is to what?")],
    choices: Annotated[
        str | None, typer.Option("--choices", help="Answers to choose among, with commas between them.")
    ] = None,
    composite: CompositeOption = None,
    model: ModelOption = "rel-small",
    seed: SeedOption = 0,
    n_top: Annotated[int, typer.Option("--top", min=1, help="Answers and basis relations shown.")] = 5,
    device: DeviceOption = None,
    quiet: QuietOption = False,
) -> None:
    """Solve A : B :: C : ? with a composite vector; show its weights and the unsteered answer."""
    from fvlens.composition import answer_analogy

    options = None if choices is None else [word.strip() for word in choices.split(",") if word.strip()]
    if options is not None and len(set(options)) < 2:
        raise ValueError(f"--choices {choices!r}: expected at least two different words with commas between them.")
    network = _load(model, device)
    made = _composite(network, composite, seed, quiet)
    found = answer_analogy(network, made, a, b, c, choices=options)
    table = Table(Column("way", no_wrap=True), "answers with their probability", box=None)
    for name, answers in found.answers.items():
        table.add_row(name, ", ".join(f"{word} {chance:.2f}" for word, chance in answers[:n_top]))
    out.print(f"{a} : {b} :: {c} : {found.answer}", highlight=False, soft_wrap=True)
    out.print(table)
    weights = Table("basis relation", Column("weight", justify="right"), box=None)
    for name, weight in found.explanation.top(n_top):
        weights.add_row(name, f"{weight:.3f}")
    if made.map == "transfer":
        named = ", ".join(f"{name} {chance:.2f}" for name, chance in found.explanation.named())
        out.print(f"{a} : {b} is taken for: {named}", highlight=False, soft_wrap=True)
    out.print(weights)
    for setting, strength in found.gates.items():
        out.print(f"gate, {_setting(setting)}: {strength:.2f} of the composite is injected", highlight=False)


@app.command()
def analogies(
    file: Annotated[Path, typer.Argument(help="A file or BATS folder of analogies.")],
    composite: CompositeOption = None,
    format: Annotated[
        str | None, typer.Option("--format", help="How it is written [default: guessed]; see fvlens.relations.READERS.")
    ] = None,
    folder: Annotated[Path | None, typer.Option("--out", help="Folder for tables and figure [default: none].")] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Only so many, drawn at random.")] = None,
    model: ModelOption = "rel-small",
    seed: SeedOption = 0,
    allow_leak: Annotated[
        bool, typer.Option("--allow-leak", help="Score pairs that took part in making the composite, too.")
    ] = False,
    device: DeviceOption = None,
    quiet: QuietOption = False,
) -> None:
    """Evaluate the analogies of a file: unsteered, with the composite, with its controls."""
    from fvlens.composition import evaluate_analogies
    from fvlens.pages import write_figure
    from fvlens.relations import read_analogies

    if folder is not None:
        _folder(folder)
    generator = torch.Generator().manual_seed(seed)
    read = read_analogies(file, format=format, n=limit, generator=generator)
    network = _load(model, device)
    found = evaluate_analogies(
        network, read, _composite(network, composite, seed, quiet), allow_leak=allow_leak, generator=generator,
        progress=not quiet,
    )  # fmt: skip
    table = Table("kind", "way", *(Column(name, justify="right") for name in ("n", "top-1", "interval", "choice")),
                  box=None)  # fmt: skip
    summary = found.summary()
    for row in summary.to_dict("records"):
        choice = "" if row["choice"] != row["choice"] else f"{row['choice']:.3f}"
        interval = f"[{row['low']:.3f}, {row['high']:.3f}]"
        table.add_row(row["kind"] or "", row["way"], str(row["n"]), f"{row['top1']:.3f}", interval, choice)
    out.print(table)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        each = write_table(folder / "analogies.csv", found.to_dataframe())
        table_file = write_table(folder / "summary.csv", summary)
        _wrote([each, table_file, write_figure(folder / "analogies.html", found.plot())])


@app.command()
def sensitivity(
    composite: CompositeOption = None,
    folder: Annotated[Path, typer.Option("--out", help="Folder for table and figure.")] = Path("fvlens-sensitivity"),
    n_test: Annotated[int, typer.Option("--n-test", min=2, help="Test analogies, half near, half far.")] = 300,
    n_fit: Annotated[
        int, typer.Option("--n-fit", min=4, help="Training analogies of each map, if there is a map.")
    ] = 600,
    n_repeats: Annotated[int, typer.Option("--n-repeats", min=1, help="Draws behind each random change.")] = 3,
    setting: Annotated[
        Literal["zero_shot", "one_shot"], typer.Option("--setting", help="Prompts that are steered.")
    ] = "zero_shot",
    model: ModelOption = "rel-small",
    seed: SeedOption = 0,
    device: DeviceOption = None,
    quiet: QuietOption = False,
) -> None:
    """The same analogies with parts of the basis dropped, merged, drowned in noise or removed."""
    from fvlens.composition import basis_study, library_analogies
    from fvlens.pages import write_figure

    folder = _folder(folder)
    network = _load(model, device)
    made = _composite(network, composite, seed, quiet)
    generator = torch.Generator().manual_seed(seed)
    drawn: dict[str, Any] = dict(generator=generator, names=made.basis.names, n_foils=0)
    kind = "far" if made.setting == "one_shot" else None  # as library_composite fits
    fit = [] if made.map == "none" else library_analogies("train", n=n_fit, kind=kind, **drawn)
    found = basis_study(
        network, made, library_analogies("test", n=n_test, **drawn), fit=fit, n_repeats=n_repeats, setting=setting,
        generator=generator, progress=not quiet,
    )  # fmt: skip
    names = ("vectors", "top-1", "interval", "against the full basis", "weights in common")
    table = Table("basis", *(Column(name, justify="right") for name in names), box=None)
    for one in found.changes:
        low, high, _ = one.interval
        mean, (least, most, _) = one.difference
        difference = f"{mean:+.3f} [{least:+.3f}, {most:+.3f}]"
        table.add_row(
            one.name, f"{one.n_basis:.0f}", f"{one.top1:.3f}", f"[{low:.3f}, {high:.3f}]", difference,
            f"{one.stability:.2f}",
        )  # fmt: skip
    out.print(table)
    compared = ", ".join(f"{name} {top1:.3f}" for name, top1 in found.references.items())
    out.print(f"{found.n_analogies} analogies, {_setting(setting)}; {compared}", highlight=False, soft_wrap=True)
    folder.mkdir(parents=True, exist_ok=True)
    table_file = write_table(folder / "sensitivity.csv", found.to_dataframe())
    _wrote([table_file, write_figure(folder / "sensitivity.html", found.plot())])


def _setting(name: str) -> str:
    return {"zero_shot": "bare query", "one_shot": "one-shot prompt"}[name]


def _composite(network: Any, file: Path | None, seed: int, quiet: bool) -> Any:
    from fvlens.composition import CompositeMap, library_composite

    if file is not None:
        return CompositeMap.load(file, model=network)
    return library_composite(network, generator=torch.Generator().manual_seed(seed), progress=not quiet)


def _load(name: str, device: str | None) -> Any:
    from fvlens.models import load_model

    return load_model(name, device=device)


def _folder(folder: Path) -> Path:
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--out {folder} is a file; give a folder.")
    return folder


def _template(given: str) -> str | Template:
    """The name of a built-in template, or the template in a file."""
    if given in TEMPLATES:
        return given
    if Path(given).suffix == ".json" or Path(given).is_file():
        return read_template(given)
    raise ValueError(
        f"--template: no template named {given!r}; expected one of {', '.join(TEMPLATES)}, or a JSON file with name, "
        "demonstration, query and perhaps prefix."
    )


def _say(text: str) -> None:
    out.print(text, highlight=False, soft_wrap=True)


def _wrote(files: Sequence[Path]) -> None:
    for file in files:
        _say(f"wrote {file}")


def _summary(result) -> Table:
    """Short table of a run: who answers how often."""
    table = Table(
        "zero-shot top-1 on test unless said otherwise",
        "top-1",
        "95% interval",
        title=f"{result.relation} on {result.model_name}, {result.n_test} test pairs",
        box=None,
    )
    for name, value, interval in result.summary():
        text = "" if interval is None else f"{interval.low:.2f} to {interval.high:.2f}"
        table.add_row(name, f"{value:.2f}", text)
    return table


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point: run the app, turn errors into one line and exit code 2."""
    from typer import main as typer_main

    args = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in args
    args = [arg for arg in args if arg != "--debug"] or ["--help"]
    command = typer_main.get_command(app)
    _command_line.set(["fvlens", *args])
    try:
        code = command.main(args=args, prog_name="fvlens", standalone_mode=False)
    except (KeyboardInterrupt, EOFError):
        err.print("fvlens: interrupted", highlight=False)
        sys.exit(130)
    except Exception as error:
        if debug:
            raise
        if type(error).__name__ == "Abort":
            err.print("fvlens: interrupted", highlight=False)
            sys.exit(130)
        usage = getattr(error, "format_message", None)  # an error of the command line's own parser
        text = usage() if usage is not None else str(error) or type(error).__name__
        hint = "" if isinstance(error, ValueError) else " (fvlens --help, or --debug for details)"
        err.print(f"fvlens: {' '.join(text.split())}{hint}", highlight=False, soft_wrap=True)
        sys.exit(2)
    if code == 130:  # the parser has caught the interruption itself
        err.print("fvlens: interrupted", highlight=False)
    sys.exit(code if isinstance(code, int) else 0)


if __name__ == "__main__":
    main()
