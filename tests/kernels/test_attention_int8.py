from collections.abc import Iterator
from dataclasses import replace
from math import e, log2
from types import SimpleNamespace

import pytest
import torch
from attention_tensors import attention_tensors, distance, exact_attention
from eight_bit import Poisoned
from tolerance import assert_close

from wanfast.kernels import (
    BlockLists,
    attention_int8,
    attention_int8_quantized,
    quantize_keys,
    quantize_queries,
    quantize_values,
)
from wanfast.kernels._attention_int8_reference import attention_int8_reference
from wanfast.kernels._attention_int8_tiles import LARGEST_WEIGHT, TILES
from wanfast.kernels._heads import check_has_e4m3
from wanfast.kernels._quantized import dequantize_reference
from wanfast.kernels.attention_int8 import attention_int8_quantized_triton, attention_int8_triton
from wanfast.kernels.quantize_queries import QuantizedQueries
from wanfast.kernels.quantize_values import LARGEST_VALUE

E4M3, FP16 = torch.float8_e4m3fn, torch.float16
VALUES = pytest.mark.parametrize("values", [E4M3, FP16], ids=["fp8", "fp16"])
GENERATIONS = pytest.mark.parametrize("generation", [89, 90])  # sm_120 has Ada's tiles
IMPLEMENTATIONS = pytest.mark.parametrize("implementation", ["kernel", "reference"])


@pytest.fixture(autouse=True)
def fresh_int8_is_poisoned(monkeypatch: pytest.MonkeyPatch, fresh_memory_is_nan: None) -> Iterator[None]:
    memory = Poisoned(monkeypatch)
    yield
    memory.assert_whole()


def quantized(q, k, v, values=E4M3):
    return quantize_queries(q), quantize_keys(k), quantize_values(v, dtype=values)


def run(implementation, operands, tile, lists=None):
    """Attention in fp32 by the kernel or by its reference."""
    q = operands[0].values
    if implementation == "reference":
        return attention_int8_reference(*operands, flush=tile.flush, accumulate=tile.accumulate, lists=lists)
    return attention_int8_triton(*operands, torch.empty(q.shape, device=q.device), tile=tile, lists=lists)


def assert_kernel_equals_reference(operands, tile, lists=None):
    want = run("reference", operands, tile, lists)
    assert_close(got=run("kernel", operands, tile, lists), want=want, op="attention_int8")


@GENERATIONS
@VALUES
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (3, 64), (65, 63), (5, 129), (66, 100), (129, 320)])
def test_the_kernel_equals_its_reference_at_any_length(generation, values, dim, queries, keys, device):
    q, k, v = attention_tensors("gaussian", queries=queries, keys=keys, heads=1, dim=dim)
    operands = quantized(q.to(device), k.to(device), v.to(device), values)
    assert_kernel_equals_reference(operands, TILES[generation, values, dim])


