"""States of an explorer as JSON: what was chosen, so that it can be taken up again."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fvlens.files import read_json, write_json
from fvlens.models import Fingerprint, check_model
from fvlens.prompts import Template, known_template
from fvlens.relations import Pair, Relation
from fvlens.types import as_flag, as_heads, as_list, as_number, as_text, as_whole
from fvlens.vectors import FunctionVector, vector_from, vector_header

if TYPE_CHECKING:
    from fvlens.explorer._session import Session

FORMAT = "fvlens-explorer-1"

_OF_RELATIONS = ("name", "category", "source", "family", "domain", "direction")


def write_state(session: "Session", path: Path) -> Path:
    """Write a session's choices; numbers that can be computed again are left out.

    Raises:
        ValueError: no pairs were chosen yet.
    """
    relation = session.relation
    if relation is None:
        raise ValueError("there is nothing to save yet: choose a relation, or type word pairs.")
    beside, written = session.beside, session.template
    content = {
        "format": FORMAT,
        "fingerprint": dataclasses.asdict(session.fingerprint),
        "relation": {name: getattr(relation, name) for name in _OF_RELATIONS},
        "pairs": [list(pair) for pair in relation.pairs],
        "settings": {**dataclasses.asdict(session.settings), "template": written.to_json()},
        "heads": [list(head) for head in session.heads],
        "layer": session.layer,
        "scale": session.scale,
        "text": session.text,
        "asked": session.asked,
        "head": None if session.head is None else list(session.head),
        "kind": session.kind,
        "prompt": session.prompt,
        "beside": None if beside is None else {**vector_header(beside), "vector": beside.vector.tolist()},
    }
    return write_json(path, content, indent=2)


def read_state(session: "Session", path: Path) -> None:
    """Bring a session to what a file says; as it was before if the file is refused.

    Raises:
        ValueError: no such file, a damaged one, or one of another model.
    """
    content = read_json(path, "state of an explorer")
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{path.name}: expected a state that an explorer saved ({FORMAT}), and this is none.")
    before = dict(vars(session))
    try:
        check_model(Fingerprint.from_fields(content["fingerprint"]), session.model, "this state", again="the explorer")
        _take(session, content)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        vars(session).update(before)
        raise ValueError(f"{path.name}: damaged state ({type(error).__name__}: {error}).") from error
    except ValueError as error:
        vars(session).update(before)
        raise ValueError(f"{path.name}: {error}") from error
    except BaseException:
        vars(session).update(before)
        raise


def _take(session: "Session", content: dict[str, Any]) -> None:
    from fvlens.explorer._session import Settings

    cfg = session.model.cfg
    given = dict(content["settings"])
    template = known_template(Template.from_json(given.pop("template")))
    session.settings = Settings(
        n_heads=as_whole(given["n_heads"], "n_heads"),
        n_shots=as_whole(given["n_shots"], "n_shots"),
        n_prompts=as_whole(given["n_prompts"], "n_prompts"),
        n_corrupted=as_whole(given["n_corrupted"], "n_corrupted"),
        labels=as_text(given["labels"], "labels"),  # pyright: ignore[reportArgumentType]
        template=template or "qa",
        seed=as_whole(given["seed"], "seed"),
    )
    pairs = tuple(Pair(*as_list(pair, "pair")) for pair in as_list(content["pairs"], "pairs"))
    head, beside = content["head"], content["beside"]
    said = {name: as_text(content["relation"][name], name) for name in _OF_RELATIONS}
    session.choose(Relation(pairs=pairs, **said))
    session.heads = tuple(as_heads(as_list(content["heads"], "heads"), cfg.n_layers, cfg.n_heads))
    session.move(layer=as_whole(content["layer"], "layer", 0), scale=as_number(content["scale"], "scale"))
    session.type(as_text(content["text"], "text"), asked=as_flag(content["asked"], "asked"))
    session.look(head=head, kind=content["kind"], prompt=as_whole(content["prompt"], "prompt", 0))
    session.beside = None if beside is None else _vector(beside)


def _vector(content: dict[str, Any]) -> FunctionVector:
    numbers = [as_number(value, "vector") for value in as_list(content["vector"], "vector")]
    return vector_from(torch.tensor(numbers), content)
