from .activation import ActivationOffload
from .norms import layer_norm, rms_norm
from .pointwise import dropout, gated_activation, gelu, swiglu
from .staging import StagingLayout

__all__ = [
    "ActivationOffload",
    "StagingLayout",
    "dropout",
    "gated_activation",
    "gelu",
    "layer_norm",
    "rms_norm",
    "swiglu",
]
