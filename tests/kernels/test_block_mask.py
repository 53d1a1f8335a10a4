import math
from importlib import import_module

import pytest
import torch
from tolerance import assert_close
from torch import Tensor

from wanfast.kernels import (
    BlockLists,
    block_mask,
    block_means,
    blocks_kept_at_most,
    choose_blocks,
    lists_of_run,
)
from wanfast.kernels.block_mask import (
    KEY_BLOCK,
    QUERY_BLOCK,
    ascending,
    check_lists,
    heaviest,
    pool_blocks_reference,
    pool_blocks_triton,
    reaching,
    token_mask,
)

MODULE = import_module("wanfast.kernels.block_mask")
IMPLEMENTATIONS = pytest.mark.parametrize(
    "run", [pool_blocks_triton, pool_blocks_reference], ids=["kernel", "reference"]
)


def lists_of(masks: BlockLists, b: int, n: int) -> list[list[int]]:
    rows = zip(masks.columns[b, n].tolist(), masks.counts[b, n].tolist(), strict=True)
    return [columns[:count] for columns, count in rows]


@IMPLEMENTATIONS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 129, 300])
def test_means_equal_float64(run, dtype, block, tokens, device):
    x = (1 + torch.randn(2, tokens, 3, 64, device=device)).to(dtype)
    want = torch.stack([part.double().mean(1) for part in x.split(block, 1)], 2)
    mean = run(x, block)
    assert mean.dtype == torch.float32
    assert_close(got=mean, want=want, op="pool_blocks")


@IMPLEMENTATIONS
def test_means_of_slices_and_of_runs_of_tokens(run, device):
    fused = torch.full((2, 200, 3, 2, 128), math.nan, device=device, dtype=torch.bfloat16)
    fused[:, 30:171] = torch.randn(2, 141, 3, 2, 128, device=device).bfloat16()
    x = fused[:, 30:171, 1]
    want = torch.stack([part.double().mean(1) for part in x.split(64, 1)], 2)
    assert_close(got=run(x, 64), want=want, op="pool_blocks")


def test_means_are_found_where_offsets_pass_two_to_the_31(device):
    near = torch.randn(2, 130, 1, 64, device=device).half()
    far = torch.empty_strided((2, 130, 1, 64), (64, 2**24, 64, 1), dtype=torch.float16, device=device)
    for start in range(0, 130, 10):
        far[:, start : start + 10] = near[:, start : start + 10]
    assert torch.equal(pool_blocks_triton(far, 64), pool_blocks_triton(near, 64))


def test_density_keeps_the_blocks_of_largest_mass():
    mass = torch.tensor([[0.1, 0.4, 0.2, 0.3], [0.25, 0.25, 0.25, 0.25]])
    assert heaviest(mass, 0.5).tolist() == [[False, True, False, True], [True, True, False, False]]
    assert heaviest(mass, 0.26).sum(-1).tolist() == [2, 2]
    assert heaviest(mass, 0.001).sum(-1).tolist() == [1, 1]
    assert heaviest(mass, 1.0).all()


def test_a_share_that_is_whole_is_not_rounded_up():
    assert 0.07 * 100 > 7
    assert heaviest(torch.rand(1, 100), 0.07).sum() == 7


def test_cumulative_keeps_the_smallest_set_that_reaches_it():
    mass = torch.tensor([[0.125, 0.5, 0.125, 0.25], [0.25, 0.25, 0.25, 0.25]])
    assert reaching(mass, 0.5).tolist() == [[False, True, False, False], [True, True, False, False]]
    assert reaching(mass, 0.75).tolist() == [[False, True, False, True], [True, True, True, False]]
    assert reaching(mass, 0.76).tolist() == [[True, True, False, True], [True, True, True, True]]
    assert reaching(mass, 1e-9).sum(-1).tolist() == [1, 1]
    assert reaching(torch.rand(50, 200).softmax(-1), 1.0).all()


