from .types import Action, Copy, Order, Plan, Times, Transfer

__all__ = ["Action", "Copy", "Order", "Plan", "Times", "Transfer"]
