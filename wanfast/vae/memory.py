"""What encoding and decoding hold beside the weights, and what they compute: counted from what their code makes.

A peak is the frames that convolutions remember, which stand throughout, and the largest moment of a chunk. A moment is
counted in channels times positions: of a residual block its input, and at its second convolution that one's input and
output, for example. The convolutions of the C++ extension read where tensors lie; torch's get frames joined and padded.
"""

from dataclasses import dataclass
from itertools import pairwise

from wanfast.config import VAEConfig
from wanfast.vae.decode import FINE_FRAMES
from wanfast.vae.sizes import PIXEL_CHANNELS

_FP32 = 4
_REMEMBERED = 2  # frames before each convolution over three


@dataclass(frozen=True, slots=True)
class VAEActivations:
    """Bytes at the peak of one half of a VAE, and the work of one chunk."""

    histories: int
    moment: int
    chunk_flops: int  # of the last chunk, 2 per multiply-add, convolutions and attention

    @property
    def total(self) -> int:
        """The peak."""
        return self.histories + self.moment


class _Count:
    """Adds up histories and keeps the largest moment, both in fp32 numbers.

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

    def result(self, standing: int = 0) -> VAEActivations:
        """Give the count in bytes; `standing` numbers are there at every moment."""
        moment = standing + self._peak - (self.histories if self._is_first else 0)
        return VAEActivations(self.histories * _FP32, moment * _FP32, 2 * self.products)


def decode_activations(
    config: VAEConfig, *, rows: int, columns: int, num_frames: int, is_joined: bool = False
) -> VAEActivations:
    """Count what decoding one latent frame after another holds at its peak, for one sample in fp32.

    Args:
        config: sizes of the VAE.
        rows: of the latents.
        columns: of the latents.
        num_frames: of the latents.
        is_joined: whether convolutions run on torch rather than on the extension.
    """
    count = _Count(num_frames=num_frames, is_joined=is_joined)
    base = [config.decoder_dim * multiplier for multiplier in (config.multipliers[-1], *config.multipliers[::-1])]
    shrink = 2 if config.version == "2.1" else 1
    frames, area = 1, rows * columns
    count.conv(0, config.z_dim, base[0], frames, area)
    count.middle(base[0], frames, area)
    temporal = (*config.temporal_downsample[::-1], None)
    num_coarse = max((level + 1 for level, doubles in enumerate(temporal) if doubles), default=0)
    # Numbers of the frames that wait for their turn, how many turns there are, and the work before the first.
    waiting, times, coarse_products = 0, 1, 0
    for level, (before, out) in enumerate(pairwise(base)):
        channels = before // (shrink if level > 0 else 1)
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
    count.products = coarse_products + times * count.products
    before_it = (0, 0, 1, config.temporal_stride)[min(num_frames, 3)]  # frames of the chunk before, kept by `decode`
    return count.result(before_it * PIXEL_CHANNELS * rows * columns * config.spatial_stride**2)


def encode_activations(
    config: VAEConfig, *, height: int, width: int, num_frames: int, is_joined: bool = False
) -> VAEActivations:
    """Count what encoding a video chunk by chunk holds at its peak, for one sample in fp32; a chunk is counted too.

    Args:
        config: sizes of the VAE.
        height: of the video, in pixels.
        width: of the video, in pixels.
        num_frames: of the latents that it becomes.
        is_joined: whether convolutions run on torch rather than on the extension.
    """
    count = _Count(num_frames=num_frames, is_joined=is_joined)
    base = [config.encoder_dim * multiplier for multiplier in (1, *config.multipliers)]
    frames = config.temporal_stride if num_frames > 1 else 1
    area = height * width // config.patch_size**2
    pixels = PIXEL_CHANNELS * config.patch_size**2
    given = 2 * pixels * frames * area  # the chunk, and that laid out
    count.conv(given - pixels * frames * area, pixels, base[0], frames, area)
    for level, (channels, out) in enumerate(pairwise(base)):
        source = 0 if config.version == "2.1" else channels * frames * area
        for block in range(config.num_res_blocks):
            held = given + (source if block else 0)
            count.residual(held, channels if block == 0 else out, out, frames, area)
        if level == len(config.temporal_downsample):
            break
        volume, halved = frames * area, frames * area // 4
        count.at(given + source + out * (2 * volume + halved))  # the padded frames
        count.products += 9 * out * out * halved
        if config.temporal_downsample[level]:
            count.histories += out * area // 4
            if num_frames > 1:
                count.at(given + source + out * (volume + 3 * halved))
                frames //= 2
                count.products += 3 * out * out * halved // 2
        area //= 4
    count.middle(base[-1], frames, area)
    count.conv(given, base[-1], 2 * config.z_dim, frames, area)
    return count.result()
