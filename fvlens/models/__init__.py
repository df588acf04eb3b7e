"""Load a model, and say exactly which model it is.

Models are loaded WITHOUT weight processing (no layer-norm folding, no centring), so that a vector of the residual
stream means the same here as in any other tool. Two classes of TransformerLens can hold them: ``HookedTransformer``
("hooked", up to TransformerLens 3), which has its own copy of the computation, and ``TransformerBridge`` ("bridge"),
which hooks into the Hugging Face model. Both read the checkpoint the same way and give the same numbers.
"""

from fvlens.models._checkpoints import EMBEDDED_MODELS, embedded_folder, is_known, official_names
from fvlens.models._fingerprint import INFORMATIVE, Fingerprint, LoadReport, fingerprint, load_report
from fvlens.models._hooked import quiet_deprecation
from fvlens.models._load import Backend, default_device, load_model, model_device
from fvlens.models._looks import is_kept, of_weights, refresh
from fvlens.models._made_on import check_model, refuse_retrained, told_apart
from fvlens.models._memory import free_memory
from fvlens.models._packaged import PACKAGED_MODELS, packaged_file
from fvlens.models._tokenizer import BOS_POLICIES, DEFAULT_BOS, Bos, bos_differs, bos_token_id, check_bos, in_front

__all__ = [
    "BOS_POLICIES",
    "DEFAULT_BOS",
    "EMBEDDED_MODELS",
    "INFORMATIVE",
    "PACKAGED_MODELS",
    "Backend",
    "Bos",
    "Fingerprint",
    "LoadReport",
    "bos_differs",
    "bos_token_id",
    "check_bos",
    "check_model",
    "default_device",
    "embedded_folder",
    "fingerprint",
    "free_memory",
    "in_front",
    "is_kept",
    "is_known",
    "load_model",
    "load_report",
    "model_device",
    "of_weights",
    "official_names",
    "packaged_file",
    "quiet_deprecation",
    "refresh",
    "refuse_retrained",
    "told_apart",
]
