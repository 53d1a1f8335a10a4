"""Strips against whole pictures: what is kept of a strip knows nothing of the cut, in both directions and both VAEs."""

import dataclasses

import pytest
import torch
from reference.vae import golden_input, golden_tensors, small_config
from tolerance import assert_close
from torch import Tensor

from wanfast.checkpoint.reader import memory_reader
from wanfast.config import VAE_2_1, VAE_2_2, VAEConfig
from wanfast.pixels import to_uint8
from wanfast.vae import encode as encode_module
from wanfast.vae.decode import decode_frame
from wanfast.vae.encode import encode, encode_chunks
from wanfast.vae.pixels import decode_pixels
from wanfast.vae.tiles import Strip, cut_strips, decode_halo, encode_halo, most_tiles
from wanfast.vae.weights import VAEWeights, expected_tensors, load_vae

LANDSCAPE, PORTRAIT = (2, 23), (23, 2)  # rows and columns of latents
CASES = pytest.mark.parametrize(
    ("num_tiles", "size", "content"),
    [(2, LANDSCAPE, "smooth"), (3, LANDSCAPE, "random"), (3, PORTRAIT, "smooth"), (2, PORTRAIT, "random")],
)


def _vae(config: VAEConfig) -> VAEWeights:
    return load_vae(memory_reader(golden_tensors(expected_tensors(config))), config)


@pytest.fixture(scope="module", params=["2.1", "2.2"])
def small(request: pytest.FixtureRequest) -> VAEWeights:
    return _vae(small_config(request.param))


def _picture(content: str, shape: tuple[int, ...]) -> Tensor:
    """[1, C, F, H, W]: white noise, or slow waves with a slope, in [-1, 1] or about."""
    if content == "random":
        return golden_input("a picture", shape).clamp(-2, 2) / 2
    _, channels, frames, height, width = shape
    c, t, y, x = torch.meshgrid(*map(torch.arange, (channels, frames, height, width)), indexing="ij")
    return (0.7 * ((2 * y / height + 3 * x / width + t / 5) + c).sin() + 0.3 * x / width)[None].float()


def _decoded(vae: VAEWeights, latents: Tensor, strip: Strip | None = None) -> Tensor:
    """Not clamped, which would hide differences."""
    history, frames = None, []
    for latent_frame in latents.split(1, dim=2):
        chunk, history = decode_frame(vae, latent_frame, history, strip)
        frames.append(chunk)
    return torch.cat(frames, dim=2)


def _seams(error: Tensor, strips: list[Strip], scale: int) -> float:
    """The largest error in the two pixels on either side of a cut."""
    cuts = [strip.start * scale for strip in strips[1:]]
    return max(float(error.narrow(strips[0].axis, cut - 2, 4).max()) for cut in cuts)


@CASES
def test_decoding_in_strips_leaves_no_seam(
    small: VAEWeights, num_tiles: int, size: tuple[int, int], content: str
) -> None:
    latents = _picture(content, (1, 4, 2, *size))
    whole = _decoded(small, latents)
    strips = cut_strips(*size, num_tiles, decode_halo(small.config))
    got = torch.cat([_decoded(small, latents, strip) for strip in strips], dim=strips[0].axis)
    assert_close(got=got, want=whole, op="vae_strips")
    # Measured where this was written: equal to the bit, in every case.
    assert _seams((got - whole).abs(), strips, small.config.spatial_stride) <= 1e-6 * float(whole.abs().max())


@CASES
def test_encoding_in_strips_leaves_no_seam(
    small: VAEWeights, num_tiles: int, size: tuple[int, int], content: str
) -> None:
    stride = small.config.spatial_stride
    video = _picture(content, (1, 3, 5, size[0] * stride, size[1] * stride))
    whole, got = encode(small, video), encode(small, video, num_tiles)
    assert_close(got=got, want=whole, op="vae_strips")
    strips = cut_strips(*size, num_tiles, encode_halo(small.config))
    # Measured where this was written: at most 4e-7 of the largest value, as everywhere else.
    assert _seams((got - whole).abs(), strips, 1) <= 2e-6 * float(whole.abs().max())


@dataclasses.dataclass(frozen=True)
class _Poisoned(Strip):
    """Reads the whole picture, but what stands further from the kept part than `halo` is NaN."""

    halo: int = 0

    def read(self, x: Tensor, scale: int) -> Tensor:
        x, size = x.clone(), x.shape[self.axis]
        before, behind = max(self.start - self.halo, 0) * scale, min((self.stop + self.halo) * scale, size)
        x.narrow(self.axis, 0, before).fill_(float("nan"))
        x.narrow(self.axis, behind, size - behind).fill_(float("nan"))
        return x


