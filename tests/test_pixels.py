"""Pixels on their way to the host: whose turn it is when, and on a GPU the same bytes as on the CPU."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from wanfast import pixels
from wanfast.errors import RequestError
from wanfast.pixels import on_host, to_uint8


def test_on_a_cpu_each_chunk_comes_before_the_next_is_made() -> None:
    log: list[str] = []

    def chunks() -> Iterator[Tensor]:
        for index in range(3):
            log.append(f"made {index}")
            yield torch.full((1, 3, 1, 2, 2), index / 2)

    for index, got in enumerate(on_host(chunks())):
        log.append(f"given {index}")
        assert got.unique().tolist() == [(127, 191, 255)[index]]
    assert log == ["made 0", "given 0", "made 1", "given 1", "made 2", "given 2"]


@pytest.mark.parametrize(
    "want",
    [
        [],
        ["begin 0", "wait 0"],
        ["begin 0", "begin 1", "wait 0", "begin 2", "wait 1", "begin 3", "wait 2", "wait 3"],
    ],
    ids=len,
)
def test_from_a_gpu_the_next_chunk_is_begun_before_one_is_waited_for(
    want: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    log: list[str] = []

    class Copy:
        def __init__(self, frames: Any) -> None:
            self.name = frames.name
            log.append(f"begin {self.name}")

        def result(self) -> Tensor:
            log.append(f"wait {self.name}")
            return torch.tensor(self.name)

    monkeypatch.setattr(pixels, "_Copy", Copy)
    count = len(want) // 2
    chunks = (SimpleNamespace(device=torch.device("cuda"), name=index) for index in range(count))
    assert [int(got) for got in on_host(chunks)] == list(range(count))  # type: ignore[arg-type]
    assert log == want


@pytest.mark.gpu
def test_a_gpu_s_pixels_are_the_cpu_s() -> None:
    draw = torch.Generator().manual_seed(0)
    chunks = [torch.randn(1, 3, frames, 33, 50, generator=draw) for frames in (1, 4, 4)]
    got = list(on_host(chunk.cuda() for chunk in chunks))
    assert all(torch.equal(one, to_uint8(chunk)) for one, chunk in zip(got, chunks, strict=True))
    assert all(one.device.type == "cpu" and one.is_contiguous() for one in got)
    broken = [chunks[0].cuda(), torch.full_like(chunks[1], float("nan")).cuda()]
    with pytest.raises(RequestError, match="finite"):
        list(on_host(iter(broken)))
