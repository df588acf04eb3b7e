"""``fvlens inject``: a vector at work."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch
import typer
from jaxtyping import Float
from rich.table import Table

from fvlens.cli._app import note, out, say, wrote
from fvlens.cli._figures import Drawing
from fvlens.cli._loading import GivenLoading, load_recorded
from fvlens.cli._options import BosOption, spread
from fvlens.cli._options import template as read_template
from fvlens.prompts import AnswerEnd, template_for, template_or, warn_of_bos
from fvlens.showing import shortened

if TYPE_CHECKING:
    from fvlens.plots import Figure


@spread
def inject(
    vector: Annotated[Path, typer.Argument(help="A vector file written by `fvlens run`.")],
    prompt: Annotated[
        str, typer.Argument(help="Text, or a word to ask; by default a single word is asked, and more is text.")
    ],
    loading: GivenLoading,
    drawing: Drawing,
    scale: Annotated[float, typer.Option("--scale", help="Factor on the vector.")] = 1.0,
    top: Annotated[int, typer.Option("--top", min=1, help="Tokens to show.")] = 5,
    generate: Annotated[int, typer.Option("--generate", min=0, help="Also generate, up to so many tokens.")] = 0,
    template: Annotated[
        str | None, typer.Option("--template", help="Instead of the vector's own: a name, or a JSON file.")
    ] = None,
    bos: BosOption = None,
    word: Annotated[
        bool | None,
        typer.Option(
            "--word/--raw", help="Ask PROMPT in the vector's template, or take it as it is.", show_default=False
        ),
    ] = None,
    no_check: Annotated[
        bool, typer.Option("--no-check", help="Also inject into a model that the vector was not made on.")
    ] = False,
) -> None:
    """What a prompt continues with, without and with a vector injected at its last token."""
    from fvlens.interventions import inject as injecting
    from fvlens.metrics import best_tokens
    from fvlens.models import in_front, model_device
    from fvlens.vectors import FunctionVector

    loaded = FunctionVector.load(vector, template=None if template is None else read_template(template))
    if not prompt.strip():
        raise ValueError("the prompt is empty; give some text.")
    _, network = load_recorded(vector, loaded.fingerprint, loading, check=not no_check)
    written = template_for(network, template_or(loaded.template))
    if bos is not None:
        written = written.with_bos(bos)
    warn_of_bos(network, loaded.template, written, vector.name, stacklevel=1)
    end = AnswerEnd.of(network.tokenizer, written)
    asked = len(prompt.split()) == 1 if word is None else word
    guessed = ""
    if word is None:
        taken = (
            f"a word, asked in template {written.name}; --raw takes it as text"
            if asked
            else (f"text, as it is; --word asks it in template {written.name}")
        )
        guessed = f"the prompt {prompt!r} is {taken}"
    if asked:
        prompt = written.bare(prompt.strip())
    else:  # no template says where this ends
        end = dataclasses.replace(end, text=None)
    ids = network.tokenizer(prompt, add_special_tokens=False)["input_ids"]
    tokens = torch.tensor([[*in_front(network, written.bos, ids), *ids]], device=model_device(network))
    if tokens.shape[1] + generate > network.cfg.n_ctx:
        raise ValueError(
            f"the prompt has {tokens.shape[1]} tokens, and --generate asks for {generate} more; the model's context "
            f"holds {network.cfg.n_ctx}."
        )

    def answer() -> tuple[Float[torch.Tensor, " d_vocab"], list[int], str]:
        with torch.inference_mode():
            logits = network(tokens)[0, -1].float()
            text = ""
            if generate:
                longer = network.generate(tokens, max_new_tokens=generate, do_sample=False, verbose=False)
                new = end.until(longer[0, tokens.shape[1] :].tolist())
                text = end.answer(new) if asked else end.written(new)
        return logits.softmax(dim=-1).cpu(), best_tokens(logits, min(top, len(logits))).tolist(), text

    if guessed:
        note(guessed)
    plain, plain_best, plain_text = answer()
    with injecting(network, loaded, scale=scale, check=not no_check):
        steered, steered_best, steered_text = answer()
    words = {token: repr(network.tokenizer.decode([token])) for token in [*plain_best, *steered_best]}
    said = f"with {loaded.relation or 'vector'} after layer {loaded.layer}"
    say(f"prompt {prompt!r}")
    table = Table("rank", "plain", said, box=None)
    for i, (before, after) in enumerate(zip(plain_best, steered_best, strict=True), start=1):
        table.add_row(str(i), f"{words[before]} {plain[before]:.3f}", f"{words[after]} {steered[after]:.3f}")
    out.print(table)
    if generate:
        say(f"plain   {plain_text!r}")
        say(f"steered {steered_text!r}")

    def figure() -> "Figure":
        from fvlens.plots import paired_bars

        shown = sorted(words, key=lambda token: -max(float(plain[token]), float(steered[token])))
        return paired_bars(
            [words[token] for token in shown],
            plain[shown],
            steered[shown],
            names=("plain", said),
            x_title="Probability of the next token",
            title=f"What follows {shortened(prompt)!r}",
        )

    wrote(drawing.draw(figure))
