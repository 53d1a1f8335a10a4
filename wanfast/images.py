"""Pictures in: read one safely, and resize it exactly as the reference does.

A picture file is untrusted input: whatever its bytes, the outcome is an RGB image or a `MediaError` naming the file.
"""

import os
import warnings
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from wanfast.errors import MediaError, RequestError

ImageSource: TypeAlias = str | os.PathLike[str] | Image.Image | npt.NDArray[np.uint8]

# Only decoders that stay inside the process: Pillow would hand an EPS file to Ghostscript.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
_WHAT_WORKS = "PNG, JPEG, WebP, GIF, BMP and TIFF pictures work"


def load_image(source: ImageSource) -> Image.Image:
    """Read a picture as 8-bit RGB, the right way up.

    As in the reference, transparency is dropped, not blended: a pixel shows the colour stored under its alpha; and
    colour profiles are ignored. Unlike the reference, EXIF orientation is applied, and 16-bit grey is scaled to 8 bits
    instead of clipped at 255. Of an animation the first frame is taken.

    Args:
        source: a file, a Pillow image (left as it is), or pixels, uint8 [H, W, 3] in RGB order.

    Returns:
        An image of mode "RGB" of its own memory.

    Raises:
        MediaError: the file is missing, unreadable, no picture, truncated, broken, or too large to decode safely.
        RequestError: source is none of the kinds above, or pixels of another shape or dtype.
    """
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim != 3 or source.shape[2] != 3 or source.size == 0:
            raise RequestError(f"image: an array must be uint8 [height, width, 3], got {source.dtype} {source.shape}")
        return Image.fromarray(source).copy()
    if isinstance(source, Image.Image):
        return _to_rgb(source, "image")
    if not isinstance(source, (str, os.PathLike)):
        raise RequestError(
            f"image: must be a file name, a Pillow image or a uint8 array, got {type(source).__name__}; "
            "an array [height, width, 3] works"
        )
    return _read_file(os.fspath(source))


def _read_file(path: str) -> Image.Image:
    try:
        with open(path, "rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of large pictures; those it can decode are welcome
            return _to_rgb(Image.open(file, formats=FORMATS), path)
    except MediaError:
        raise
    except FileNotFoundError:
        raise MediaError(f"{path}: no such file; give the path of a picture") from None
    except IsADirectoryError:
        raise MediaError(f"{path}: is a folder; give the path of a picture in it") from None
    except UnidentifiedImageError:
        raise MediaError(f"{path}: is not a picture that can be read; {_WHAT_WORKS}") from None
    except Image.DecompressionBombError:
        raise MediaError(f"{path}: has too many pixels to decode safely; scale it down to 100 megapixels") from None
    except Exception as error:  # a decoder can raise anything over broken bytes: struct.error, SyntaxError, ...
        raise MediaError(f"{path}: cannot be opened as a picture ({_reason(error)}); {_WHAT_WORKS}") from error


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    """Decode, turn upright and convert; `name` is what errors call the picture."""
    try:
        upright = ImageOps.exif_transpose(image)
        if upright.mode == "F":
            raise MediaError(f"{name}: holds floating-point pixels; save it with 8 or 16 bits per channel")
        if upright.mode.startswith("I"):
            return _grey16_to_rgb(upright, name)
        return upright.convert("RGB")
    except MediaError:
        raise
    except Exception as error:  # as above: decoding happens here, not in Image.open
        raise MediaError(f"{name}: is broken or cut off ({_reason(error)}); save or download it again") from error


def _grey16_to_rgb(image: Image.Image, name: str) -> Image.Image:
    """Scale modes "I;16*" and "I" (a 16-bit PNG in older Pillow) to 8 bits: 65,535 becomes 255."""
    grey = np.asarray(image).astype(np.int64)
    if grey.min() < 0 or grey.max() > 65_535:
        raise MediaError(f"{name}: holds 32-bit pixels; save it with 8 or 16 bits per channel")
    return Image.fromarray(np.rint(grey / 257).astype(np.uint8)).convert("RGB")


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__


def image_to_tensor(image: Image.Image) -> Tensor:
    """Turn an RGB image into a tensor: 0 becomes -1, 255 becomes 1.

    Returns:
        [3, H, W], fp32, CPU, in [-1, 1]; the reference's own operations, so equal to its bits.

    Raises:
        ValueError: the image's mode is not "RGB"; `load_image` gives one that is.

    Source: Wan-Video/Wan2.2, wan/image2video.py, generate.
    """
    if image.mode != "RGB":
        raise ValueError(f"image: must have mode RGB, got {image.mode}; load_image converts")
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
    return pixels.to(torch.float32).div_(255).sub_(0.5).div_(0.5)


def resize_bicubic(image: Tensor, width: int, height: int) -> Tensor:
    """Resize as the reference does for image to video: bicubic (a = -0.75), half-pixel centres, no antialiasing.

    Args:
        image: [3, H, W], fp32, in [-1, 1].
        width: of the result, in pixels.
        height: of the result, in pixels.

    Returns:
        [3, height, width], fp32, CPU. Overshoot beyond [-1, 1] is kept: the reference does not clamp it.

    Source: Wan-Video/Wan2.2, wan/image2video.py, generate.
    """
    pixels = image.to("cpu", torch.float32)[None]
    return F.interpolate(pixels, size=(height, width), mode="bicubic", align_corners=False)[0]


def resize_lanczos_crop(image: Image.Image, resized: tuple[int, int], box: tuple[int, int, int, int]) -> Tensor:
    """Resize and crop as the reference does for text-image to video.

    Args:
        image: RGB.
        resized: (width, height) before the crop, in pixels.
        box: (left, top, right, bottom) of the crop, in pixels of the resized image and inside it.

    Returns:
        [3, bottom - top, right - left], fp32, CPU, in [-1, 1].

    Raises:
        ValueError: the box is empty or leaves the resized image.

    Source: Wan-Video/Wan2.2, wan/textimage2video.py, i2v.
    """
    left, top, right, bottom = box
    if not (0 <= left < right <= resized[0] and 0 <= top < bottom <= resized[1]):
        raise ValueError(f"box: must be non-empty and inside {resized}, got {box}")
    return image_to_tensor(image.resize(resized, Image.Resampling.LANCZOS).crop(box))
