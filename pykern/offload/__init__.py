from .activation import ActivationOffload
from .staging import StagingLayout

__all__ = ["ActivationOffload", "StagingLayout"]
