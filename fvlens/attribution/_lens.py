"""The logit lens: what each layer's residual stream would say if it were the last."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fvlens.activations import Positions, activation_cache
from fvlens.arguments import check_arguments
from fvlens.attribution._effects import standard_error
from fvlens.attribution._figures import WIDTH_95
from fvlens.metrics import best_tokens, probability, rank
from fvlens.models import Fingerprint, fingerprint, model_device
from fvlens.prompts import Prompts, Template, get_template
from fvlens.results import Result
from fvlens.showing import named, number
from fvlens.suffix import read_out_slices

if TYPE_CHECKING:
    import pandas as pd

    from fvlens.plots import Figure


@dataclass(frozen=True, slots=True, repr=False)
class LogitLens(Result):
    """What the residual stream after each layer says, by prompt and token.

    Prompts are left-padded: index -1 of ``pos`` is the last kept token. Where :attr:`mask` is False there is no token,
    and ranks and token ids are -1, probabilities 0.

    Attributes:
        layers: the layers, each read behind its block.
        probability: of the answer's first token.
        rank: of the answer's first token, 0 for the best.
        top_tokens: the best tokens, best first.
        top_probability: their probabilities.
        answers: the answers' first tokens.
        tokens: the kept tokens; -1 where there is none.
        places: where each kept token stands, counted from the right of the prompt: -1 is the last; 0 where there is
            none.
        mask: whether a kept token is one.
        words: text of each token id that occurs; empty if the model had no tokenizer.
        relation, labels, template, n_shots, data_hash: the prompts.
        fingerprint: the model.
    """

    FORMAT: ClassVar[str] = "fvlens-logit-lens-1"

    layers: tuple[int, ...]
    probability: Float[Tensor, "layer prompt pos"]
    rank: Int[Tensor, "layer prompt pos"]
    top_tokens: Int[Tensor, "layer prompt pos k"]
    top_probability: Float[Tensor, "layer prompt pos k"]
    answers: Int[Tensor, " prompt"]
    tokens: Int[Tensor, "prompt pos"]
    places: Int[Tensor, "prompt pos"]
    mask: Bool[Tensor, "prompt pos"]
    words: Mapping[int, str]
    relation: str
    labels: str
    template: Template | str
    n_shots: int
    data_hash: str
    fingerprint: Fingerprint

    def __post_init__(self) -> None:
        object.__setattr__(self, "template", get_template(self.template))

    def __len__(self) -> int:
        return len(self.answers)

    def _line(self) -> str:
        best = int(self.mean.argmax())
        return (
            f"{named(self.relation)}, {self.labels} labels: {len(self.layers)} layers, "
            f"{len(self)} prompts, {self.tokens.shape[1]} tokens, mean probability of the answer at the last token at "
            f"most {float(self.mean[best]):.3f} (layer {self.layers[best]}), model {self.fingerprint.name!r}"
        )

    def _cells(self) -> list[tuple[str, ...]]:
        numbers = zip(self.layers, self.mean.tolist(), self.stderr.tolist(), self.top1.tolist(), strict=True)
        rows = [(str(layer), *map(number, values)) for layer, *values in numbers]
        return [("layer", "probability of the answer", "standard error", "top-1"), *rows]

    def _check_loaded(self) -> None:
        if len(self.layers) != len(self.rank):
            raise ValueError(f"layers: expected {len(self.rank)}, got {len(self.layers)}.")

    @property
    def mean(self) -> Float[Tensor, " layer"]:
        """Mean probability of the answer at the last kept token."""
        return self.probability[:, :, -1].mean(dim=1)

    @property
    def stderr(self) -> Float[Tensor, " layer"]:
        """Standard error of :attr:`mean` over prompts (NaN for a single prompt)."""
        return standard_error(self.probability[:, :, -1].T)

    @property
    def top1(self) -> Float[Tensor, " layer"]:
        """Share of prompts whose answer has rank 0 at the last kept token."""
        return (self.rank[:, :, -1] == 0).float().mean(dim=1)

    def word(self, token: int) -> str:
        """Text of a token, its id if the text is not known."""
        return self.words.get(int(token), str(int(token)))

    def to_dataframe(self) -> "pd.DataFrame":
        """One row a layer, prompt and kept token: ``layer, prompt, pos, token, probability, rank, top_token,
        top_probability``.

        ``pos`` counts from the right of the prompt: -1 is the last token. ``top_token`` is the best token alone.
        """
        import pandas as pd

        layer, prompt, place = self.mask.expand_as(self.rank).nonzero(as_tuple=True)
        at = layer, prompt, place
        return pd.DataFrame(
            {
                "layer": torch.tensor(self.layers)[layer].numpy(),
                "prompt": prompt.numpy(),
                "pos": self.places[prompt, place].numpy(),
                "token": [self.word(token) for token in self.tokens[prompt, place].tolist()],
                "probability": self.probability[at].numpy(),
                "rank": self.rank[at].numpy(),
                "top_token": [self.word(token) for token in self.top_tokens[at][:, 0].tolist()],
                "top_probability": self.top_probability[at][:, 0].numpy(),
            }
        )

    def plot(self, *, prompt: int | None = None, change: bool = False) -> "Figure":
        """The answer's probability: by layer at the last token, or of one prompt by layer and token.

        Args:
            prompt: index of a prompt, for the map of its tokens; its hover text names the best tokens. By default the
                mean over prompts, with its 95% interval (1.96 standard errors).
            change: of one prompt: what each layer adds to the probability that the layer before it gave, instead of
                the probability; of the first layer, all of it.

        Raises:
            ValueError: there is no such prompt; ``change`` without a prompt.
        """
        from fvlens import plots

        if change and prompt is None:
            raise ValueError("plot: change=True is for the map of one prompt; give prompt=, too.")

        what = f"{named(self.relation)} ({self.labels} labels, "
        if prompt is None:
            several = len(self) > 1
            return plots.line_sweep(
                list(self.layers),
                self.mean,
                self.mean - WIDTH_95 * self.stderr if several else None,
                self.mean + WIDTH_95 * self.stderr if several else None,
                x_title="Layer",
                y_title="Probability of the answer",
                title=f"Logit lens at the last token, {what}{len(self)} prompts)",
                note="Band: 95% interval of the mean (1.96 standard errors)",
            )
        if not 0 <= prompt < len(self):
            raise ValueError(f"plot: expected a prompt in 0..{len(self) - 1}, got {prompt}.")
        kept = self.mask[prompt].nonzero().flatten().tolist()
        rows = range(len(self.layers) - 1, -1, -1)  # the last layer on top
        names = [f"layer {self.layers[row]}" for row in rows]
        words = [self.word(token) for token in self.tokens[prompt, kept].tolist()]
        hover = [[self._said(row, prompt, place) for place in kept] for row in rows]
        where = f"{what}prompt {prompt}, answer {self.word(int(self.answers[prompt]))!r})"
        chance = self.probability[:, prompt][:, kept]
        if change:
            added = torch.cat([chance[:1], chance.diff(dim=0)]).flip(0)
            title = f"What each layer adds to the answer's probability, {where}"
            return plots.token_map(added, names, words, title=title, colorbar_title="change", hover=hover)
        title = f"Logit lens, {where}"
        return plots.shares(chance.flip(0), names, words, title=title, colorbar_title="probability", hover=hover)

    def _said(self, row: int, prompt: int, place: int) -> str:
        """The best tokens and the answer's rank, for hover texts."""
        best = zip(self.top_tokens[row, prompt, place], self.top_probability[row, prompt, place], strict=True)
        listed = ", ".join(f"{self.word(int(token))!r} {float(chance):.2f}" for token, chance in best)
        return f"rank {int(self.rank[row, prompt, place])}; best {listed}"


