import math
from importlib import import_module

import pytest
import torch
from tolerance import assert_close
from torch import Tensor

from wanfast.kernels import attention
from wanfast.kernels._attention_tiles import HEAD_DIMS, KEYS, TILES, architecture, pick
from wanfast.kernels.attention import (
    attention_reference,
    attention_triton,
    kernel_serves,
    log_sum_exp_reference,
)
from wanfast.kernels.block_mask import KEY_BLOCK, QUERY_BLOCK

MODULE = import_module("wanfast.kernels.attention")
DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
HEAD_SIZES = pytest.mark.parametrize("head_dim", HEAD_DIMS)


def hopper(q, k, v, **options):
    return attention_triton(q, k, v, tile=pick(90, q.shape[3]), **options)


def reference(q, k, v, *, scale, last_count=1, out=None):
    result = attention_reference(q, k, v, scale=scale, last_count=last_count, out=out)
    return result, log_sum_exp_reference(q, k, scale=scale, last_count=last_count)


IMPLEMENTATIONS = pytest.mark.parametrize(
    "run", [attention_triton, hopper, reference], ids=["kernel", "hopper", "reference"]
)


def truth(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    scores = torch.einsum("btnd,bsnd->bnts", q.double(), k.double()) * scale
    return torch.einsum("bnts,bsnd->btnd", scores.softmax(-1), v.double()), scores.logsumexp(-1)


def heads(queries, keys, head_dim, dtype, device, batch=1, count=1) -> tuple[Tensor, Tensor, Tensor]:
    q = torch.randn(batch, queries, count, head_dim, device=device).to(dtype)
    k, v = torch.randn(2, batch, keys, count, head_dim, device=device).to(dtype)
    return q, k, v


def check(result: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor]) -> None:
    assert_close(got=result[0], want=want[0], op="attention")
    assert result[1].dtype == torch.float32
    assert_close(got=result[1], want=want[1], op="log_sum_exp")


@IMPLEMENTATIONS
@DTYPES
@HEAD_SIZES
@pytest.mark.parametrize(
    ("queries", "keys"),
    [(1, 1), (2, 65), (63, 64), (64, 63), (65, 2), (127, 129), (129, 127), (200, 200), (65, 512)],
    ids=str,
)
def test_attention_equals_float64(run, dtype, head_dim, queries, keys, device):
    q, k, v = heads(queries, keys, head_dim, dtype, device)
    scale = head_dim**-0.5
    result = run(q, k, v, scale=scale)
    assert result[0].dtype == dtype
    assert result[0].is_contiguous()
    check(result, truth(q, k, v, scale))


@IMPLEMENTATIONS
def test_samples_and_heads_are_kept_apart(run, device):
    q, k, v = heads(70, 130, 64, torch.float16, device, batch=2, count=3)
    check(run(q, k, v, scale=0.125), truth(q, k, v, 0.125))


@IMPLEMENTATIONS
@DTYPES
def test_large_scores_do_not_overflow(run, dtype, device):
    q, k, v = heads(65, 200, 128, dtype, device)
    q *= 60  # scores to about 300, where exp alone is infinite
    scale = 128**-0.5
    check(run(q, k, v, scale=scale), truth(q, k, v, scale))


@IMPLEMENTATIONS
@DTYPES
@pytest.mark.parametrize("order", [1, -1], ids=["rising", "falling"])
def test_the_running_maximum_may_rise_in_every_block(run, dtype, order, device):
    q, k, v = heads(3, 260, 64, dtype, device)
    q = q.abs()
    k = (
        order
        * torch.linspace(-4, 4, 260, device=device)[None, :, None, None].expand(1, 260, 1, 64).to(dtype).contiguous()
    )
    check(run(q, k, v, scale=0.25), truth(q, k, v, 0.25))


@IMPLEMENTATIONS
@DTYPES
def test_a_row_with_one_decisive_key_is_that_keys_value(run, dtype, device):
    q, k, v = heads(130, 130, 128, dtype, device)
    k = 16 * q.flip(1)
    out, _ = run(q, k, v, scale=1.0)
    assert torch.equal(out, v.flip(1))


