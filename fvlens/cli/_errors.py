"""Messages of the library as whoever typed a command can use them: arguments of Python become options of the command.

The library says ``layer=9: expected 0..3`` and ``leave revision out``; at the command line that is ``--layer 9`` and
``leave --revision out``. What a message says for Python alone stands in brackets that begin with "in Python", and is
left out here.
"""

import re
from collections.abc import Collection

_VALUE = r"""(?:'[^']*'|"[^"]*"|\w+\([^()]*\)|\[[^\]]*\]|[^\s,;:()'"]*[^\s,;:().'"])?"""
_FOR_PYTHON = re.compile(r"[,;]? \(in Python[^()]*(?:\([^()]*\)[^()]*)*\)")
_CALLS = {"fvlens.list_relations()": "`fvlens relations`"}


def option_name(field: str) -> str:
    """The option of a field."""
    return f"--{field.replace('_', '-')}"


def in_options(text: str, names: Collection[str]) -> str:
    """A message of the library, for somebody who typed a command with options of these names.

    Example:
        >>> in_options("layer=9: expected 0..3 (in Python, model.cfg).", {"layer"})
        '--layer 9: expected 0..3.'
        >>> in_options("Say so with allow_leak=True, or use path=None.", {"allow_leak"})
        'Say so with --allow-leak, or use path=None.'
    """
    text = _FOR_PYTHON.sub("", text)
    for call, command in _CALLS.items():
        text = text.replace(call, command)

    def option(found: re.Match[str]) -> str:
        name, value = found[1], found[2]
        if name not in names:
            return found[0]
        bare = value[1:-1] if value[:1] in ("'", '"') and not re.search(r"\s", value) and len(value) > 2 else value
        return option_name(name) if value in ("", "True") else f"{option_name(name)} {bare}"

    text = re.sub(rf"(?<![\w./\\-])([a-z_]\w*)=({_VALUE})", option, text)
    text = re.sub(
        r"\bleave (\w+) out\b",
        lambda found: f"leave {option_name(found[1])} out" if found[1] in names else found[0],
        text,
    )
    return re.sub(r"(--[\w-]+) \(\1\)", r"\1", text)
