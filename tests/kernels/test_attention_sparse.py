import math
from importlib import import_module

import pytest
import torch
from tolerance import assert_close
from torch import Tensor

from wanfast.kernels import BlockLists, attention_sparse, block_mask
from wanfast.kernels._attention_tiles import pick
from wanfast.kernels.attention import attention_triton
from wanfast.kernels.attention_sparse import (
    attention_sparse_reference,
    attention_sparse_triton,
    sparse_log_sum_exp_reference,
)
from wanfast.kernels.block_mask import KEY_BLOCK, QUERY_BLOCK

MODULE = import_module("wanfast.kernels.attention")
DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)


def hopper(q, k, v, lists, **options):
    return attention_sparse_triton(q, k, v, lists, tile=pick(90, q.shape[3]), **options)


def reference(q, k, v, lists, *, scale, out=None):
    result = attention_sparse_reference(q, k, v, lists, scale=scale, out=out)
    return result, sparse_log_sum_exp_reference(q, k, lists, scale=scale)


KERNELS = pytest.mark.parametrize("run", [attention_sparse_triton, hopper], ids=["kernel", "hopper"])
IMPLEMENTATIONS = pytest.mark.parametrize(
    "run", [attention_sparse_triton, hopper, reference], ids=["kernel", "hopper", "reference"]
)


def random_lists(batch: int, heads: int, queries: int, keys: int, device, share: float = 0.5) -> BlockLists:
    """Lists of random blocks; what follows a list's end would be seen: it names a block that does not exist."""
    rows, blocks = math.ceil(queries / QUERY_BLOCK), math.ceil(keys / KEY_BLOCK)
    columns = torch.full((batch, heads, rows, blocks), 2**20, dtype=torch.int32)
    counts = torch.empty(batch, heads, rows, dtype=torch.int32)
    for place in torch.cartesian_prod(*map(torch.arange, (batch, heads, rows))).reshape(-1, 3).tolist():
        kept = torch.rand(blocks) < share
        kept[torch.randint(blocks, ())] = True
        counts[tuple(place)] = kept.sum()
        columns[tuple(place)][: int(kept.sum())] = kept.nonzero()[:, 0].int()
    return BlockLists(columns.to(device), counts.to(device))


def truth(q: Tensor, k: Tensor, v: Tensor, lists: BlockLists, scale: float) -> tuple[Tensor, Tensor]:
    """Float64 softmax over the listed tokens alone, gathered one query block at a time."""
    out = torch.full(q.shape, math.nan, dtype=torch.float64, device=q.device)
    lse = torch.full((q.shape[0], q.shape[2], q.shape[1]), math.nan, dtype=torch.float64, device=q.device)
    for b, n, i in torch.cartesian_prod(*map(torch.arange, lists.counts.shape)).reshape(-1, 3).tolist():
        blocks = lists.columns[b, n, i, : lists.counts[b, n, i]].tolist()
        at = torch.cat([torch.arange(k.shape[1], device=q.device).split(KEY_BLOCK)[block] for block in blocks])
        rows = slice(i * QUERY_BLOCK, (i + 1) * QUERY_BLOCK)
        scores = scale * q[b, rows, n].double() @ k[b, at, n].double().T
        out[b, rows, n] = scores.softmax(-1) @ v[b, at, n].double()
        lse[b, n, rows] = scores.logsumexp(-1)
    return out, lse


def heads(queries, keys, head_dim, dtype, device, batch=1, count=1) -> tuple[Tensor, Tensor, Tensor]:
    q = torch.randn(batch, queries, count, head_dim, device=device).to(dtype)
    k, v = torch.randn(2, batch, keys, count, head_dim, device=device).to(dtype)
    return q, k, v


def check(result: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor]) -> None:
    assert_close(got=result[0], want=want[0], op="attention")
    assert_close(got=result[1], want=want[1], op="log_sum_exp")


@IMPLEMENTATIONS
@DTYPES
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (130, 65), (63, 200), (257, 320), (129, 513)], ids=str)
def test_sparse_attention_equals_float64(run, dtype, head_dim, queries, keys, device):
    q, k, v = heads(queries, keys, head_dim, dtype, device)
    lists = random_lists(1, 1, queries, keys, device)
    check(run(q, k, v, lists, scale=0.1), truth(q, k, v, lists, 0.1))


