"""Random bits by counter, as the kernels draw them."""

from torch import Tensor


def philox(counter: tuple[Tensor, ...], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Philox4x32-10: four 32-bit words for counters of four and a key of two, all as int64.

    Salmon, Moraes, Dror, Shaw: Parallel random numbers: as easy as 1, 2, 3 (SC 2011).
    """
    mask = 0xFFFFFFFF

    def product(words: Tensor, factor: int) -> tuple[Tensor, Tensor]:
        upper, lower = (words >> 16) * factor, (words & 0xFFFF) * factor
        lower = lower + ((upper & 0xFFFF) << 16)
        return (upper >> 16) + (lower >> 32), lower & mask

    for _ in range(10):
        high0, low0 = product(counter[0], 0xD2511F53)
        high1, low1 = product(counter[2], 0xCD9E8D57)
        counter = (high1 ^ counter[1] ^ key[0], low1, high0 ^ counter[3] ^ key[1], low0)
        key = ((key[0] + 0x9E3779B9) & mask, (key[1] + 0xBB67AE85) & mask)
    return counter
