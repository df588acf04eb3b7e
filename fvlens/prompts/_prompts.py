"""Prompts: clean, corrupted and zero-shot in-context prompts as tokens.

A prompt is BOS, then one demonstration per shot, then the query with its answer missing. What stands before words is
the template's: in the built-in ones a space, so that the answer is the continuation `` y`` and its first token decides
top-1.
"""

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from fvlens.arguments import check_arguments
from fvlens.models import in_front
from fvlens.prompts._answers import answers_behind
from fvlens.prompts._chat import template_for
from fvlens.prompts._refused import check_embedded, check_known, check_length
from fvlens.prompts._templates import Template, TokenClass
from fvlens.relations import Pair, Pairs, Part, list_relations, load_relation, named_pairs, words_of
from fvlens.showing import Shown, named

Labels = Literal["true", "permuted", "deranged", "random"]
LABELS: tuple[Labels, ...] = ("true", "permuted", "deranged", "random")
PAD_ANSWER = -1


@dataclass(frozen=True, slots=True, repr=False)
class Prompts(Shown):
    """A set of tokenised prompts, left-padded: the last token of each is at index -1.

    Attributes:
        tokens: token ids.
        attention_mask: 1 for real tokens, 0 for padding.
        answer_tokens: ids of the answer's tokens, padded on the right with :data:`PAD_ANSWER`.
        token_classes: a :class:`TokenClass` for every token.
        queries: the query pair of each prompt (with its true output).
        demonstrations: the pairs shown in each prompt, with the labels as shown.
        labels: how the labels were chosen.
        n_shots: demonstrations in each prompt.
        template: how the prompts are written.
        relation: name of the relation, if known.
        texts: the prompts as text, without BOS.
    """

    tokens: Int[Tensor, "prompt pos"]
    attention_mask: Int[Tensor, "prompt pos"]
    answer_tokens: Int[Tensor, "prompt answer_pos"]
    token_classes: Int[Tensor, "prompt pos"]
    queries: tuple[Pair, ...]
    demonstrations: tuple[tuple[Pair, ...], ...]
    labels: Labels
    n_shots: int
    template: Template
    relation: str
    texts: tuple[str, ...]
    _hash: str | None = dataclasses.field(default=None, init=False, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.queries)

    def _line(self) -> str:
        return (
            f"{named(self.relation)}: {len(self)} prompts of up to {self.tokens.shape[1]} tokens, {self.n_shots} "
            f"shots, {self.labels} labels, template {self.template}"
        )

    def _cells(self) -> list[tuple[str, ...]]:
        rows = zip(self.texts, self.queries, strict=True)
        return [("prompt", "answer"), *((f"...{text[-60:]}", pair.output) for text, pair in rows)]

    @property
    def first_answer_token(self) -> Int[Tensor, " prompt"]:
        """Id of the first token of each answer, which decides top-1."""
        return self.answer_tokens[:, 0]

    @property
    def answer_mask(self) -> Bool[Tensor, "prompt answer_pos"]:
        """True where :attr:`answer_tokens` holds a token."""
        return self.answer_tokens != PAD_ANSWER

    @property
    def data_hash(self) -> str:
        """First 16 hex digits of the SHA-256 of the prompt texts and their answers."""
        if self._hash is None:  # every result over the prompts records it
            asked = zip(self.texts, self.queries, strict=True)
            text = "\x1f".join(f"{text}\x1e{query.output}" for text, query in asked)
            object.__setattr__(self, "_hash", hashlib.sha256(text.encode()).hexdigest()[:16])
        assert self._hash is not None
        return self._hash

    def select(self, keep: Bool[Tensor, " prompt"] | Sequence[int]) -> "Prompts":
        """The prompts marked True (or with these indices), in order."""
        if isinstance(keep, Tensor):
            if keep.shape != (len(self),):
                raise ValueError(f"select: expected {len(self)} flags, one a prompt, got shape {tuple(keep.shape)}.")
            index = keep.nonzero().flatten().tolist()
        else:
            index = [int(i) for i in keep]
        if not index:
            raise ValueError("select: expected at least one prompt to keep, got none.")
        rows = torch.tensor(index)
        return dataclasses.replace(
            self,
            tokens=self.tokens[rows],
            attention_mask=self.attention_mask[rows],
            answer_tokens=self.answer_tokens[rows],
            token_classes=self.token_classes[rows],
            queries=tuple(self.queries[i] for i in index),
            demonstrations=tuple(self.demonstrations[i] for i in index),
            texts=tuple(self.texts[i] for i in index),
        )


