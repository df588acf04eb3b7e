"""Word pairs that somebody typed, one a line."""

import re

from fvlens.relations import Pair

_BETWEEN = re.compile(r"\t|->|→|=>|;|,|:")
"""What may stand between two words; the first on the line does."""


def typed_pairs(text: str) -> tuple[Pair, ...]:
    """The pairs of a text, one a line, with a comma, an arrow, a colon, a semicolon or a tab between the words.

    Raises:
        ValueError: a line without two words, with its number; no line at all.

    Example:
        >>> typed_pairs("hot, cold\\nbig -> small")
        (Pair(input='hot', output='cold'), Pair(input='big', output='small'))
    """
    pairs = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        words = [word.strip() for word in _BETWEEN.split(line, maxsplit=1)]
        if len(words) != 2 or not all(words):
            raise ValueError(f"line {number}: expected two words with a comma between them, got {line.strip()[:60]!r}.")
        pairs.append(Pair(*words))
    if not pairs:
        raise ValueError("no pairs were typed; write one a line, such as: hot, cold")
    return tuple(pairs)
