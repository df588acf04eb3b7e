"""Templates from a tokenizer's chat format: demonstrations as turns, the query where the assistant's answer begins.

1. *Written once.* Two turns of made-up words, and a third question, are written by the tokenizer's own chat template,
   with the header of the answer that is asked for (``add_generation_prompt``).
2. *Cut up.* What stands before, between and behind the words is the template: before the first turn the format's
   default system text, if it has one; between a question and its answer; behind an answer, its end of turn.
3. *Checked.* Prompts of other words and of none to three demonstrations, put together from these pieces, must be what
   the tokenizer writes, to the letter. A format that numbers its turns, say, is refused.

So a prompt's tokens are those of ``tokenizer.apply_chat_template``, and the pieces travel with vectors and results.
"""

from collections.abc import Sequence
from typing import Any

from fvlens.prompts._templates import CHAT, TEMPLATE_NAMES, Template, get_template

_WORDS = ("Fvlensaska", "Fvlenssaya", "Fvlensaskb", "Fvlenssayb", "Fvlensaskc")
"""Words that stand nowhere else: two questions with their answers, and a question."""

_TRIED = (("walk", "walked"), ("two words", "naïve 42!"), ("O'Neil & son", "x"), ("Zürich", "well-known"))


def template_for(model: Any, template: str | Template) -> Template:
    """The template itself, or a built-in one by name; for ``"chat"`` that of the model's own chat format.

    Raises:
        ValueError: no such template; ``"chat"`` for a model whose tokenizer has no chat format, or one that cannot be
            written piece by piece.
    """
    found = get_template(template)
    return chat_template(model.tokenizer).with_bos(found.bos) if found.needs_tokenizer else found


def chat_template(tokenizer: Any) -> Template:
    """The template of a tokenizer's chat format.

    Nothing is put in front of a prompt (``bos="none"``): its BOS token is there where the format writes one. The
    default system text of the format is kept, in ``prefix``. What the format writes between the header of an answer
    and the answer itself belongs to the answer where it is spaces, as in ``[/INST] y``, and to the query otherwise.

    Raises:
        ValueError: as for :func:`template_for`.
    """
    others = f"expected one of {', '.join(name for name in TEMPLATE_NAMES if name != CHAT.name)}, or a Template"
    if getattr(tokenizer, "chat_template", None) is None:
        raise ValueError(f"template='chat': the model's tokenizer has no chat format; {others}.")
    a, b = _WORDS[0:2], _WORDS[2:4]
    prefix, between, behind, again, joint, header = _around(_written(tokenizer, [a, b], _WORDS[4]), _WORDS, others)
    _, _, end = _around(_written(tokenizer, [a]), a, others)
    if (between, behind) != (again, joint):
        raise ValueError(f"template='chat': this chat format writes one turn otherwise than the next; {others}.")

    # where one turn ends and the next begins
    begin = behind.removeprefix(end) if end and behind.startswith(end) else ""
    if prefix.endswith(begin):
        prefix = prefix[: len(prefix) - len(begin)]
    else:
        begin = ""
    after = behind[: len(behind) - len(begin)]

    # where the answer begins
    more = between.removeprefix(header) if between.startswith(header) else between
    space = more[len(more.rstrip(" ")) :]
    if between.startswith(header):
        header += more.rstrip(" ")
    made = Template(
        CHAT.name,
        begin + "{input}" + between[: len(between) - len(space)] + "{output}" + after,
        begin + "{input}" + header,
        prefix,
        before_input="",
        before_output=space,
        bos="none",
    )
    for n in range(len(_TRIED)):
        shown, (word, _) = _TRIED[:n], _TRIED[n]
        if "".join(text for text, _ in made.pieces(shown, word)) != _written(tokenizer, shown, word):
            raise ValueError(
                f"template='chat': this chat format does not write {n} demonstrations and a query one after another "
                f"alike; {others}."
            )
    return made


def _written(tokenizer: Any, shown: Sequence[tuple[str, str]], asked: str | None = None) -> str:
    """What the tokenizer writes for these turns, and for a question whose answer is to follow."""
    import jinja2

    turns = [
        {"role": role, "content": word}
        for pair in shown
        for role, word in zip(("user", "assistant"), pair, strict=True)
    ]
    if asked is not None:
        turns.append({"role": "user", "content": asked})
    try:
        return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=asked is not None)
    except (jinja2.TemplateError, ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"template='chat': the tokenizer's chat format cannot write turns of user and assistant "
            f"({type(error).__name__}: {error})."
        ) from error


def _around(text: str, words: Sequence[str], others: str) -> list[str]:
    """What stands before, between and behind these words, each of which must stand there once, in this order."""
    parts = []
    for word in words:
        if text.count(word) != 1:
            raise ValueError(f"template='chat': this chat format does not write every turn once, as it is; {others}.")
        part, text = text.split(word)
        parts.append(part)
    return [*parts, text]