def build_prompts(
    model: Any,
    pairs: Pairs,
    *,
    queries: Pairs | None = None,
    n_prompts: int | None = None,
    n_shots: int = 10,
    labels: Labels = "true",
    template: str | Template = "qa",
    pool: Sequence[str] | None = None,
    relation: str | None = None,
    generator: torch.Generator,
) -> Prompts:
    """In-context prompts over word pairs, clean or with corrupted labels.

    Prompt: BOS, ``n_shots`` demonstrations, the query without its answer (Todd et al. 2024, section 2). With
    ``labels="permuted"`` the demonstrations' labels are permuted freely, so that a label may stay in place [paper];
    ``"deranged"`` lets none stay, and ``"random"`` draws each label from ``pool`` [our choices].

    Args:
        model: the model whose tokenizer is used.
        pairs: pairs that the demonstrations are drawn from, without replacement and never the query's own input; in
            any shape, see :func:`fvlens.relations.as_relation`.
        queries: pairs that the queries are drawn from; ``pairs`` if not given. One that stands twice is asked twice.
        n_prompts: number of prompts. Queries are visited in random order and again from the start when there are fewer
            of them; by default each query is asked once, in the given order.
        n_shots: demonstrations per prompt; 0 gives zero-shot prompts.
        labels: ``"true"``, ``"permuted"``, ``"deranged"`` or ``"random"``.
        template: name of a built-in template, ``"chat"`` for the chat format of the model's tokenizer, or a
            :class:`Template`, which also says whether BOS stands in front:
            ``get_template("qa").with_bos("none")``.
        pool: answers that random labels are drawn from; by default the answers of the other library relations.
        relation: name recorded in the result; by default that of ``pairs`` or ``queries`` if one has a name.
        generator: source of randomness.

    Returns:
        :class:`Prompts`, left-padded.

    Raises:
        ValueError: pairs that cannot be read; unknown labels or template; too few pairs for the demonstrations; no
            derangement exists; empty pool; the model has no tokenizer; or a prompt is longer than the model's context.

    Example:
        >>> import torch, fvlens
        >>> model = fvlens.load_model("rel-small")
        >>> pairs = fvlens.load_relation("country-capital").pairs
        >>> g = torch.Generator().manual_seed(0)
        >>> prompts = fvlens.build_prompts(model, pairs, n_prompts=2, n_shots=1, generator=g)
        >>> tuple(prompts.tokens.shape)
        (2, 15)

    References:
        Todd et al. 2024, arXiv:2310.15213, section 2.
    """
    check_arguments(build_prompts, locals())
    template = template_for(model, template)
    if labels not in LABELS:
        raise ValueError(f"build_prompts: labels={labels!r}; expected one of {', '.join(LABELS)}.")
    if n_shots < 0 or (n_prompts is not None and n_prompts < 1):
        raise ValueError(f"build_prompts: expected n_shots >= 0 and n_prompts >= 1, got {n_shots} and {n_prompts}.")
    demo_pairs, name = named_pairs(pairs, what="build_prompts: pairs", may_be_empty=queries is not None)
    query_pairs = demo_pairs
    if queries is not None:
        query_pairs, of_queries = named_pairs(queries, what="build_prompts: queries", repeats=True)
        name = name or of_queries
    # the pool was drawn from the whole library where parts of a split were given, and stays so: the same seed, the same
    # prompts
    kept_apart = relation
    if relation is None:
        relation, kept_apart = name, "" if isinstance(demo_pairs, Part) or isinstance(query_pairs, Part) else name
    if labels == "random" and n_shots:
        own_pool = None if pool is None else words_of(pool, "build_prompts: pool")
        pool = _default_pool(kept_apart, [*demo_pairs, *query_pairs]) if own_pool is None else own_pool
        if not pool:
            raise ValueError("build_prompts: labels='random' needs a pool of answers, got an empty one.")

    chosen = _choose_queries(query_pairs, n_prompts, generator)
    demonstrations: list[tuple[Pair, ...]] = []
    for query in chosen:
        candidates = [pair for pair in demo_pairs if pair.input != query.input]
        if len(candidates) < n_shots:
            raise ValueError(
                f"build_prompts: {n_shots} demonstrations wanted for query {query.input!r}, but only {len(candidates)} "
                "pairs have another input; give more pairs or fewer shots."
            )
        order = torch.randperm(len(candidates), generator=generator)[:n_shots].tolist()
        shown = [candidates[i] for i in order]
        demonstrations.append(_corrupt(shown, labels, pool, generator))
    return render_prompts(
        model, chosen, demonstrations, template=template, labels=labels, n_shots=n_shots, relation=relation
    )


