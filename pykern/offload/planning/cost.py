"""What a transformer layer saves for its backward, and how long moving that takes beside computing the layer.

The figures of PipeOffload (arXiv 2503.01328): two bytes per element, attention that saves no scores, an MLP four times
as wide as the hidden states. A model that is at hand is better measured.
"""


def layer_bytes(
    batch: int,
    sequence: int,
    hidden: int,
    heads: int | None = None,
    kv_heads: int | None = None,
    *,
    recompute: bool = True,
) -> float:
    """Bytes that one layer saves for one microbatch of `batch` sequences.

    34 * batch * sequence * hidden; with norms, the activation function and dropout computed again in the backward,
    20 * batch * sequence * hidden. With `kv_heads` < `heads` (grouped queries) keys and values are that much smaller:
    16 + 4 * kv_heads / heads instead of 20.
    """
    shared = 1.0 if heads is None or kv_heads is None else kv_heads / heads
    return ((16 if recompute else 30) + 4 * shared) * batch * sequence * hidden


def layer_flops(batch: int, sequence: int, hidden: int) -> tuple[float, float, float]:
    """Of one layer's forward, backward of the input, and backward of the weights.

    24 * batch * sequence * hidden**2 each, and what attention itself takes, 4 * batch * sequence**2 * hidden forward
    and twice that backward; together 72 * batch * sequence * hidden**2 * (1 + sequence / (6 * hidden)).
    """
    products = 24.0 * batch * sequence * hidden**2
    attention = 4.0 * batch * sequence**2 * hidden
    return products + attention, products + 2 * attention, products


def copy_ratio(sequence: int, hidden: int, flops_per_second: float, bytes_per_second: float) -> float:
    """k: seconds to copy a layer's block out and back, over seconds to compute the layer's forward and backward.

    With 20 bytes * batch * sequence * hidden, and both directions in turn at `bytes_per_second` (equation 1):
    k = 10 / (3 * (6 * hidden + sequence)) * flops_per_second / bytes_per_second. All blocks can go out and back behind
    the computation where k <= 1, of v chunks about v / k otherwise.
    """
    moved = 2 * layer_bytes(1, sequence, hidden) / bytes_per_second
    return moved / (sum(layer_flops(1, sequence, hidden)) / flops_per_second)
