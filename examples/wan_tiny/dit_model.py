"""The Wan 2.2 transformer in plain PyTorch for training: official tensor names, any width, real numbers only.

Wan attends to 512 rows of text, of which all but a dozen are the same padding. Training computes that row once and
counts it as often as it stands there: the same function at a thirtieth of the cost.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

TEXT_LEN = 512
FREQ_DIM = 256
HEAD_DIM = 128  # as in the large models, so that the same kernels run
EPS = 1e-6
BOUNDARY = 0.875  # sigma from which on the high-noise expert works


@dataclass(frozen=True, slots=True)
class DiTSizes:
    """Sizes of one transformer."""

    dim: int = 256
    ffn_dim: int = 768
    num_layers: int = 4
    text_dim: int = 128
    in_channels: int = 16
    out_channels: int = 16
    head_dim: int = HEAD_DIM


class Text:
    """Captions of a batch as the encoder gives them, and how much each row counts."""

    def __init__(self, rows: Tensor, lengths: Tensor) -> None:
        """Take encoded captions.

        Args:
            rows: [B, T, C]; what lies beyond a caption's length is ignored.
            lengths: [B] tokens of each caption, all below T: one row is left for padding.
        """
        position = torch.arange(rows.shape[1], device=rows.device)
        self.rows = rows * (position < lengths[:, None])[..., None]
        padding = (TEXT_LEN - lengths.float()).log()[:, None]
        weight = torch.where(position == lengths[:, None], padding, -torch.inf)
        self.bias = weight.masked_fill(position < lengths[:, None], 0.0)[:, None, None, :]  # [B, 1, 1, T]


class RMSNorm(nn.Module):
    """Scales rows to a root mean square of the weight."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise [..., C]."""
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        scale = (length.square() / x.shape[-1] + EPS).rsqrt()
        return x * scale.to(x.dtype) * self.weight.to(x.dtype)


