"""A run as its ``results.json`` tells it, checked field by field before anything is run again."""

import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from fvlens.files import as_path, read_json
from fvlens.models import Fingerprint, fingerprint
from fvlens.prompts import TEMPLATES, Template, template_from
from fvlens.relations import Relation, from_recorded, library_relation, list_relations
from fvlens.report._differences import ABSENT, RunDifference, differences
from fvlens.report._fields import Fields
from fvlens.report._files import RESULTS_FILE
from fvlens.report._numbers import SCHEMA
from fvlens.report._provenance import Provenance
from fvlens.report._settings import Loading, RunOptions
from fvlens.showing import Shown, named
from fvlens.types import as_heads
from fvlens.universal import GivenHeads, file_hash

UNSEEN = "(outside the run's folder: not looked at without trust)"
"""Stands for the hash of a file that only ``results.json`` names."""


@dataclass(frozen=True, slots=True, repr=False)
class RecordedRun(Shown):
    """A run as ``results.json`` tells it, checked.

    Attributes:
        folder: where the file is.
        relation, options, loading, heads: what :func:`fvlens.report.run_relation` needs to run again.
        content: the whole file.
    """

    folder: Path
    relation: Relation
    options: RunOptions
    loading: Loading | None
    heads: GivenHeads | None
    content: dict[str, Any]

    def _line(self) -> str:
        return f"{named(self.relation.name)} in {self.folder}, {len(self.content)} entries"

    def changes(self, model: Any, *, trust: bool = False) -> list[RunDifference]:
        """What the numbers depend on and is not as it was: model, data, versions, platform.

        Args:
            model: the model that the run is repeated on.
            trust: also look at a file of heads that the run names outside its folder.
        """
        known = set(list_relations())
        own = self.relation
        names = [name for name in self.content["data"]["relations"] if name in known or name == own.name]
        hashes = {name: (own if name == own.name else library_relation(name)).data_hash for name in names}
        now = Provenance.of(model, hashes)
        new = {
            "fingerprint": asdict(fingerprint(model)),
            "data_hash": self.relation.data_hash,
            "data": {
                "relations": now.relations,
                "library": now.library_hash,
                "heads_file": self._heads_file_now(trust),
            },
            "versions": now.versions,
            "code_hash": now.code_hash,
            "platform": now.platform,
        }
        old = {name: self.content[name] for name in new}
        old["fingerprint"] = asdict(Fingerprint.from_fields(old["fingerprint"]))  # with what earlier versions left out
        if not old["fingerprint"]["forms"]:  # of an earlier version
            new["fingerprint"]["forms"] = ""
        return differences(old, new)

    def _heads_file_now(self, trust: bool) -> str | None:
        if self.heads is None or not self.heads.path:
            return None
        if not trust and self.folder.resolve() not in Path(self.heads.path).resolve().parents:
            return UNSEEN
        try:
            return file_hash(self.heads.path)
        except ValueError:
            return ABSENT


def read_run(folder: str | Path) -> RecordedRun:
    """Read and check the ``results.json`` of a run. Nothing in the file is executed.

    Args:
        folder: what ``fvlens run`` or :func:`fvlens.report.write_run` wrote.

    Returns:
        The run's settings, and the whole file.

    Raises:
        ValueError: no such file; not JSON; another schema than ours; a field that is missing or of the wrong type; a
            setting out of range; or a relation that the library does not have. The message names file and field.
    """
    folder = as_path(folder)
    fields = _read(folder / RESULTS_FILE)
    relation = _relation(fields)
    options = _options(fields)
    loading = _loading(fields)
    inside = fields.inside("fingerprint")
    content = {name: value for name, value in inside.content.items() if name != "bos"}  # earlier files have it
    mark = Fields(inside.path, {"quantization": "", **content}, inside.place).made(Fingerprint)
    _check_provenance(fields)
    return RecordedRun(folder, relation, options, loading, _heads(fields, options, mark), fields.content)


def _read(path: Path) -> Fields:
    """The file's content, of our schema."""
    content = read_json(path, "results of a finished `fvlens run`")
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(content).__name__}.")
    schema = content.get("schema")
    if schema != SCHEMA or isinstance(schema, bool):
        raise ValueError(
            f"{path}: schema: expected {SCHEMA}, got {schema!r}; the file is of another version of fvlens, whose runs "
            f"draw and choose otherwise, so make the run again with {_made_by(content)}."
        )
    return Fields(path, content)


