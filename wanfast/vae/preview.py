"""A light decoder for previews: one matrix from the channels of a latent to the colour of the square it stands for.

It costs milliseconds and shows layout, colours and movement; one picture per latent frame, one pixel per latent. The
matrix is fitted to the decoder that the model has, once per run, by decoding some small pictures.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from wanfast.vae.decode import decode
from wanfast.vae.weights import VAEWeights

_FIT_SHAPE = (2, 8, 8)  # latent frames, rows, columns
_FIT_CELL = 4  # latents per side of one colour: what varies from latent to latent is no colour
_FIT_COLOURS = 4  # per latent channel
_FIT_BATCH = 8


@dataclass(frozen=True, slots=True)
class RGBFactors:
    """colour = matrix @ latent + bias, in [-1, 1] from black to white."""

    matrix: Tensor  # fp32 [3, C]
    bias: Tensor  # fp32 [3]


@torch.no_grad()
def fit_factors(vae: VAEWeights, device: torch.device) -> RGBFactors:
    """Fit the matrix of a VAE by least squares: random cells of colour, and what its decoder makes of them.

    Args:
        vae: with its decoder.
        device: where that is.
    """
    config, generator = vae.config, torch.Generator().manual_seed(0)
    count, rows, columns = _FIT_SHAPE
    videos = math.ceil(_FIT_COLOURS * config.z_dim * _FIT_CELL**2 / (rows * columns))
    cells = torch.randn(videos, config.z_dim, 1, rows // _FIT_CELL, columns // _FIT_CELL, generator=generator)
    # Still from frame to frame, as most of a video is.
    still = F.interpolate(cells, scale_factor=(count, _FIT_CELL, _FIT_CELL))
    colours = [
        torch.stack(
            [F.avg_pool2d(frames.mean(dim=2), config.spatial_stride) for frames in decode(vae, one.to(device))], dim=2
        )
        for one in torch.split(still, _FIT_BATCH)
    ]
    # What a place shows in every video is its own, such as the dark of a border, and no latent's.
    x, y = still.movedim(1, -1).double(), torch.cat(colours).movedim(1, -1).cpu().double()
    inputs, targets = (part - part.mean(dim=0) for part in (x, y))
    solution = torch.linalg.lstsq(inputs.flatten(0, 3), targets.flatten(0, 3)).solution
    bias = y.mean(dim=(0, 1, 2, 3)) - x.mean(dim=(0, 1, 2, 3)) @ solution
    return RGBFactors(solution.T.float().contiguous(), bias.float())


def latents_to_rgb(latents: Tensor, factors: RGBFactors) -> Tensor:
    """Turn latents into small pictures.

    Args:
        latents: [C, F, H, W], normalised, any device.
        factors: of the latents' VAE.

    Returns:
        uint8 [F, H, W, 3], RGB, CPU.
    """
    matrix, bias = factors.matrix.to(latents.device), factors.bias.to(latents.device)
    colours = torch.einsum("oc,cfhw->fhwo", matrix, latents.float()) + bias
    return colours.add_(1).mul_(127.5).nan_to_num_(0.0).clamp_(0, 255).to(torch.uint8).cpu()
