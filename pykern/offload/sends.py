"""When a rank may wait for what it sent: from then on, that the other side receives it needs nothing more of the rank.

A send may only end once the other rank has asked for it, and that rank may be waiting for something that this one sends
later: waiting at once could be for ever. A message that came from there, perhaps by way of others, and was sent after
it had asked, tells that it has.
"""

from collections.abc import Sequence
from typing import NamedTuple


class Step(NamedTuple):
    """One thing that a rank does: "compute" something, "send" a message, or "receive" one, which asks for it.

    message: which one is sent or received. needs: messages that must have arrived before it is computed.
    """

    kind: str
    message: object = None
    needs: tuple = ()


def safe_waits(ranks: Sequence[Sequence[Step]]) -> list[dict[object, int]]:
    """By rank and message sent: the number of the rank's first computation before which waiting for it is safe.

    Computations are counted from 0. A message that is known to be received by no computation has their count.
    """
    asked = {step.message: (rank, place) for rank, steps in enumerate(ranks) for place, step in enumerate(steps)
             if step.kind == "receive"}  # fmt: skip
    # How far a rank knows each rank to have come, at the sending of each message.
    known_with: dict[object, list[int]] = {}
    known = [[-1] * len(ranks) for _ in ranks]
    places = [0] * len(ranks)
    computed = [0] * len(ranks)
    pending: list[dict[object, tuple[int, int]]] = [{} for _ in ranks]
    found: list[dict[object, int]] = [{} for _ in ranks]
    progress = True
    while progress:
        progress = False
        for rank, steps in enumerate(ranks):
            while places[rank] < len(steps):
                step = steps[places[rank]]
                if any(message not in known_with for message in step.needs):
                    break
                for message in step.needs:
                    known[rank] = [max(pair) for pair in zip(known[rank], known_with[message], strict=True)]
                if step.kind == "compute":
                    # What arrived for this computation is known only once it runs: the next one's transfers use it.
                    computed[rank] += 1
                    for message, (other, place) in list(pending[rank].items()):
                        if known[rank][other] >= place:
                            found[rank][message] = computed[rank]
                            del pending[rank][message]
                known[rank][rank] = places[rank]
                if step.kind == "send":
                    known_with[step.message] = list(known[rank])
                    pending[rank][step.message] = asked[step.message]
                places[rank] += 1
                progress = True
    for rank, messages in enumerate(pending):
        found[rank].update(dict.fromkeys(messages, computed[rank]))
    return found