@IMPLEMENTATIONS
def test_equal_keys_give_the_mean_value(run, device):
    q, k, v = heads(5, 129, 64, torch.float16, device)
    out, lse = run(q, k[:, :1].expand_as(k), v, scale=1.0)
    assert_close(got=out, want=v.double().mean(1, keepdim=True).expand(1, 5, 1, 64), op="attention")
    score = torch.einsum("btnd,bnd->bnt", q.double(), k[:, 0].double())
    assert_close(got=lse, want=score + math.log(129), op="log_sum_exp")


@IMPLEMENTATIONS
@pytest.mark.parametrize("keys", [1, 63, 64, 65])
def test_last_count_stands_for_copies_of_the_last_key(run, keys, device):
    q, k, v = heads(9, keys, 64, torch.float16, device, count=2)
    copies = torch.arange(keys, device=device).repeat_interleave(
        torch.tensor([1] * (keys - 1) + [37], device=device), output_size=keys + 36
    )
    result = run(q, k, v, scale=0.2, last_count=37)
    check(result, truth(q, k[:, copies], v[:, copies], 0.2))


@IMPLEMENTATIONS
@DTYPES
def test_slices_of_a_fused_projection_and_runs_of_tokens_are_read_in_place(run, dtype, device):
    fused = torch.full((2, 150, 3, 2, 128), math.nan, device=device, dtype=dtype)
    fused[:, 7:138] = torch.randn(2, 131, 3, 2, 128, device=device).to(dtype)
    q, k, v = (fused[:, 7:138, part] for part in range(3))
    q = q[:, 1:]
    out = torch.full((2, 140, 2, 130), math.nan, device=device, dtype=dtype)
    there = out[:, 4:134, :, 1:129]
    result, lse = run(q, k, v, scale=0.1, out=there)
    assert result is there
    check((result, lse), truth(q, k, v, 0.1))
    there.fill_(math.nan)
    assert out.isnan().all(), "written beside the run of tokens"


