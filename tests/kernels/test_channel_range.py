import pytest
import torch

from wanfast.kernels.channel_range import channel_range, channel_range_reference, channel_range_triton

IMPLEMENTATIONS = pytest.mark.parametrize(
    "run", [channel_range_triton, channel_range_reference], ids=["kernel", "reference"]
)


def assert_range(x, found):
    mean, low, high = found
    assert all(part.dtype == torch.float32 for part in found)
    torch.testing.assert_close(mean.double(), x.double().mean(1), rtol=1e-6, atol=1e-6 * x.abs().max().item())
    assert torch.equal(low, x.amin(1).float())
    assert torch.equal(high, x.amax(1).float())


@IMPLEMENTATIONS
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 64), (2, 63, 2, 128), (1, 1025, 1, 64), (1, 2100, 1, 128), (1, 2, 24, 128)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_mean_and_extremes_equal_float64(run, shape, dtype, device):
    x = (torch.randn(shape, device=device) + 10 * torch.randn(shape[2:], device=device)).to(dtype)
    assert_range(x, run(x))


@IMPLEMENTATIONS
@pytest.mark.parametrize("sign", [-1, 1])
def test_what_lies_past_the_last_token_is_no_extreme(run, sign, device):
    x = sign * (5 + torch.rand(1, 70, 2, 64, device=device))
    assert_range(x, run(x))


@IMPLEMENTATIONS
def test_the_tensor_may_be_part_of_a_packed_projection(run, device):
    x = torch.randn(2, 66, 3, 5, 64, device=device).bfloat16()[:, :, 1, ::2]
    assert_range(x, run(x))


def test_channel_range_refuses_what_is_no_head():
    with pytest.raises(ValueError, match="x: head dimension must be 64 or 128, got 32"):
        channel_range(torch.zeros(1, 2, 3, 32))
