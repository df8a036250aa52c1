"""Plans what leaves each device of a pipeline when: plain Python, without torch. `types` says what a plan is.

The way of a request, one module a step: `request` checks it; `orders` makes the schedule's order; `simulation` times
it; `choosing` picks the blocks that leave, and `layout` the times of their copies, by the clock; `transfers` says
before which action each of them is asked for; `simulation` runs the whole with its copies; `arena` gives blocks their
slots on the host; `notes` says what came of it. `planner` is `plan`, which goes through all of them, and `checking`
goes through a plan that is made. `cli` is `python -m pykern plan`: `cost` gives it a layer's times and bytes; it shows
a plan by `table` and `drawing`.
"""

from .checking import check_plan
from .planner import plan, replan
from .types import Action, Copy, Order, Plan, Times, Transfer

__all__ = ["Action", "Copy", "Order", "Plan", "Times", "Transfer", "check_plan", "plan", "replan"]
