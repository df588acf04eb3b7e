"""The prompts that an evaluation asks: pairs and how they are to be asked, or prompts that are there already.

The options of everything in this room are here too: how pairs are asked (:class:`Prompting`), how prompts are run
(:class:`Running`), and both (:class:`Options`).
"""

import warnings
from collections.abc import Iterable, Sequence
from typing import Any, Literal, TypedDict, get_args

import torch

from fvlens.prompts import LABELS, AnswerTokens, Labels, Prompts, Template, build_prompts, template_or
from fvlens.relations import Pairs, Part, named_pairs
from fvlens.suffix import Route

Setting = Literal["zero_shot", "icl", "shuffled"]
SETTINGS: tuple[Setting, ...] = get_args(Setting)
Asked = Pairs | Prompts
"""What is asked: pairs, one query each, or prompts."""


class Prompting(TypedDict, total=False):
    """How pairs are asked; prompts that are there already take none of it.

    Attributes:
        setting: ``"zero_shot"`` (the default): the bare query. ``"icl"``: after clean demonstrations. ``"shuffled"``:
            after demonstrations with corrupted labels.
        demonstrations: pairs that ``icl`` and ``shuffled`` draw from, never the query's own input; not used by
            ``zero_shot``. In any shape, as the pairs that are asked (:func:`fvlens.relations.as_relation`).
        n_shots: demonstrations in each prompt, 10 by default; not used by ``zero_shot``.
        template: name of a built-in template, or a ``Template``; by default that of the vector if it has one, else
            ``"qa"``.
        labels: how ``shuffled`` corrupts labels: ``"permuted"`` (the default), ``"deranged"`` or ``"random"``.
        pool: answers that random labels are drawn from; by default those of other library relations.
        relation: name recorded in the result; by default that of the pairs or demonstrations if one is a relation.
    """

    setting: Setting
    demonstrations: Pairs | None
    n_shots: int
    template: str | Template | None
    labels: Labels | None
    pool: Sequence[str] | None
    relation: str | None


class Running(TypedDict, total=False):
    """How prompts are run, as :func:`fvlens.scoring.score` takes it.

    Attributes:
        batch_size: prompts run together at most; by default from the memory plan. It changes nothing but speed, memory
            and rounding (in half precision rounding moves ranks), and is halved, with a warning, where memory runs out.
        path: insist on ``"weights"``, ``"kv"`` or ``"naive"``; by default the fastest that is exact.
        max_memory: bytes for activations; by default 1 GiB on a CPU.
        compute: precision of products; None for the model's own.
    """

    batch_size: int | None
    path: Route | None
    max_memory: int | None
    compute: torch.dtype | None


class Options(Prompting, Running, total=False):
    """How pairs are asked and how their prompts are run: what evaluations, sweeps and controls take."""


def running(options: Options) -> Running:
    """How prompts are run, of all options."""
    return Running(**{name: options[name] for name in Running.__annotations__ if name in options})  # pyright: ignore


def asked_prompts(
    function: str,
    model: Any,
    asked: Asked,
    options: Options | Prompting,
    generator: torch.Generator,
    source: Any = None,
    known: Iterable[str] = tuple(Options.__annotations__),
    first_tokens: bool = True,
) -> Prompts:
    """One prompt a pair, as asked for; prompts as they are.

    Where answers share first tokens, which decide top-1, a warning says so.

    Args:
        function: the function that the user called, for messages.
        model: the model.
        asked: the pairs, or prompts.
        options: how pairs are asked; how they are run is for :func:`running`.
        generator: draws the demonstrations.
        source: a vector, or means, whose template is the default where it has one.
        known: the options that the function takes.
        first_tokens: warn of answers that share theirs.

    Raises:
        TypeError: unknown options.
        ValueError: unknown values; settings that do not go together; options beside prompts; whatever
            :func:`~fvlens.build_prompts` refuses.
    """
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise TypeError(f"{function}: unexpected options {', '.join(unknown)}; expected some of {', '.join(known)}.")
    prompting = Prompting(**{name: options[name] for name in Prompting.__annotations__ if name in options})  # pyright: ignore
    if isinstance(asked, Prompts):
        given = sorted(name for name, value in prompting.items() if value is not None)
        if given:
            raise ValueError(f"{function}: {', '.join(given)} beside prompts, which say it themselves; leave it out.")
        prompts = asked
    else:
        prompts = _prompts(function, model, asked, prompting, generator, source)
    caution = AnswerTokens.of(prompts).caution if first_tokens else ""
    if caution:
        warnings.warn(f"{function}: {caution}", stacklevel=4)
    return prompts


def read_once(function: str, asked: Pairs, options: Options | Prompting) -> tuple[Pairs, dict[str, Any]]:
    """Pairs, and all options, with demonstrations and the relation's name: iterators are gone through once."""
    found: dict[str, Any] = dict(options)
    own, name = named_pairs(asked, what=f"{function}: pairs", stacklevel=6)
    names = [(own, name)]
    if options.get("demonstrations") is not None:
        what = f"{function}: demonstrations"
        found["demonstrations"], of_shown = named_pairs(options.get("demonstrations"), what=what, stacklevel=6)
        names.append((found["demonstrations"], of_shown))
    # parts of a split keep their name themselves
    name = next((name for pairs, name in names if name and not isinstance(pairs, Part)), "")
    if found.get("relation") is None and name:
        found["relation"] = name
    return own, found


def _prompts(
    function: str, model: Any, given: Pairs, options: Prompting, generator: torch.Generator, source: Any
) -> Prompts:
    """One prompt a pair."""
    setting: Any = options.get("setting", "zero_shot")
    n_shots, labels = options.get("n_shots", 10), options.get("labels")
    if setting not in SETTINGS:
        raise ValueError(f"{function}: setting={setting!r}; expected one of {', '.join(SETTINGS)}.")
    corruptions = [name for name in LABELS if name != "true"]
    if labels is not None and setting != "shuffled":
        raise ValueError(
            f"{function}: labels={labels!r} with setting={setting!r}; labels belong to setting='shuffled' only."
        )
    if labels is not None and labels not in corruptions:
        raise ValueError(f"{function}: labels={labels!r}; expected one of {', '.join(corruptions)}.")
    asked, prompting = read_once(function, given, options)
    demonstrations = prompting.get("demonstrations")
    if setting == "zero_shot":
        demonstrations, n_shots = asked, 0
    elif demonstrations is None:
        raise ValueError(
            f"{function}: setting={setting!r} needs demonstrations, got None; give the pairs to draw them from, such "
            "as demonstrations=split.train."
        )
    elif n_shots < 1:
        raise ValueError(
            f"{function}: setting={setting!r} needs n_shots of at least 1, got {n_shots}; without demonstrations the "
            "setting is 'zero_shot'."
        )
    return build_prompts(
        model,
        demonstrations,
        queries=asked,
        n_shots=n_shots,
        labels="true" if setting != "shuffled" else labels or "permuted",
        template=template_or(prompting.get("template"), getattr(source, "template", None)),
        pool=prompting.get("pool"),
        relation=prompting.get("relation"),
        generator=generator,
    )


def setting_of(prompts: Prompts) -> Setting:
    """The setting that prompts are in."""
    if prompts.n_shots == 0:
        return "zero_shot"
    return "icl" if prompts.labels == "true" else "shuffled"


def copied(generator: torch.Generator) -> torch.Generator:
    """A generator that will draw what this one draws."""
    return torch.Generator(device=generator.device).set_state(generator.get_state())
