import math

import pytest
import torch

from wanfast.checkpoint.bind import check_names, read_linear, read_tensor
from wanfast.checkpoint.reader import memory_reader
from wanfast.errors import CheckpointError


def _reader(**tensors):
    return memory_reader({name.replace("_", "."): tensor for name, tensor in tensors.items()}, "model.safetensors")


def test_a_tensor_is_taken_as_it_is_or_cast():
    tensor = torch.tensor([[1.0, -3.0]])
    reader = _reader(a=tensor)
    assert read_tensor(reader, "a", (1, 2)).data_ptr() == tensor.data_ptr()
    cast = read_tensor(reader, "a", (1, 2), dtype=torch.bfloat16)
    assert cast.dtype == torch.bfloat16
    assert cast.tolist() == [[1.0, -3.0]]


def test_a_missing_tensor_is_named():
    with pytest.raises(CheckpointError, match=r"model\.safetensors: tensor b is missing"):
        read_tensor(_reader(a=torch.ones(1)), "b", (1,))


def test_a_mis_shaped_tensor_is_named():
    with pytest.raises(CheckpointError, match=r"model\.safetensors: tensor a has shape \[3\], expected \[1, 3\]"):
        read_tensor(_reader(a=torch.ones(3)), "a", (1, 3))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("stored", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16])
def test_one_value_that_is_not_finite_is_found(value, stored, dtype):
    tensor = torch.zeros(4, 5, dtype=stored)
    tensor[2, 3] = value
    with pytest.raises(CheckpointError, match=rf"tensor a: 1 of 20 values are not finite .*first: {value} at \[2, 3\]"):
        read_tensor(_reader(a=tensor), "a", (4, 5), dtype=dtype)


def test_nan_in_fp8_is_found():
    tensor = torch.tensor([1.0, math.nan]).to(torch.float8_e4m3fn)
    with pytest.raises(CheckpointError, match="1 of 2 values are not finite"):
        read_tensor(_reader(a=tensor), "a", (2,), dtype=torch.bfloat16)
    assert read_tensor(_reader(a=tensor[:1]), "a", (1,), dtype=torch.bfloat16).item() == 1


def test_a_value_too_large_for_the_dtype_asked_for_is_found():
    reader = _reader(a=torch.tensor([1.0, 7e4]))
    assert read_tensor(reader, "a", (2,), dtype=torch.bfloat16).isfinite().all()
    with pytest.raises(CheckpointError, match=r"1 of 2 values are not finite in float16 \(first: 70000.0 at \[1\]\)"):
        read_tensor(reader, "a", (2,), dtype=torch.float16)


def test_an_empty_or_scalar_tensor_is_read():
    assert read_tensor(_reader(a=torch.empty(0, 2)), "a", (0, 2)).shape == (0, 2)
    assert read_tensor(_reader(a=torch.tensor(2.0)), "a", ()).item() == 2


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.uint8])
def test_integers_are_no_weights(dtype):
    with pytest.raises(CheckpointError, match=r"tensor a is (int8|bool|uint8), expected floating-point weights"):
        read_tensor(_reader(a=torch.ones(2, dtype=dtype)), "a", (2,), dtype=torch.float32)


def test_a_linear_layer_has_both_its_tensors():
    reader = _reader(q_weight=torch.ones(2, 3), q_bias=torch.ones(2))
    layer = read_linear(reader, "q", 2, 3, dtype=torch.bfloat16)
    assert layer.weight.shape == (2, 3)
    assert layer.bias is not None and layer.bias.dtype == layer.weight.dtype == torch.bfloat16
    assert read_linear(reader, "q", 2, 3, bias=False, dtype=torch.float32).bias is None
    with pytest.raises(CheckpointError, match=r"tensor q\.weight has shape \[2, 3\], expected \[3, 2\]"):
        read_linear(reader, "q", 3, 2, dtype=torch.float32)
    with pytest.raises(CheckpointError, match=r"tensor k\.bias is missing"):
        read_linear(_reader(k_weight=torch.ones(2, 3)), "k", 2, 3, dtype=torch.float32)


def test_exact_names_pass():
    check_names(_reader(a=torch.ones(2), b=torch.ones(1, 3)), {"a": (2,), "b": (1, 3)}, part="VAE")


def test_all_kinds_of_difference_are_named_at_once_with_counts():
    reader = memory_reader({"w": torch.ones(2), "x1": torch.ones(1), "x0": torch.ones(1)}, "vae.pth")
    expected = {"w": (3,), **{f"m{i}": (1,) for i in range(5)}}
    with pytest.raises(CheckpointError) as caught:
        check_names(reader, expected, part="VAE")
    assert str(caught.value) == (
        "vae.pth: not the tensors of the VAE: 5 missing (m0, m1, m2, ...); 2 unexpected (x0, x1); "
        "1 mis-shaped (w is [2], expected [3], in vae.pth)"
    )


def test_check_names_says_the_stored_name_of_an_unexpected_tensor():
    reader = memory_reader({"stored": torch.ones(1)}, "f").renamed({"stored": "official"})
    with pytest.raises(CheckpointError, match=r"1 unexpected \(official \(stored as stored\)\)"):
        check_names(reader, {}, part="DiT")
