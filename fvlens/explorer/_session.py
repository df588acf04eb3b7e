"""What the explorer knows and computes: a model, pairs, heads, a vector, a prompt. No widgets here."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from fvlens.attribution import (
    AttentionPatterns,
    DirectEffects,
    LogitLens,
    attention_patterns,
    direct_effects,
    logit_lens,
)
from fvlens.evaluation import copied
from fvlens.explorer._files import check_folder, inside
from fvlens.explorer._kept import KeptPrompt, NextTokens
from fvlens.explorer._typed import typed_pairs
from fvlens.find import Found, find_vector, task_means
from fvlens.models import Fingerprint, fingerprint
from fvlens.prompts import Prompts, Template, build_prompts, template_for, template_or
from fvlens.relations import Pairs, Relation, as_relation
from fvlens.report import RecipeOptions
from fvlens.types import Head, HeadLike, as_heads, as_number
from fvlens.vectors import FunctionVector, function_vector

Kind = Literal["corrupted", "clean"]
"""Prompts that are looked at: those with wrong labels, which effects are measured on, or those with true ones."""
KINDS: tuple[Kind, ...] = get_args(Kind)

MOST_SCALE = 8.0
"""Scales from minus this to this can be chosen."""


@dataclass(frozen=True, slots=True)
class Settings(RecipeOptions):
    """How heads are found: those of :class:`fvlens.report.RecipeOptions`, and a seed.

    Of few pairs that were typed, ``n_shots`` is at most one less than the train pairs.

    Attributes:
        seed: of the split and the prompts.
    """

    seed: int = 0


@dataclass(frozen=True, slots=True)
class HeadView:
    """What is shown of one head on one prompt.

    Attributes:
        head: the head.
        words, attention: the prompt's tokens, and the head's attention from the last token to each.
        effects: its indirect effect on each corrupted prompt.
        direct: its direct effect on the logit difference of each prompt of the kind that is shown; None if the model
            has none, with the reason in :attr:`why_not`.
        decoded: tokens that its mean output points to, with their logits.
    """

    head: Head
    words: tuple[str, ...]
    attention: Float[Tensor, " pos"]
    effects: Float[Tensor, " prompt"]
    direct: Float[Tensor, " shown"] | None
    why_not: str
    decoded: tuple[tuple[str, float], ...]


class Session:
    """A model, word pairs, the heads in a vector, its layer and scale, a prompt; and all that is computed of them.

    Widgets hold none of this: each of their events is one call here, and what they show is asked for here.

    Args:
        model: the model.
        relation: pairs to begin with, in any shape; None to choose later.
        settings: how heads are found.
        folder: files are saved into this folder and loaded from it, and nowhere else; by default the current one.
        progress: called with a few words before each step of long work.
    """

    def __init__(
        self,
        model: Any,
        relation: Pairs | None = None,
        *,
        settings: Settings | None = None,
        folder: str | Path = ".",
        progress: Callable[[str], None] | None = None,
    ) -> None:
        self.model = model
        self.settings = settings or Settings()
        self.folder = check_folder(folder)
        self.progress: Callable[[str], None] = progress or (lambda words: None)
        self.relation: Relation | None = None
        self.found: Found | None = None
        self.prompts: dict[Kind, Prompts] = {}
        self.heads: tuple[Head, ...] = ()
        self.layer, self.scale = 0, 1.0
        self.text, self.asked = "", True
        self.head: Head | None = None
        self.kind: Kind = "corrupted"
        self.prompt = 0
        self.beside: FunctionVector | None = None
        self._kept: tuple[Any, KeptPrompt] | None = None
        self._made: tuple[Any, FunctionVector] | None = None
        self._seen: dict[Any, Any] = {}
        if relation is not None:
            self.choose(relation)

    # -- pairs --------------------------------------------------------------------------------------------------------

    def choose(self, pairs: Pairs) -> Found:
        """Find the heads of these pairs, and begin with the vector that :func:`fvlens.find_vector` makes of them.

        Nothing changes if that fails.

        Raises:
            ValueError: pairs that cannot be read or split, or whatever the steps refuse.
        """
        own, relation = self.settings, as_relation(pairs, what="explore")
        written = template_for(self.model, template_or(own.template))
        generator = torch.Generator().manual_seed(own.seed)
        split = relation.split(generator)
        n_shots = min(own.n_shots, max(1, len(split.train) - 1))  # of few pairs that were typed
        drawn: dict[str, Any] = dict(queries=split.valid, n_shots=n_shots, template=written, relation=relation.name)
        # find_vector draws clean prompts, then corrupted ones; both are drawn beside it, to be looked at
        looked = copied(generator)
        clean = build_prompts(self.model, split.train, n_prompts=own.n_prompts, generator=looked, **drawn)
        wrong = build_prompts(
            self.model, split.train, n_prompts=own.n_corrupted, labels=own.labels, generator=looked, **drawn
        )
        self.progress(f"means of all heads over {own.n_prompts} prompts")
        means = task_means(
            self.model, split, relation=relation.name, n_shots=n_shots, n_prompts=own.n_prompts, template=written,
            generator=generator, progress=False,
        )  # fmt: skip
        self.progress(f"effect of each head on {own.n_corrupted} prompts, then the best layer and scale")
        found = find_vector(
            self.model, split, labels=own.labels, n_heads=own.n_heads, n_shots=n_shots, means=means,
            n_corrupted=own.n_corrupted, template=written, relation=relation.name, seed=own.seed, generator=generator,
            progress=False,
        )  # fmt: skip
        assert found.effects is not None
        assert found.effects.data_hash == wrong.data_hash, "the prompts that are looked at are not the measured ones"
        self.relation, self.found = relation, found
        self.prompts = {"corrupted": wrong, "clean": clean}
        self.heads, self.layer, self.scale = found.heads, found.layer, found.scale
        self.head, self.prompt = found.heads[0], 0
        self.text, self.asked = split.valid[0].input, True
        self._seen = {}
        return found

    def choose_typed(self, text: str, name: str = "typed pairs") -> Found:
        """Find the heads of pairs that were typed, one a line.

        Raises:
            ValueError: a line that is no pair, with its number; or as :meth:`choose`.
        """
        return self.choose(Relation(name, typed_pairs(text)))

    @property
    def chosen(self) -> Found:
        """What was found for the pairs.

        Raises:
            ValueError: no pairs were chosen yet.
        """
        if self.found is None:
            raise ValueError("no pairs yet: choose a relation, or type word pairs.")
        return self.found

    @property
    def template(self) -> Template:
        """How a word is asked."""
        return template_for(self.model, template_or(self.settings.template))

    @property
    def fingerprint(self) -> Fingerprint:
        """The model's."""
        return fingerprint(self.model)

    # -- the vector ---------------------------------------------------------------------------------------------------

    def toggle(self, head: HeadLike) -> bool:
        """Put a head into the vector, or take it out, and look at it; True if it is in now.

        Raises:
            ValueError: the model has no such head.
        """
        own = self._head(head)
        is_in = own not in self.heads
        self.heads = (*self.heads, own) if is_in else tuple(one for one in self.heads if one != own)
        self.head = own
        return is_in

    def put_in(self, heads: Iterable[HeadLike]) -> None:
        """Make the vector of these heads and no others.

        Raises:
            ValueError: heads that the model has not, or one twice.
        """
        self.heads = tuple(as_heads(heads, self.model.cfg.n_layers, self.model.cfg.n_heads))

    def move(self, *, layer: int | None = None, scale: float | int | None = None) -> None:
        """Add the vector after another layer, or with another factor.

        Raises:
            ValueError: no such layer; a scale beyond :data:`MOST_SCALE`.
        """
        if layer is not None and not 0 <= layer < self.model.cfg.n_layers:
            raise ValueError(f"layer: expected one in 0..{self.model.cfg.n_layers - 1}, got {layer}.")
        if scale is not None and not abs(as_number(scale, "scale")) <= MOST_SCALE:
            raise ValueError(f"scale: expected a number from -{MOST_SCALE:g} to {MOST_SCALE:g}, got {scale}.")
        self.layer = self.layer if layer is None else layer
        self.scale = self.scale if scale is None else float(scale)

    @property
    def vector(self) -> FunctionVector | None:
        """The vector of the heads that are in, its scale in it; None if none is."""
        if self.found is None or not self.heads:
            return None
        key = (id(self.found), self.heads)
        if self._made is None or self._made[0] != key:
            made = function_vector(
                self.model, self.found.means, heads=self.heads, layer=self.layer, seed=self.settings.seed
            )
            self._made = key, made
        return self._made[1].at_layer(self.layer) * self.scale

    # -- the prompt ---------------------------------------------------------------------------------------------------

    def type(self, text: str, *, asked: bool | None = None) -> None:
        """Take another prompt: a word that is asked in the template, or text as it is.

        Raises:
            ValueError: an empty prompt, one that is too long, or words that the tokenizer does not know; the prompt
                before stays.
        """
        asked = self.asked if asked is None else asked
        self._keep(text, asked)
        self.text, self.asked = text, asked

    def _keep(self, text: str, asked: bool) -> KeptPrompt:
        key = (text, asked, self.template)
        if self._kept is None or self._kept[0] != key:
            self._kept = key, KeptPrompt.of(self.model, text, self.template, asked=asked)
        return self._kept[1]

    @property
    def columns(self) -> dict[str, FunctionVector | None]:
        """What the prompt is run under: nothing, the vector, and the one that is kept beside it."""
        columns: dict[str, FunctionVector | None] = {"without": None}
        if self.vector is not None:
            columns["with the vector"] = self.vector
        if self.beside is not None:
            columns["with the one beside"] = self.beside
        return columns

    def next_tokens(self, k: int = 5) -> NextTokens:
        """The most probable next tokens of the prompt, a row each of :attr:`columns`.

        Raises:
            ValueError: as :meth:`type`; a vector beside of another model.
        """
        return self._keep(self.text, self.asked).next_tokens(list(self.columns.values()), k)

    # -- one head -----------------------------------------------------------------------------------------------------

    def look(self, *, head: HeadLike | None = None, kind: str | None = None, prompt: int | None = None) -> None:
        """Look at another head, or at another prompt.

        Raises:
            ValueError: no such head, kind or prompt.
        """
        if head is not None:
            self.head = self._head(head)
        if kind is not None and kind != self.kind:
            if kind not in KINDS:
                raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}.")
            self.kind, self.prompt = KINDS[KINDS.index(kind)], 0
        if prompt is not None:
            n = len(self._shown())
            if not 0 <= prompt < n:
                raise ValueError(f"prompt: expected one in 0..{n - 1}, got {prompt}.")
            self.prompt = prompt

    def _head(self, head: HeadLike) -> Head:
        return as_heads([head], self.model.cfg.n_layers, self.model.cfg.n_heads)[0]

    def _shown(self) -> Prompts:
        """The prompts that are looked at: as many clean ones as corrupted ones."""
        _ = self.chosen  # refuses where nothing was chosen
        return self.prompts[self.kind].select(range(min(map(len, self.prompts.values()))))

    @property
    def questions(self) -> tuple[str, ...]:
        """The query of each prompt that can be looked at, with its answer."""
        return tuple(f"{i}: {pair.input} → {pair.output}" for i, pair in enumerate(self._shown().queries))

    def _once(self, what: str, make: Callable[[], Any]) -> Any:
        """What was computed of the prompts that are shown; a refusal is remembered, too."""
        key = (what, self.kind)
        if key not in self._seen:
            self._seen[key] = make()
        return self._seen[key]

    def attention(self) -> AttentionPatterns:
        """The head's attention from the last token of each prompt that is shown.

        Raises:
            ValueError: no pairs or no head yet; the model's blocks show no attention.
        """
        if self.head is None:
            raise ValueError("no head yet: click one on the map.")
        head, prompts = self.head, self._shown()
        return self._once(
            f"attention of {head}",
            lambda: attention_patterns(self.model, prompts, [head], pairs=self.relation, progress=False),
        )

    def direct(self) -> DirectEffects:
        """Direct effects of all heads on the prompts that are shown.

        Raises:
            ValueError: no pairs yet; the model's parts do not add up.
        """
        prompts = self._shown()
        return self._once("direct", lambda: direct_effects(self.model, prompts, progress=False))

    def lens(self) -> LogitLens:
        """What each layer would say at the last token of each prompt that is shown.

        Raises:
            ValueError: no pairs yet.
        """
        prompts = self._shown()
        return self._once("lens", lambda: logit_lens(self.model, prompts, k=3, progress=False))

    def view(self) -> HeadView:
        """All that is shown of the head that is looked at.

        Raises:
            ValueError: as :meth:`attention`.
        """
        patterns, found = self.attention(), self.chosen
        assert self.head is not None
        assert found.effects is not None
        columns = (patterns.groups[self.prompt] >= 0).nonzero().flatten().tolist()
        direct, why_not = None, ""
        try:
            direct = self.direct().heads[:, self.head.layer, self.head.head]
        except ValueError as error:  # models without direct effects say why; the rest is shown all the same
            why_not = str(error)
        alone = function_vector(self.model, found.means, heads=[self.head], layer=self.layer)
        return HeadView(
            head=self.head,
            words=tuple(patterns.word(self.prompt, column) for column in columns),
            attention=patterns.last[self.prompt, 0, columns],
            effects=found.effects.cie[:, self.head.layer, self.head.head],
            direct=direct,
            why_not=why_not,
            decoded=tuple(alone.decode(self.model, 8)),
        )

    # -- two vectors --------------------------------------------------------------------------------------------------

    def keep_beside(self) -> FunctionVector:
        """Keep the vector as it is now beside those to come.

        Raises:
            ValueError: no head is in the vector.
        """
        self.beside = self._vector("keep")
        return self.beside

    def load_beside(self, name: str) -> FunctionVector:
        """Read a vector of the folder and keep it beside.

        Raises:
            ValueError: no such file in the folder; no vector, or one of another model.
        """
        self.beside = FunctionVector.load(inside(self.folder, name, ".safetensors"), model=self.model)
        return self.beside

    def drop_beside(self) -> None:
        """Keep no vector beside."""
        self.beside = None

    def _vector(self, verb: str) -> FunctionVector:
        vector = self.vector
        if vector is None:
            raise ValueError(f"there is no vector to {verb}: choose pairs, and put a head in.")
        return vector

    # -- files --------------------------------------------------------------------------------------------------------

    def save_vector(self, name: str) -> Path:
        """Write the vector, its scale in it, into the folder.

        Raises:
            ValueError: no head is in the vector; a name that leads out of the folder.
        """
        return self._vector("save").save(inside(self.folder, name, ".safetensors"))

    def save_state(self, name: str) -> Path:
        """Write pairs, settings and all that was chosen into the folder.

        Raises:
            ValueError: no pairs yet; a name that leads out of the folder.
        """
        from fvlens.explorer._state import write_state

        return write_state(self, inside(self.folder, name, ".json"))

    def load_state(self, name: str) -> None:
        """Take up what :meth:`save_state` wrote; the heads are found again. Nothing changes if that fails.

        Raises:
            ValueError: no such file in the folder, a damaged one, or one of another model.
        """
        from fvlens.explorer._state import read_state

        read_state(self, inside(self.folder, name, ".json"))
