"""Each public kernel at Wan's sizes beside its peers in the same run, round by round.

On a GPU: seconds of one call, of many one behind the other; TFLOPS or GB/s, and the share of what the GPU reaches in a
plain copy or product. On a CPU the references run at a tiny size beside torch: that the files work, and no more.
"""

import statistics
from typing import Any

import pytest
import torch
from gpu_timing import calls_of, ceilings, ready_peers, run_calls, timed
from kernel_pairs import PAIRS, SIZES, Pair
from pytest_benchmark.fixture import BenchmarkFixture

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SIZES_HERE = [name for name in SIZES if (name == "tiny") != (DEVICE.type == "cuda")]
ROUNDS = 7


@pytest.mark.parametrize("size", SIZES_HERE, ids=lambda size: size.replace(" ", "-"))
@pytest.mark.parametrize("name", PAIRS)
@torch.inference_mode()
def test_kernel(benchmark: BenchmarkFixture, name: str, size: str) -> None:
    pair = PAIRS[name](SIZES[size], DEVICE)
    peers, refused = ready_peers(pair.peers, DEVICE)
    _check(pair)
    calls = calls_of(pair.ours, DEVICE)
    theirs: dict[str, list[float]] = {peer: [] for peer in peers}
    calls_of_peer = {peer: calls_of(operation, DEVICE) for peer, operation in peers.items()}

    def time_peers() -> None:
        for peer, operation in peers.items():
            theirs[peer].append(timed(operation, calls_of_peer[peer], DEVICE))

    benchmark.pedantic(run_calls, args=(pair.ours, calls, DEVICE), setup=time_peers, rounds=ROUNDS)
    seconds = benchmark.stats.stats.median / calls
    medians = {peer: statistics.median(values) for peer, values in theirs.items()}
    benchmark.extra_info |= {"calls_per_round": calls} | _compared(seconds, medians) | _speeds(pair, seconds)
    benchmark.extra_info |= {f"{peer}_refused": reason for peer, reason in refused.items()}
    if DEVICE.type != "cuda":
        benchmark.extra_info["tiny"] = "references at a tiny size on a CPU"


def _check(pair: Pair) -> None:
    """The result points where the first peer's does."""
    got = pair.result(pair.ours()).float().flatten()
    assert bool(torch.isfinite(got).all())
    if pair.cosine > 0:
        want = next(iter(pair.peers.values()))().float().flatten()
        cosine = torch.dot(got, want) / (got.norm() * want.norm())
        assert cosine >= pair.cosine, float(cosine)


def _compared(seconds: float, peers: dict[str, float]) -> dict[str, Any]:
    """Seconds and ratios of the peers, the fastest first: it is the one that the page's table shows."""
    told: dict[str, Any] = {}
    for peer, theirs in sorted(peers.items(), key=lambda item: item[1]):
        told |= {f"{peer}_seconds": float(f"{theirs:.4g}"), f"{peer}_seconds_over_ours": round(theirs / seconds, 3)}
    return told


def _speeds(pair: Pair, seconds: float) -> dict[str, Any]:
    """TFLOPS or GB/s, and its share of the ceilings."""
    best = ceilings(DEVICE)
    if pair.operations:
        speed = pair.operations / seconds / 1e12
        shares = {name: speed / top for name, top in best.items() if not name.startswith("copy")}
        told = {"tflops": round(speed, 1)}
    else:
        speed = pair.bytes / seconds / 1e9
        shares = {name: speed / top for name, top in best.items() if name.startswith("copy")}
        told = {"gb_per_s": round(speed, 1)}
    return told | {f"share_of_{name}": round(share, 3) for name, share in shares.items()} | best
