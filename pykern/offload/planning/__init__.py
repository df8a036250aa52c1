from .planner import plan, replan
from .replay import check_plan
from .types import Action, Copy, Order, Plan, Times, Transfer

__all__ = ["Action", "Copy", "Order", "Plan", "Times", "Transfer", "check_plan", "plan", "replan"]
