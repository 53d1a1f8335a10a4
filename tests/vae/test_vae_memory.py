"""The counted memory and work of both VAEs against the allocator's record and torch's count of operations."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from tracked import tracked_peak

from wanfast.checkpoint.reader import memory_reader
from wanfast.config import VAE_2_1, VAE_2_2, VAEConfig
from wanfast.vae import conv
from wanfast.vae.blocks import History
from wanfast.vae.decode import decode_frame
from wanfast.vae.encode import encode_chunk, encode_chunks
from wanfast.vae.memory import decode_activations, encode_activations
from wanfast.vae.sizes import expected_tensors
from wanfast.vae.tiles import cut_strips, decode_halo
from wanfast.vae.weights import VAEWeights, load_vae

CONFIGS = [replace(config, encoder_dim=32, decoder_dim=32) for config in (VAE_2_1, VAE_2_2)]
VERSIONS = pytest.mark.parametrize("config", CONFIGS, ids=["2.1", "2.2"])
LENGTHS = pytest.mark.parametrize("num_frames", [1, 2, 3])
STRIPS = pytest.mark.parametrize(("num_tiles", "num_frames", "rows"), [(2, 1, 10), (3, 3, 4)])
ROWS, COLUMNS = 8, 12
TOLERANCE = 0.05


def _vae(config: VAEConfig) -> VAEWeights:
    state = {name: 0.05 * torch.randn(shape) for name, shape in expected_tensors(config).items()}
    return load_vae(memory_reader(state), config)


def _decoding(vae: VAEWeights, num_frames: int, rows: int = ROWS) -> Callable[[], None]:
    latents = torch.randn(1, vae.config.z_dim, num_frames, rows, COLUMNS)

    @torch.no_grad()
    def run() -> None:
        history: History | None = None
        for frame in latents.split(1, dim=2):
            _, history = decode_frame(vae, frame, history)

    return run


def _encoding(vae: VAEWeights, num_frames: int, rows: int = ROWS) -> Callable[[], None]:
    stride = vae.config.spatial_stride

    @torch.no_grad()
    def run() -> None:
        history: History | None = None
        for index in range(num_frames):
            frames = torch.zeros(1, 3, 4 if index else 1, rows * stride, COLUMNS * stride)
            _, history = encode_chunk(vae, frames, history)

    return run


@VERSIONS
@LENGTHS
def test_the_count_of_decoding_is_the_allocator_s_record(config: VAEConfig, num_frames: int) -> None:
    counted = decode_activations(config, rows=ROWS, columns=COLUMNS, num_frames=num_frames)
    assert counted.total == pytest.approx(tracked_peak(_decoding(_vae(config), num_frames)), rel=TOLERANCE)


@VERSIONS
@LENGTHS
def test_the_count_of_encoding_is_the_allocator_s_record(config: VAEConfig, num_frames: int) -> None:
    stride = config.spatial_stride
    counted = encode_activations(config, height=ROWS * stride, width=COLUMNS * stride, num_frames=num_frames)
    assert counted.total == pytest.approx(tracked_peak(_encoding(_vae(config), num_frames)), rel=TOLERANCE)


@VERSIONS
@STRIPS
def test_the_count_of_decoding_in_strips_is_the_allocator_s_record(
    config: VAEConfig, num_tiles: int, num_frames: int, rows: int
) -> None:
    vae, size = _vae(config), {"rows": rows, "columns": 30}
    latents = torch.randn(1, config.z_dim, num_frames, *size.values())

    @torch.no_grad()
    def run() -> None:
        for strip in cut_strips(rows, 30, num_tiles, decode_halo(config)):
            history: History | None = None
            for frame in latents.split(1, dim=2):
                _, history = decode_frame(vae, frame, history, strip)

    counted = decode_activations(config, **size, num_frames=num_frames, num_tiles=num_tiles)
    assert counted.total == pytest.approx(tracked_peak(run), rel=TOLERANCE)
    assert counted.total < 0.8 * decode_activations(config, **size, num_frames=num_frames).total


@VERSIONS
@STRIPS
def test_the_count_of_encoding_in_strips_is_the_allocator_s_record(
    config: VAEConfig, num_tiles: int, num_frames: int, rows: int
) -> None:
    vae, stride = _vae(config), config.spatial_stride
    size = {"height": rows * stride, "width": 30 * stride}

    @torch.no_grad()
    def run() -> None:
        first = torch.zeros(1, 3, 1, *size.values())
        later = torch.zeros(1, 3, 4, *size.values()) if num_frames > 1 else first
        encode_chunks(vae, [first, *[later] * (num_frames - 1)], num_tiles)

    counted = encode_activations(config, **size, num_frames=num_frames, num_tiles=num_tiles)
    assert counted.features == 4 * num_frames * 4 * config.encoder_dim * rows * 30  # too small here to show below
    assert counted.total == pytest.approx(tracked_peak(run), rel=TOLERANCE)
    assert counted.total < 0.8 * encode_activations(config, **size, num_frames=num_frames).total


@VERSIONS
def test_torch_s_own_convolutions_are_counted_with_the_frames_they_join(
    config: VAEConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a GPU's library takes besides is its own affair, and so is what torch's loops take on a CPU."""
    real = F.conv3d

    def conv3d(x: Tensor, weight: Tensor, bias: Tensor, **options: Any) -> Tensor:
        shape = real(x.to("meta"), weight.to("meta"), bias.to("meta"), **options).shape
        return torch.empty(shape, memory_format=torch.channels_last_3d)

    monkeypatch.setattr(conv, "_C", None)
    monkeypatch.setattr(F, "conv3d", conv3d)
    vae, stride = _vae(config), config.spatial_stride
    decoded = decode_activations(config, rows=ROWS, columns=COLUMNS, num_frames=3, is_joined=True)
    assert decoded.total == pytest.approx(tracked_peak(_decoding(vae, 3)), rel=TOLERANCE)
    size = {"height": ROWS * stride, "width": COLUMNS * stride}
    encoded = encode_activations(config, **size, num_frames=3, is_joined=True)
    assert encoded.total == pytest.approx(tracked_peak(_encoding(vae, 3)), rel=TOLERANCE)


@VERSIONS
def test_the_work_is_what_torch_counts(config: VAEConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conv, "_C", None)  # torch does not see into the extension
    vae, stride, rows = _vae(config), config.spatial_stride, 2
    for num_frames in (1, 2):
        decoded = decode_activations(config, rows=rows, columns=COLUMNS, num_frames=num_frames)
        size = {"height": rows * stride, "width": COLUMNS * stride}
        encoded = encode_activations(config, **size, num_frames=num_frames)
        for flops, run in ((decoded.chunk_flops, _decoding), (encoded.chunk_flops, _encoding)):
            totals = [0]
            for count in range(1, num_frames + 1):
                with FlopCounterMode(display=False) as counter:
                    run(vae, count, rows)()
                totals.append(counter.get_total_flops())
            assert flops == pytest.approx(totals[-1] - totals[-2], rel=0.03)
