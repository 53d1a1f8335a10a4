"""What benchmarks/test_kernels.py times computes the same as its peers: the references, at a tiny size."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import kernel_pairs
import wan_shapes

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", kernel_pairs.PAIRS)
@torch.inference_mode()
def test_a_kernel_and_its_peers_agree(name):
    pair = kernel_pairs.PAIRS[name](kernel_pairs.TINY, CPU)
    got = pair.result(pair.ours()).float()
    assert torch.isfinite(got).all()
    assert (pair.operations > 0) or (pair.bytes > 0)
    for peer in pair.peers.values():
        want = peer().float()
        assert want.numel() == got.numel()
        if pair.cosine > 0:
            assert torch.cosine_similarity(got.flatten(), want.flatten(), dim=0) >= pair.cosine


@pytest.mark.parametrize("size", wan_shapes.WAN.values(), ids=wan_shapes.WAN)
def test_sizes_are_those_of_their_videos(size):
    frames, rows, columns = size.grid
    assert frames * rows * columns == size.tokens
    assert size.heads * wan_shapes.HEAD_DIM == size.channels
    patch = 16 if size.channels == 5120 else 32  # pixels of a patch's side
    assert (rows * patch, columns * patch) == size.frame