def apart(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v and a result of 2 samples, 130 queries, 140 keys, 3 heads of 64, no two with a stride in common."""
    q = torch.randn(2, 3, 130, 64, device=device).to(dtype).transpose(1, 2)
    k = torch.randn(140, 2, 3, 72, device=device).to(dtype).transpose(0, 1)[..., 8:]
    v = torch.randn(2, 140, 4, 80, device=device).to(dtype)[:, :, 1:, :64]
    out = torch.full((3, 2, 130, 96), math.nan, device=device).to(dtype).permute(1, 2, 0, 3)[..., :64]
    strides = [x.stride()[axis] for axis in range(3) for x in (q, k, v, out)]
    assert all(len(set(strides[at : at + 4])) == 4 for at in (0, 4, 8))
    return q, k, v, out


@IMPLEMENTATIONS
@DTYPES
def test_every_tensor_has_strides_of_its_own(run, dtype, device):
    q, k, v, out = apart(dtype, device)
    check(run(q, k, v, scale=0.1, out=out), truth(q, k, v, 0.1))


@pytest.mark.parametrize("run", [attention_triton, hopper], ids=["kernel", "hopper"])
@pytest.mark.parametrize("axis", ["tokens", "heads", "samples"])
def test_offsets_may_pass_two_to_the_31(run, axis, device):
    tokens, far = 194, 2**31 + 64  # elements, of memory that is never touched but for a few pages
    strides = {"tokens": (64, 2**24, 64), "heads": (64, 64, far), "samples": (far, 64, 64)}[axis]
    shape = {"tokens": (1, tokens, 1), "heads": (1, tokens, 2), "samples": (2, tokens, 1)}[axis]
    near = torch.randn(*shape, 64, device=device).half()
    x = torch.empty_strided((*shape, 64), (*strides, 1), dtype=torch.float16, device=device)
    for key in (slice(0, 64), slice(64, tokens)):
        x[:, key] = near[:, key]
    want, _ = run(near, near, near, scale=0.125)
    out = torch.empty_strided(x.shape, x.stride(), dtype=torch.float16, device=device)
    run(x, x, x, scale=0.125, out=out)
    assert torch.equal(out, want)


def test_half_precision_heads_of_the_compiled_widths_go_to_the_kernel(monkeypatch, device):
    q, k, v = heads(66, 65, 64, torch.float16, device)
    launched = []

    def launch(*args, **kwargs):
        launched.append(args[0].shape)
        return attention_triton(*args, **kwargs)

    monkeypatch.setattr(MODULE, "runs_triton", lambda x: True)
    monkeypatch.setattr(MODULE, "attention_triton", launch)
    out, lse = attention(q, k, v, return_lse=True)
    check((out, lse), truth(q, k, v, 0.125))
    assert torch.equal(attention(q, k, v), out)
    assert launched == [q.shape, q.shape]
    assert not kernel_serves(q.float())
    assert not kernel_serves(q[..., :32])
    assert kernel_serves(heads(1, 1, 128, torch.bfloat16, device)[0])


@pytest.mark.parametrize(
    ("dtype", "head_dim"),
    [(torch.float32, 128), (torch.float64, 64), (torch.bfloat16, 24), (torch.float16, 8)],
    ids=str,
)
def test_other_heads_run_the_reference(dtype, head_dim, device):
    q, k, v = heads(33, 65, head_dim, dtype, device, count=2)
    out, lse = attention(q, k, v, last_count=5, return_lse=True)
    scores = torch.einsum("btnd,bsnd->bnts", q.double(), k.double()) * head_dim**-0.5
    scores[..., -1] += math.log(5)
    assert out.dtype == dtype
    check((out, lse), (torch.einsum("bnts,bsnd->btnd", scores.softmax(-1), v.double()), scores.logsumexp(-1)))
    assert torch.equal(attention(q, k, v, last_count=5), out)


def test_a_gpu_takes_the_newest_row_that_is_not_newer(device):
    ada = pick(89, 128)
    assert ada == pick(80, 128) == pick(86, 128) == pick(100, 128) == pick(120, 128)
    assert not ada.ahead
    assert pick(90, 128).ahead, "the tests' `hopper` takes the other path"
    assert device.type != "cpu" or architecture(torch.empty(0)) == 89


def test_tiles_keep_their_rules():
    assert KEYS == KEY_BLOCK
    for _, tiles in TILES:
        assert tuple(tiles) == HEAD_DIMS
        for head_dim, tile in tiles.items():
            assert QUERY_BLOCK % tile.queries == 0
            assert head_dim % tile.part == 0
            assert tile.part <= tile.queries


ZEROS = torch.zeros(2, 5, 3, 16)
FAR = torch.empty_strided((2, 5, 3, 16), (0, 2**24, 0, 1))  # never touched


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"q": ZEROS[0]}, r"q: must be \[B, T, N, D\], none of them 0, got \(5, 3, 16\)"),
        ({"q": ZEROS[:, :0]}, r"q: must be \[B, T, N, D\], none of them 0, got \(2, 0, 3, 16\)"),
        ({"q": ZEROS.int()}, "q: must be float16, bfloat16, float32 or float64, got torch.int32"),
        (
            {"q": ZEROS.transpose(1, 3).contiguous().transpose(1, 3)},
            "q: channels must be adjacent in memory, got strides",
        ),
        ({"k": ZEROS[:1]}, r"k: must be \[2, tokens, 3, 16\], got \(1, 5, 3, 16\)"),
        ({"k": ZEROS[:, :0]}, r"k: must be \[2, tokens, 3, 16\], got \(2, 0, 3, 16\)"),
        ({"k": ZEROS.half()}, "k: must be torch.float32, like q, got torch.float16"),
        ({"v": ZEROS[:, :4]}, r"v: must be \[2, 5, 3, 16\], got \(2, 4, 3, 16\)"),
        ({"v": ZEROS.to("meta")}, "v: must be on cpu, like q, got meta"),
        ({"v": ZEROS[..., :1].expand(2, 5, 3, 16)}, "v: channels must be adjacent in memory"),
        ({"k": FAR}, "k: tokens must be less than 16777216 elements apart, got strides"),
        ({"out": ZEROS[:, 1:]}, r"out: must be \[2, 5, 3, 16\], got \(2, 4, 3, 16\)"),
        ({"out": ZEROS.double()}, "out: must be torch.float32, like q, got torch.float64"),
        ({"scale": 0.0}, "scale: must be above 0 and finite, got 0.0"),
        ({"scale": math.nan}, "scale: must be above 0 and finite, got nan"),
        ({"last_count": 0}, "last_count: must be at least 1, got 0"),
    ],
)
def test_attention_refuses(arguments, message):
    good = {"q": ZEROS, "k": ZEROS, "v": ZEROS}
    attention(**good)
    with pytest.raises(ValueError, match=message):
        attention(**(good | arguments))
