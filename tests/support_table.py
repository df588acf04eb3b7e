"""The support table of ``fvlens/models/README.md``: what the features of ``matrix`` find, as Markdown.

``python tests/support_table.py`` prints it; with ``--write`` it replaces that page's section. The page's test runs the
same features and fails where the section says something else. A feature whose numbers differ from the oracle's raises
here too, so no table comes of it.
"""

import argparse
import functools
from pathlib import Path

import matrix
from checkpoints import ARCHITECTURES, VARIANTS
from matrix import BACKENDS, FEATURES

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "fvlens" / "models" / "README.md"
NAME = PAGE.relative_to(ROOT).as_posix()
BEGIN, END = "<!-- support table -->", "<!-- end of support table -->"
TITLES = {"hooked": "**HookedTransformer** (TransformerLens 3.9)", "bridge": "**TransformerBridge** (3.9 and 4)"}
GROUPS = {"llama": 2, "qwen2": 2, "qwen3": 2, "mistral": 2, "gemma": 1, "gemma2": 2}
"""Architectures whose four query heads share fewer keys and values, as the checkpoints have them."""

UNSUPPORTED = {
    ("hooked", "llama, rotary scaling dynamic", "loads"): "it has no rotary scaling 'dynamic'",
    ("hooked", "llama, biases in the MLP", "loads"): "its gated MLP has no biases before the product (mlp_bias)",
    ("hooked", "phi, layer norm of queries and keys", "loads"): "it has no layer norm over queries and keys",
    ("bridge", "phi, layer norm of queries and keys", "loads"): "did not declare 'q_norm'",
    ("bridge", "neox, no biases in attention", "loads"): "AssertionError: it does not say why",
}
"""(backend, architecture, feature) -> the reason that the package's ValueError gives."""


def why_not(feature: str, name: str, backend: str) -> str | None:
    """Why a feature must raise, or None. What cannot be loaded has no other feature either."""
    return UNSUPPORTED.get((backend, name, "loads")) or UNSUPPORTED.get((backend, name, feature))


def expected(feature: str, name: str, backend: str) -> str:
    """The cell that a supported feature must have."""
    if feature == "fast path":
        return (*matrix.fast_paths(name, backend), "naive")[0]
    if feature == "batched variants":
        return ", ".join(matrix.fast_paths(name, backend)) or "none"
    if feature == "grouped heads":
        return f"yes (4 on {GROUPS[name]})" if name in GROUPS else "none in it"
    return "yes"


@functools.cache
def cell(feature: str, name: str, backend: str) -> str:
    """What was found: the feature's own word, or the reason of its error (short, if it is one that we know)."""
    try:
        return FEATURES[feature](name, backend)
    except ValueError as error:
        text = " ".join(str(error).split())
        reason = why_not(feature, name, backend)
        return f"no: {reason if reason is not None and reason in text else text}".replace("|", "\\|")


def difference(name: str, backend: str) -> str:
    """Difference of the logits, coarse enough to be the same on every machine."""
    if cell("loads", name, backend) != "yes":
        return "-"
    found = matrix.logit_difference(name, backend)
    return "below 1e-5" if found < 1e-5 else f"{found:.0e}"


def table(backend: str) -> str:
    """One row an architecture, one column a feature."""
    rows = [["architecture", *FEATURES, "logits off by"], ["---"] * (len(FEATURES) + 2)]
    for name in ARCHITECTURES:
        rows.append([name, *(cell(feature, name, backend) for feature in FEATURES), difference(name, backend)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def variants(backend: str) -> str:
    """One row a variant of an architecture: whether it loads, and how near its logits come."""
    rows = [["variant", "loads", "logits off by"], ["---"] * 3]
    rows += [[name, cell("loads", name, backend), difference(name, backend)] for name in VARIANTS]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


@functools.cache
def section() -> str:
    """The tables of all backends there are."""
    return "\n\n".join(f"{TITLES[backend]}:\n\n{table(backend)}\n\n{variants(backend)}" for backend in BACKENDS)


def section_of_page() -> str:
    """What the page says between the markers, of the backends there are (without TransformerLens 3, of the bridge).

    Raises:
        ValueError: the page has not exactly one pair of markers, or a table that belongs to no backend.
    """
    text = PAGE.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"{NAME}: expected one {BEGIN} and one {END}.")
    inside = text.split(BEGIN)[1].split(END)[0].strip()
    parts = {}
    for part in inside.split("\n\n**"):
        whole = part if part.startswith("**") else f"**{part}"
        backend = next((key for key, title in TITLES.items() if whole.startswith(f"{title}:")), None)
        if backend is None:
            raise ValueError(f"{NAME}: a table that belongs to no backend: {whole[:80]!r}.")
        parts[backend] = whole
    if list(parts) != list(TITLES):
        raise ValueError(f"{NAME}: expected tables for {', '.join(TITLES)}, got {', '.join(parts) or 'none'}.")
    return "\n\n".join(parts[backend] for backend in BACKENDS)


def write() -> None:
    """Replace the page's section.

    Raises:
        ValueError: HookedTransformer's table cannot be made here, or the page has no markers.
    """
    if tuple(BACKENDS) != tuple(TITLES):
        raise ValueError(f"expected TransformerLens 3.9, which has {', '.join(TITLES)}; here is {', '.join(BACKENDS)}.")
    text = PAGE.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"{NAME}: expected one {BEGIN} and one {END}; put them where the tables belong.")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}\n{section()}\n{END}{after}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"replace the section of {NAME}")
    if parser.parse_args().write:
        write()
    else:
        print(section())


if __name__ == "__main__":
    main()
