from .activation import ActivationOffload

__all__ = ["ActivationOffload"]
