"""Functions run by several processes at once that talk over gloo."""

import multiprocessing as processes
import tempfile
from pathlib import Path

import torch
from torch import distributed, multiprocessing

# What takes seconds to import is imported once, by the process that all others are forked from.
processes.set_forkserver_preload(["pykern.offload.schedules", "torch.distributed.tensor", "torch.distributed.fsdp"])


def _process(rank: int, count: int, folder: str, function, arguments: tuple) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=count)
    try:
        torch.save(function(*arguments), f"{folder}/result_{rank}")
    finally:
        distributed.destroy_process_group()


def run_processes(count: int, function, *arguments) -> list:
    """function(*arguments) in `count` processes of one gloo group; what each returns, by rank.

    `function` is of a module's top level and asks torch.distributed for its rank; arguments and results may hold
    tensors. The exception of a process that fails is
    raised here with its traceback.
    """
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.start_processes(
            _process, (count, folder, function, arguments), nprocs=count, start_method="forkserver"
        )
        return [torch.load(Path(folder) / f"result_{rank}", weights_only=False) for rank in range(count)]
