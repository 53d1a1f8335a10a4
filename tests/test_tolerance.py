"""The comparison that all other tests rest on can fail, and says where."""

import pytest
import torch
from tolerance import assert_close


def test_equal_tensors_pass():
    want = torch.randn(3, 5)
    assert_close(got=want.clone(), want=want.double(), op="layer_norm")
    assert_close(got=torch.zeros(4), want=torch.zeros(4), op="golden")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_fails_on_either_side(bad):
    good, broken = torch.ones(2, 3), torch.ones(2, 3)
    broken[1, 2] = bad
    with pytest.raises(AssertionError, match=r"golden float32: not finite at \(1, 2\) \(1 of 6 values\)"):
        assert_close(got=broken, want=good, op="golden")
    with pytest.raises(AssertionError, match=r"the truth itself is not finite at \(1, 2\)"):
        assert_close(got=good, want=broken, op="golden")


def test_another_shape_or_nothing_at_all_fails():
    with pytest.raises(AssertionError, match=r"shape \(3, 1\), want \(3,\)"):
        assert_close(got=torch.ones(3, 1), want=torch.ones(3), op="golden")
    with pytest.raises(AssertionError, match="nothing to compare"):
        assert_close(got=torch.ones(0), want=torch.ones(0), op="golden")


def test_a_model_is_held_to_its_largest_value():
    want = torch.tensor([10.0, 1e-6])
    assert_close(got=want + torch.tensor([0.0, 9e-5]), want=want, op="dit_fp32")
    with pytest.raises(AssertionError, match=r"worst error 1.1e-05 of max\|want\|.*worst at \(1,\)"):
        assert_close(got=want + torch.tensor([0.0, 1.1e-4]), want=want, op="dit_fp32")


def test_a_kernel_is_held_to_one_rounding():
    want = torch.rand(4096, dtype=torch.float64) + 1
    assert_close(got=want.half(), want=want, op="layer_norm")
    next_up = torch.nextafter(want.half(), torch.tensor(2.0).half())
    with pytest.raises(AssertionError, match="worst error"):
        assert_close(got=next_up, want=want, op="layer_norm")


def test_a_small_error_everywhere_fails_by_its_rms():
    got = torch.full((64,), 1.5).half()
    want = got.double() * (1 - torch.finfo(torch.half).eps / 4)  # half a unit roundoff, well below the worst allowed
    with pytest.raises(AssertionError, match=r"worst error 0\.5 u \(limit 1\.25\), RMS 0\.5 u \(limit 0\.4\)"):
        assert_close(got=got, want=want, op="layer_norm")
