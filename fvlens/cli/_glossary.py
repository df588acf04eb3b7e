"""The words of this field and of these commands, each explained once: ``fvlens explain TERM`` and the help pages."""

import difflib
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Term:
    """A word and what it means here.

    Attributes:
        name: the word, as it is listed.
        text: what it means, in a sentence or a few; the first one says what it is.
        also: other words for it, options and their values among them.
        see: terms that the text leans on or that belong beside it.
    """

    name: str
    text: str
    also: tuple[str, ...] = ()
    see: tuple[str, ...] = ()

    @property
    def first(self) -> str:
        """The first sentence, for help pages."""
        return self.text.partition(". ")[0].removesuffix(".") + "."


_LISTED = (
    # what is asked
    Term(
        "relation",
        "What the two words of every pair of a list have in common, such as hot -> cold, big -> small. A relation is "
        "one of the library's (`fvlens relations`) or a file of your own pairs (`fvlens relations check FILE`).",
        also=("pairs", "task"),
        see=("split", "family"),
    ),
    Term(
        "split",
        "A relation's pairs in three parts that share no word: train (demonstrations, means, training), valid (where "
        "layer and scale are chosen) and test (what is reported).",
        also=("train", "valid", "test"),
        see=("seed",),
    ),
    Term(
        "family",
        "Relations that ask the same in different domains, such as the kinds of animals and of tools. Each has a "
        "domain; analogies between two domains of one family are far ones.",
        also=("domain", "category"),
        see=("far",),
    ),
    Term(
        "template",
        "How a pair is written in a prompt, such as `Q: hot` and `A: cold` on two lines. Built in are some by name; "
        "one of your own is a JSON file.",
        see=("bare query", "demonstrations", "BOS"),
    ),
    Term(
        "BOS",
        "A token that says that a text begins, of which `--bos` puts one in front of every prompt, none, or what the "
        "tokenizer itself puts there. Vectors know what it was for them, and warn where it is another.",
        also=("beginning of sequence",),
        see=("template",),
    ),
    Term(
        "demonstrations",
        "Pairs written into a prompt before the query, so that the model can see what is asked. A prompt with 10 of "
        "them is a 10-shot prompt.",
        also=("shots", "10-shot", "n-shots", "one-shot", "icl", "in-context", "in-context learning", "clean"),
        see=("bare query", "labels"),
    ),
    Term(
        "bare query",
        "A prompt that holds the query alone and no demonstration, so that nothing but a vector can say what is asked.",
        also=("zero-shot",),
        see=("demonstrations",),
    ),
    Term(
        "labels",
        "The answers in a prompt's demonstrations: true, permuted, deranged or random. On prompts where they are not "
        "true, effects of heads are measured.",
        also=("true", "shuffled", "corrupted", "both-labels"),
        see=("permuted", "random", "deranged", "AIE"),
    ),
    Term(
        "permuted",
        "Labels that are the demonstrations' own, in shuffled order, so that one may stay in its place. Heads ranked "
        "on them are those that notice whether the demonstrations agree on a task.",
        see=("labels", "deranged", "random"),
    ),
    Term(
        "deranged",
        "Permuted labels of which none stays in its place.",
        see=("labels", "permuted"),
    ),
    Term(
        "random",
        "Labels drawn from other relations' answers. Heads ranked on them are those that carry which relation it is. "
        "Random vectors and random heads are something else: controls.",
        see=("labels", "permuted", "controls"),
    ),
    # where in the model
    Term(
        "head",
        "One attention head of the model, written L1H2: layer 1, head 2, both counted from 0. What it writes at the "
        "last token can be read, averaged and replaced.",
        also=("heads", "L1H2"),
        see=("AIE", "layer"),
    ),
    Term(
        "layer",
        "A block of the model, counted from 0 at the bottom. `--layer 2` adds a vector after layer 2; by default the "
        "layer is chosen on the validation pairs.",
        also=("layers",),
        see=("scale", "split"),
    ),
    Term(
        "CIE",
        "Causal indirect effect: how much the probability of the answer's first token rises on one prompt with "
        "corrupted labels when one head's output is replaced by its mean over clean prompts.",
        also=("causal indirect effect", "effect"),
        see=("AIE", "labels", "path"),
    ),
    Term(
        "AIE",
        "Average indirect effect: how much the answer's probability rises, on prompts with corrupted labels, when one"
        " head's output is replaced by its mean over clean prompts. It is the mean of CIE over prompts and says how "
        "much the head carries the task; its standard error stands beside it.",
        also=("average indirect effect", "mean AIE", "standard error"),
        see=("CIE", "heatmap", "labels"),
    ),
    Term(
        "heatmap",
        "The picture of all heads: layers by heads, each cell an AIE, the strongest heads outlined.",
        also=("map of heads",),
        see=("AIE",),
    ),
    Term(
        "screen",
        "A quick estimate of all heads' effects from gradients: atp (one backward pass a batch), ig (several along a "
        "path) or lrp (relevance). It can miss heads, so `--recheck 20` runs its 20 best again exactly.",
        also=("atp", "ig", "lrp", "recheck", "method", "gradient screen"),
        see=("AIE",),
    ),
    Term(
        "universal heads",
        "One set of heads for many relations: those with the largest AIE on average over the relations that the model"
        " does from demonstrations.",
        also=("universal",),
        see=("AIE",),
    ),
    Term(
        "path",
        "How a number was computed: weights and kv run only what a change can reach and are exact, naive is one whole"
        " forward pass a change.",
        also=("kv", "naive", "weights"),
    ),
    # vectors
    Term(
        "function vector",
        "A task as one vector of the residual stream: the sum of what the strongest heads write on average over clean"
        " prompts. Added to a bare query's last token it makes the model do the task.",
        also=("fv", "vector", "untuned"),
        see=("head", "inject", "fine-tuned vector"),
    ),
    Term(
        "fine-tuned vector",
        "A function vector trained further on about 20 pairs with the model frozen; the epoch is chosen on the "
        "validation pairs.",
        also=("ffv", "fine-tuning", "finetuned", "epochs", "n-train", "trained"),
        see=("function vector", "split"),
    ),
    Term(
        "inject",
        "To add a vector, times a scale, to the residual stream after a layer, at a prompt's last token.",
        also=("injected", "steer", "steered", "plain"),
        see=("layer", "scale"),
    ),
    Term(
        "scale",
        "The factor on a vector when it is injected; 1 adds it as it is. By default it is chosen with the layer on "
        "the validation pairs.",
        see=("inject", "layer", "split"),
    ),
    # numbers
    Term(
        "top-1",
        "How often the answer's first token is the model's most probable one. Where answers share a first token it "
        "takes one for the other; then look at exact.",
        also=("top1", "accuracy"),
        see=("exact", "interval"),
    ),
    Term(
        "exact",
        "How often every token of the answer is the most probable one, given those before: the model then writes the "
        "whole answer greedily. `--method exact` of `fvlens heads` is something else: effects without a screen.",
        also=("whole answer",),
        see=("top-1", "screen"),
    ),
    Term(
        "interval",
        "A 95% bootstrap interval: how far the number moves when as many test words are drawn again from those that "
        "were asked.",
        also=("95% interval", "low", "high", "bootstrap"),
        see=("top-1",),
    ),
    Term(
        "controls",
        "What else might explain a vector's score: no vector, random vectors of its norm, vectors of random heads, "
        "vectors of other relations. A vector is worth something if it is far above them.",
        also=("control", "n-random", "n-others", "random vectors", "random heads", "other relations"),
        see=("function vector",),
    ),
    Term(
        "seed",
        "The number that everything random is drawn from; the same seed gives the same numbers on one machine.",
        see=("split",),
    ),
    Term(
        "cell",
        "The smallest part of a study that is measured and kept: one relation under one setting. A study that was "
        "stopped goes on from the cells that are there.",
        also=("cells", "study", "studies"),
    ),
    # analogies
    Term(
        "analogy",
        "a : b :: c : ?, where a pair shows a relation that nobody names and c asks for it. a : b is the source, c : "
        "? the target.",
        also=("analogies", "source", "target"),
        see=("composite", "far"),
    ),
    Term(
        "far",
        "Of an analogy: source and target lie in different domains, such as animals and tools. In a near one both lie"
        " in the same.",
        also=("near", "far analogy", "near analogy"),
        see=("family",),
    ),
    Term(
        "composite",
        "A weighted sum of a basis's vectors, injected into the query of an analogy. The weights come from how well "
        "each vector does on the source pair.",
        also=("composite vector", "weight", "weights of a composite"),
        see=("basis", "map", "gate"),
    ),
    Term(
        "basis",
        "The vectors that a composite is made of, one for each of many relations.",
        also=("basis relation",),
        see=("composite",),
    ),
    Term(
        "map",
        "What makes a composite's weights of the source pair's scores: none (the scores as they are), diagonal, full,"
        " lowrank or transfer, for analogies between domains. All but none are trained on analogies.",
        also=("none", "diagonal", "full", "lowrank", "transfer"),
        see=("composite", "gate"),
    ),
    Term(
        "gate",
        "What decides whether a composite is injected, or how strongly, without knowing the answer: threshold and "
        "logistic are 0 or 1, learned lies between.",
        also=("threshold", "logistic", "learned", "strength"),
        see=("composite", "map"),
    ),
    # models and files
    Term(
        "fingerprint",
        "What tells one model from another: a hash of its weights, its shape, its precision. Vectors and heads carry "
        "that of their model and are refused on another.",
        also=("hash",),
    ),
)
GLOSSARY: dict[str, Term] = {term.name: term for term in _LISTED}
"""All terms by name, in the order in which they are listed."""

