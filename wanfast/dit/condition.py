"""What tells the DiT about a given picture: channels beside the latents, or the first latent frame itself."""

import torch
from torch import Tensor

from wanfast.errors import RequestError


def image_condition(image_latents: Tensor, *, temporal_stride: int = 4) -> Tensor:
    """Put the mask of known frames before the latents of a video that is the picture and then grey.

    Args:
        image_latents: [B, C, F, H, W], the VAE's code of the picture followed by zero frames. Not written to.
        temporal_stride: video frames per latent frame after the first, and so mask channels.

    Returns:
        [B, temporal_stride + C, F, H, W] in image_latents' dtype: the mask, 1 in the first latent frame and 0 in the
        others, then the latents.

    Raises:
        RequestError: image_latents is not [B, C, F, H, W], or temporal_stride is below 1.

    Source: Wan-Video/Wan2.2, wan/image2video.py.
    """
    if image_latents.dim() != 5:
        raise RequestError(f"image_latents: must be [B, C, F, H, W], got {tuple(image_latents.shape)}")
    if temporal_stride < 1:
        raise RequestError(f"temporal_stride: must be at least 1, got {temporal_stride}")
    batch, _, frames, height, width = image_latents.shape
    mask = image_latents.new_zeros(batch, temporal_stride, frames, height, width)
    mask[:, :, :1] = 1
    return torch.cat([mask, image_latents], dim=1)


def keep_first_frame(latents: Tensor, first_frame: Tensor | None) -> Tensor:
    """Put the picture's latents back in the first latent frame; done to the noise and after every solver step.

    Args:
        latents: [B, C, F, H, W]. Not written to.
        first_frame: [B, C, 1, H, W], the VAE's code of the picture; None where there is no picture.

    Returns:
        [B, C, F, H, W] in latents' dtype; the latents themselves where there is no picture.

    Raises:
        RequestError: first_frame is not one frame of the latents' batch, channels and size.

    Source: Wan-Video/Wan2.2, wan/textimage2video.py.
    """
    if first_frame is None:
        return latents
    want = (*latents.shape[:2], 1, *latents.shape[3:])
    if latents.dim() != 5 or first_frame.shape != want:
        raise RequestError(f"first_frame: must be {want}, one frame of the latents, got {tuple(first_frame.shape)}")
    return torch.cat([first_frame.to(latents.dtype), latents[:, :, 1:]], dim=2)
