"""Reading pictures against the formats' own rules, and resizing against the kernels' formulas in float64."""

import io
import math
import random
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from wanfast.errors import MediaError, RequestError
from wanfast.images import image_to_tensor, load_image, resize_bicubic, resize_lanczos_crop

# What EXIF orientation n says of the stored rows and columns, as numpy moves to the picture as it should be seen.
UPRIGHT = {
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: lambda a: np.rot90(a, 1),
}


def pixels(height: int, width: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


def png_claiming(width: int, height: int) -> bytes:
    """A PNG of a few bytes that says it is this large."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "webp"])
def test_lossless_files_give_their_pixels(tmp_path: Path, suffix: str) -> None:
    want = pixels(9, 14)
    path = tmp_path / f"picture.{suffix}"
    Image.fromarray(want).save(path, lossless=True)
    for source in (path, str(path)):
        image = load_image(source)
        assert image.mode == "RGB" and image.size == (14, 9)
        assert np.array_equal(np.asarray(image), want)


def test_arrays_and_pillow_images_give_their_pixels_in_memory_of_their_own() -> None:
    want = pixels(5, 7)
    for source in (want.copy(), Image.fromarray(want.copy()), want[:, ::-1][:, ::-1]):
        image = load_image(source)
        if isinstance(source, np.ndarray):
            source[:] = 0
        else:
            source.paste((0, 0, 0), (0, 0, 7, 5))
        assert np.array_equal(np.asarray(image), pixels(5, 7))


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int, suffix: str) -> None:
    stored = pixels(6, 10)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"turned.{suffix}"
    Image.fromarray(stored).save(path, exif=exif)
    want = UPRIGHT[orientation](stored)
    assert np.array_equal(np.asarray(load_image(path)), want)
    with Image.open(path) as opened:
        assert np.array_equal(np.asarray(load_image(opened)), want)


def test_transparency_is_dropped_not_blended(tmp_path: Path) -> None:
    rgba = pixels(6, 8, 4)
    rgba[..., 3] = np.arange(8) * 30
    Image.fromarray(rgba).save(tmp_path / "rgba.png")
    assert np.array_equal(np.asarray(load_image(tmp_path / "rgba.png")), rgba[..., :3])
    grey_alpha = Image.fromarray(rgba[..., 0]).convert("LA")
    grey_alpha.putalpha(Image.fromarray(rgba[..., 3]))
    grey_alpha.save(tmp_path / "la.png")
    assert np.array_equal(np.asarray(load_image(tmp_path / "la.png")), rgba[..., [0, 0, 0]])


def test_palette_grey_and_bilevel_pictures_become_rgb(tmp_path: Path) -> None:
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 200, 100, 50])
    palette.putpixel((1, 0), 1)
    palette.save(tmp_path / "palette.png", transparency=0)
    assert np.asarray(load_image(tmp_path / "palette.png")).tolist() == [[[10, 20, 30], [200, 100, 50]]]
    grey = pixels(3, 4)[..., 0]
    Image.fromarray(grey).save(tmp_path / "grey.png")
    assert np.array_equal(np.asarray(load_image(tmp_path / "grey.png")), grey[..., None].repeat(3, 2))
    Image.fromarray(grey > 127).save(tmp_path / "bits.png")
    assert np.array_equal(np.asarray(load_image(tmp_path / "bits.png"))[..., 0], np.where(grey > 127, 255, 0))


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_grey_is_scaled_not_clipped(tmp_path: Path, suffix: str) -> None:
    deep = np.array([[0, 128, 129, 257 * 100, 257 * 100 + 128, 65_535]], dtype=np.uint16)
    Image.fromarray(deep).save(tmp_path / f"deep.{suffix}")
    got = np.asarray(load_image(tmp_path / f"deep.{suffix}"))
    assert got.tolist() == [[[v, v, v] for v in (0, 0, 1, 100, 100, 255)]]


def test_cmyk_jpeg_becomes_rgb(tmp_path: Path) -> None:
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "red.jpg", quality=95)
    assert np.abs(np.asarray(load_image(tmp_path / "red.jpg")).astype(int) - (255, 0, 0)).max() <= 4


@pytest.mark.parametrize("suffix", ["gif", "png", "webp"])
def test_an_animation_gives_its_first_frame(tmp_path: Path, suffix: str) -> None:
    red, blue = Image.new("RGB", (8, 8), (255, 0, 0)), Image.new("RGB", (8, 8), (0, 0, 255))
    path = tmp_path / f"moving.{suffix}"
    red.save(path, save_all=True, append_images=[blue], lossless=True)
    assert (np.asarray(load_image(path)) == (255, 0, 0)).all()


def test_a_phone_jpeg_of_several_pictures_is_read(tmp_path: Path) -> None:
    red, blue = Image.new("RGB", (16, 16), (255, 0, 0)), Image.new("RGB", (16, 16), (0, 0, 255))
    red.save(tmp_path / "phone.jpg", format="MPO", save_all=True, append_images=[blue])
    assert np.abs(np.asarray(load_image(tmp_path / "phone.jpg")).astype(int) - (255, 0, 0)).max() <= 4


def write_bad(folder: Path, kind: str) -> Path:
    """A path that `load_image` must refuse."""
    path = folder / "bad.png"
    good = io.BytesIO()
    Image.fromarray(pixels(40, 40)).save(good, "PNG")
    contents = {
        "empty": b"",
        "text": b"not a picture at all\n" * 9,
        "truncated": good.getvalue()[: len(good.getvalue()) // 2],
        "too large": png_claiming(60_000, 60_000),
        "larger than any": png_claiming(2**31 - 1, 2**31 - 1),
        "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n",
    }
    if kind in contents:
        path.write_bytes(contents[kind])
    elif kind == "float":
        Image.fromarray(np.ones((3, 3), np.float32)).save(path, "TIFF")
    elif kind == "32-bit":
        Image.fromarray(np.full((3, 3), 2**20, np.int32)).save(path, "TIFF")
    elif kind == "folder":
        path.mkdir()
    elif kind == "under a file":
        path.write_bytes(b"x")
        return path / "picture.png"
    return path


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("missing", "no such file"),
        ("folder", "is a folder"),
        ("under a file", "Not a directory"),
        ("empty", "not a picture"),
        ("text", "not a picture"),
        ("postscript", "not a picture"),
        ("truncated", "cut off"),
        ("too large", "too many pixels"),
        ("larger than any", "too many pixels"),
        ("float", "floating-point"),
        ("32-bit", "32-bit"),
    ],
)
def test_a_bad_file_is_refused_in_one_line_with_its_name(tmp_path: Path, kind: str, words: str) -> None:
    path = write_bad(tmp_path, kind)
    with pytest.raises(MediaError) as caught:
        load_image(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and words in message and ";" in message and "\n" not in message


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "gif", "bmp", "tif"])
def test_damaged_files_never_show_a_decoder_error(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"damaged.{suffix}"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels(24, 20)).save(path, exif=exif)
    good, draw = path.read_bytes(), random.Random(0)
    refused = 0
    for _ in range(60):
        bad = bytearray(good)
        for _ in range(draw.choice((1, 4, 16))):
            bad[draw.randrange(min(len(bad), draw.choice((64, 10**9))))] = draw.randrange(256)
        path.write_bytes(bad[: draw.choice((len(bad), draw.randrange(len(bad))))])
        try:
            assert load_image(path).mode == "RGB"
        except MediaError as error:
            assert str(error).startswith(f"{path}: ")
            refused += 1
    assert refused > 10


def test_a_broken_pillow_image_is_refused(tmp_path: Path) -> None:
    with Image.open(write_bad(tmp_path, "truncated")) as opened, pytest.raises(MediaError, match=r"image: .*cut off"):
        load_image(opened)
    with pytest.raises(MediaError, match=r"image: .*conversion"):
        load_image(Image.new("La", (4, 4)))  # premultiplied grey, which Pillow has no way to RGB for


@pytest.mark.parametrize(
    "source",
    [np.zeros((4, 4, 3), np.float32), np.zeros((4, 4), np.uint8), np.zeros((0, 4, 3), np.uint8), b"bytes", None],
)
def test_a_source_of_another_kind_is_refused(source: object) -> None:
    with pytest.raises(RequestError, match="image: "):
        load_image(source)  # type: ignore[arg-type]


def test_tensor_values_run_from_minus_one_to_one() -> None:
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    tensor = image_to_tensor(Image.fromarray(np.stack([levels, levels[::-1], levels.T], axis=2)))
    assert tensor.shape == (3, 16, 16) and tensor.dtype == torch.float32
    want = torch.arange(256, dtype=torch.float64).reshape(16, 16) / 127.5 - 1
    for channel, plane in enumerate((want, want.flip(0), want.T)):
        assert (tensor[channel] - plane).abs().max() < 2e-7
    assert tensor[0, 0, 0] == -1 and tensor[0, -1, -1] == 1


def test_tensor_refuses_an_image_that_is_not_rgb() -> None:
    with pytest.raises(ValueError, match="RGB"):
        image_to_tensor(Image.new("L", (2, 2)))


def keys_matrix(size: int, new_size: int, a: float = -0.75) -> torch.Tensor:
    """Weights [new_size, size] of cubic convolution (Keys, 1981) at half-pixel centres, edges repeated; float64."""
    matrix = torch.zeros(new_size, size, dtype=torch.float64)
    for i in range(new_size):
        centre = (i + 0.5) * size / new_size - 0.5
        for j in range(math.floor(centre) - 1, math.floor(centre) + 3):
            d = abs(centre - j)
            near = (a + 2) * d**3 - (a + 3) * d**2 + 1
            far = a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a
            matrix[i, min(max(j, 0), size - 1)] += near if d <= 1 else far
    return matrix


@pytest.mark.parametrize(("width", "height"), [(48, 32), (11, 40), (8, 6), (23, 17)])
def test_bicubic_is_the_cubic_convolution_unclamped(width: int, height: int) -> None:
    image = image_to_tensor(Image.fromarray(pixels(17, 23)).point(lambda v: 255 if v > 127 else 0))
    got = resize_bicubic(image, width, height)
    want = torch.einsum("yh,xw,chw->cyx", keys_matrix(17, height), keys_matrix(23, width), image.double())
    assert got.shape == (3, height, width) and got.dtype == torch.float32
    assert (got - want).abs().max() < 1e-5
    if (width, height) == (48, 32):
        assert got.max() > 1.05 and got.min() < -1.05


def test_lanczos_crop_is_the_references_own_statements() -> None:
    image = Image.fromarray(pixels(45, 60))
    left, top = (64 - 32) // 2, (48 - 48) // 2
    want = image.resize((64, 48), Image.LANCZOS).crop((left, top, left + 32, top + 48))
    got = resize_lanczos_crop(image, (64, 48), (left, top, left + 32, top + 48))
    assert got.shape == (3, 48, 32)
    assert torch.equal(got, torch.from_numpy(np.array(want)).permute(2, 0, 1).float().div(255).sub(0.5).div(0.5))


@pytest.mark.parametrize("box", [(-1, 0, 8, 8), (0, 0, 17, 8), (0, 0, 8, 13), (4, 0, 4, 8)])
def test_lanczos_crop_refuses_a_box_outside_the_image(box: tuple[int, int, int, int]) -> None:
    with pytest.raises(ValueError, match="box"):
        resize_lanczos_crop(Image.new("RGB", (10, 10)), (16, 12), box)