OF_COMMANDS: dict[str, tuple[str, ...]] = {
    "run": ("AIE", "permuted", "random", "layer", "scale", "top-1", "exact", "controls"),
    "rerun": ("fingerprint", "seed"),
    "heads": ("AIE", "permuted", "random", "screen"),
    "universal": ("AIE", "universal heads", "permuted", "random", "cell"),
    "compare": ("fine-tuned vector", "top-1", "exact", "cell"),
    "study": ("cell", "interval"),
    "inject": ("inject", "scale", "layer", "template"),
    "compose": ("basis", "composite", "map", "gate"),
    "analogy": ("analogy", "composite", "basis", "gate"),
    "analogies": ("analogy", "composite", "far", "top-1", "interval"),
    "sensitivity": ("basis", "composite", "map"),
    "check": ("split", "top-1", "exact"),
}
"""The terms that a command's help page ends with."""


def term(word: str) -> Term:
    """The term of this name, or that has this other name; capitals, blanks and signs between words do not matter.

    Raises:
        ValueError: there is none; the message offers the nearest.
    """
    known = {_plain(name): one for one in reversed(_LISTED) for name in one.also}
    known |= {_plain(one.name): one for one in _LISTED}
    asked = _plain(word)
    if asked in known:
        return known[asked]
    near = dict.fromkeys(known[name].name for name in difflib.get_close_matches(asked, known, n=3, cutoff=0.5))
    hint = f"did you mean {', '.join(near)}?" if near else "`fvlens explain` lists the terms."
    raise ValueError(f"no term {word!r}; {hint}")


def help_note(command: str) -> str | None:
    """What a command's help page says of its words, a paragraph each; None where it has none of its own."""
    if command not in OF_COMMANDS:
        return None
    told = [f"{name}: {GLOSSARY[name].first}" for name in OF_COMMANDS[command]]
    return "\n\n".join([*told, "`fvlens explain TERM` says more."])


def _plain(word: str) -> str:
    return " ".join(word.casefold().replace("-", " ").replace("_", " ").split())
