"""Scores of generated text."""

import string
from collections import Counter


def exact_match(predicted: str, expected: str) -> bool:
    """Whether two answers are the same text after SQuAD's normalisation.

    Lower case, ASCII punctuation and the articles a, an, the removed, runs of white space made one space. We differ in
    one case: where that would leave nothing (the answer ``a`` of a spelling relation), only case and space change.

    Args:
        predicted: the generated answer.
        expected: the true answer.

    Returns:
        True if the normalised texts are equal.

    Example:
        >>> from fvlens.metrics import exact_match
        >>> exact_match(" The Hague.", "the hague"), exact_match("a", "the")
        (True, False)

    References:
        arXiv:1606.05250, section 6.1 (evaluation of SQuAD).
    """
    return _normalised(predicted) == _normalised(expected)


def token_f1(predicted: str, expected: str) -> float:
    """F1 of the words that two answers share.

    ``F1 = 2 p r / (p + r)`` with precision ``p = shared / words predicted`` and recall ``r = shared / words expected``.
    Words are counted with repetition, after the normalisation of :func:`exact_match`. Two empty answers score 1.

    Args:
        predicted: the generated answer.
        expected: the true answer.

    Returns:
        A score in 0..1.

    Example:
        >>> from fvlens.metrics import token_f1
        >>> token_f1("New York City", "York")
        0.5

    References:
        arXiv:1606.05250, section 6.1 (evaluation of SQuAD).
    """
    ours, theirs = _normalised(predicted).split(), _normalised(expected).split()
    if not ours or not theirs:
        return float(ours == theirs)
    shared = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * shared / (len(ours) + len(theirs))


_ARTICLES = frozenset(("a", "an", "the"))

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def _normalised(text: str) -> str:
    words = text.lower().split()
    kept = [word for word in " ".join(words).translate(_NO_PUNCTUATION).split() if word not in _ARTICLES]
    return " ".join(kept or words)
