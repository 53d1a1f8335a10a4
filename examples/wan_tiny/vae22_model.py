"""The Wan 2.2 VAE, that of TI2V-5B, in plain PyTorch for training: 48 latent channels, 16 x 16 x 4.

It is Wan 2.1's with pixels folded two by two before the encoder, and with shortcuts without parameters around every
level: means of patches on the way down, copies on the way up.
"""

from torch import Tensor, nn
from torch.nn import functional
from vae_model import MULTIPLIERS, CausalConv, Down, Norm, Residual, Up, middle

Z_DIM = 48


class DownLevel(nn.Module):
    """Two residual blocks and, but for the last level, a halving; around them, means of patches."""

    def __init__(self, inputs: int, outputs: int, *, halves: bool, temporal: bool) -> None:
        super().__init__()
        layers: list[nn.Module] = [Residual(inputs, outputs), Residual(outputs, outputs)]
        if halves:
            layers.append(Down(outputs, temporal=temporal))
        self.downsamples = nn.Sequential(*layers)
        self.outputs, self.factors = outputs, (2 if temporal else 1, 2 if halves else 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, C, F, H, W]."""
        return self.downsamples(x) + _mean_patches(x, self.outputs, *self.factors)


class UpLevel(nn.Module):
    """Three residual blocks and, but for the last level, a doubling; around these levels, copies."""

    def __init__(self, inputs: int, outputs: int, *, doubles: bool, temporal: bool) -> None:
        super().__init__()
        layers: list[nn.Module] = [Residual(inputs, outputs), Residual(outputs, outputs), Residual(outputs, outputs)]
        if doubles:
            layers.append(Up(outputs, outputs, temporal=temporal))
        self.upsamples = nn.Sequential(*layers)
        self.outputs, self.doubles, self.time = outputs, doubles, 2 if temporal else 1

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, C, F, H, W]."""
        main = self.upsamples(x)
        return main + _copies(x, self.outputs, self.time) if self.doubles else main


class Encoder(nn.Module):
    """Folded pixels to moments."""

    def __init__(self, base: int) -> None:
        super().__init__()
        widths = [base * factor for factor in (1, *MULTIPLIERS)]
        self.conv1 = CausalConv(12, base)
        self.downsamples = nn.Sequential(
            *(
                DownLevel(widths[level], widths[level + 1], halves=level < 3, temporal=level in (1, 2))
                for level in range(4)
            )
        )
        self.middle = middle(widths[-1])
        self.head = nn.Sequential(Norm(widths[-1]), nn.SiLU(), CausalConv(widths[-1], 2 * Z_DIM))

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, 12, F, H / 2, W / 2] to [B, 2 Z, (F - 1) / 4 + 1, H / 16, W / 16]."""
        return self.head(self.middle(self.downsamples(self.conv1(x))))


class Decoder(nn.Module):
    """Latents to folded pixels."""

    def __init__(self, base: int) -> None:
        super().__init__()
        widths = [base * factor for factor in (MULTIPLIERS[-1], *reversed(MULTIPLIERS))]
        self.conv1 = CausalConv(Z_DIM, widths[0])
        self.middle = middle(widths[0])
        self.upsamples = nn.Sequential(
            *(UpLevel(widths[level], widths[level + 1], doubles=level < 3, temporal=level < 2) for level in range(4))
        )
        self.head = nn.Sequential(Norm(base), nn.SiLU(), CausalConv(base, 12))

    def forward(self, z: Tensor) -> Tensor:
        """Map [B, Z, f, h, w] to [B, 12, 4 (f - 1) + 1, 8 h, 8 w]."""
        return self.head(self.upsamples(self.middle(self.conv1(z))))


class VAE22(nn.Module):
    """Both halves, the 1 x 1 x 1 convolutions between them, and the folding of pixels."""

    def __init__(self, encoder_base: int, decoder_base: int) -> None:
        super().__init__()
        self.encoder = Encoder(encoder_base)
        self.conv1 = CausalConv(2 * Z_DIM, 2 * Z_DIM, (1, 1, 1))
        self.conv2 = CausalConv(Z_DIM, Z_DIM, (1, 1, 1))
        self.decoder = Decoder(decoder_base)

    def encode(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of the latents of a video [B, 3, F, H, W] in [-1, 1]."""
        mean, log_variance = self.conv1(self.encoder(fold(video))).chunk(2, dim=1)
        return mean, log_variance.clamp(-30, 10)

    def decode(self, latents: Tensor) -> Tensor:
        """Video of latents as `encode` gives them; not clamped."""
        return unfold(self.decoder(self.conv2(latents)))


def fold(video: Tensor) -> Tensor:
    """Put 2 x 2 pixels into channels, [B, 3, F, H, W] to [B, 12, F, H / 2, W / 2]: column, then row the fastest."""
    rows = video.unflatten(4, (-1, 2)).unflatten(3, (-1, 2))  # [B, 3, F, h, 2, w, 2]
    return rows.permute(0, 1, 6, 4, 2, 3, 5).flatten(1, 3)


def unfold(video: Tensor) -> Tensor:
    """Undo `fold`."""
    parts = video.unflatten(1, (-1, 2, 2))  # [B, 3, column, row, F, h, w]
    return parts.permute(0, 1, 4, 5, 3, 6, 2).flatten(5, 6).flatten(3, 4)


def _mean_patches(x: Tensor, outputs: int, time: int, space: int) -> Tensor:
    """Average groups of channels and their patches to so many channels; a frame that is missing in front is zero."""
    x = functional.pad(x, (0, 0, 0, 0, -x.shape[2] % time, 0))
    parts = x.unflatten(4, (-1, space)).unflatten(3, (-1, space)).unflatten(2, (-1, time))
    # [B, C, f, t, h, y, w, x] to channels of (C, t, y, x)
    flat = parts.permute(0, 1, 3, 5, 7, 2, 4, 6).flatten(1, 4)
    return flat.unflatten(1, (outputs, -1)).mean(2)


def _copies(x: Tensor, outputs: int, time: int) -> Tensor:
    """Spread copies of the channels over patches; the first frame is not doubled."""
    repeated = x.repeat_interleave(outputs * time * 4 // x.shape[1], dim=1)
    parts = repeated.unflatten(1, (outputs, time, 2, 2))  # [B, O, t, y, x, F, H, W]
    spread = parts.permute(0, 1, 5, 2, 6, 3, 7, 4)  # [B, O, F, t, H, y, W, x]
    video = spread.flatten(6, 7).flatten(4, 5).flatten(2, 3)
    return video[:, :, time - 1 :]
