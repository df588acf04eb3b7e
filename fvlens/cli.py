"""Command line: ``fvlens run``, ``relations``, ``models``, ``heads``, ``inject``.

Errors are one line with a hint and exit code 2; ``--debug``, anywhere on the line, shows the traceback instead.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from rich.console import Console
from rich.table import Column, Table

from fvlens.models import EMBEDDED_MODELS
from fvlens.prompts import TEMPLATES, get_template
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

ModelOption = Annotated[str, typer.Option("--model", help="rel-small, a local folder, or a TransformerLens name.")]
SeedOption = Annotated[int, typer.Option("--seed", help="Seed of everything random.")]
ShotsOption = Annotated[int, typer.Option("--n-shots", min=1, help="Demonstrations in an in-context prompt.")]
PromptsOption = Annotated[int, typer.Option("--n-prompts", min=1, help="Clean prompts behind the task means.")]
HeadsOption = Annotated[int, typer.Option("--n-heads", min=1, help="Heads in the function vector.")]
LabelsOption = Annotated[
    Literal["permuted", "random"], typer.Option("--labels", help="Corruption that heads are ranked on.")
]
TemplateOption = Annotated[str, typer.Option("--template", help=f"One of {', '.join(TEMPLATES)}.")]
DeviceOption = Annotated[str | None, typer.Option("--device", help="cpu, cuda ...; by default CUDA if there is one.")]
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
    n_heads: HeadsOption = 10,
    labels: LabelsOption = "permuted",
    layer: Annotated[
        int | None, typer.Option("--layer", help="Inject after this layer [default: best on valid].")
    ] = None,
    template: TemplateOption = "qa",
    device: DeviceOption = None,
    quiet: QuietOption = False,
) -> None:
    """The whole chain on one relation: heads, function vector, controls, report."""
    from fvlens.report import RunOptions, run_relation, write_run

    found = load_relation(relation)
    options = RunOptions(
        seed=seed,
        n_shots=n_shots,
        n_prompts=n_prompts,
        n_heads=n_heads,
        labels=labels,
        layer=layer,
        template=template,
    )
    folder = folder or Path(f"fvlens-{relation}")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--out {folder} is a file; give a folder.")
    result = run_relation(_load(model, device), found, options=options, model_name=model, progress=not quiet)
    files = write_run(result, folder)
    out.print(_summary(result))
    for file in files:
        out.print(f"wrote {file}", highlight=False, soft_wrap=True)


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
    from transformer_lens.supported_models import OFFICIAL_MODEL_NAMES

    for name, text in EMBEDDED_MODELS.items():
        if filter.lower() in name.lower():
            out.print(f"{name}  ({text})", highlight=False, soft_wrap=True)
    for name in OFFICIAL_MODEL_NAMES:
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
    device: DeviceOption = None,
    quiet: QuietOption = False,
) -> None:
    """The heads that carry a relation, by average indirect effect."""
    from fvlens.report import RunOptions, find_heads

    found = load_relation(relation)
    options = RunOptions(
        seed=seed, n_shots=n_shots, n_prompts=n_prompts, n_heads=n_heads, labels=labels, template=template
    )
    generator = torch.Generator().manual_seed(seed)
    split = found.split(generator)
    _, effects = find_heads(_load(model, device), split, options, found.name, generator, progress=not quiet)
    chosen = effects[labels]
    table = Table("head", "AIE", "standard error", title=f"{relation}, {labels} labels", box=None)
    for head in chosen.top(n_heads):
        table.add_row(str(head), f"{chosen.aie[head]:.4f}", f"{chosen.stderr[head]:.4f}")
    out.print(table)


@app.command()
def inject(
    vector: Annotated[Path, typer.Argument(help="A vector file written by `fvlens run`.")],
    prompt: Annotated[str, typer.Argument(help="Text; a single word is asked in the vector's own template.")],
    model: ModelOption = "rel-small",
    scale: Annotated[float, typer.Option("--scale", help="Factor on the vector.")] = 1.0,
    top: Annotated[int, typer.Option("--top", min=1, help="Tokens to show.")] = 5,
    generate: Annotated[int, typer.Option("--generate", min=0, help="Also generate this many tokens.")] = 0,
    device: DeviceOption = None,
) -> None:
    """What a prompt continues with, without and with a vector injected at its last token."""
    from fvlens.interventions import inject as injecting
    from fvlens.models import bos_token_id, model_device
    from fvlens.vectors import FunctionVector

    loaded = FunctionVector.load(vector)
    network = _load(model, device)
    loaded.check(network)
    if not prompt.strip():
        raise ValueError("the prompt is empty; give some text.")
    if len(prompt.split()) == 1:
        prompt = get_template(loaded.template or "qa").query.format(input=f" {prompt.strip()}")
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
            chances = network(tokens)[0, -1].float().softmax(dim=-1)
            text = ""
            if generate:
                longer = network.generate(tokens, max_new_tokens=generate, do_sample=False, verbose=False)
                text = network.tokenizer.decode(longer[0, tokens.shape[1] :].tolist())
        best = chances.topk(min(top, len(chances)))
        words = [
            f"{network.tokenizer.decode([token])!r} {chance:.3f}"
            for token, chance in zip(best.indices.tolist(), best.values.tolist(), strict=True)
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


def _load(name: str, device: str | None) -> Any:
    from fvlens.models import load_model

    return load_model(name, device=device)


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