@pytest.mark.parametrize(("generation", "heads"), [(89, 40), (90, 24)])
def test_every_sample_and_head_is_its_own(generation, heads, device):
    q, k, v = (torch.randn(2, tokens, heads // 2, 128, device=device).bfloat16() for tokens in (3, 70, 70))
    assert_kernel_equals_reference(quantized(q, k, v), TILES[generation, E4M3, 128])


@pytest.mark.parametrize(("queries", "keys"), [(1025, 1025), (65, 4097)])
def test_the_kernel_equals_its_reference_on_long_sequences(queries, keys, device):
    q, k, v = attention_tensors("outlier", queries=queries, keys=keys, heads=1, dim=128)
    operands = quantized(q.to(device), k.to(device), v.to(device))
    assert_kernel_equals_reference(operands, replace(TILES[89, E4M3, 128], rows=256))


# Least cosine, least cosine about the mean over queries, largest error of a query relative to its own length. What was
# seen is 0.7 of these errors or less. Outlier tokens: a score of int8 numbers that stands far above the others carries
# its rounding into the exponent; all of the row's error is there, fp16 or e4m3.
LIMITS = {
    (E4M3, "gaussian"): (0.999, 0.998, 0.08),
    (E4M3, "biased"): (0.99999, 0.998, 0.002),
    (E4M3, "outlier"): (0.999, 0.998, 0.45),
    (E4M3, "one-hot"): (0.9999, 0.9994, 0.025),
    (FP16, "gaussian"): (0.9999, 0.9998, 0.03),
    (FP16, "biased"): (0.99999, 0.9998, 0.001),
    (FP16, "outlier"): (0.999, 0.998, 0.45),
    (FP16, "one-hot"): (0.999995, 0.99998, 0.01),
}


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("generation", [89, 90])
@pytest.mark.parametrize(("values", "kind"), LIMITS, ids=lambda part: str(part).removeprefix("torch."))
def test_the_reference_is_near_float64_on_difficult_tensors(dim, generation, values, kind):
    q, k, v = attention_tensors(kind, queries=200, keys=4097, heads=1, dim=dim)
    got = run("reference", quantized(q, k, v, values), TILES[generation, values, dim])
    seen = distance(got=got, want=exact_attention(q, k, v))
    cosine, centred_cosine, worst_row = LIMITS[values, kind]
    assert seen.cosine >= cosine and seen.centred_cosine >= centred_cosine and seen.worst_row <= worst_row, seen


@VALUES
@pytest.mark.parametrize("kind", ["biased", "one-hot"])
def test_the_kernel_is_near_float64_on_biased_tensors(values, kind, device):
    q, k, v = (x.to(device) for x in attention_tensors(kind, queries=60, keys=1025, heads=2, dim=128))
    got = run("kernel", quantized(q, k, v, values), TILES[89, values, 128])
    seen = distance(got=got, want=exact_attention(q, k, v))
    assert seen.cosine >= 0.999 and seen.centred_cosine >= 0.998 and seen.worst_row <= 0.025, seen


def test_keys_need_their_mean_taken_off(device):
    q, k, v = (x.to(device) for x in attention_tensors("gaussian", queries=64, keys=1000, heads=1, dim=128))
    k = (
        k.float() + 100 * torch.randn(128, device=device)
    ).bfloat16()  # what Wan's keys are like: a mean far above the deviation
    want = exact_attention(q, k, v)
    rounded = quantize_queries(q), quantize_keys(k), quantize_values(v, dtype=FP16)
    rough = rounded[0], quantize_keys(k, mean=torch.zeros(1, 1, 128, device=device)), rounded[2]
    tile = TILES[89, FP16, 128]
    smooth = distance(got=run("kernel", rounded, tile), want=want)
    unsmoothed = distance(got=run("kernel", rough, tile), want=want)
    assert smooth.cosine > 0.999
    assert unsmoothed.cosine < 0.95, unsmoothed
    other = (
        rounded[0],
        quantize_keys(k, mean=k.float().mean(1) + 0.5 * torch.randn(1, 1, 128, device=device)),
        rounded[2],
    )
    assert distance(got=run("kernel", other, tile), want=want).cosine > 0.999  # any vector near the mean is exact


@GENERATIONS
@VALUES
@IMPLEMENTATIONS
def test_each_key_finds_its_own_value(generation, values, implementation, device):
    keys = torch.arange(200)
    directions = torch.where(torch.randn(200, 128) > 0, 1.0, -1.0)
    v = torch.stack([keys % 16, keys // 16], -1).float().repeat(1, 64) - 6  # a value that tells which key it is of
    q, k, v = (x[None, :, None].to(device).bfloat16() for x in (3 * directions, 3 * directions, v))
    got = run(implementation, quantized(q, k, v, values), TILES[generation, values, 128])
    assert ((got - v.float()).abs() < 0.5).all()


@VALUES
@pytest.mark.parametrize("generation", [89, 90, 120])
@pytest.mark.parametrize("dim", [64, 128])
def test_fp16_sums_cannot_overflow(values, generation, dim):
    tile = TILES[generation, values, dim]
    assert (generation, values) != (90, E4M3) or tile.accumulate == torch.float32
    if tile.accumulate == torch.float16:
        total = LARGEST_WEIGHT[values] * LARGEST_VALUE[values] * tile.flush
        spacing = 2.0**5  # of fp16 from 2^15 to 2^16; each of `flush` sums is rounded to it
        assert total + tile.flush * spacing / 2 <= torch.finfo(torch.float16).max


@VALUES
@IMPLEMENTATIONS
def test_the_largest_weights_and_values_meet_and_stay_finite(values, implementation, device):
    """One interval of `flush` keys, each of the largest weight and of the largest value; then keys of the opposite."""
    tile = TILES[89, values, 128]
    sign = torch.ones(2 * tile.flush, device=device)
    sign[tile.flush :] = -1
    q = torch.ones(1, 2, 1, 128, device=device)
    k = sign[None, :, None, None] * q[:, :1] * (128**-0.5 / (2 * log2(e)))  # the others' weights are half the largest
    v = 10 * sign[None, :, None, None] * q[:, :1]
    operands = quantized(q, k, v, values)
    stored = operands[2].values.float()
    assert (stored[:, :, : tile.flush // 64] == LARGEST_VALUE[values]).all()
    assert_close(got=run(implementation, operands, tile).double(), want=exact_attention(q, k, v), op="attention_int8")

    if values == E4M3:  # and with values of four times the size they would not
        larger = replace(operands[2], values=(4 * stored).to(values), scale=operands[2].scale / 4)
        assert not run(implementation, (*operands[:2], larger), tile).isfinite().all()


@GENERATIONS
@VALUES
def test_scores_that_all_vanish_give_the_mean(generation, values, device):
    q, k, v = (torch.randn(1, tokens, 2, 64, device=device) for tokens in (3, 100, 100))
    q[:, 1] = 0
    q[:, 2] *= 1e-30
    k *= 1e-25
    operands, tile = quantized(q, k, v, values), TILES[generation, values, 64]
    got = run("kernel", operands, tile)
    assert ((got - v.double().mean(1, keepdim=True)).abs() < 0.02).all()
    last_block = BlockLists(*(torch.ones(1, 2, 1, *one, dtype=torch.int32, device=device) for one in ((1,), ())))
    got = run("kernel", operands, tile, last_block)
    assert ((got - v[:, 64:].double().mean(1, keepdim=True)).abs() < 0.05).all()


@GENERATIONS
@IMPLEMENTATIONS
@pytest.mark.parametrize("keys", [1, 65])
def test_groups_without_a_key_leave_scores_alone_that_are_far_below_zero(generation, implementation, keys, device):
    """Their scale is 1, where that of the keys, and so their scores below zero, is in the hundreds."""
    q = torch.ones(1, 3, 1, 64, device=device)
    k = torch.full((1, keys, 1, 64), -5e4, device=device)
    v = torch.randn(1, keys, 1, 64, device=device)
    mean = torch.zeros(1, 1, 64, device=device)
    operands = quantize_queries(q), quantize_keys(k, mean=mean), quantize_values(v)
    got = run(implementation, operands, TILES[generation, E4M3, 64])
    assert ((got - v.double().mean(1, keepdim=True)).abs() < 0.02).all()


@GENERATIONS
@IMPLEMENTATIONS
def test_one_key_gives_its_value(generation, implementation, device):
    q, k, v = (torch.randn(2, tokens, 2, 128, device=device).bfloat16() for tokens in (3, 1, 1))
    got = run(implementation, quantized(q, k, v), TILES[generation, E4M3, 128])
    assert torch.equal(got, v.float().expand(2, 3, 2, 128))


def full_lists(queries, keys, heads, device):
    blocks, rows = -(-keys // 64), -(-queries // 128)
    columns = torch.arange(blocks, dtype=torch.int32, device=device).expand(1, heads, rows, blocks).contiguous()
    return BlockLists(columns, torch.full((1, heads, rows), blocks, dtype=torch.int32, device=device))


@GENERATIONS
@pytest.mark.parametrize("keys", [128, 130, 250])
def test_lists_of_all_blocks_change_no_bit(generation, keys, device):
    q, k, v = (torch.randn(1, tokens, 2, 128, device=device).bfloat16() for tokens in (150, keys, keys))
    operands, tile = quantized(q, k, v), TILES[generation, E4M3, 128]
    lists = full_lists(150, keys, 2, device)
    assert torch.equal(run("kernel", operands, tile, lists), run("kernel", operands, tile))


@GENERATIONS
@VALUES
@pytest.mark.parametrize("dim", [64, 128])
def test_lists_leave_out_what_they_do_not_hold(generation, values, dim, device):
    """Odd and even counts, with and without the block that is not whole; rubbish past a row's count is not read."""
    q, k, v = (torch.randn(1, tokens, 2, dim, device=device).bfloat16() for tokens in (300, 410, 410))
    chosen = [[0, 2, 3], [1, 6], [6]], [[0, 1, 2, 6], [5], [2, 4]]
    columns = torch.full((1, 2, 3, 5), 10**6, dtype=torch.int32, device=device)
    live = torch.zeros(1, 2, 300, 410, dtype=torch.bool, device=device)
    for n, rows in enumerate(chosen):
        for i, blocks in enumerate(rows):
            columns[0, n, i, : len(blocks)] = torch.tensor(blocks)
            for j in blocks:
                live[0, n, i * 128 : (i + 1) * 128, j * 64 : (j + 1) * 64] = True
    counts = torch.tensor([[[len(blocks) for blocks in rows] for rows in chosen]], dtype=torch.int32, device=device)
    lists, operands = BlockLists(columns, counts), quantized(q, k, v, values)
    assert_kernel_equals_reference(operands, TILES[generation, values, dim], lists)
    seen = distance(
        got=run("kernel", operands, TILES[generation, values, dim], lists), want=exact_attention(q, k, v, live=live)
    )
    assert seen.cosine > 0.999, seen


@pytest.mark.parametrize("dtype", [torch.int8, E4M3], ids=["int8", "e4m3"])
@pytest.mark.parametrize("rotated", [False, True], ids=["plain", "rotated"])
@GENERATIONS
def test_an_8_bit_output_is_the_rounded_output(dtype, rotated, generation, device):
    q, k, v = (torch.randn(1, tokens, 2, 128, device=device).bfloat16() for tokens in (70, 100, 100))
    operands, tile = quantized(q, k, v), TILES[generation, E4M3, 128]
    got = attention_int8_quantized_triton(*operands, dtype, rotated=rotated, tile=tile)
    assert got.rotated == rotated
    assert got.values.shape == (1, 70, 256) and got.values.dtype == dtype and got.scale.shape == (1, 70, 2)
    want = run("kernel", operands, tile).flatten(2)
    absmax = want.unflatten(-1, (2, 128)).norm(dim=-1) if rotated else want.unflatten(-1, (2, 128)).abs().amax(-1)
    if not rotated:
        torch.testing.assert_close(got.scale, absmax / (127 if dtype == torch.int8 else 16), rtol=1e-5, atol=0)
    error = (dequantize_reference(got) - want).unflatten(-1, (2, 128)).norm(dim=-1)
    rounding = {torch.int8: 0.012, E4M3: 0.035}[dtype]  # of Gaussian rows of 128, as a share of their length
    assert (error <= rounding * want.unflatten(-1, (2, 128)).norm(dim=-1)).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_the_result_is_rounded_once_to_the_dtype_asked_for(dtype, device):
    q, k, v = (torch.randn(1, tokens, 2, 64, device=device).bfloat16() for tokens in (5, 70, 70))
    operands, tile = quantized(q, k, v), TILES[89, E4M3, 64]
    out = torch.empty(1, 5, 2, 64, dtype=dtype, device=device)
    assert attention_int8_triton(*operands, out, tile=tile) is out
    assert torch.equal(out, run("kernel", operands, tile).to(dtype))


def test_operands_are_left_alone_and_out_is_written(device):
    q, k, v = (torch.randn(1, 70, 2, 128, device=device).bfloat16() for _ in range(3))
    operands = quantized(q, k, v)
    before = [tensor.clone() for part in operands for tensor in (part.values, part.scale)]
    out = torch.empty(1, 70, 2, 128, dtype=torch.bfloat16, device=device)
    assert attention_int8(*operands, out=out) is out
    assert torch.equal(out, attention_int8(*operands))
    as_8_bit = attention_int8_quantized(*operands, torch.int8)
    assert_close(got=dequantize_reference(as_8_bit).view(out.shape), want=out.double(), op="attention_int8_output")
    after = [tensor for part in operands for tensor in (part.values, part.scale)]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


def _bad(name):
    q, k, v = (torch.zeros(2, tokens, 3, 64) for tokens in (130, 70, 70))
    q, k, v = quantized(q, k, v)
    lists = full_lists(130, 70, 3, "cpu")
    two = BlockLists(lists.columns.expand(2, 3, 2, 2).contiguous(), lists.counts.expand(2, 3, 2).contiguous())
    zero = torch.zeros
    changed = {
        "good": {},
        "q values": {"q": QuantizedQueries(q.values.short(), q.scale)},
        "q heads": {"q": QuantizedQueries(zero(2, 5, 3, 96).to(torch.int8), q.scale)},
        "q strides": {"q": QuantizedQueries(q.values.transpose(1, 2).contiguous().transpose(1, 2), q.scale)},
        "q scale": {"q": QuantizedQueries(q.values, q.scale[..., :2])},
        "k values": {"k": replace(k, values=k.values[:1])},
        "k scale": {"k": replace(k, scale=k.scale.double())},
        "k tokens": {"k": replace(k, tokens=0)},
        "v tokens": {"v": replace(v, tokens=69)},
        "v dtype": {"v": replace(v, values=v.values.bfloat16())},
        "v values": {"v": replace(v, values=v.values[:, :, :1])},
        "v device": {"v": replace(v, mean=v.mean.to("meta"))},
        "counts": {"lists": BlockLists(two.columns, two.counts[:, :, :1])},
        "columns": {"lists": BlockLists(two.columns.long(), two.counts)},
        "width": {"lists": BlockLists(two.columns.repeat(1, 1, 1, 2), two.counts)},
        "out": {"out": zero(2, 130, 3, 128)},
        "out dtype": {"out": zero(2, 130, 3, 64).double()},
    }
    return {"q": q, "k": k, "v": v, "lists": two} | changed[name]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("q values", "q.values: must be int8, got torch.int16"),
        ("q heads", "q.values: head dimension must be 64 or 128, got 96"),
        ("q strides", "q.values: must be contiguous, got strides"),
        ("q scale", r"q.scale: must be \(2, 130, 3\), got \(2, 130, 2\)"),
        ("k values", r"k.values: must be \(2, 3, 2, 64, 64\), got \(1, 3, 2, 64, 64\)"),
        ("k scale", "k.scale: must be float32, got torch.float64"),
        ("k tokens", "k.tokens: must be at least 1, got 0"),
        ("v tokens", "v.tokens: must be 70, like k.tokens, got 69"),
        ("v dtype", "v.values: must be float8_e4m3fn or float16, got torch.bfloat16"),
        ("v values", r"v.values: must be \(2, 3, 2, 64, 64\), got \(2, 3, 1, 64, 64\)"),
        ("v device", "v.mean: must be on cpu, like q, got meta"),
        ("counts", r"lists.counts: must be \(2, 3, 2\), got \(2, 3, 1\)"),
        ("columns", "lists.columns: must be int32, got torch.int64"),
        ("width", "lists.columns: must list 1 to 2 key blocks, got 4"),
        ("out", r"out: must be \(2, 130, 3, 64\), got \(2, 130, 3, 128\)"),
        ("out dtype", "out: must be bfloat16, float16 or float32, got torch.float64"),
    ],
)
def test_attention_int8_refuses(name, message):
    attention_int8(**_bad("good"))
    with pytest.raises(ValueError, match=message):
        attention_int8(**_bad(name))


def test_e4m3_is_refused_by_a_gpu_that_lacks_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    on_gpu = SimpleNamespace(is_cuda=True, device="cuda")
    check_has_e4m3(FP16, on_gpu, "v.values")
    with pytest.raises(ValueError, match=r"v.values: float8_e4m3fn needs compute capability 8.9; use float16, got"):
        check_has_e4m3(E4M3, on_gpu, "v.values")


def test_an_8_bit_output_is_refused_where_no_linear_reads_it():
    operands = {name: part for name, part in _bad("good").items() if name != "lists"}
    with pytest.raises(ValueError, match=r"q.values: head dimension must be 128 for an 8-bit output, got 64"):
        attention_int8_quantized(**operands, dtype=torch.int8)
    with pytest.raises(ValueError, match=r"dtype: must be int8 or float8_e4m3fn, got torch.float16"):
        attention_int8_quantized(**operands, dtype=torch.float16)
