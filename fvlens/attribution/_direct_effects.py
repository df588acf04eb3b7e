"""Direct effects of every part on every prompt: values, sums, order, tables and figures."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fvlens.attribution._effects import standard_error
from fvlens.attribution._figures import Kind, check_kind, top_bars
from fvlens.models import Fingerprint
from fvlens.prompts import Template, get_template
from fvlens.results import Result
from fvlens.showing import MOST_ROWS, named, number
from fvlens.types import Head

if TYPE_CHECKING:
    import pandas as pd

    from fvlens.plots import Figure


@dataclass(frozen=True, slots=True, repr=False)
class DirectEffects(Result):
    """Direct effect of every part of a model on every prompt's logit difference, answer against foils, in logits.

    Attributes:
        heads: of each head's write, ``z @ W_O``; positive pushes towards the answer.
        mlps: of each layer's MLP, its biases with it; 0 in a model without MLPs.
        others: of what else there is, in the order of :attr:`other_names`.
        other_names: ``"embedding"`` (of the last token), and those of ``"positions"``, ``"attention biases"`` (all b_O,
            and biases of norms behind attention), ``"final norm's bias"`` and ``"unembedding's bias"`` that are not 0.
        total: the logit difference itself, by the model's own norm and unembedding, before any cap.
        scale: what the final norm divides by on that prompt: held fixed, it makes the parts add up.
        answers: first token of each answer.
        foil: what the answer is compared with: ``"answers"``, ``"vocabulary"`` or ``"given"``.
        n_foils: number of tokens whose mean logit is taken away.
        logit_cap: the cap of the model's logits, which the differences are taken before; None without one.
        relation, labels, template, n_shots, data_hash: the prompts.
        fingerprint: the model.
    """

    FORMAT: ClassVar[str] = "fvlens-direct-effects-1"

    heads: Float[Tensor, "prompt layer head"]
    mlps: Float[Tensor, "prompt layer"]
    others: Float[Tensor, "prompt other"]
    other_names: tuple[str, ...]
    total: Float[Tensor, " prompt"]
    scale: Float[Tensor, " prompt"]
    answers: Int[Tensor, " prompt"]
    foil: str
    n_foils: Int[Tensor, " prompt"]
    logit_cap: float | None
    relation: str
    labels: str
    template: Template | str
    n_shots: int
    data_hash: str
    fingerprint: Fingerprint

    def __post_init__(self) -> None:
        object.__setattr__(self, "template", get_template(self.template))

    def __len__(self) -> int:
        return len(self.total)

    def _line(self) -> str:
        n_prompts, n_layers, n_heads = self.heads.shape
        best = self.top(1)[0]
        return (
            f"{named(self.relation)}, {self.labels} labels: {n_prompts} prompts, {n_layers} "
            f"layers x {n_heads} heads, mean logit difference {float(self.total.mean()):+.3f} against {self.foil}, "
            f"most by {best} with {float(self.mean[best]):+.3f}, model {self.fingerprint.name!r}"
        )

    def _cells(self) -> list[tuple[str, ...]]:
        stderr, heads = self.stderr, self.top(min(MOST_ROWS, self.mean.numel()))
        rows = [(str(head), f"{float(self.mean[head]):+.4f}", number(float(stderr[head]), 4)) for head in heads]
        return [("head", "mean direct effect", "standard error"), *rows]

    def _check_loaded(self) -> None:
        if len(self.other_names) != self.others.shape[1]:
            raise ValueError(f"other_names: expected {self.others.shape[1]} names, got {len(self.other_names)}.")

    @property
    def sum(self) -> Float[Tensor, " prompt"]:
        """All parts together: :attr:`total`, up to rounding (1e-4 in float32, more in half precision)."""
        parts = torch.cat([self.heads.flatten(1), self.mlps, self.others], dim=1)
        return parts.double().sum(dim=1).float()

    @property
    def mean(self) -> Float[Tensor, "layer head"]:
        """Mean direct effect of each head over prompts."""
        return self.heads.mean(dim=0)

    @property
    def stderr(self) -> Float[Tensor, "layer head"]:
        """Standard error of :attr:`mean` over prompts (NaN for a single prompt)."""
        return standard_error(self.heads)

    def top(self, n: int) -> list[Head]:
        """The n heads of the largest mean direct effect, largest first: those that write the answer.

        Raises:
            ValueError: n is not between 1 and the number of heads.
        """
        return self._ordered(n, "top", largest=True)

    def bottom(self, n: int) -> list[Head]:
        """The n heads of the smallest mean direct effect, smallest first: those that write against the answer.

        Raises:
            ValueError: n is not between 1 and the number of heads.
        """
        return self._ordered(n, "bottom", largest=False)

    def _ordered(self, n: int, what: str, *, largest: bool) -> list[Head]:
        n_heads = self.heads.shape[2]
        order = self.mean.flatten().argsort(descending=largest, stable=True).tolist()
        if not 1 <= n <= len(order):
            raise ValueError(f"{what}: expected n between 1 and {len(order)} (all heads), got {n}.")
        return [Head(i // n_heads, i % n_heads) for i in order[:n]]

    def to_dataframe(self) -> "pd.DataFrame":
        """One row a prompt and part: ``prompt, part, kind, layer, head, effect, total``.

        ``part`` is a name such as ``"L2H3"``, ``"MLP 2"`` or ``"embedding"``; ``kind`` is ``"head"``, ``"mlp"`` or
        ``"other"``; ``layer`` and ``head`` are missing where a part has none.
        """
        import pandas as pd

        n_prompts, n_layers, n_heads = self.heads.shape
        heads = [(str(Head(i, j)), "head", i, j) for i in range(n_layers) for j in range(n_heads)]
        mlps = [(f"MLP {i}", "mlp", i, None) for i in range(n_layers)]
        parts = [*heads, *mlps, *((name, "other", None, None) for name in self.other_names)]
        effects = torch.cat([self.heads.flatten(1), self.mlps, self.others], dim=1)
        names, kinds, layers, heads_of = (list(column) for column in zip(*parts, strict=True))
        return pd.DataFrame(
            {
                "prompt": torch.arange(n_prompts).repeat_interleave(len(parts)).numpy(),
                "part": names * n_prompts,
                "kind": kinds * n_prompts,
                "layer": pd.array(layers * n_prompts, dtype="Int64"),
                "head": pd.array(heads_of * n_prompts, dtype="Int64"),
                "effect": effects.flatten().numpy(),
                "total": self.total.repeat_interleave(len(parts)).numpy(),
            }
        )

    def plot(
        self, *, kind: Kind = "map", n_top: int = 10, prompt: int | None = None, zmax: float | int | None = None
    ) -> "Figure":
        """A figure of the effects, ``n_top`` heads being those of the largest absolute mean.

        Args:
            kind: ``"map"``, all heads by layer, the largest outlined and named, the MLPs beside them and other parts
                under the title; ``"top"``, the largest as bars with 95% intervals (1.96 standard errors over prompts);
                ``"prompts"``, the effects of the largest on every prompt.
            n_top: number of heads.
            prompt: of the map: one prompt; by default the mean over all, whose standard errors are in the hover text.
            zmax: of the map: where its scale ends, as of :meth:`IndirectEffects.plot`.

        Raises:
            ValueError: an unknown kind; there is no such prompt; ``prompt`` or ``zmax`` of another kind than the map.
        """
        from fvlens import plots

        check_kind(kind, zmax)
        if kind != "map":
            if prompt is not None:
                raise ValueError(f"plot: prompt={prompt} is for a map, and kind={kind!r} shows all prompts.")
            largest = self.mean.abs().flatten().argsort(descending=True, stable=True)[: max(1, n_top)].tolist()
            n_heads = self.heads.shape[2]
            shown = [Head(i // n_heads, i % n_heads) for i in largest]
            title = f"Direct effects, {named(self.relation)} ({self.labels} labels, {len(self)} prompts)"
            if kind == "top":
                return top_bars(shown, self.mean, self.stderr, x_title="logits", title=title)
            samples = [self.heads[:, head.layer, head.head] for head in shown]
            return plots.distribution(list(map(str, shown)), samples, x_title="logits", title=title)
        if prompt is not None and not 0 <= prompt < len(self):
            raise ValueError(f"plot: expected a prompt in 0..{len(self) - 1}, got {prompt}.")
        shown = [self.heads, self.mlps, self.others, self.total[:, None]]
        heads, mlps, others, total = (x.mean(dim=0) if prompt is None else x[prompt] for x in shown)
        biases = dict(zip(self.other_names, others.tolist(), strict=True))
        rest = {name: biases.pop(name, None) for name in ("embedding", "positions")}
        rest["biases"] = sum(biases.values()) if biases else None
        order = heads.abs().flatten().argsort(descending=True, stable=True)[:n_top].tolist()
        where = f"{self.labels} labels, " + (f"{len(self)} prompts" if prompt is None else f"prompt {prompt}")
        return plots.direct_map(
            heads,
            mlps,
            {kind: value for kind, value in rest.items() if value is not None},
            total=float(total),
            stderr=(self.stderr, standard_error(self.mlps)) if prompt is None else None,
            outlined=[Head(i // heads.shape[1], i % heads.shape[1]) for i in order],
            title=f"Direct effects, {named(self.relation)} ({where})",
            zmax=zmax,
        )