@pytest.mark.parametrize("cumulative", [0.05, 0.3, 0.77, 0.999])
def test_cumulative_is_minimal_on_random_rows(cumulative):
    mass = (3 * torch.randn(40, 90)).softmax(-1)
    kept = reaching(mass, cumulative)
    total = (mass.double() * kept).sum(-1)
    smallest = mass.double().masked_fill(~kept, 2).amin(-1)
    assert (total >= cumulative - 1e-9).all()
    assert (total - smallest < cumulative).all()
    assert (mass.double().masked_fill(kept, 0).amax(-1) <= smallest).all(), "a heavier block was left out"


def test_columns_ascend_and_the_rest_is_zero():
    kept = torch.tensor([[False, True, True, False, True], [True, False, False, False, False]])
    columns = ascending(kept, 4)
    assert columns.dtype == torch.int32
    assert columns.tolist() == [[1, 2, 4, 0], [0, 0, 0, 0]]


def expected(q: Tensor, k: Tensor, scale: float, share: int) -> list[list[set[int]]]:
    """The rule once more in float64: the `share` blocks of largest mass and the diagonal, for a sample's heads."""
    chosen = []
    for n in range(q.shape[2]):
        rows = []
        for i, queries in enumerate(q[0, :, n].double().split(QUERY_BLOCK)):
            blocks = k[0, :, n].double().split(KEY_BLOCK)
            scores = torch.stack([scale * queries.mean(0) @ keys.mean(0) + math.log(len(keys)) for keys in blocks])
            own = {j for j in (2 * i, 2 * i + 1) if j < len(blocks)}
            rows.append(set(scores.topk(share).indices.tolist()) | own)
        chosen.append(rows)
    return chosen


@pytest.mark.parametrize("kernel", [True, False], ids=["kernel", "reference"])
def test_lists_follow_the_rule(kernel, monkeypatch, device):
    monkeypatch.setattr(MODULE, "kernel_serves", lambda x: kernel)
    q, k = (4 * torch.randn(2, 1, 520, 2, 64, device=device)).half()
    masks = block_mask(q, k, density=0.3, scale=0.5)
    assert masks.columns.dtype == masks.counts.dtype == torch.int32
    for n, rows in enumerate(expected(q, k, 0.5, share=3)):
        found = lists_of(masks, 0, n)
        assert [sorted(row) for row in rows] == found
    check_lists(masks, q, 520)


def test_a_partial_block_weighs_what_its_tokens_weigh():
    k = torch.zeros(1, 65, 1, 8)
    masks = block_mask(torch.zeros(1, 1, 1, 8), k, cumulative=64 / 65 - 1e-3)
    assert lists_of(masks, 0, 0) == [[0, 1]], "the diagonal"
    mass = torch.tensor([[64.0, 1.0]]).log().softmax(-1)
    assert reaching(mass, 64 / 65 - 1e-3).tolist() == [[True, False]]
    far = block_mask(torch.zeros(1, 1, 1, 8), torch.zeros(1, 129, 1, 8), cumulative=128 / 129 - 1e-3)
    assert lists_of(far, 0, 0) == [[0, 1]], "the third block holds one token of 129"


def test_the_diagonal_and_kept_ranges_are_always_there(device):
    q = torch.randn(1, 700, 1, 64, device=device)
    k = -q  # the own blocks are those of least mass
    masks = block_mask(q, k, density=0.01, keep_keys=[(0, 65), (640, 641)])
    for i, row in enumerate(lists_of(masks, 0, 0)):
        own = {j for j in (2 * i, 2 * i + 1) if j < 11}
        assert own | {0, 1, 10} <= set(row)
        assert len(row) <= masks.columns.shape[3]
    assert masks.columns.shape[3] == 1 + 2 + 3
    mask = token_mask(masks, 0, 0, 700, 700)
    assert mask[:, :128].all()
    assert mask[:, 640:].all()
    assert mask.diagonal().all()


def test_keys_may_be_fewer_or_more_than_queries(device):
    q, k = torch.randn(1, 300, 1, 8, device=device), torch.randn(1, 70, 1, 8, device=device)
    fewer = block_mask(q, k, density=0.5)
    assert fewer.counts.tolist() == [[[2, 1, 1]]], "beyond the keys no block is a query's own"
    more = block_mask(k, q, density=1.0)
    assert lists_of(more, 0, 0) == [[0, 1, 2, 3, 4]]


