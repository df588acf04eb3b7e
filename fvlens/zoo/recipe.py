"""Recipe of the embedded model: its shape, its tokenizer and the in-context sequences it is trained on.

A sequence is a list of slots ``(x, shown label)`` of one relation, rendered with one template. The loss is taken on the
answer position of every slot, so that one sequence trains 0 to ``max_demonstrations`` demonstrations at once, and after
every label, where the template's separator follows, so that an answer that the model generates ends. Three
kinds of sequence are mixed, each closing a short cut that makes function vectors disappear (design notes in the model
card):

* clean: every label is the relation's own; slot 0 has no demonstration, so it trains the prior over the relations of x;
* distractor: each label is replaced, at a rate drawn from U(low, high), by an answer of one other relation; the target
  stays the true relation's answer and counts only after the first true label. The model must pool evidence over
  demonstrations, which spreads the work over heads;
* permuted: the labels are permuted among the demonstrations and the target is the answer of a random relation of x
  (the prior), so that output words alone do not give the relation away.

Seeing that a permuted label is false needs the pair (input, label), which answers alone teach very slowly. So each
label is also checked in training: a linear read-out of the lower blocks says whether it is true of its input (see
:class:`fvlens.zoo.build.Trainee`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from fvlens.prompts import TEMPLATES, Template
from fvlens.relations import Relation

BOS = "<|endoftext|>"
PIECES = r" ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\n+|\s+(?!\S)|\s+"
"""How text is cut before merging: GPT-2's rule, but a run of line breaks stays whole whatever follows it, so that the
template text between two words has the same tokens alone (in training) as in a prompt."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything that determines the embedded model.

    Shape: ``n_layers``, ``n_heads``, ``d_model``, ``d_mlp``, ``n_ctx``.
    Optimisation: AdamW, ``lr`` with linear warm-up over ``warmup`` steps and cosine decay to a hundredth.
    Data: shares of the three kinds of sequence, templates with their shares.
    Pair checks: the blocks after which labels are checked, and the weight of that loss.
    Separators: the weight of the loss of what follows a label, and the share of the sequences in which it is taken
    (it is soon learnt, and the vocabulary is most of the work).
    """

    n_layers: int = 4
    n_heads: int = 8
    d_model: int = 128
    d_mlp: int = 512
    n_ctx: int = 160
    steps: int = 5000
    batch_size: int = 64
    lr: float = 3e-3
    warmup: int = 200
    weight_decay: float = 0.01
    max_demonstrations: int = 12
    clean: float = 0.35
    distractor: float = 0.35
    permuted: float = 0.30
    replace_low: float = 0.2
    replace_high: float = 0.9
    check_layers: tuple[int, ...] = (0, 1)
    check_weight: float = 0.5
    separator_weight: float = 0.1
    separator_share: float = 0.25
    templates: tuple[tuple[str, float], ...] = (("qa", 0.5), ("arrow", 0.25), ("colon", 0.25))
    seed: int = 0

    def __post_init__(self) -> None:
        shares = self.clean + self.distractor + self.permuted
        if abs(shares - 1) > 1e-9:
            raise ValueError(f"recipe: expected shares clean + distractor + permuted = 1, got {shares}.")
        if self.d_model % self.n_heads:
            raise ValueError(f"recipe: d_model {self.d_model} is not a multiple of n_heads {self.n_heads}.")


def train_tokenizer(words: Sequence[str]) -> Tokenizer:
    """Byte-level BPE in which every library word, with its leading space, is one token.

    Merges are learned on the words (and the templates' own text) until no pair is left to merge, so each word ends as
    a single token while any other text still falls back to smaller pieces and, at worst, bytes.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(PIECES), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=200_000,
        min_frequency=1,
        special_tokens=[BOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    frames = [t.prefix + t.demonstration.format(input="", output="") for t in TEMPLATES.values()]
    tokenizer.train_from_iterator([*frames, *(" " + word for word in words)], trainer)
    return tokenizer


@dataclass(frozen=True, slots=True)
class _Frame:
    """One template as token ids around the two words of a slot."""

    before: tuple[int, ...]
    between: tuple[int, ...]
    after: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Batch:
    """Training sequences with the positions whose next-token distribution is trained."""

    tokens: Int[Tensor, "batch pos"]
    answer_positions: Int[Tensor, " slot"]
    targets: Int[Tensor, "batch slot"]
    counted: Bool[Tensor, "batch slot"]
    separator: int
    """First token of the text between a label and the next slot."""
    true_pair: Bool[Tensor, "batch label"]
    """Whether the label shown in a slot is an answer of its input under any relation (all slots but the last)."""
    truth: Int[Tensor, " batch"]
    """The true relation's answer in the last slot."""
    permuted: Bool[Tensor, " batch"]
    clean: Bool[Tensor, " batch"]


class SequenceSampler:
    """Draws training batches from the relations; all randomness comes from the generator given to :meth:`draw`."""

    def __init__(self, recipe: Recipe, relations: Sequence[Relation], tokenizer: Tokenizer) -> None:
        self.recipe = recipe
        self.bos: int = tokenizer.encode(BOS, add_special_tokens=False).ids[0]
        width = max(len(relation) for relation in relations)
        n_slots = recipe.max_demonstrations + 1
        short = [relation.name for relation in relations if len(relation) < n_slots]
        if short:
            raise ValueError(f"recipe: expected at least {n_slots} pairs a relation, too few in {', '.join(short)}.")

        def word_id(word: str) -> int:
            ids = tokenizer.encode(" " + word, add_special_tokens=False).ids
            if len(ids) != 1:
                raise ValueError(f"recipe: {word!r} is {len(ids)} tokens, expected one; train the tokenizer on it.")
            return ids[0]

        self.size = torch.tensor([len(relation) for relation in relations])
        self.inputs = torch.zeros(len(relations), width, dtype=torch.long)
        self.outputs = torch.zeros(len(relations), width, dtype=torch.long)
        answers: dict[int, list[int]] = {}
        for r, relation in enumerate(relations):
            for p, (x, y) in enumerate(relation.pairs):
                self.inputs[r, p], self.outputs[r, p] = word_id(x), word_id(y)
                answers.setdefault(word_id(x), []).append(word_id(y))
        # every relation's answer to an input, as a padded table indexed by the input's token
        self.n_answers = torch.zeros(tokenizer.get_vocab_size(), dtype=torch.long)
        self.answers = torch.zeros(tokenizer.get_vocab_size(), max(map(len, answers.values())), dtype=torch.long)
        for token, ids in answers.items():
            self.n_answers[token] = len(ids)
            self.answers[token, : len(ids)] = torch.tensor(ids)
        self.frames = [self._frame(tokenizer, TEMPLATES[name]) for name, _ in recipe.templates]
        self.frame_shares = torch.tensor([share for _, share in recipe.templates])

    @staticmethod
    def _frame(tokenizer: Tokenizer, template: Template) -> _Frame:
        parts = template.demonstration.replace("{input}", "\0").replace("{output}", "\0").split("\0")
        ids = [tuple(tokenizer.encode(part, add_special_tokens=False).ids) for part in parts]
        before, between, after = ids
        if not after:
            raise ValueError(f"recipe: expected a template that separates demonstrations, got {template.name!r}.")
        return _Frame(before, between, after)

    def draw(self, generator: torch.Generator) -> Batch:
        """One batch of ``recipe.batch_size`` sequences, all in one template."""
        recipe = self.recipe
        n, slots = recipe.batch_size, recipe.max_demonstrations + 1
        frame = self.frames[int(torch.multinomial(self.frame_shares, 1, generator=generator))]
        relation = torch.randint(len(self.size), (n,), generator=generator)
        order = torch.rand(n, self.inputs.shape[1], generator=generator)
        order[torch.arange(self.inputs.shape[1]) >= self.size[relation, None]] = 2.0
        pick = order.argsort(dim=1)[:, :slots]
        x = self.inputs[relation[:, None], pick]
        y = self.outputs[relation[:, None], pick]
        kind = torch.rand(n, 1, generator=generator)
        distractor = (kind >= recipe.clean) & (kind < recipe.clean + recipe.distractor)
        permuted = kind >= recipe.clean + recipe.distractor

        other = torch.randint(len(self.size) - 1, (n, 1), generator=generator)
        other = other + (other >= relation[:, None]).long()  # any relation but the sequence's own
        stray_pick = (torch.rand(n, slots, generator=generator) * self.size[other]).long()
        stray = self.outputs[other, stray_pick]
        span = recipe.replace_high - recipe.replace_low
        rate = recipe.replace_low + span * torch.rand(n, 1, generator=generator)
        replaced = distractor & (torch.rand(n, slots, generator=generator) < rate)
        shuffled = y.gather(1, torch.rand(n, slots, generator=generator).argsort(dim=1))
        shown = torch.where(replaced, stray, torch.where(permuted, shuffled, y))

        prior_pick = (torch.rand(n, slots, generator=generator) * self.n_answers[x]).long()
        prior = self.answers[x, prior_pick]
        targets = torch.where(permuted, prior, y)
        true_before = (~replaced).long().cumsum(dim=1) - (~replaced).long() > 0
        counted = ~distractor | true_before
        known = torch.arange(self.answers.shape[1]) < self.n_answers[x][..., None]
        true_pair = ((self.answers[x] == shown[..., None]) & known).any(dim=-1)[:, :-1]
        tokens, positions = self._render(frame, x, shown)
        return Batch(
            tokens=tokens,
            answer_positions=positions,
            targets=targets,
            counted=counted,
            separator=frame.after[0],
            true_pair=true_pair,
            truth=y[:, -1],
            permuted=permuted[:, 0],
            clean=~(permuted | distractor)[:, 0],
        )

    def _render(self, frame: _Frame, x: Tensor, shown: Tensor) -> tuple[Tensor, Tensor]:
        """Token ids of whole sequences, up to the last label, and the positions that answers follow."""
        n, slots = x.shape

        def constant(ids: tuple[int, ...]) -> Tensor:
            return torch.tensor(ids, dtype=torch.long).expand(n, slots, len(ids))

        slot = torch.cat(
            [constant(frame.before), x[..., None], constant(frame.between), shown[..., None], constant(frame.after)],
            dim=2,
        )
        length = slot.shape[2]
        tokens = torch.cat([torch.full((n, 1), self.bos), slot.reshape(n, slots * length)], dim=1)
        first = 1 + len(frame.before) + len(frame.between)
        positions = first + length * torch.arange(slots)
        tokens = tokens[:, : int(positions[-1]) + 2]
        return tokens, positions
