"""Options of the command line, made from dataclasses of settings, and those that many commands share.

:func:`spread` turns a command's parameter that is such a dataclass into one option a field. The help is the field's
line in the class's docstring, the default the field's, and the class's own checks refuse bad values. Errors that name
arguments name options (``_errors.py``).
"""

import dataclasses
import functools
import inspect
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import typer
from typer.models import OptionInfo

from fvlens.cli._errors import in_options, option_name
from fvlens.files import check_destination
from fvlens.models import EMBEDDED_MODELS, PACKAGED_MODELS, Bos, official_names
from fvlens.prompts import TEMPLATE_NAMES, Template, get_template, read_template
from fvlens.relations import list_relations, plain_name

RelationArgument = Annotated[
    str,
    typer.Argument(
        help="Name of a library relation (see `fvlens relations`), or a file of your own word pairs.",
        autocompletion=lambda: list_relations(),
    ),
]
QuietOption = Annotated[bool, typer.Option("--quiet", help="No progress bars.")]
BosOption = Annotated[
    Bos | None,
    typer.Option(
        "--bos", help="What stands in front of prompts, instead of what the template says.", show_default=False
    ),
]
SeedOption = Annotated[int, typer.Option("--seed", help="Seed of everything random.")]


COMPLETED: Mapping[str, Callable[[], list[str]]] = {
    "model": lambda: [*EMBEDDED_MODELS, *PACKAGED_MODELS, *official_names()],
    "template": lambda: list(TEMPLATE_NAMES),
}
"""What a shell offers for the values of a field."""


@dataclasses.dataclass(frozen=True, slots=True)
class Fields:
    """Beside a parameter's type, in ``Annotated``: the options that it stands for.

    A parameter of type ``dict`` gets the values that stand on the line, by field; any other gets the dataclass.

    Attributes:
        kind: the dataclass.
        names: its fields that are options; by default all.
        notes: what a command's help adds to that of a field.
    """

    kind: Any
    names: tuple[str, ...] = ()
    notes: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def chosen(self) -> list[dataclasses.Field[Any]]:
        """The fields that are options."""
        return [field for field in dataclasses.fields(self.kind) if not self.names or field.name in self.names]

    def options(self) -> list[inspect.Parameter]:
        """One parameter a field; None stands for its default, so that a command can tell what was given."""
        docs = field_docs(self.kind)
        made = []
        for field in self.chosen():
            text = docs.get(field.name, "")
            text = text[:1].upper() + text[1:]
            type_: Any = field.type
            if Template in get_args(field.type):
                type_ = str
                text += f" Built in are {', '.join(TEMPLATE_NAMES)}; one of your own is a JSON file."
            if field.name in self.notes:
                text += f" {self.notes[field.name]}"
            if field.default is not None and field.default is not False and field.default != ():
                default = " ".join(map(str, field.default)) if isinstance(field.default, tuple) else field.default
                text += f" [default: {default}]"
            if get_origin(field.type) is tuple:  # given once for each of its values
                type_ = list[get_args(field.type)[0]]
            offered = COMPLETED.get(field.name)
            option = Annotated[
                type_ | None,
                typer.Option(option_name(field.name), help=text, show_default=False, autocompletion=offered),
            ]
            made.append(inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=option))
        return made


