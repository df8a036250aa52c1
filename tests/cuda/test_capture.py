"""On a GPU only: no op waits for the host, each can be captured in a CUDA graph, and streams are respected."""

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

import pykern
from bench.harness import load_cases
from tests.support import emulated_ops

NOT_ON_A_GPU = ("ward float32", "sequences", "refresh", "offload/step_", "offload/media")

# Their bench cases have everything a call needs on the device before it begins.
CASES = [case for case in load_cases() if not any(part in case.label for part in NOT_ON_A_GPU)]


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def pykern_call(case):
    with torch.device("cuda"):
        name, call = next(iter(case.make().items()))
    assert name.startswith("pykern")
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    return call


def copies(results: object) -> list[Tensor]:
    return [leaf.detach().clone() for leaf in tree_leaves(results) if isinstance(leaf, Tensor)]


@needs_gpu
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"cuda-{case.label}")
def test_nothing_waits_for_the_host(case):
    call = pykern_call(case)
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode(before)


@needs_gpu
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"cuda-{case.label}")
def test_graph_replays(case):
    call = pykern_call(case)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    graph.replay()
    torch.cuda.synchronize()
    if case.family == "lowrank":
        return  # its calls change their inputs
    captured = copies(results)
    graph.replay()
    torch.cuda.synchronize()
    for first, second in zip(captured, copies(results), strict=True):
        assert torch.equal(first.reshape(-1).view(torch.uint8), second.reshape(-1).view(torch.uint8))


@needs_gpu
def test_cuda_stream_of_the_caller_is_used():
    """A launch on another stream would read what the slow copy has not written yet."""
    rewards, ids = torch.zeros(4096, device="cuda"), torch.arange(4096, device="cuda") % 64
    wanted = torch.rand(4096, device="cuda")
    expected = pykern.group_advantages(wanted, ids)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        rewards.copy_(wanted)
        got = pykern.group_advantages(rewards, ids)
    torch.cuda.synchronize()
    assert torch.equal(got, expected)


def test_every_op_has_a_case():
    """The cases above, by the op that they time; it fails where an op is added without one."""
    labels = " ".join(case.label for case in CASES)
    timed_by = {
        "group_advantages": "group_advantages",
        "group_entropy": "group_entropy",
        "group_statistics": "group_statistics",
        "policy_loss_forward": "policy_loss",
        "policy_loss_backward": "policy_loss",
        "policy_loss_token_weights": "policy_loss_token_weights",
        "disco_loss_forward": "disco_loss",
        "rollout_correction": "rollout_correction",
        "masked_quantile": "masked_quantile",
        "masked_select_share": "share_mask",
        "masked_moments": "masked_moments",
        "masked_whiten": "masked_whiten",
        "discounted_scan": "discounted_returns",
        "optimal_token_baseline": "optimal_token_baseline",
        "risk_advantages": "risk_advantages",
        "linear_token_logprobs": "linear_token_logprobs_forward",
        "linear_token_logprobs_backward": "linear_token_logprobs_forward_backward",
        "linear_chunk_logprobs": "linear_policy_loss",
        "linear_chunk_gradients": "linear_policy_loss",
        "token_logprobs": "token_logprobs_forward",
        "token_logprobs_backward": "token_logprobs_forward_backward",
        "token_logprobs_backward_in_place": "token_logprobs_forward_backward",
        "quantize_groups": "quantize_groups",
        "dequantize_groups": "dequantize_groups",
        "low_rank_apply_int8": "apply_int8",
        "low_rank_adamw_step": "lowrank/galore_step",
        "low_rank_project": "lowrank/project",
        "low_rank_rule": "lowrank/rule",
        "low_rank_ratios": "lowrank/ratios",
        "low_rank_limit": "lowrank/limit",
        "low_rank_apply": "lowrank/apply[",
        "adamw_step": "lowrank/adamw_step",
        "sparse_rows_add": "sltrain_linear",
        "sparse_rows_take": "sltrain_linear",
        "prefix_attention_tiles": "prefix_attention_tiles",
        "prefix_attention_forward": "prefix_attention forward bfloat16",
        "prefix_attention_backward": "prefix_attention backward bfloat16",
        "gather_rows": "gather_rows",
        "gather_rows_backward": "gather_rows backward",
        "offload_pack": "staging pack",
        "offload_unpack": "staging unpack",
        "norm": "rms_norm",
        "norm_backward": "layer_norm",
        "activation": "gelu",
        "activation_backward": "swiglu",
        "seeded_dropout": "dropout",
    }
    not_built = {name for name in timed_by if timed_by[name] not in labels}
    assert not not_built
    # The library's own list where there is one: a wheel is tested without the emulator.
    assert sorted(timed_by) == sorted(pykern._native.cuda_ops or emulated_ops())
