"""The C++ extension's direct sum of stride 1 in fp32 on every instruction set of this CPU, against float64."""

import threading
import time
from dataclasses import replace

import pytest
import torch
from tolerance import assert_close
from torch import Tensor

from wanfast.vae.conv import causal_conv3d_extension, causal_conv3d_reference, prepare

_C = pytest.importorskip("wanfast._C", reason="wanfast was installed without a C++ compiler")

SETS = _C.instruction_sets()
CL3D = torch.channels_last_3d


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def problem(shape: tuple[int, ...], out_channels: int, seen: int, kernel: tuple[int, ...]):
    """x [B, C, T, H, W], its history of `seen` frames, weight and bias."""
    batch, channels, _, height, width = shape
    x = torch.randn(shape).contiguous(memory_format=CL3D)
    history = torch.randn(batch, channels, seen, height, width).contiguous(memory_format=CL3D) if seen else None
    weight = torch.randn(out_channels, channels, *kernel)
    return x, history, weight, torch.randn(out_channels)


def truth(x: Tensor, history: Tensor | None, weight: Tensor, bias: Tensor) -> Tensor:
    seen = None if history is None else history.double()
    return causal_conv3d_reference(x.double(), seen, weight.double(), bias.double())


def test_lists_the_portable_path_last():
    assert SETS[-1] == "portable"
    assert len(SETS) == len(set(SETS))


# Channel counts of the models and around them, and where a tile, a panel or a block of channels ends.
CASES = [
    # x [B, C, T, H, W], O, frames of history
    ((1, 1, 1, 1, 1), 1, 0),
    ((2, 5, 3, 5, 9), 7, 1),
    ((1, 3, 1, 7, 29), 96, 0),
    ((1, 12, 2, 3, 13), 20, 2),
    ((1, 96, 2, 4, 6), 3, 2),
    ((2, 17, 2, 2, 15), 33, 1),
    ((1, 31, 1, 3, 28), 16, 2),
    ((1, 192, 1, 2, 7), 48, 0),
    ((1, 385, 1, 2, 3), 17, 1),
]


@pytest.mark.parametrize("instruction_set", SETS)
@pytest.mark.parametrize("kernel", [(3, 3, 3), (3, 1, 1), (1, 1, 1), (1, 3, 3), (3, 3, 1), (1, 1, 3)])
@pytest.mark.parametrize(("shape", "out_channels", "seen"), CASES)
def test_equals_float64(instruction_set, kernel, shape, out_channels, seen):
    x, history, weight, bias = problem(shape, out_channels, min(seen, kernel[0] - 1), kernel)
    y = causal_conv3d_extension(x, history, prepare(weight), bias, method="direct", instruction_set=instruction_set)
    assert_close(got=y, want=truth(x, history, weight, bias), op="conv3d_fp32")


@pytest.mark.parametrize("instruction_set", SETS)
@pytest.mark.parametrize("width", range(1, 33))
def test_every_width_of_a_row(instruction_set, width):
    x, history, weight, bias = problem((1, 2, 1, 2, width), 33, 1, (3, 3, 3))
    y = causal_conv3d_extension(x, history, prepare(weight), bias, method="direct", instruction_set=instruction_set)
    assert_close(got=y, want=truth(x, history, weight, bias), op="conv3d_fp32")


@pytest.mark.parametrize("instruction_set", SETS)
def test_any_number_of_threads_gives_the_same_bits(instruction_set, set_threads):
    x, history, weight, bias = problem((2, 40, 2, 20, 31), 48, 1, (3, 3, 3))
    packed, results = prepare(weight), []
    for threads in (1, 2, 4, 64):
        set_threads(threads)
        results.append(
            causal_conv3d_extension(x, history, packed, bias, method="direct", instruction_set=instruction_set)
        )
    assert all(torch.equal(results[0], other) for other in results[1:])
    assert_close(got=results[0], want=truth(x, history, weight, bias), op="conv3d_fp32")


@pytest.mark.parametrize("instruction_set", SETS)
def test_frames_batches_and_chunks_do_not_change_the_bits(instruction_set):
    x, history, weight, bias = problem((2, 20, 4, 6, 21), 19, 2, (3, 3, 3))
    packed = prepare(weight)

    def run(x: Tensor, history: Tensor | None) -> Tensor:
        return causal_conv3d_extension(x, history, packed, bias, method="direct", instruction_set=instruction_set)

    whole = run(x, history)
    assert torch.equal(run(x[1:], history[1:]), whole[1:])
    assert torch.equal(run(x[:, :, 2:], x[:, :, :2]), whole[:, :, 2:])
    assert torch.equal(run(x, None), run(x, torch.zeros_like(history)))


