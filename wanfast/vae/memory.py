"""What encoding and decoding hold beside the weights, and what they compute: counted from what their code makes.

A peak is the frames that convolutions remember, which stand throughout, and the largest moment of a chunk. A moment is
counted in channels times positions: of a residual block its input, and at its second convolution that one's input and
output, for example. The convolutions of the C++ extension and of the GPU's kernel read where tensors lie; torch's get
frames joined and padded. In strips (`tiles.py`), the widest is counted, and the work of all of them.
"""

from dataclasses import dataclass, replace
from itertools import pairwise

from wanfast.config import VAEConfig
from wanfast.vae.decode import FINE_FRAMES
from wanfast.vae.sizes import PIXEL_CHANNELS
from wanfast.vae.tiles import WHOLE_LEVELS, cut_strips, decode_halo, encode_halo

_FP32 = 4  # bytes
_REMEMBERED = 2  # frames before each convolution over three


@dataclass(frozen=True, slots=True)
class VAEActivations:
    """Bytes at the peak of one half of a VAE, and the work of one chunk."""

    histories: int
    moment: int
    chunk_flops: int  # of the last chunk, in all strips, 2 per multiply-add, convolutions and attention
    features: int = 0  # what the strips of an encoder leave for the levels that see the whole picture

    @property
    def total(self) -> int:
        """The peak."""
        return self.histories + self.moment + self.features


class _Count:
    """Adds up histories and keeps the largest moment, both in numbers.

    In a video's first chunk, histories are made one by one; in later ones all of them stand from the start.
    """

    def __init__(self, *, num_frames: int, is_joined: bool) -> None:
        self.histories = self.products = self._peak = 0
        self._is_first = num_frames == 1
        self._is_joined = is_joined

    def conv(self, held: int, channels: int, out_channels: int, frames: int, area: int, taps: int = 27) -> None:
        """Count a convolution over three frames while `held` numbers beside its input and output are alive."""
        self.products += taps * channels * out_channels * frames * area
        self.histories += _REMEMBERED * channels * area
        joined = (frames + _REMEMBERED) * channels if self._is_joined else 0
        self.at(held + ((channels + out_channels) * frames + joined) * area)

    def at(self, numbers: int) -> None:
        """Count a moment."""
        self._peak = max(self._peak, numbers + (self.histories if self._is_first else 0))

    def residual(self, held: int, channels: int, out_channels: int, frames: int, area: int) -> None:
        """Count a residual block; `held` does not include its input."""
        volume = frames * area
        self.conv(held + channels * volume, channels, out_channels, frames, area)
        self.conv(held + channels * volume, out_channels, out_channels, frames, area)
        if channels != out_channels:
            self.products += channels * out_channels * volume
            self.at(held + (channels + 2 * out_channels) * volume)

    def middle(self, channels: int, frames: int, area: int) -> None:
        """Count the coarsest blocks: the attention holds its input, that normed, and queries, keys, values."""
        self.residual(0, channels, channels, frames, area)
        self.products += (4 * channels + 2 * area) * channels * frames * area
        self.at(7 * channels * frames * area)
        self.residual(0, channels, channels, frames, area)

    def result(self, itemsize: int, standing: int = 0) -> VAEActivations:
        """Give the count in bytes; `standing` numbers are there at every moment."""
        moment = standing + self._peak - (self.histories if self._is_first else 0)
        return VAEActivations(self.histories * itemsize, moment * itemsize, 2 * self.products)


