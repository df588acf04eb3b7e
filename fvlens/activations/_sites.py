"""The places of a block whose activations can be kept, under TransformerLens' names."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Site:
    """One activation of every block.

    Attributes:
        hook: the hook's name behind ``blocks.{layer}.``.
        axes: names of the axes behind layer and prompt.
    """

    hook: str
    axes: tuple[str, ...]

    @property
    def pos_axis(self) -> int:
        """Which of :attr:`axes` runs over the kept tokens."""
        return next(i for i, axis in enumerate(self.axes) if axis in ("pos", "query_pos"))

    @property
    def head_axis(self) -> int | None:
        """Which of :attr:`axes` runs over heads, if any."""
        return next((i for i, axis in enumerate(self.axes) if axis in ("head", "kv_head")), None)


_HEADS, _KV_HEADS, _STREAM = ("pos", "head", "d_head"), ("pos", "kv_head", "d_head"), ("pos", "d_model")

SITES: dict[str, Site] = {
    "z": Site("attn.hook_z", _HEADS),
    "q": Site("attn.hook_q", _HEADS),
    "k": Site("attn.hook_k", _KV_HEADS),
    "v": Site("attn.hook_v", _KV_HEADS),
    "pattern": Site("attn.hook_pattern", ("head", "query_pos", "key_pos")),
    "attn_out": Site("hook_attn_out", _STREAM),
    "mlp_out": Site("hook_mlp_out", _STREAM),
    "resid_pre": Site("hook_resid_pre", _STREAM),
    "resid_mid": Site("hook_resid_mid", _STREAM),
    "resid_post": Site("hook_resid_post", _STREAM),
}
"""Name -> site. Queries and keys are those before any rotation; where heads share keys and values there are fewer
``kv_head``s; ``attn_out`` and ``mlp_out`` are what is added to the residual stream; ``resid_mid`` lies between them."""


def hook_of(site: str, layer: int) -> str:
    """Name of a site's hook in one layer.

    Example:
        >>> hook_of("pattern", 2)
        'blocks.2.attn.hook_pattern'
    """
    return f"blocks.{layer}.{SITES[site].hook}"


def as_sites(sites: str | Iterable[str]) -> tuple[str, ...]:
    """Checked names of sites.

    Raises:
        ValueError: no site, an unknown one, or one twice.
    """
    names = (sites,) if isinstance(sites, str) else tuple(sites)
    for name in names:
        if name not in SITES:
            raise ValueError(f"sites: no site named {name!r}; expected some of {', '.join(SITES)}.")
    if not names or len(set(names)) < len(names):
        raise ValueError(f"sites: expected at least one site and each once, got {list(names)}.")
    return names


def as_layers(layers: Iterable[int] | int | None, there: Iterable[int]) -> tuple[int, ...]:
    """Checked layers in increasing order; all that are ``there`` by default.

    Raises:
        ValueError: no layer, one twice, or one that is not there.
    """
    known = tuple(there)
    chosen = known if layers is None else (layers,) if isinstance(layers, int) else tuple(layers)
    if not chosen or len(set(chosen)) < len(chosen) or not set(chosen) <= set(known):
        raise ValueError(f"layers: expected different layers out of {list(known)}, got {list(chosen)}.")
    return tuple(sorted(int(layer) for layer in chosen))


def check_sites(model: Any, sites: Iterable[str], layers: Iterable[int]) -> None:
    """Refuse sites that a model does not have.

    Raises:
        ValueError: a block has no such activation, with the reason.
    """
    hooks = model.hook_dict
    for site in sites:
        for layer in layers:
            if hook_of(site, layer) not in hooks:
                raise ValueError(f"site {site!r}: this model has no {hook_of(site, layer)} ({_reason(model, site)}).")


def _reason(model: Any, site: str) -> str:
    if site in ("resid_mid", "mlp_out") and getattr(model.cfg, "attn_only", False):
        return "its blocks have no MLP"
    if site == "resid_mid" and getattr(model.cfg, "parallel_attn_mlp", False):
        return "its attention and its MLP read the same residual stream, so that nothing lies between them"
    return f"{type(model).__name__} gives its blocks no such hook"


def axis_sizes(cfg: Any, *, n_places: int, n_pos: int) -> dict[str, int]:
    """Length of each axis, for kept tokens and for all tokens of a prompt."""
    ungrouped = getattr(cfg, "ungroup_grouped_query_attention", False)
    return {
        "pos": n_places,
        "query_pos": n_places,
        "key_pos": n_pos,
        "head": cfg.n_heads,
        "kv_head": cfg.n_heads if ungrouped else getattr(cfg, "n_key_value_heads", None) or cfg.n_heads,
        "d_head": cfg.d_head,
        "d_model": cfg.d_model,
    }