class Attention(nn.Module):
    """Attention with normed queries and keys, over the video itself or over text."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(dim), RMSNorm(dim)

    def forward(self, x: Tensor, context: Tensor, rotation: Tensor | None, bias: Tensor | None) -> Tensor:
        """Let rows [B, L, C] attend to rows [B, T, C]."""
        q, k = self._heads(self.norm_q(self.q(x))), self._heads(self.norm_k(self.k(context)))
        if rotation is not None:
            q, k = _rotate(q, rotation), _rotate(k, rotation)
        v = self._heads(self.v(context))
        # Spelt out: on a CPU the backward pass of the fused form takes three times as long at these lengths.
        logits = (q * q.shape[-1] ** -0.5) @ k.transpose(2, 3)
        weights = (logits if bias is None else logits + bias).softmax(dim=-1)
        return self.o((weights.to(v.dtype) @ v).transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.num_heads, -1)).transpose(1, 2)


class Block(nn.Module):
    """Self-attention, attention to text and a feed-forward layer, the first and the last modulated by time."""

    def __init__(self, sizes: DiTSizes) -> None:
        super().__init__()
        dim = sizes.dim
        self.modulation = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)
        self.self_attn, self.cross_attn = (Attention(dim, dim // sizes.head_dim) for _ in range(2))
        self.norm3 = nn.LayerNorm(dim, eps=EPS)
        self.ffn = nn.Sequential(
            nn.Linear(dim, sizes.ffn_dim), nn.GELU(approximate="tanh"), nn.Linear(sizes.ffn_dim, dim)
        )

    def forward(self, x: Tensor, time: Tensor, context: Tensor, text: Text, rotation: Tensor) -> Tensor:
        """Map tokens [B, L, C] with time [B, 6, C] or [B, L, 6, C]."""
        shift, scale, gate, shift_2, scale_2, gate_2 = _modulations(self.modulation, time)
        normed = _norm(x) * (1 + scale) + shift
        x = x + gate * self.self_attn(normed, normed, rotation, None)
        x = x + self.cross_attn(self.norm3(x), context, None, text.bias)
        return x + gate_2 * self.ffn(_norm(x) * (1 + scale_2) + shift_2)


class Head(nn.Module):
    """Tokens to patches of velocity."""

    def __init__(self, sizes: DiTSizes) -> None:
        super().__init__()
        self.modulation = nn.Parameter(torch.randn(1, 2, sizes.dim) / sizes.dim**0.5)
        self.head = nn.Linear(sizes.dim, 4 * sizes.out_channels)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """Map [B, L, C] with time [B, 1 or L, C]."""
        shift, scale = _modulations(self.modulation, time[..., None, :] if time.shape[1] > 1 else time)
        return self.head(_norm(x) * (1 + scale) + shift)


class DiT(nn.Module):
    """One expert."""

    def __init__(self, sizes: DiTSizes) -> None:
        super().__init__()
        dim = sizes.dim
        self.sizes = sizes
        self.patch_embedding = nn.Conv3d(sizes.in_channels, dim, (1, 2, 2), stride=(1, 2, 2))
        self.text_embedding = nn.Sequential(
            nn.Linear(sizes.text_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim)
        )
        self.time_embedding = nn.Sequential(nn.Linear(FREQ_DIM, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(Block(sizes) for _ in range(sizes.num_layers))
        self.head = Head(sizes)
        nn.init.zeros_(self.head.head.weight)
        nn.init.zeros_(self.time_projection[1].weight)
        nn.init.zeros_(self.time_projection[1].bias)

    def forward(self, x: Tensor, timesteps: Tensor, text: Text) -> Tensor:
        """Predict the velocity.

        Args:
            x: noisy latents, with the condition behind them on the channel axis if there is one, [B, C, F, H, W].
            timesteps: in [0, 1000], [B], or [B, L] with one per token.
            text: encoded captions.

        Returns:
            [B, out_channels, F, H, W], fp32.
        """
        grid = (x.shape[2], x.shape[3] // 2, x.shape[4] // 2)
        tokens = self.patch_embedding(x).flatten(2).transpose(1, 2)
        if timesteps.dim() == 1:
            timesteps = timesteps[:, None]
        time = self.time_embedding(_sinusoid(timesteps))  # [B, 1 or L, C]
        steps = self.time_projection(time).unflatten(2, (6, -1))
        steps = steps.squeeze(1) if steps.shape[1] == 1 else steps
        context = self.text_embedding(text.rows)
        rotation = _rotation(grid, self.sizes.head_dim)
        for block in self.blocks:
            tokens = block(tokens, steps, context, text, rotation)
        patches = self.head(tokens, time).float().unflatten(1, grid).unflatten(4, (2, 2, -1))
        return patches.permute(0, 6, 1, 2, 4, 3, 5).flatten(3, 4).flatten(4, 5)


def _norm(x: Tensor) -> Tensor:
    return functional.layer_norm(x, x.shape[-1:], eps=EPS)


def _modulations(parameter: Tensor, time: Tensor) -> list[Tensor]:
    """Shifts, scales and gates that broadcast over [B, L, C], from time [B, N, C] or [B, L, N, C]."""
    summed = parameter + time
    if summed.dim() == 4:
        return list(summed.unbind(2))
    return [one[:, None] for one in summed.unbind(1)]


def _sinusoid(timesteps: Tensor) -> Tensor:
    half = FREQ_DIM // 2
    angles = timesteps.double()[..., None] * 10_000 ** (-torch.arange(half, dtype=torch.float64) / half)
    return torch.cat([angles.cos(), angles.sin()], dim=-1).float()


def _rotation(grid: tuple[int, int, int], head_dim: int) -> Tensor:
    """Angles of rotary positions, [L, head_dim / 2]: a third of a head's pairs for each of time, row and column."""
    pairs = head_dim // 2
    shares = (pairs - 2 * (pairs // 3), pairs // 3, pairs // 3)
    angles = []
    for axis, share in enumerate(shares):
        positions = torch.arange(grid[axis], dtype=torch.float64)
        frequencies = 10_000 ** (-torch.arange(share, dtype=torch.float64) / share)
        shape = [1, 1, 1, share]
        shape[axis] = grid[axis]
        angles.append((positions[:, None] * frequencies).view(shape).expand(*grid, share))
    return torch.cat(angles, dim=-1).flatten(0, 2).float()


def _rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Turn neighbouring pairs of channels of [B, N, L, D] by the angles."""
    cos, sin = (values.repeat_interleave(2, dim=-1).to(x.dtype) for values in (rotation.cos(), rotation.sin()))
    # (a, b) to (-b, a) as a product with a matrix: on a CPU several times faster than shuffling channels.
    turn = torch.block_diag(*[torch.tensor([[0.0, 1.0], [-1.0, 0.0]])] * (x.shape[-1] // 2))
    return x * cos + (x @ turn.to(x.dtype)) * sin


def timestep_of(sigma: Tensor) -> Tensor:
    """What the network is told of a noise level: the integer timestep that samplers round to."""
    return (sigma * 1000).floor()


def draw_sigmas(count: int, shift: float, low: float, high: float, generator: torch.Generator) -> Tensor:
    """Noise levels as the sampler with this shift visits them, within [low, high): [count]."""

    def level(sigma: float) -> float:
        return sigma / (shift - (shift - 1) * sigma)

    spread = level(low) + (level(high) - level(low)) * torch.rand(count, generator=generator)
    return shift * spread / (1 + (shift - 1) * spread)