def _made_by(content: Mapping[str, Any]) -> str:
    """The command that made a run's files, as far as they tell."""
    command = content.get("command")
    told = isinstance(command, list) and all(isinstance(word, str) for word in command)
    return f"`{shlex.join(command if told and command else ['fvlens', 'run'])}`"


def _relation(fields: Fields) -> Relation:
    """The library's relation of this name, or one's own pairs, which the file holds."""
    name = fields.get("relation", str)
    if fields.content.get("pairs") is None:  # files of before have no such field
        try:
            return library_relation(name)
        except ValueError as error:
            raise fields.error("relation", error) from error
    kept = fields.inside("pairs")
    file, pairs, family = kept.get("file", str | None), kept.get("list", list), kept.get("family", str)
    kept.get("file_hash", str | None)
    try:
        return from_recorded(name, pairs, file or "", family=family)
    except ValueError as error:
        raise kept.error("list", error) from error


def _options(fields: Fields) -> RunOptions:
    """The options; a template of one's own is made from its text."""
    recorded = fields.inside("options")
    recorded.get("heads_file", str | None)
    beside = ("heads_file", "template_text")
    values: dict[str, Any] = {"bos": "one"}  # as it was before the files said so
    values |= {name: value for name, value in recorded.content.items() if name not in beside}
    if "template_text" in recorded.content:
        try:
            values["template"] = template_from(recorded.content)
        except (KeyError, ValueError) as error:
            raise recorded.error("template_text", error) from error
    written = values.get("template")
    template = TEMPLATES.get(written) if isinstance(written, str) else written
    if isinstance(template, Template) and template.bos == values["bos"]:
        values["bos"] = None  # as the template says
    options = Fields(recorded.path, values, recorded.place).made(RunOptions)
    if fields.get("seed", int) != options.seed:
        raise fields.error("seed", f"{fields.content['seed']}, but options.seed is {options.seed}; expected one seed.")
    return options


def _loading(fields: Fields) -> Loading | None:
    """How the model was loaded, None if the run was given one."""
    if fields.get("loading", dict | None) is None:
        return None
    recorded = fields.inside("loading")
    if "trust" in recorded.content:
        raise recorded.error("trust", "a file cannot say that it is to be trusted; expected no such field.")
    loading = Fields(recorded.path, {"base": None, **recorded.content, "trust": False}, recorded.place).made(Loading)
    if loading.device is not None:
        try:
            torch.device(loading.device)
        except RuntimeError as error:
            raise ValueError(f"{fields.path}: loading.device: {loading.device!r} is not a device.") from error
    return loading


def _check_provenance(fields: Fields) -> None:
    """Check the fields that say what the numbers depend on, and are only compared."""
    fields.get("data_hash", str)
    data = fields.inside("data")
    hashes = data.inside("relations")
    for name in hashes.content:
        hashes.get(name, str)
    data.get("library", str)
    data.get("heads_file", str | None)
    for name in ("versions", "platform"):
        values = fields.inside(name)
        for key, value in values.content.items():
            if not isinstance(value, str | int | None):
                raise values.error(key, f"expected a text or a number, got {value!r}.")
    fields.get("code_hash", str)


def _heads(fields: Fields, options: RunOptions, mark: Fingerprint) -> GivenHeads | None:
    """The heads that a file gave or that were named, None if they were ranked."""
    source = fields.get("heads_source", Literal["ranking", "file", "named"])
    if source == "ranking":
        return None
    path, digest = fields.content["options"]["heads_file"], fields.content["data"]["heads_file"]
    if source == "named":
        path = digest = ""
    elif path is None or digest is None:
        raise ValueError(f"{fields.path}: heads_source is 'file', but options.heads_file or data.heads_file is null.")
    # an entry is a head with its effect and standard error, which are null here
    entries = fields.get("heads", list)
    pairs = [entry[:2] if isinstance(entry, list) and len(entry) == 4 else entry for entry in entries]
    try:
        heads = as_heads(pairs, mark.n_layers, mark.n_heads)
    except ValueError as error:
        raise ValueError(f"{fields.path}: {error}") from error
    if len(heads) != options.n_heads:
        raise fields.error("heads", f"expected options.n_heads, {options.n_heads} heads, got {len(heads)}.")
    return GivenHeads(tuple(heads), path, digest, fields.get("heads_note", str))
