"""Names of the hooks that fvlens uses, as TransformerLens writes them."""


def resid_hook(layer: int) -> str:
    """Name of the residual stream after a block.

    Example:
        >>> resid_hook(2)
        'blocks.2.hook_resid_post'
    """
    return f"blocks.{layer}.hook_resid_post"


def resid_pre_hook(layer: int) -> str:
    """Name of the residual stream before a block.

    Example:
        >>> resid_pre_hook(2)
        'blocks.2.hook_resid_pre'
    """
    return f"blocks.{layer}.hook_resid_pre"


def z_hook(layer: int) -> str:
    """Name of the mixed values of all heads of a block, before the output projection.

    Example:
        >>> z_hook(2)
        'blocks.2.attn.hook_z'
    """
    return f"blocks.{layer}.attn.hook_z"
