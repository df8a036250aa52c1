"""Peak memory of a stretch of work, as the operating system or the CUDA allocator saw it."""

import ctypes
import re
import resource
import sys
from pathlib import Path

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def _resident(name: str) -> int:
    return int(re.search(rf"^{name}:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE)[1]) * 1024


def _return_freed_memory() -> None:
    # glibc keeps freed pages; left there, they would count as the next update's need.
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError):
        pass


class PeakMemory:
    """with PeakMemory(device) as memory: ...; then memory.peak and memory.before, in bytes.

    CPU under Linux: the process's resident high-water mark (VmHWM), reset at the start through
    /proc/self/clear_refs, and its resident size then. Where that cannot be reset, `peak` is the largest
    resident size since the process began. CUDA: PyTorch's allocated bytes. `method` says which.
    """

    def __init__(self, device: torch.device, trim: bool = False):
        """trim: first return what the C allocator holds free, for two processes to be comparable."""
        self.device, self.trim = device, trim
        self.before = self.peak = 0
        self.method = "allocated CUDA memory"

    def __enter__(self) -> "PeakMemory":
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self.before = torch.cuda.memory_allocated(self.device)
            return self
        if self.trim:
            _return_freed_memory()
        try:
            _CLEAR.write_text("5")
            self.before = _resident("VmRSS")
            self.method = "resident high-water mark, reset for each update"
        except (OSError, TypeError):
            self.before = self._since_start()
            self.method = "largest resident size since the process began"
        return self

    def __exit__(self, *exception) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            self.peak = torch.cuda.max_memory_allocated(self.device)
        elif self.method.startswith("resident"):
            self.peak = _resident("VmHWM")
        else:
            self.peak = self._since_start()

    @staticmethod
    def _since_start() -> int:
        size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return size if sys.platform == "darwin" else size * 1024