def logit_lens(
    model: Any,
    prompts: Prompts,
    *,
    positions: Positions | slice | Sequence[int] | int | None = "last",
    layers: Sequence[int] | int | None = None,
    k: int = 5,
    batch_size: int | None = None,
    max_memory: int | None = None,
    progress: bool = True,
) -> LogitLens:
    """What the model would say after each layer: its final norm and unembedding on every layer's residual stream.

    ``softmax(U(norm(resid_post_l)))`` at each kept token, with the model's own final norm (its scale that of this
    residual stream), unembedding and cap. After the last layer these are the model's own predictions. Early layers
    often decode to nothing, since they do not write in the terms of the last.

    Args:
        model: the model.
        prompts: the prompts.
        positions: the tokens, as of :func:`~fvlens.activation_cache`: ``"last"``, None for all, a token class, or
            indices counted from the right.
        layers: the layers; by default all.
        k: number of best tokens that are kept.
        batch_size: prompts run together; by default chosen from what memory is free.
        max_memory: bytes for activations, as of :func:`~fvlens.activation_cache`.
        progress: show a progress bar.

    Returns:
        :class:`LogitLens`: probability and rank of the answer's first token, and the best tokens.

    Raises:
        ValueError: a layer or position that there is not; k out of range; a TransformerBridge that something steers.

    Example:
        >>> import torch, fvlens
        >>> from fvlens.attribution import logit_lens
        >>> model = fvlens.load_model("rel-small", device="cpu")
        >>> g = torch.Generator().manual_seed(0)
        >>> prompts = fvlens.build_prompts(model, fvlens.load_relation("antonym"), n_prompts=4, generator=g)
        >>> lens = logit_lens(model, prompts, progress=False)
        >>> bool(lens.mean[-1] > lens.mean[0])
        True

    References:
        nostalgebraist 2020, "interpreting GPT: the logit lens".
    """
    check_arguments(logit_lens, locals(), runs=True)
    if not 1 <= k <= model.cfg.d_vocab:
        raise ValueError(f"logit_lens: expected k between 1 and {model.cfg.d_vocab}, got {k}.")
    cache = activation_cache(
        model,
        prompts,
        sites="resid_post",
        layers=layers,
        positions=positions,
        batch_size=batch_size,
        max_memory=max_memory,
        progress=progress,
    )
    answers, device = prompts.first_answer_token, model_device(model)
    shape = len(cache.layers), *cache.mask.shape
    chance, ranks = torch.zeros(shape), torch.full(shape, -1)
    best, best_chance = torch.full((*shape, k), -1), torch.zeros(*shape, k)
    for i, layer in enumerate(cache.layers):
        for rows, block in cache.blocks("resid_post", layer):
            prompt, place = cache.mask[rows].nonzero(as_tuple=True)  # padding says nothing
            resid, prompt = block[prompt, place], prompt + rows.start
            with torch.no_grad():
                for some, logits in read_out_slices(model, resid.to(device, model.cfg.dtype)):
                    at = i, prompt[some], place[some]
                    wanted = answers[prompt[some]].to(logits.device)
                    top = best_tokens(logits, k)
                    chance[at], ranks[at] = probability(logits, wanted).cpu(), rank(logits, wanted).cpu()
                    best[at] = top.cpu()
                    best_chance[at] = logits.float().softmax(dim=-1).gather(-1, top).cpu()
    tokens = prompts.tokens.gather(1, cache.columns)
    return LogitLens(
        layers=cache.layers,
        probability=chance,
        rank=ranks,
        top_tokens=best,
        top_probability=best_chance,
        answers=answers,
        tokens=tokens.masked_fill(~cache.mask, -1),
        places=(cache.columns - prompts.tokens.shape[1]).masked_fill(~cache.mask, 0),
        mask=cache.mask,
        words=_words(model, torch.cat([tokens.flatten(), best.flatten(), answers])),
        relation=prompts.relation,
        labels=prompts.labels,
        template=prompts.template,
        n_shots=prompts.n_shots,
        data_hash=prompts.data_hash,
        fingerprint=fingerprint(model),
    )


def _words(model: Any, tokens: Int[Tensor, " token"]) -> dict[int, str]:
    """Text of each token that occurs; -1 is none."""
    if model.tokenizer is None:
        return {}
    return {token: model.tokenizer.decode([token]) for token in tokens.unique().tolist() if token >= 0}