def spread(command: Callable[..., None]) -> Callable[..., None]:
    """A command with one option a field in place of each parameter that stands for a dataclass of settings."""
    signature = inspect.signature(command)
    parts = {name: part for name, one in signature.parameters.items() if (part := _part(one.annotation)) is not None}
    parameters = []
    for name, parameter in signature.parameters.items():
        options = [parameter] if name not in parts else parts[name].options()
        parameters += [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in options]

    options = set(filter(None, map(_option_of, parameters)))

    def filled(given: dict[str, Any]) -> dict[str, Any]:
        for name, part in parts.items():
            values = {field.name: given.pop(field.name) for field in part.chosen()}
            on_line = {
                key: tuple(value) if isinstance(value, list) else value
                for key, value in values.items()
                if value is not None and value != []
            }
            as_dict = get_args(signature.parameters[name].annotation)[:1] == (dict[str, Any],)
            given[name] = on_line if as_dict else made(part.kind, on_line)
        return given

    @functools.wraps(command)
    def flat(**given: Any) -> None:
        try:
            command(**filled(given))
        except ValueError as error:
            told = in_options(str(error), options)
            if told == str(error):
                raise
            raise ValueError(told) from error

    flat.__signature__ = signature.replace(parameters=parameters)  # pyright: ignore[reportAttributeAccessIssue]
    return flat


def made(kind: Callable[..., Any], given: Mapping[str, Any]) -> Any:
    """A dataclass of the values that stand on the line, its defaults for the others.

    Raises:
        ValueError: what the dataclass refuses, with the option's name where the message begins with the field's.
    """
    values = {key: template(value) if key == "template" else value for key, value in given.items()}
    try:
        return kind(**values)
    except ValueError as error:
        begun = re.match(r"(\w+)(?=[:=])", str(error))
        if begun is None or begun[1] not in values:
            raise
        raise ValueError(f"{option_name(begun[1])}{str(error)[begun.end() :]}") from error


def field_docs(kind: type) -> dict[str, str]:
    """What a dataclass's docstring, and those of the classes it extends, say of each field under ``Attributes:``; empty
    where docstrings are stripped."""
    docs: dict[str, str] = {}
    for one in reversed([part for part in kind.__mro__ if dataclasses.is_dataclass(part)]):
        docs |= _own_field_docs(one)
    return docs


def _own_field_docs(kind: type) -> dict[str, str]:
    docs: dict[str, str] = {}
    names: list[str] = []
    _, _, section = inspect.cleandoc(kind.__doc__ or "").partition("\nAttributes:\n")
    for line in section.splitlines():
        if line and not line.startswith(" "):
            break
        entry = re.fullmatch(r" {4}(\w[\w, ]*): (.*)", line)
        if entry is not None:
            names = entry[1].split(", ")
        text = line.strip() if entry is None else entry[2]
        docs |= {name: f"{docs.get(name, '')} {text}".strip() for name in names}
    return docs


def template(given: str, bos: Bos | None = None) -> str | Template:
    """The name of a built-in template, or the template in a file; with ``bos`` in front if that is given."""
    if bos is not None:
        return get_template(template(given)).with_bos(bos)
    if given in TEMPLATE_NAMES:
        return given
    if Path(given).suffix == ".json" or Path(given).is_file():
        return read_template(given)
    raise ValueError(
        f"--template: no template named {given!r}; expected one of {', '.join(TEMPLATE_NAMES)}, or a JSON file with "
        "name, demonstration, query and perhaps prefix, bos, before_input, before_output."
    )


def result_folder(given: Path | None, relation: str = "") -> Path:
    """The folder for results, as given or named after the relation, if it can be written to."""
    return check_destination(given or Path(f"fvlens-{plain_name(relation)}"))


def _option_of(parameter: inspect.Parameter) -> str | None:
    """An option as Python would write it, ``allow_leak`` for ``--allow-leak``; None for an argument."""
    declared = next((one for one in get_args(parameter.annotation)[1:] if hasattr(one, "param_decls")), None)
    if not isinstance(declared, OptionInfo):
        return None
    names = declared.param_decls or (option_name(parameter.name),)
    return names[0].removeprefix("--").partition("/")[0].replace("-", "_")


def _part(annotation: Any) -> Fields | None:
    """The options that a parameter stands for, None if it is one option itself."""
    if dataclasses.is_dataclass(annotation):
        return Fields(annotation)
    if get_origin(annotation) is not Annotated:
        return None
    return next((one for one in get_args(annotation)[1:] if isinstance(one, Fields)), None)
