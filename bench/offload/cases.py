"""Time of one forward and backward with and without activation offload.

The threshold of mapped allocations is left alone here, since it would slow down the other providers, which run in the
same process; `peak_memory.py` gives every provider a process of its own, and measures memory.
"""

from functools import partial

from bench.harness import Case
from bench.offload import cases_gpu, cases_media, cases_recompute, cases_staging
from bench.offload.peak_memory import MODELS, build, checkpointed


def make(name: str) -> dict:
    import torch

    import pykern

    loss, parameters = build(name)
    memory = pykern.ActivationOffload("memory")
    file = pykern.ActivationOffload("file", map_allocations=False)

    def step(context_of, loss=loss):
        for parameter in parameters:
            parameter.grad = None
        with context_of():
            loss().backward()

    return {
        "pykern, file": partial(step, lambda: file),
        "pykern, memory": partial(step, lambda: memory),
        "plain PyTorch": partial(step, torch.enable_grad),
        "save_on_cpu": partial(step, torch.autograd.graph.save_on_cpu),
        "checkpoint": partial(step, torch.enable_grad, checkpointed(name)),
    }


def cases(device: str) -> list[Case]:
    ops = cases_staging.cases(device) + cases_recompute.cases(device)
    if device != "cpu":
        return ops + cases_gpu.cases(device)
    shapes = {"mlp": "24 layers of 256, 8192 rows", "transformer": "8 layers of 256, 4 x 512 tokens"}
    # Matrix products of forward and backward; attention's own, a few percent, are left out.
    flops = {"mlp": 6 * 24 * 256 * 256 * 8192, "transformer": 6 * 8 * 12 * 256 * 256 * 2048}
    steps = [Case("offload", f"step_{name}", shapes[name], partial(make, name), flops[name]) for name in MODELS]
    return steps + ops + cases_media.cases()
