"""The trainer's choice of a device: the GPU where pykern can use it, never the CPU in silence."""

import pytest
import torch

from pykern import _native, device
from pykern.train import device as train_device
from pykern.train.config import Config, InputError
from pykern.train.device import GPU_DEFAULTS, describe, families, resolve


@pytest.fixture
def usable_gpu(monkeypatch):
    """As on a machine where the CUDA library loads and a GPU is there."""
    monkeypatch.setattr(device, "unusable_reason", lambda: None)
    monkeypatch.setattr(train_device, "unusable_reason", lambda: None)
    return monkeypatch


ALL_OPS = frozenset(op for ops in train_device._OPS.values() for op in ops)


def test_auto_is_the_cpu_without_a_gpu(monkeypatch):
    monkeypatch.setattr(device, "unusable_reason", lambda: "no GPU")
    monkeypatch.setattr(train_device, "unusable_reason", lambda: "no GPU")
    assert resolve(Config(), "auto") == "cpu"
    assert describe(Config()) == "attention, policy, lowrank, offload: on cpu (no GPU)"
    with pytest.raises(InputError, match="--device cuda: no GPU; use --device cpu"):
        resolve(Config(), "cuda")


def test_auto_is_the_gpu_where_all_kernels_are_there(usable_gpu):
    usable_gpu.setattr(_native, "cuda_ops", ALL_OPS)
    assert resolve(Config(**GPU_DEFAULTS), "auto") == "cuda"
    assert resolve(Config(), "cpu") == "cpu"


def test_float32_is_refused_on_a_gpu(usable_gpu):
    usable_gpu.setattr(_native, "cuda_ops", ALL_OPS)
    with pytest.raises(InputError, match="--dtype float32: attention on a GPU takes bfloat16; use --dtype mixed"):
        resolve(Config(offload="none"), "cuda")


def test_offload_is_refused_on_a_gpu(usable_gpu):
    usable_gpu.setattr(_native, "cuda_ops", ALL_OPS)
    with pytest.raises(
        InputError, match="--offload memory: is for activations in ordinary memory; use --offload pinned or none"
    ):
        resolve(Config(offload="memory"), "auto")
    assert resolve(Config(offload="pinned", dtype="mixed"), "auto") == "cuda"
    with pytest.raises(InputError, match="--offload pinned: needs a GPU; use --offload memory or file"):
        resolve(Config(offload="pinned"), "cpu")


@pytest.mark.parametrize("name", ["auto", "cuda"])
@pytest.mark.parametrize(
    "family, op",
    [("attention", "prefix_attention_backward"), ("policy", "linear_token_logprobs"), ("lowrank", "adamw_step")],
)
def test_missing_kernel_is_refused_by_name(usable_gpu, name, family, op):
    usable_gpu.setattr(_native, "cuda_ops", ALL_OPS - {op})
    with pytest.raises(
        InputError, match=f"--device {name}: the {family} family has no CUDA kernel for {op} yet; use --device cpu"
    ):
        resolve(Config(), name)


def test_unused_family_needs_no_kernel(usable_gpu):
    usable_gpu.setattr(_native, "cuda_ops", ALL_OPS - {"low_rank_adamw_step", "adamw_step"})
    assert families(Config(optimizer="adamw", offload="none")) == ["attention", "policy"]
    assert resolve(Config(optimizer="adamw", **GPU_DEFAULTS), "auto") == "cuda"


def test_needed_ops_exist():
    assert all(hasattr(torch.ops.pykern, op) for op in ALL_OPS)
