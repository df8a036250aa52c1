from importlib import import_module
from typing import Any

from .activation import ActivationOffload
from .bandwidth import measure_bandwidth
from .norms import layer_norm, rms_norm
from .pipeline import PipelineOffload
from .planning import Plan, plan, replan
from .pointwise import dropout, gated_activation, gelu, swiglu
from .recompute import recompute_saved
from .staging import StagingLayout

# They need torch.distributed, which not every build of torch has, and which takes its time to import.
_SCHEDULES = ("ScheduleGIS", "SchedulePipeOffload", "SchedulePlanned", "stages_of_rank")

__all__ = [
    "ActivationOffload",
    "PipelineOffload",
    "Plan",
    "StagingLayout",
    "dropout",
    "gated_activation",
    "gelu",
    "layer_norm",
    "measure_bandwidth",
    "plan",
    "recompute_saved",
    "replan",
    "rms_norm",
    "swiglu",
]


def __getattr__(name: str) -> Any:
    if name in _SCHEDULES:
        return getattr(import_module(".schedules", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