@pytest.mark.parametrize("size", [(1, 15), (15, 1)])
def test_the_decoder_reaches_as_far_as_its_halo_and_no_further(small: VAEWeights, size: tuple[int, int]) -> None:
    latents, halo = _picture("random", (1, 4, 3, *size)), decode_halo(small.config)
    axis = -1 if size[1] > 1 else -2
    for less in (0, 1):
        strip = _Poisoned(axis, 7, 8, 0, 15, halo - less)
        assert bool(_decoded(small, latents, strip).isfinite().all()) == (less == 0)


@pytest.mark.parametrize("size", [(1, 13), (13, 1)])
def test_the_encoder_reaches_as_far_as_its_halo_and_no_further(
    small: VAEWeights, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    stride, halo = small.config.spatial_stride, encode_halo(small.config)
    video = _picture("random", (1, 3, 9, size[0] * stride, size[1] * stride))
    axis = -1 if size[1] > 1 else -2
    for less in (0, 1):
        strips = [_Poisoned(axis, start, start + 1, 0, 13, halo - less) for start in range(13)]
        monkeypatch.setattr(encode_module, "cut_strips", lambda *_, strips=strips: strips)
        assert bool(encode(small, video, 13).isfinite().all()) == (less == 0)


@pytest.mark.parametrize("config", [VAE_2_1, VAE_2_2], ids=["2.1", "2.2"])
def test_at_real_channel_counts(config: VAEConfig) -> None:
    """One frame of 2.1's whole width and of a quarter of 2.2's: what is wider takes minutes here."""
    config = config if config.version == "2.1" else dataclasses.replace(config, encoder_dim=40, decoder_dim=64)
    vae, size = _vae(config), (1, 16)
    latents = _picture("smooth", (1, config.z_dim, 1, *size))
    strips = cut_strips(*size, 2, decode_halo(config))
    assert [strip.read_stop - strip.read_start for strip in strips] == [14, 14]
    got = torch.cat([_decoded(vae, latents, strip) for strip in strips], dim=-1)
    assert_close(got=got, want=_decoded(vae, latents), op="vae_strips")


@pytest.mark.parametrize("num_tiles", [1, 3])
@pytest.mark.parametrize("size", [(1, 17), (17, 1)])
def test_pixels_are_those_of_whole_pictures_however_they_are_made(
    small: VAEWeights, num_tiles: int, size: tuple[int, int]
) -> None:
    latents = _picture("random", (1, 4, 3, *size))
    want = to_uint8(_decoded(small, latents))
    shares: list[int] = []
    chunks = list(decode_pixels(small, latents, num_tiles, on_frames=shares.append))
    assert [len(chunk) for chunk in chunks] == [1, 4, 4]
    assert all(chunk.is_contiguous() for chunk in chunks)
    # The last digit of fp32 may carry one value in a million over an integer.
    assert float((torch.cat(chunks).int() - want.int()).abs().max()) <= 1
    assert float((torch.cat(chunks) != want).float().mean()) < 1e-4
    assert shares == sorted(shares) and shares[-1] == 9 and len(shares) == 3 * num_tiles


@pytest.mark.parametrize("num_tiles", [1, 2])
def test_frames_that_are_there_are_not_given_out_again(small: VAEWeights, num_tiles: int) -> None:
    latents = _picture("random", (1, 4, 3, 1, 9))
    want = torch.cat(list(decode_pixels(small, latents, num_tiles)))
    for skip in (1, 5):
        assert torch.equal(torch.cat(list(decode_pixels(small, latents, num_tiles, skip=skip))), want[skip:])


def test_chunks_of_any_origin_are_encoded_in_strips(small: VAEWeights) -> None:
    stride = small.config.spatial_stride
    first = _picture("smooth", (1, 3, 1, 2 * stride, 16 * stride))
    grey = torch.zeros(1, 3, 4, 2 * stride, 16 * stride)
    want = encode(small, torch.cat((first, grey, grey), dim=2))
    assert_close(got=encode_chunks(small, iter([first, grey, grey]), 2), want=want, op="vae_strips")


def test_strips_cover_the_longer_side_once() -> None:
    for rows, columns, num_tiles, halo in ((90, 160, 3, 6), (160, 90, 4, 5), (8, 8, 1, 6), (9, 31, 7, 2)):
        strips = cut_strips(rows, columns, num_tiles, halo)
        assert len(strips) == num_tiles
        size = max(rows, columns)
        kept = [place for strip in strips for place in range(strip.start, strip.stop)]
        assert kept == list(range(size))
        for strip in strips:
            assert strip.axis == (-1 if columns >= rows else -2)
            assert strip.read_start == max(0, strip.start - halo)
            assert strip.read_stop == min(size, strip.stop + halo)
        widths = [strip.stop - strip.start for strip in strips]
        assert max(widths) - min(widths) <= 1
    assert most_tiles(90, 160) == 20
    assert most_tiles(4, 6) == 1
    with pytest.raises(ValueError, match=r"num_tiles: must be from 1 to 6.*got 7"):
        cut_strips(4, 6, 7, 1)