@IMPLEMENTATIONS
def test_each_sample_and_head_has_its_own_lists(run, device):
    q, k, v = heads(150, 330, 64, torch.float16, device, batch=2, count=3)
    lists = random_lists(2, 3, 150, 330, device)
    check(run(q, k, v, lists, scale=0.2), truth(q, k, v, lists, 0.2))


@IMPLEMENTATIONS
@pytest.mark.parametrize("last", [3, 4])
def test_keys_that_are_not_listed_carry_no_weight(run, last, device):
    q, k, v = heads(140, 300, 64, torch.float16, device)
    lists = BlockLists(
        torch.tensor([[[[0, last], [last, 0]]]], dtype=torch.int32, device=device),
        torch.tensor([[[2, 1]]], dtype=torch.int32, device=device),
    )
    want = truth(q, k, v, lists, 0.125)
    k[:, 64 * last + 64 :] = v[:, 64 * last + 64 :] = math.nan
    k[:, 64 : 64 * last] = v[:, 64 : 64 * last] = math.nan
    check(run(q, k, v, lists, scale=0.125), want)


@DTYPES
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(("queries", "keys"), [(1, 64), (130, 200), (65, 63)], ids=str)
def test_density_one_is_dense_attention_bit_for_bit(dtype, head_dim, queries, keys, device):
    q, k, v = heads(queries, keys, head_dim, dtype, device)
    lists = block_mask(q, k, density=1.0)
    for tile in (pick(89, head_dim), pick(90, head_dim)):
        dense, dense_lse = attention_triton(q, k, v, scale=0.09, tile=tile)
        sparse, sparse_lse = attention_sparse_triton(q, k, v, lists, scale=0.09, tile=tile)
        assert torch.equal(sparse, dense)
        assert torch.equal(sparse_lse, dense_lse)


def test_cumulative_one_is_dense_attention_with_the_tiles_in_use(device):
    q, k, v = heads(129, 200, 128, torch.bfloat16, device)
    dense, _ = attention_triton(q, k, v, scale=0.09)
    sparse, _ = attention_sparse_triton(q, k, v, block_mask(q, k, cumulative=1.0), scale=0.09)
    assert torch.equal(sparse, dense)


def test_the_chosen_blocks_hold_the_softmax_where_blocks_are_alike(device):
    """The purpose: tokens alike within a block, a quarter of the blocks, and almost the dense result."""
    directions = torch.randn(8, 64, device=device) * 3
    q = directions.repeat_interleave(64, 0)[None, :, None] + 0.3 * torch.randn(1, 512, 1, 64, device=device)
    q, v = q.half(), torch.randn(1, 512, 1, 64, device=device).half()
    lists = block_mask(q, q, density=0.25)
    assert lists.counts.sum() <= 4 * 4
    sparse, _ = attention_sparse_triton(q, q, v, lists, scale=0.125)
    dense, _ = attention_triton(q, q, v, scale=0.125)
    assert torch.cosine_similarity(sparse.flatten().double(), dense.flatten().double(), 0) > 0.999


@IMPLEMENTATIONS
@DTYPES
def test_slices_of_a_fused_projection_are_read_in_place(run, dtype, device):
    fused = torch.full((2, 150, 3, 2, 128), math.nan, device=device, dtype=dtype)
    fused[:, 7:138] = torch.randn(2, 131, 3, 2, 128, device=device).to(dtype)
    q, k, v = (fused[:, 7:138, part] for part in range(3))
    out = torch.full((2, 140, 2, 130), math.nan, device=device, dtype=dtype)
    there = out[:, 4:135, :, 1:129]
    lists = random_lists(2, 2, 131, 131, device)
    result, lse = run(q, k, v, lists, scale=0.1, out=there)
    assert result is there
    check((result, lse), truth(q, k, v, lists, 0.1))
    there.fill_(math.nan)
    assert out.isnan().all(), "written beside the run of tokens"


