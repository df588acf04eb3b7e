"""What a run's numbers depend on beside its settings and its model."""

import hashlib
import importlib.metadata
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from fvlens.models import model_device
from fvlens.relations import list_relations, load_relation

PACKAGES = ("fvlens", "torch", "transformer-lens", "transformers", "tokenizers", "numpy")


@dataclass(frozen=True, slots=True)
class Provenance:
    """What a run's numbers depend on beside its settings and its model.

    Attributes:
        versions: of the packages in :data:`PACKAGES` and of Python.
        code_hash: of fvlens' own Python files, since a version may stay while the code changes.
        platform: class and device of the model, operating system, processor, CUDA version, and threads of torch.
        relations: hash of the pairs of every relation that took part, by name.
        library_hash: of the whole library, from which random labels and other relations are drawn.
    """

    versions: dict[str, str]
    code_hash: str
    platform: dict[str, Any]
    relations: dict[str, str]
    library_hash: str

    @classmethod
    def of(cls, model: Any, relations: Mapping[str, str]) -> "Provenance":
        """As things are now."""
        # a version may stay while the code changes, so the package's own files are hashed
        code = hashlib.sha256()
        package = Path(str(resources.files("fvlens")))
        for file in sorted(package.rglob("*.py"), key=lambda file: file.relative_to(package).as_posix()):
            code.update(f"{file.relative_to(package).as_posix()}\n".encode() + file.read_bytes())
        # random labels and other relations are drawn from the whole library
        library = [
            f"{name}\t{load_relation(name).family}\t{load_relation(name).data_hash}" for name in list_relations()
        ]
        device = model_device(model)
        return cls(
            versions={name: importlib.metadata.version(name) for name in PACKAGES}
            | {"python": platform.python_version()},
            code_hash=code.hexdigest()[:16],
            platform={
                "model_class": type(model).__name__,
                "system": platform.platform(),
                "processor": _processor(),
                "device": f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device),
                "cuda": torch.version.cuda,
                "threads": torch.get_num_threads(),
            },
            relations=dict(relations),
            library_hash=hashlib.sha256("\n".join(library).encode()).hexdigest()[:16],
        )


def _processor() -> str:
    """Name of the CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