@pytest.mark.parametrize("instruction_set", SETS)
def test_nan_and_infinity_reach_exactly_the_outputs_that_read_them(instruction_set):
    x, history, weight, bias = problem((1, 18, 3, 6, 30), 20, 2, (3, 3, 3))
    x[0, 3, 1, 2, 15] = float("nan")
    x[0, 17, 0, 5, 29] = float("inf")
    history[0, 16, 0, 0, 0] = float("-inf")
    got = causal_conv3d_extension(x, history, prepare(weight), bias, method="direct", instruction_set=instruction_set)
    want = truth(x, history, weight, bias)
    assert torch.equal(got.isnan(), want.isnan()) and torch.equal(got.isinf(), want.isinf())
    assert 0 < int(want.isfinite().sum()) < want.numel()
    torch.testing.assert_close(got.double()[want.isfinite()], want[want.isfinite()], rtol=0, atol=1e-4)


@pytest.mark.parametrize("instruction_set", SETS)
def test_writes_every_output_whatever_memory_held(instruction_set, monkeypatch):
    x, history, weight, bias = problem((1, 18, 2, 5, 17), 35, 1, (3, 3, 3))
    packed = prepare(weight)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: empty(*args, **kwargs).fill_(float("nan")))
    y = causal_conv3d_extension(x, history, packed, bias, method="direct", instruction_set=instruction_set)
    monkeypatch.undo()
    assert_close(got=y, want=truth(x, history, weight, bias), op="conv3d_fp32")


@pytest.mark.parametrize("instruction_set", SETS)
def test_reads_and_writes_nothing_outside_its_arguments(instruction_set):
    """Each argument lies between NaN pages: reading beside it poisons the result, writing beside it is seen."""
    x, history, weight, bias = problem((1, 19, 1, 3, 15), 21, 1, (3, 3, 3))
    packed = prepare(weight)
    fenced = [torch.full((tensor.numel() + 4096,), float("nan")) for tensor in (x, history, packed.data, bias)]

    def between(page: Tensor, tensor: Tensor) -> Tensor:
        place = page[2048:-2048].as_strided(tensor.shape, tensor.stride())
        return place.copy_(tensor)

    y = causal_conv3d_extension(
        between(fenced[0], x),
        between(fenced[1], history),
        replace(packed, data=between(fenced[2], packed.data)),
        between(fenced[3], bias),
        instruction_set=instruction_set,
    )
    assert_close(got=y, want=truth(x, history, weight, bias), op="conv3d_fp32")


def test_packs_panels_of_16_outputs_around_chunks_of_16_inputs():
    weight = torch.randn(18, 17, 3, 1, 1)
    packed = prepare(weight).data
    assert packed.numel() == 32 * 17 * 3
    first, second = packed.view(2, 17 * 3, 16)
    assert torch.equal(first[:48].view(3, 16, 16), weight[:16, :16, :, 0, 0].permute(2, 1, 0))
    assert torch.equal(first[48:].view(3, 1, 16), weight[:16, 16:, :, 0, 0].permute(2, 1, 0))
    assert torch.equal(second[48:, :2].view(3, 1, 2), weight[16:, 16:, :, 0, 0].permute(2, 1, 0))
    assert not second[:, 2:].any()


def test_refuses_an_instruction_set_the_cpu_lacks():
    x, history, weight, bias = problem((1, 2, 1, 2, 2), 2, 1, (3, 3, 3))
    with pytest.raises(ValueError, match="instruction_set: must be one this CPU has, got sse9"):
        causal_conv3d_extension(x, history, prepare(weight), bias, instruction_set="sse9")


def test_refuses_a_weight_that_is_not_packed():
    x, history, weight, bias = problem((1, 2, 1, 2, 2), 2, 1, (3, 5, 5))
    with pytest.raises(ValueError, match="weight: must be packed"):
        causal_conv3d_extension(x, history, prepare(weight), bias)


def test_python_runs_on_while_it_computes(set_threads):
    set_threads(1)
    x, history, weight, bias = problem((1, 96, 4, 40, 60), 96, 2, (3, 3, 3))
    packed, done, ticks = prepare(weight), threading.Event(), 0

    def compute() -> None:
        causal_conv3d_extension(x, history, packed, bias, instruction_set="portable")
        done.set()

    worker = threading.Thread(target=compute)
    worker.start()
    while not done.is_set():
        time.sleep(0.001)
        ticks += 1
    worker.join()
    assert ticks > 5  # with the lock held there would be none between start and end