@IMPLEMENTATIONS
@DTYPES
def test_every_tensor_has_strides_of_its_own(run, dtype, device):
    q = torch.randn(2, 3, 130, 64, device=device).to(dtype).transpose(1, 2)
    k = torch.randn(140, 2, 3, 72, device=device).to(dtype).transpose(0, 1)[..., 8:]
    v = torch.randn(2, 140, 4, 80, device=device).to(dtype)[:, :, 1:, :64]
    out = torch.full((3, 2, 130, 96), math.nan, device=device).to(dtype).permute(1, 2, 0, 3)[..., :64]
    lists = random_lists(2, 3, 130, 140, device)
    check(run(q, k, v, lists, scale=0.1, out=out), truth(q, k, v, lists, 0.1))


@KERNELS
def test_offsets_may_pass_two_to_the_31(run, device):
    q, k, v = heads(200, 200, 64, torch.float16, device)
    far = torch.empty_strided((1, 200, 3, 64), (64, 2**24, 64, 1), dtype=torch.float16, device=device)
    for start in range(0, 200, 50):
        near = slice(start, start + 50)
        far[:, near] = torch.cat([x[:, near] for x in (q, k, v)], 2)
    lists = random_lists(1, 1, 200, 200, device)
    want, _ = run(q, k, v, lists, scale=0.125)
    got, _ = run(*far.split(1, 2), lists, scale=0.125)
    assert torch.equal(got, want)


def test_the_operation_takes_the_kernel_or_the_reference(monkeypatch, device):
    q, k, v = heads(130, 130, 64, torch.float16, device)
    lists = random_lists(1, 1, 130, 130, device)
    want = truth(q, k, v, lists, 0.125)
    expected = reference if device.type == "cpu" else attention_sparse_triton
    for run in (expected, attention_sparse_triton):
        out, lse = attention_sparse(q, k, v, lists, return_lse=True)
        check((out, lse), want)
        assert torch.equal(out, run(q, k, v, lists, scale=0.125)[0])
        assert torch.equal(attention_sparse(q, k, v, lists), out)
        monkeypatch.setattr(MODULE, "runs_triton", lambda x: True)


LISTS = random_lists(2, 3, 130, 200, torch.device("cpu"))
Q, K = torch.zeros(2, 130, 3, 16), torch.zeros(2, 200, 3, 16)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"q": Q.int()}, "q: must be float16, bfloat16, float32 or float64"),
        ({"k": K[:, :, :2]}, r"k: must be \[2, tokens, 3, 16\], got \(2, 200, 2, 16\)"),
        ({"v": K[:, 1:]}, r"v: must be \[2, 200, 3, 16\], got \(2, 199, 3, 16\)"),
        ({"out": K}, r"out: must be \[2, 130, 3, 16\], got \(2, 200, 3, 16\)"),
        ({"scale": math.inf}, "scale: must be above 0 and finite, got inf"),
        (
            {"lists": random_lists(2, 3, 128, 200, "cpu")},
            r"lists.columns: must be \[2, 3, 2, 1 to 4\], got \(2, 3, 1, 4\)",
        ),
        (
            {"lists": random_lists(2, 3, 130, 260, "cpu")},
            r"lists.columns: must be \[2, 3, 2, 1 to 4\], got \(2, 3, 2, 5\)",
        ),
        ({"lists": BlockLists(LISTS.columns.long(), LISTS.counts)}, "lists.columns: must be int32, got torch.int64"),
        ({"lists": BlockLists(LISTS.columns, LISTS.counts[:, :, :1])}, r"lists.counts: must be \[2, 3, 2\], got"),
        (
            {"lists": BlockLists(LISTS.columns[..., ::2], LISTS.counts)},
            "lists.columns: must be contiguous, got strides",
        ),
        (
            {"lists": BlockLists(LISTS.columns, LISTS.counts.to("meta"))},
            "lists.counts: must be on cpu, like q, got meta",
        ),
    ],
)
def test_attention_sparse_refuses(arguments, message):
    good = {"q": Q, "k": K, "v": K, "lists": LISTS}
    attention_sparse(**good)
    with pytest.raises(ValueError, match=message):
        attention_sparse(**(good | arguments))