def _default_pool(relation: str | None, pairs: Sequence[Pair]) -> list[str]:
    """Answers of the library's other relations, without the answers of these pairs."""
    own = {pair.output for pair in pairs}
    names = [name for name in list_relations() if name != relation]
    return sorted({output for name in names for output in load_relation(name).outputs} - own)


def _choose_queries(pairs: Sequence[Pair], n_prompts: int | None, generator: torch.Generator) -> Sequence[Pair]:
    if n_prompts is None:
        return pairs
    order: list[int] = []
    while len(order) < n_prompts:
        order += torch.randperm(len(pairs), generator=generator).tolist()
    return [pairs[i] for i in order[:n_prompts]]


def _corrupt(
    shown: list[Pair], labels: Labels, pool: Sequence[str] | None, generator: torch.Generator
) -> tuple[Pair, ...]:
    """The demonstrations with labels as asked for."""
    n = len(shown)
    outputs = [pair.output for pair in shown]
    new: list[str]
    if labels == "true" or n == 0:
        return tuple(shown)
    if labels == "random":
        assert pool is not None
        picks = torch.randint(len(pool), (n,), generator=generator).tolist()
        new = [pool[int(i)] for i in picks]
    elif labels == "permuted":
        new = [outputs[i] for i in torch.randperm(n, generator=generator).tolist()]
    else:
        new = _derange(outputs, generator)
    return tuple(Pair(pair.input, label) for pair, label in zip(shown, new, strict=True))


def _derange(outputs: list[str], generator: torch.Generator) -> list[str]:
    """A random order of the labels in which no place keeps its label (as a word, so equal labels are swapped too)."""
    n = len(outputs)
    most = max(outputs.count(label) for label in outputs)
    if 2 * most > n:
        raise ValueError(
            f"build_prompts: labels='deranged' is impossible: one label stands in {most} of {n} demonstrations; "
            "use labels='permuted' or 'random'."
        )
    for _ in range(1000):
        new = [outputs[i] for i in torch.randperm(n, generator=generator).tolist()]
        if all(a != b for a, b in zip(new, outputs, strict=True)):
            return new
    # rare: sort equal labels together and rotate by the largest group, which moves every label off its own block
    order = sorted(range(n), key=lambda i: outputs[i])
    new = [""] * n
    for place, i in enumerate(order):
        new[i] = outputs[order[(place + most) % n]]
    return new


