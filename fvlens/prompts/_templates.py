"""Templates: how a prompt is written, as data that travels with vectors and results."""

import dataclasses
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

from fvlens.files import read_json
from fvlens.models import DEFAULT_BOS, Bos, bos_differs, check_bos
from fvlens.types import as_text


class TokenClass(IntEnum):
    """What a token of a prompt is for (names after the reference implementation of Todd et al. 2024)."""

    PADDING = -1
    BOS = 0
    PREFIX = 1
    DEMONSTRATION_INPUT = 2
    DEMONSTRATION_LABEL = 3
    SEPARATOR = 4
    """Template text around the words of a demonstration, and around the query's word."""
    QUERY = 5
    PREDICTIVE = 6
    """The last token of the prompt, whose next-token distribution is read."""


@dataclass(frozen=True, slots=True)
class Template:
    """How a prompt is written. ``str(template)`` is its name.

    Attributes:
        name: the template's name.
        demonstration: one demonstration; ``{input}`` and ``{output}`` stand for the words x and y with what belongs
            before them.
        query: the query; ends where the answer begins.
        prefix: text before the first demonstration.
        bos: what stands in front of the prompt: ``"tokenizer"``, what the tokenizer puts in front of a text that it
            encodes; ``"one"``, exactly one BOS token where the tokenizer has one; ``"none"``. Never two.
        before_input, before_output: the white space that belongs to a word and to an answer, one space by default: an
            answer's first token is that of `` y``. Empty where the model would write ``y`` itself, as in most chat
            formats.
    """

    name: str
    demonstration: str
    query: str
    prefix: str = ""
    bos: Bos = DEFAULT_BOS
    before_input: str = " "
    before_output: str = " "

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            text = getattr(self, field.name)
            if not isinstance(text, str):
                raise ValueError(f"template: expected {field.name} as text, got {text!r}.")
        if not self.name.strip():
            raise ValueError(f"template: expected a name, got {self.name!r}.")
        for field_name, text, needed in (
            ("demonstration", self.demonstration, ("{input}", "{output}")),
            ("query", self.query, ("{input}",)),
        ):
            for placeholder in needed:
                if text.count(placeholder) != 1:
                    raise ValueError(
                        f"template {self.name!r}: expected {placeholder} exactly once in {field_name}, got {text!r}."
                    )
        if "{output}" in self.query:
            raise ValueError(f"template {self.name!r}: the query must end before the answer, got {self.query!r}.")
        check_bos(self.bos, f"template {self.name!r}: ")
        for field_name in ("before_input", "before_output"):
            text = getattr(self, field_name)
            if text.strip():
                raise ValueError(
                    f"template {self.name!r}: expected {field_name} as white space or empty, got {text!r}; other text "
                    "belongs into demonstration and query."
                )

    def __str__(self) -> str:
        return self.name

    def asked(self, word: str) -> str:
        """A word as prompts hold it, with what belongs before it."""
        return self.before_input + word

    def answered(self, word: str) -> str:
        """An answer as it continues a prompt, with what belongs before it; top-1 is about its first token."""
        return self.before_output + word

    def pieces(self, demonstrations: Sequence[tuple[str, str]], word: str) -> list[tuple[str, TokenClass]]:
        """A prompt in labelled pieces: these words with their answers, then the query of a word."""
        pieces: list[tuple[str, TokenClass]] = [(self.prefix, TokenClass.PREFIX)]

        def add(text: str, words: dict[str, tuple[str, TokenClass]]) -> None:
            places = sorted((text.index(key), key) for key in words)
            start = 0
            for place, key in places:
                pieces.append((text[start:place], TokenClass.SEPARATOR))
                pieces.append(words[key])
                start = place + len(key)
            pieces.append((text[start:], TokenClass.SEPARATOR))

        for x, y in demonstrations:
            shown = {
                "{input}": (self.asked(x), TokenClass.DEMONSTRATION_INPUT),
                "{output}": (self.answered(y), TokenClass.DEMONSTRATION_LABEL),
            }
            add(self.demonstration, shown)
        add(self.query, {"{input}": (self.asked(word), TokenClass.QUERY)})
        return [(text, kind) for text, kind in pieces if text]

    def bare(self, word: str) -> str:
        """A prompt that asks for one word without demonstrations."""
        return "".join(text for text, _ in self.pieces((), word))

    @property
    def needs_tokenizer(self) -> bool:
        """Whether this stands for the chat format of whatever tokenizer prompts are made for: the template ``"chat"``
        before :func:`fvlens.prompts.template_for` has made it."""
        return (self.name, self.demonstration, self.query) == (CHAT.name, CHAT.demonstration, CHAT.query)

    def with_bos(self, bos: Bos) -> "Template":
        """The same, with something else in front of the prompt."""
        return dataclasses.replace(self, bos=bos)

    def to_json(self) -> dict[str, str]:
        """The whole template as plain JSON values; what stands before words only where it is not one space."""
        values = dataclasses.asdict(self)
        return {name: text for name, text in values.items() if not (name.startswith("before_") and text == " ")}

    @classmethod
    def from_json(cls, value: Any, bos: Bos = DEFAULT_BOS) -> "Template":
        """The template that :meth:`to_json` gave; ``bos`` is for one that does not say its own.

        Raises:
            ValueError: not an object of these texts, or one that is no template.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        if not isinstance(value, Mapping) or not {*names} >= {*value} >= {"name", "demonstration", "query"}:
            raise ValueError(
                f"expected a template as an object with {', '.join(names)} (all after query may be left out), got "
                f"{json.dumps(value, default=repr)[:80]}."
            )
        return cls(**{"bos": bos, **value})


TEMPLATES: dict[str, Template] = {
    template.name: template
    for template in (
        Template("qa", "Q:{input}\nA:{output}\n\n", "Q:{input}\nA:"),
        Template("arrow", "{input} ->{output}\n", "{input} ->"),
        Template("colon", "{input}:{output}\n", "{input}:"),
    )
}
"""The built-in templates: ``qa`` (Todd et al. 2024, the default), ``arrow`` and ``colon``."""

CHAT = Template("chat", "{input}{output}", "{input}", before_input="", before_output="", bos="none")
"""What the name ``"chat"`` stands for until there is a tokenizer: see :attr:`Template.needs_tokenizer`."""

TEMPLATE_NAMES = (*TEMPLATES, CHAT.name)
"""Names that stand for templates."""


def get_template(template: str | Template) -> Template:
    """A built-in template by name, or the template itself; ``"chat"`` stands for the chat format of a tokenizer.

    Raises:
        ValueError: no built-in template has that name.
    """
    if isinstance(template, Template):
        return template
    if template not in TEMPLATE_NAMES:
        raise ValueError(f"no template named {template!r}; expected one of {', '.join(TEMPLATE_NAMES)}, or a Template.")
    return TEMPLATES.get(template, CHAT)


def read_template(path: str | Path) -> Template:
    """A template from a JSON file with an object of its texts: ``name, demonstration, query``, perhaps the other ones.

    Raises:
        ValueError: the file cannot be read, is not JSON, or holds no template.
    """
    path = Path(path)
    content = read_json(path, "template")
    try:
        return Template.from_json(content)
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from error


def template_or(*given: str | Template | None) -> Template:
    """The first template that is given, by name or itself; ``qa`` if none is.

    None and an empty name, such as that of a vector which does not know its prompts, stand for no template.

    Raises:
        ValueError: no built-in template has that name.
    """
    return get_template(next((one for one in given if one), "qa"))


def known_template(template: str | Template | None) -> Template | None:
    """The template itself, by name too; None for None and an empty name.

    Raises:
        ValueError: no built-in template has that name.
    """
    return get_template(template) if template else None


def warn_of_bos(model: Any, made: str | Template | None, used: str | Template, what: str, *, stacklevel: int) -> None:
    """Warn if something was made on prompts with other tokens in front than those that it is used on.

    Args:
        model: the model, whose tokenizer decides whether two policies differ.
        made: the template that it was made with; None if that is unknown.
        used: the template that it is used with.
        what: what it is, for the message.
        stacklevel: as for ``warnings.warn``, from here.
    """
    before, now = known_template(made), get_template(used)
    if before is not None and before.bos != now.bos and bos_differs(model, before.bos, now.bos):
        warnings.warn(
            f"{what} was made on prompts with bos={before.bos!r} and is used on prompts with bos={now.bos!r}.",
            stacklevel=stacklevel + 1,
        )


def template_header(template: str | Template | None) -> dict[str, Any]:
    """How a file holds a template: its name, and beside it the whole of it."""
    known = known_template(template)
    if known is None:
        return {"template": "", "template_text": None}
    return {"template": known.name, "template_text": known.to_json()}


def template_from(header: Mapping[str, Any], given: str | Template | None = None) -> Template | None:
    """The template that a file holds, or the one ``given`` in its place.

    Files of fvlens 0.1 hold a name alone, which must be that of a built-in template. Those that do not say what stood
    in front of prompts are of a time when it was exactly one BOS token; where the tokenizer had none, their fingerprint
    says so.

    Raises:
        KeyError: no template in the header.
        ValueError: a name alone, of no built-in template; or a damaged template.
    """
    name, text = as_text(header["template"], "template"), header.get("template_text")
    if given:
        return get_template(given)
    mark = header.get("fingerprint")
    bos: Bos = "none" if isinstance(mark, Mapping) and mark.get("bos") == "none" else "one"
    if text is not None:
        found = Template.from_json(text, bos)
        if found.name != name:
            raise ValueError(f"the template is named {name!r}, but its text {found.name!r}.")
        return found
    if name and name not in TEMPLATES:
        raise ValueError(
            f"no template named {name!r}; expected one of {', '.join(TEMPLATES)}. fvlens 0.1 wrote the name alone of a "
            "template of one's own: give the template itself, template=Template(...), and save again."
        )
    return get_template(name).with_bos(bos) if name else None
