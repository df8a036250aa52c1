"""The environment of the comparisons: the peers at the versions they are compared at, the same torch as everywhere."""

import importlib
import importlib.metadata
import sys
from pathlib import Path

import pytest
import torch

LINES = Path(__file__).with_name("requirements.txt").read_text().splitlines()
PINNED = dict(line.split("==") for line in LINES if "==" in line)
PEERS = {
    "apollo_torch": "apollo-torch",
    "bitsandbytes": "bitsandbytes",
    "galore_torch": "galore-torch",
    "fira": "fira",
    "liger_kernel": "liger-kernel",
    "prefix_grouper": "prefix-grouper",
    "q_galore_torch": "q-galore-torch",
    "torchao": "torchao",
    "transformers": "transformers",
    "trl": "trl",
    "verl": "verl",
}


@pytest.mark.parametrize("module", PEERS)
def test_peer_imports_at_its_version(module):
    importlib.import_module(module)
    assert importlib.metadata.version(PEERS[module]) == PINNED[PEERS[module]]


def test_torch_is_shared():
    assert not Path(torch.__file__).is_relative_to(sys.prefix), "the peers' environment has a torch of its own"