def test_density_one_and_cumulative_one_keep_all(device):
    q, k = torch.randn(2, 1, 130, 2, 16, device=device)
    for masks in (block_mask(q, k, density=1.0), block_mask(q, k, cumulative=1.0)):
        assert masks.columns.tolist() == [[[[0, 1, 2]] * 2] * 2]
        assert (masks.counts == 3).all()


def test_a_mask_over_tokens_is_the_lists():
    columns = torch.tensor([[[[0, 2], [1, 0]]]], dtype=torch.int32)
    mask = token_mask(BlockLists(columns, torch.tensor([[[2, 1]]], dtype=torch.int32)), 0, 0, 130, 150)
    want = torch.zeros(130, 150, dtype=torch.bool)
    want[:128, :64] = want[:128, 128:] = want[128:, 64:128] = True
    assert torch.equal(mask, want)


Q = torch.zeros(2, 200, 3, 16)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"q": Q[0]}, r"q: must be \[B, T, N, D\]"),
        ({"q": Q.int()}, "q: must be float16, bfloat16, float32 or float64, got torch.int32"),
        ({"k": Q[..., :8]}, r"k: must be \[2, tokens, 3, 16\], got \(2, 200, 3, 8\)"),
        ({"k": Q.half()}, "k: must be torch.float32, like q"),
        ({"cumulative": 0.5}, r"density, cumulative: give one, got \(0.5, 0.5\)"),
        ({"density": None}, r"density, cumulative: give one, got \(None, None\)"),
        ({"density": 0.0}, "density: must be above 0, up to 1, got 0.0"),
        ({"density": 1.1}, "density: must be above 0, up to 1, got 1.1"),
        ({"density": None, "cumulative": -0.1}, "cumulative: must be above 0, up to 1, got -0.1"),
        ({"keep_keys": [(5, 5)]}, r"keep_keys: each must be \[start, end\) within 0 to 200, k's tokens, got \(5, 5\)"),
        ({"keep_keys": [(0, 3), (0, 201)]}, r"keep_keys: .*got \(0, 201\)"),
        ({"scale": -1.0}, "scale: must be above 0 and finite, got -1.0"),
    ],
)
def test_block_mask_refuses(arguments, message):
    good = {"q": Q, "k": Q, "density": 0.5}
    block_mask(**good)
    with pytest.raises(ValueError, match=message):
        block_mask(**(good | arguments))


def int8_rows(tokens: int, heads: int, head_dim: int, device) -> tuple[Tensor, Tensor]:
    values = torch.randint(-127, 128, (2, tokens, heads, head_dim), dtype=torch.int8, device=device)
    return values, torch.rand(2, tokens, heads, device=device) + 0.01


@IMPLEMENTATIONS
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(("tokens", "block"), [(1, 128), (129, 128), (300, 128), (200, 64)])
def test_means_of_rows_in_8_bits_take_in_their_scales(run, tokens, block, head_dim, device):
    values, scale = int8_rows(tokens, 3, head_dim, device)
    wide = values.double() * scale.double()[..., None]
    want = torch.stack([part.mean(1) for part in wide.split(block, 1)], 2)
    assert_close(got=run(values, block, scale), want=want, op="pool_blocks")


@IMPLEMENTATIONS
def test_means_of_a_slice_of_rows_in_8_bits(run, device):
    values, scale = int8_rows(150, 4, 64, device)
    part = values[:, :, 1:3]
    wide = part.double() * scale[:, :, 1:3].double()[..., None]
    want = torch.stack([some.mean(1) for some in wide.split(128, 1)], 2)
    assert_close(got=run(part, 128, scale[:, :, 1:3].contiguous()), want=want, op="pool_blocks")


def test_block_means_takes_the_kernel_or_the_reference(monkeypatch, device):
    values, scale = int8_rows(130, 2, 64, device)
    for runs in (device.type == "cuda", True):
        monkeypatch.setattr(MODULE, "runs_triton", lambda _, runs=runs: runs)
        run = pool_blocks_triton if runs else pool_blocks_reference
        assert torch.equal(block_means(values, 128, scale), run(values, 128, scale))