def render_prompts(
    model: Any,
    queries: Sequence[Pair],
    demonstrations: Sequence[Sequence[Pair]],
    *,
    template: str | Template = "qa",
    labels: Labels = "true",
    n_shots: int,
    relation: str = "",
) -> Prompts:
    """Tokenise prompts whose demonstrations are already chosen.

    The whole text is tokenised at once and every token is classed by the characters it covers, so the tokens are those
    that the tokenizer gives for the plain text, with those in front that the template's ``bos`` asks for.

    Raises:
        ValueError: the model has no (fast) tokenizer; a prompt does not fit the model's context, or holds a token that
            the model has no embedding for, or a word that the tokenizer does not know.
    """
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise ValueError(
            "the model has no tokenizer; put its tokenizer's files (tokenizer.json) into its folder and load it again, "
            "or call model.set_tokenizer(...)."
        )
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"expected a fast tokenizer (with character offsets), got {type(tokenizer).__name__}.")
    template = template_for(model, template)
    pieces = [template.pieces(d, q.input) for d, q in zip(demonstrations, queries, strict=True)]
    texts = ["".join(text for text, _ in row) for row in pieces]
    encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
    answers = answers_behind(tokenizer, template, texts, encoded["input_ids"], [query.output for query in queries])
    rows: list[list[int]] = []
    classes: list[list[int]] = []
    for i, text in enumerate(texts):
        ids = list(encoded["input_ids"][i])
        spans = list(encoded["offset_mapping"][i])
        kinds = _classes(spans, pieces[i])
        kinds[-1] = int(TokenClass.PREDICTIVE)
        # the one place where BOS comes in front; a text that begins with it, as chat formats write it, gets no second
        front = in_front(model, template.bos, ids)
        if not front and ids[0] == tokenizer.bos_token_id:
            kinds[0] = int(TokenClass.BOS)
        ids, kinds = [*front, *ids], [int(TokenClass.BOS)] * len(front) + kinds
        rows.append(ids)
        classes.append(kinds)
        check_length(model, len(ids) + len(answers[i]), n_shots, template, text)
    check_embedded(model, [*rows, *answers])
    whole = [text + template.answered(query.output) for text, query in zip(texts, queries, strict=True)]
    ids_of_whole = [[*ids, *own] for ids, own in zip(encoded["input_ids"], answers, strict=True)]
    check_known(tokenizer, template, whole, ids_of_whole, queries, demonstrations)
    width = max(map(len, rows))
    pad = next(
        (i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id) if i is not None), 0
    )
    return Prompts(
        tokens=torch.tensor([[pad] * (width - len(row)) + row for row in rows]),
        attention_mask=torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows]),
        answer_tokens=_right_pad(answers),
        token_classes=torch.tensor([[int(TokenClass.PADDING)] * (width - len(row)) + row for row in classes]),
        queries=tuple(queries),
        demonstrations=tuple(tuple(d) for d in demonstrations),
        labels=labels,
        n_shots=n_shots,
        template=template,
        relation=relation,
        texts=tuple(texts),
    )


def _right_pad(rows: list[list[int]]) -> Int[Tensor, "prompt answer_pos"]:
    width = max(map(len, rows))
    return torch.tensor([row + [PAD_ANSWER] * (width - len(row)) for row in rows])


def _classes(spans: Sequence[tuple[int, int]], pieces: Sequence[tuple[str, TokenClass]]) -> list[int]:
    """Class of each token by the piece that holds its last character."""
    ends: list[tuple[int, int]] = []
    position = 0
    for text, kind in pieces:
        position += len(text)
        ends.append((position, int(kind)))
    result: list[int] = []
    piece = 0
    for start, end in spans:
        last = max(start, end - 1)
        while piece < len(ends) - 1 and last >= ends[piece][0]:
            piece += 1
        result.append(ends[piece][1])
    return result


def with_answers(
    prompts: Prompts, n_answer: int | None = None
) -> tuple[Int[Tensor, "prompt pos"], Int[Tensor, "prompt pos"], Int[Tensor, "prompt pos"]]:
    """Prompts with their answers behind them, for teacher forcing.

    Args:
        prompts: the prompts.
        n_answer: answer tokens that are scored; by default those of the longest answer.

    Returns:
        Tokens (prompt, then all but the last scored answer token), their mask, and the token wanted next at each place
        (-1 where nothing is scored).
    """
    n_answer = prompts.answer_tokens.shape[1] if n_answer is None else n_answer
    given = prompts.answer_tokens[:, : n_answer - 1]
    # padding behind a short answer: attended by nobody that is scored, so any token will do
    tokens = torch.cat([prompts.tokens, given.clamp(min=0)], dim=1)
    mask = torch.cat([prompts.attention_mask, torch.ones_like(given)], dim=1)
    targets = torch.full_like(tokens, -1)
    targets[:, prompts.tokens.shape[1] - 1 :] = prompts.answer_tokens[:, :n_answer]
    return tokens, mask, targets
