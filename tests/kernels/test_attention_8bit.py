import pytest
import torch
from attention_tensors import attention_tensors, distance, exact_attention

from wanfast.kernels import BlockLists, attention_8bit, attention_int8, quantize_keys, quantize_queries, quantize_values


@pytest.mark.parametrize("variant", ["fp8", "fp16"])
@pytest.mark.parametrize("kind", ["biased", "one-hot"])
def test_attention_8bit_is_near_float64(variant, kind, device):
    q, k, v = (x.to(device) for x in attention_tensors(kind, queries=130, keys=600, heads=2, dim=64))
    before = [x.clone() for x in (q, k, v)]
    got = attention_8bit(q, k, v, variant=variant)
    assert got.dtype == q.dtype and got.is_contiguous()
    assert distance(got=got, want=exact_attention(q, k, v)).cosine >= 0.999
    assert all(torch.equal(x, old) for x, old in zip((q, k, v), before, strict=True))


def test_fp16_weights_are_nearer_than_e4m3(device):
    q, k, v = (x.to(device) for x in attention_tensors("gaussian", queries=64, keys=1000, heads=1, dim=128))
    want = exact_attention(q, k, v)
    worst = {name: distance(got=attention_8bit(q, k, v, variant=name), want=want).worst_row for name in ("fp8", "fp16")}
    assert worst["fp16"] < worst["fp8"] / 2


def test_it_is_its_parts_in_a_row(device):
    q, k, v = (torch.randn(2, tokens, 2, 64, device=device).half() for tokens in (130, 70, 70))
    columns = torch.tensor([[0, 1], [1, 0]], dtype=torch.int32, device=device).expand(2, 2, 2, 2).contiguous()
    counts = torch.tensor([2, 1], dtype=torch.int32, device=device).expand(2, 2, 2).contiguous()
    lists = BlockLists(columns, counts)
    parts = quantize_queries(q, softmax_scale=0.3), quantize_keys(k), quantize_values(v)
    want = attention_int8(*parts, out_dtype=torch.float16, lists=lists)
    out = torch.empty(2, 130, 2, 64, dtype=torch.float16, device=device)
    assert attention_8bit(q, k, v, softmax_scale=0.3, lists=lists, out=out) is out
    assert torch.equal(out, want)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"variant": "int8"}, "variant: must be one of fp8, fp16, got int8"),
        ({"k": torch.zeros(1, 5, 2, 32)}, "k: head dimension must be 64 or 128, got 32"),
        ({"k": torch.zeros(1, 5, 3, 64)}, r"k.values: must be \(1, 2, 1, 64, 64\), got \(1, 3, 1, 64, 64\)"),
        ({"v": torch.zeros(1, 6, 2, 64)}, "v.tokens: must be 5, like k.tokens, got 6"),
        ({"out": torch.zeros(1, 4, 2, 64)}, r"out: must be \(1, 3, 2, 64\), got \(1, 4, 2, 64\)"),
    ],
)
def test_attention_8bit_refuses(arguments, message):
    good = {"q": torch.zeros(1, 3, 2, 64), "k": torch.zeros(1, 5, 2, 64), "v": torch.zeros(1, 5, 2, 64)}
    attention_8bit(**good)
    with pytest.raises(ValueError, match=message):
        attention_8bit(**(good | arguments))