@pytest.mark.parametrize("rule", [{"density": 0.3}, {"cumulative": 0.6}], ids=str)
def test_lists_do_not_depend_on_how_many_heads_are_looked_at_together(rule, monkeypatch, device):
    q, k = 3 * torch.randn(2, 2, 520, 5, 64, device=device)
    whole = block_mask(q, k, **rule)
    monkeypatch.setattr(MODULE, "MAP_ELEMENTS", 2 * 5 * 9)  # two heads of five
    parts = block_mask(q, k, **rule)
    assert torch.equal(parts.columns, whole.columns)
    assert torch.equal(parts.counts, whole.counts)


def test_runs_of_queries_make_the_lists_of_all(device):
    q, k = 3 * torch.randn(2, 1, 700, 2, 64, device=device)
    want = block_mask(q, k, density=0.2)
    means = torch.cat([block_means(run, QUERY_BLOCK) for run in q.split(256, 1)], 2)
    lists = choose_blocks(means, block_means(k, KEY_BLOCK), queries=700, keys=700, density=0.2, scale=1 / math.sqrt(64))
    assert torch.equal(lists.columns, want.columns)
    assert torch.equal(lists.counts, want.counts)


@pytest.mark.parametrize(("start", "stop", "rows"), [(0, 700, [0, 6]), (0, 256, [0, 2]), (256, 700, [2, 6])])
def test_lists_of_a_run_are_those_of_its_queries(start, stop, rows, device):
    q, k = torch.randn(2, 1, 700, 2, 64, device=device)
    lists = block_mask(q, k, density=0.2)
    part = lists_of_run(lists, start, stop)
    check_lists(part, q[:, start:stop], 700)
    assert torch.equal(part.columns, lists.columns[:, :, slice(*rows)])
    assert torch.equal(part.counts, lists.counts[:, :, slice(*rows)])
    with pytest.raises(ValueError, match="start: must be a multiple of 128, got 64"):
        lists_of_run(lists, 64, 256)


def test_no_more_blocks_are_kept_than_is_said():
    q = torch.randn(1, 1290, 3, 64)
    for density in (0.01, 0.1, 0.5, 0.93, 1.0):
        kept = block_mask(q, -q, density=density).counts.max()  # the own blocks are those of least mass
        assert kept == blocks_kept_at_most(density, 21)


INT8 = torch.zeros(2, 200, 3, 64, dtype=torch.int8)
SCALE = torch.ones(2, 200, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((Q[0], 64), r"x: must be \[B, T, N, D\]"),
        ((Q.transpose(2, 3), 64), "x: channels must be adjacent"),
        ((Q, 32), "block: must be 128 or 64, got 32"),
        ((Q.long(), 64), "x: must be float16, bfloat16, float32, float64 or int8, got torch.int64"),
        ((Q, 64, SCALE), "scale: must be None where x is not int8"),
        ((INT8, 64), "scale: must be given for int8"),
        ((INT8, 64, SCALE[:, 1:]), r"scale: must be \(2, 200, 3\), got \(2, 199, 3\)"),
        ((INT8, 64, SCALE.double()), "scale: must be fp32 and contiguous"),
        ((INT8[..., :32], 64, SCALE), "x: head dimension of int8 must be 64 or 128, got 32"),
    ],
)
def test_block_means_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        block_means(*arguments)


MEANS = {"q_mean": torch.zeros(2, 3, 2, 8), "k_mean": torch.zeros(2, 3, 5, 8), "queries": 200, "keys": 300}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"q_mean": torch.zeros(2, 3, 3, 8)}, r"q_mean: must be \(2, 3, 2, 8\) for 200 tokens, got \(2, 3, 3, 8\)"),
        ({"keys": 321}, r"k_mean: must be \(2, 3, 6, 8\) for 321 tokens"),
        ({"k_mean": torch.zeros(2, 3, 5, 8).half()}, "k_mean: must be float32, got torch.float16"),
        ({"scale": 0.0}, "scale: must be above 0 and finite, got 0.0"),
        ({"density": None}, "density, cumulative: give one"),
    ],
)
def test_choose_blocks_refuses(arguments, message):
    good = MEANS | {"density": 0.5, "scale": 1.0}
    choose_blocks(**good)
    with pytest.raises(ValueError, match=message):
        choose_blocks(**(good | arguments))