def decode_activations(
    config: VAEConfig,
    *,
    rows: int,
    columns: int,
    num_frames: int,
    is_joined: bool = False,
    num_tiles: int = 1,
    itemsize: int = _FP32,
) -> VAEActivations:
    """Count what decoding one latent frame after another holds at its peak, for one sample.

    Args:
        config: sizes of the VAE.
        rows: of the latents.
        columns: of the latents.
        num_frames: of the latents.
        is_joined: whether convolutions run on torch rather than on the extension or the GPU's kernel.
        num_tiles: strips that the picture is decoded in.
        itemsize: bytes of a number.
    """
    widest, all_read = _read(rows, columns, num_tiles, decode_halo(config))
    whole_products = 0
    count = _Count(num_frames=num_frames, is_joined=is_joined)
    base = [config.decoder_dim * multiplier for multiplier in (config.multipliers[-1], *config.multipliers[::-1])]
    shrink = 2 if config.version == "2.1" else 1
    frames, area = 1, rows * columns
    count.conv(0, config.z_dim, base[0], frames, area)
    count.middle(base[0], frames, area)
    temporal = (*config.temporal_downsample[::-1], None)
    num_coarse = max((level + 1 for level, doubles in enumerate(temporal) if doubles), default=WHOLE_LEVELS)
    # Numbers of the frames that wait for their turn, how many turns there are, and the work before the first.
    waiting, times, coarse_products = 0, 1, 0
    for level, (before, out) in enumerate(pairwise(base)):
        channels = before // (shrink if level > 0 else 1)
        if level == WHOLE_LEVELS and num_tiles > 1:
            count.at(channels * frames * (area + area // max(rows, columns) * widest))
            area = area // max(rows, columns) * widest
            whole_products, count.products = count.products, 0
        if level == num_coarse and frames > FINE_FRAMES:
            waiting, times, frames = channels * frames * area, frames // FINE_FRAMES, FINE_FRAMES
            coarse_products, count.products = count.products, 0
        is_last = temporal[level] is None
        source = 0 if config.version == "2.1" or is_last else channels * frames * area
        for block in range(config.num_res_blocks + 1):
            count.residual(waiting + (source if block else 0), channels, out, frames, area)
            channels = out
        if is_last:
            break
        volume = frames * area
        held, grown = waiting + source + out * volume, volume
        if temporal[level] and num_frames > 1:
            count.conv(held - out * volume, out, 2 * out, frames, area, taps=3)
            grown, frames = 2 * volume, 2 * frames
            count.at(held + 2 * out * grown + 4 * grown * (out // shrink))  # before and after frames are put in turn
            held += out * grown
        count.at(held + (4 + 2) * grown * (out // shrink))  # the result, and two of its phases
        count.products += 16 * out * (out // shrink) * grown
        area *= 4
    volume, pixels = frames * area, PIXEL_CHANNELS * config.patch_size**2
    count.conv(waiting, base[-1], pixels, frames, area)
    count.at(waiting + (base[-1] + (times + 2) * pixels) * volume)
    count.products = num_tiles * whole_products + (coarse_products + times * count.products) * all_read // widest
    before_it = (0, 0, 1, config.temporal_stride)[min(num_frames, 3)]  # frames of the chunk before, kept by `decode`
    kept = before_it * PIXEL_CHANNELS * area * config.patch_size**2 * _FP32 // itemsize  # frames are given out in fp32
    return count.result(itemsize, kept)


def encode_activations(
    config: VAEConfig,
    *,
    height: int,
    width: int,
    num_frames: int,
    is_joined: bool = False,
    num_tiles: int = 1,
    itemsize: int = _FP32,
) -> VAEActivations:
    """Count what encoding a video chunk by chunk holds at its peak, for one sample; a chunk is counted too.

    Args:
        config: sizes of the VAE.
        height: of the video, in pixels.
        width: of the video, in pixels.
        num_frames: of the latents that it becomes.
        is_joined: whether convolutions run on torch rather than on the extension or the GPU's kernel.
        num_tiles: strips that the fine levels take the picture in.
        itemsize: bytes of a number.
    """
    stride = config.spatial_stride
    rows, columns = height // stride, width // stride
    widest, all_read = _read(rows, columns, num_tiles, encode_halo(config))
    fine = _Count(num_frames=num_frames, is_joined=is_joined)
    frames = config.temporal_stride if num_frames > 1 else 1
    pixels = PIXEL_CHANNELS * config.patch_size**2
    of_chunk = pixels * frames * height * width // config.patch_size**2  # numbers
    of_strip = of_chunk // max(rows, columns) * widest
    of_chunk = of_chunk * _FP32 // itemsize  # as it is given
    given = of_chunk + of_strip  # the chunk, and what is read of it laid out
    frames = _count_fine(fine, config, given, of_strip // (pixels * frames), frames)
    # From here on the picture is whole.
    coarse = fine if num_tiles == 1 else _Count(num_frames=num_frames, is_joined=is_joined)
    features = 0 if num_tiles == 1 else config.encoder_dim * config.multipliers[-2] * num_frames * rows * columns
    fine_products, fine.products = fine.products, 0
    _count_coarse(coarse, config, given if num_tiles == 1 else of_chunk, frames, rows * columns)
    products = fine_products * all_read // widest + coarse.products
    largest = max((fine.result(itemsize), coarse.result(itemsize)), key=lambda one: one.total)
    return replace(largest, chunk_flops=2 * products, features=features * itemsize)


def _count_fine(count: _Count, config: VAEConfig, given: int, area: int, frames: int) -> int:
    """Count the encoder's levels before the last on a picture of this area; returns the frames behind them."""
    base = [config.encoder_dim * multiplier for multiplier in (1, *config.multipliers)]
    pixels = PIXEL_CHANNELS * config.patch_size**2
    count.conv(given - pixels * frames * area, pixels, base[0], frames, area)
    for (channels, out), is_temporal in zip(pairwise(base), config.temporal_downsample, strict=False):
        source = 0 if config.version == "2.1" else channels * frames * area
        _count_blocks(count, config, given, (channels, out), frames, area)
        volume, halved = frames * area, frames * area // 4
        count.at(given + source + out * (2 * volume + halved))  # the padded frames
        count.products += 9 * out * out * halved
        if is_temporal:
            count.histories += out * area // 4
            if frames > 1:
                count.at(given + source + out * (volume + 3 * halved))
                frames //= 2
                count.products += 3 * out * out * halved // 2
        area //= 4
    return frames


def _count_coarse(count: _Count, config: VAEConfig, given: int, frames: int, area: int) -> None:
    """Count the encoder's last level and what follows."""
    before, last = (config.encoder_dim * multiplier for multiplier in (1, *config.multipliers)[-2:])
    _count_blocks(count, config, given, (before, last), frames, area)
    count.middle(last, frames, area)
    count.conv(given, last, 2 * config.z_dim, frames, area)


def _count_blocks(
    count: _Count, config: VAEConfig, given: int, channels: tuple[int, int], frames: int, area: int
) -> None:
    """Count a level's residual blocks; from the second on, 2.2 holds the level's input beside theirs."""
    before, out = channels
    source = 0 if config.version == "2.1" else before * frames * area
    for block in range(config.num_res_blocks):
        count.residual(given + (source if block else 0), out if block else before, out, frames, area)


def _read(rows: int, columns: int, num_tiles: int, halo: int) -> tuple[int, int]:
    """Rows or columns of the latents that the widest strip reads, and all strips together."""
    read = [strip.read_stop - strip.read_start for strip in cut_strips(rows, columns, num_tiles, halo)]
    return max(read), sum(read)
