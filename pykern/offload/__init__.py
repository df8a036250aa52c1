from .activation import ActivationOffload
from .norms import layer_norm, rms_norm
from .pointwise import dropout, gated_activation, gelu, swiglu
from .recompute import recompute_saved
from .staging import StagingLayout

__all__ = [
    "ActivationOffload",
    "StagingLayout",
    "dropout",
    "gated_activation",
    "gelu",
    "layer_norm",
    "recompute_saved",
    "rms_norm",
    "swiglu",
]
