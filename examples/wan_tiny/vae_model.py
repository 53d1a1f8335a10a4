"""The Wan 2.1 VAE in plain PyTorch for training: official tensor names, any width, a whole clip at once.

The streaming of the official code (one frame, then four at a time) computes the same function; here it is unrolled:
convolutions see two zero frames in front of the clip, and the first frame passes every change of frame rate untouched.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

Z_DIM = 16
MULTIPLIERS = (1, 2, 4, 4)


class CausalConv(nn.Conv3d):
    """A convolution over frames that sees none later than its own."""

    def __init__(self, inputs: int, outputs: int, kernel: tuple[int, int, int] = (3, 3, 3)) -> None:
        super().__init__(inputs, outputs, kernel, padding=(0, kernel[1] // 2, kernel[2] // 2))

    def forward(self, x: Tensor) -> Tensor:
        """Convolve [B, C, F, H, W]."""
        if x.shape[2] == 1:  # of one frame, the two before it are zeros
            last = self.weight[:, :, -1]
            return functional.conv2d(x.squeeze(2), last, self.bias, padding=self.padding[1:]).unsqueeze(2)
        return super().forward(functional.pad(x, (0, 0, 0, 0, self.kernel_size[0] - 1, 0)))


class Norm(nn.Module):
    """Scales the channels of every pixel to a root mean square of gamma."""

    def __init__(self, channels: int, axes: int = 3) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, *(1,) * axes))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise [B, C, ...]."""
        length = torch.linalg.vector_norm(x, dim=1, keepdim=True).clamp_min(1e-12)
        return x * (self.gamma.shape[0] ** 0.5 / length) * self.gamma.to(x.dtype)


class Residual(nn.Module):
    """Norm, SiLU, convolution, twice, added to the input."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            Norm(inputs), nn.SiLU(), CausalConv(inputs, outputs),
            Norm(outputs), nn.SiLU(), nn.Dropout(0.0), CausalConv(outputs, outputs),
        )  # fmt: skip
        if inputs != outputs:
            self.shortcut = CausalConv(inputs, outputs, (1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, C, F, H, W]."""
        return (self.shortcut(x) if hasattr(self, "shortcut") else x) + self.residual(x)


class Attention(nn.Module):
    """Self-attention over the pixels of one frame, with one head."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = Norm(channels, axes=2)
        self.to_qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, C, F, H, W]."""
        frames = x.transpose(1, 2).flatten(0, 1)
        q, k, v = self.to_qkv(self.norm(frames)).flatten(2).transpose(1, 2).chunk(3, dim=-1)
        mixed = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(frames.shape)
        return x + self.proj(mixed).unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2)


class Down(nn.Module):
    """Halves rows and columns, and the frames after the first if it is temporal."""

    def __init__(self, channels: int, *, temporal: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(channels, channels, 3, stride=2))
        if temporal:
            self.time_conv = nn.Conv3d(channels, channels, (3, 1, 1), stride=(2, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, C, F, H, W] to [B, C, F or (F - 1) / 2 + 1, H / 2, W / 2]."""
        x = _per_frame(self.resample, x)
        if not hasattr(self, "time_conv") or x.shape[2] == 1:
            return x
        return torch.cat([x[:, :, :1], self.time_conv(x)], dim=2)


class Up(nn.Module):
    """Doubles rows and columns, and the frames after the first if it is temporal."""

    def __init__(self, channels: int, outputs: int, *, temporal: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(
            nn.Upsample(scale_factor=2, mode="nearest-exact"), nn.Conv2d(channels, outputs, 3, padding=1)
        )
        if temporal:
            self.time_conv = CausalConv(channels, 2 * channels, (3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, C, F, H, W] to [B, outputs, F or 2 (F - 1) + 1, 2 H, 2 W]."""
        if hasattr(self, "time_conv") and x.shape[2] > 1:
            rest = functional.conv3d(
                functional.pad(x[:, :, 1:], (0, 0, 0, 0, 2, 0)), self.time_conv.weight, self.time_conv.bias
            )
            doubled = rest.unflatten(1, (2, x.shape[1])).permute(0, 2, 3, 1, 4, 5).flatten(2, 3)
            x = torch.cat([x[:, :, :1], doubled], dim=2)
        return _per_frame(self.resample, x)


def _per_frame(layer: nn.Module, x: Tensor) -> Tensor:
    frames = x.transpose(1, 2).flatten(0, 1)
    return layer(frames).unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2)


def middle(channels: int) -> nn.Sequential:
    """The blocks at the coarsest size."""
    return nn.Sequential(Residual(channels, channels), Attention(channels), Residual(channels, channels))


class Encoder(nn.Module):
    """Pixels to moments."""

    def __init__(self, base: int) -> None:
        super().__init__()
        widths = [base * factor for factor in (1, *MULTIPLIERS)]
        layers: list[nn.Module] = []
        for level in range(4):
            layers += [Residual(widths[level], widths[level + 1]), Residual(widths[level + 1], widths[level + 1])]
            if level < 3:
                layers.append(Down(widths[level + 1], temporal=level > 0))
        self.conv1 = CausalConv(3, base)
        self.downsamples = nn.Sequential(*layers)
        self.middle = middle(widths[-1])
        self.head = nn.Sequential(Norm(widths[-1]), nn.SiLU(), CausalConv(widths[-1], 2 * Z_DIM))

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, 3, F, H, W] to [B, 2 Z, (F - 1) / 4 + 1, H / 8, W / 8]."""
        return self.head(self.middle(self.downsamples(self.conv1(x))))


class Decoder(nn.Module):
    """Latents to pixels."""

    def __init__(self, base: int) -> None:
        super().__init__()
        widths = [base * factor for factor in (MULTIPLIERS[-1], *reversed(MULTIPLIERS))]
        layers: list[nn.Module] = []
        for level in range(4):
            inputs = widths[level] if level == 0 else widths[level] // 2
            layers += [Residual(inputs, widths[level + 1])]
            layers += [Residual(widths[level + 1], widths[level + 1]) for _ in range(2)]
            if level < 3:
                layers.append(Up(widths[level + 1], widths[level + 1] // 2, temporal=level < 2))
        self.conv1 = CausalConv(Z_DIM, widths[0])
        self.middle = middle(widths[0])
        self.upsamples = nn.Sequential(*layers)
        self.head = nn.Sequential(Norm(base), nn.SiLU(), CausalConv(base, 3))

    def forward(self, z: Tensor) -> Tensor:
        """Map [B, Z, f, h, w] to [B, 3, 4 (f - 1) + 1, 8 h, 8 w]."""
        return self.head(self.upsamples(self.middle(self.conv1(z))))


class VAE(nn.Module):
    """Both halves and the 1 x 1 x 1 convolutions between them."""

    def __init__(self, base: int) -> None:
        super().__init__()
        self.encoder = Encoder(base)
        self.conv1 = CausalConv(2 * Z_DIM, 2 * Z_DIM, (1, 1, 1))
        self.conv2 = CausalConv(Z_DIM, Z_DIM, (1, 1, 1))
        self.decoder = Decoder(base)

    def encode(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of the latents of a video [B, 3, F, H, W] in [-1, 1]."""
        mean, log_variance = self.conv1(self.encoder(video)).chunk(2, dim=1)
        return mean, log_variance.clamp(-30, 10)

    def decode(self, latents: Tensor) -> Tensor:
        """Video of latents as `encode` gives them; not clamped."""
        return self.decoder(self.conv2(latents))
