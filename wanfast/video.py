"""Video out: frames become an mp4 that carries the settings it was made with.

A file appears under its name only when it is complete: it is written beside its place under a hidden name and moved
there at the end.
"""

import contextlib
import json
import os
import secrets
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import av
import numpy as np
import torch
from av.container import InputContainer
from av.video.reformatter import ColorRange, Colorspace
from av.video.stream import VideoStream
from torch import Tensor

from wanfast.errors import MediaError, RequestError
from wanfast.locks import place_file
from wanfast.mp4 import BT709, Mp4Encoder, Pixels

PathLike: TypeAlias = str | os.PathLike[str]

_MAX_SETTINGS_BYTES = 1 << 20
_PROBE_BYTES = 1 << 20  # what `check_writable` writes to see that the disk is not full


@dataclass(frozen=True, slots=True, eq=False)
class Video:
    """A finished video and the settings that repeat it."""

    frames: Tensor  # uint8 [F, H, W, 3], RGB, CPU
    fps: int
    settings: Mapping[str, Any]  # JSON values

    def save(self, path: PathLike) -> Path:
        """Write an mp4 with the settings embedded.

        Args:
            path: ends in .mp4; `~` is the home folder. An existing file is replaced, in one move once the new one is
                complete; until then, and on any failure, it stays as it was.

        Returns:
            The path.

        Raises:
            RequestError: path is no file name, or as in `write_video`.
            MediaError: as in `write_video`.
        """
        if not isinstance(path, str | os.PathLike):
            raise RequestError(f"path: must be a file name, got {path!r}; clip.mp4 would work")
        target = os.path.expanduser(os.fspath(path))
        return write_video(target, (self.frames,), fps=self.fps, settings=self.settings)


def check_writable(path: PathLike) -> None:
    """Refuse now what `write_video` would refuse after minutes of computing; leaves nothing behind.

    Raises:
        RequestError: the name does not end in .mp4, or no file can have it.
        MediaError: the folder is missing or not writable, the disk is full, or the name is taken by what is no file.
    """
    part = _part_of(_target_of(path))
    with _writing(path):
        try:
            with open(part, "xb") as file:
                file.write(bytes(_PROBE_BYTES))
        finally:
            part.unlink(missing_ok=True)


def write_video(
    path: PathLike,
    chunks: Iterable[Tensor | Pixels],
    *,
    fps: int,
    settings: Mapping[str, Any],
    overwrite: bool = True,
) -> Path:
    """Encode frames to an H.264 mp4 in a thread of its own as they arrive, and embed the settings.

    The colours are converted to limited-range BT.709 and tagged so; the index stands first, so that playing can start
    before the whole file is there. The settings are one JSON object under the `comment` tag. The same frames and
    settings give the same bytes. An existing file is replaced only by a complete one; on any failure, Ctrl-C included,
    it stays, and nothing new does.

    Args:
        path: ends in .mp4; a link is followed.
        chunks: uint8 [F, H, W, 3] each, RGB, any F, even H and W the same for all; tensors on any device, or arrays.
            Not to be written to any more: while one is encoded the next is asked for, and with two waiting, none is.
        fps: frames per second, >= 1.
        settings: JSON values under string keys, up to 1 MiB as text.
        overwrite: whether a file that stands there at the end is replaced; else the clip gets a number behind its name.

    Returns:
        The path of the clip.

    Raises:
        RequestError: the name does not end in .mp4, or no file can have it; height or width is odd.
        MediaError: the file cannot be written, as in `check_writable`; the disk fills up.
        ValueError: fps < 1; settings that are not JSON; no frames, or a chunk of another shape or dtype.
            What can be known before the first chunk is refused before it is asked for.
    """
    return encode_video(path, chunks, fps=fps, settings=settings, overwrite=overwrite)()


def encode_video(
    path: PathLike,
    chunks: Iterable[Tensor | Pixels],
    *,
    fps: int,
    settings: Mapping[str, Any],
    overwrite: bool = True,
) -> Callable[[], Path]:
    """Hand over all frames of an mp4, the last of which are still being encoded then; else as `write_video`.

    Returns:
        What waits for the end, puts the file in its place and gives its path; to be called once, by any thread. It
        raises as `write_video` does, and leaves nothing behind then.
    """
    if fps < 1:
        raise ValueError(f"fps: must be at least 1, got {fps}")
    comment = _to_comment(settings)
    check_writable(path)
    target = _target_of(path)
    part = _part_of(target)
    with _removed_on_failure(part):
        encoder = _encode(path, part, _each_chunk(chunks), fps, comment)

    def finish() -> Path:
        with _removed_on_failure(part):
            with _abandoned_on_failure(encoder), _writing(path):
                encoder.finish()
            with _writing(path):
                with open(part, "rb+") as file:
                    os.fsync(file.fileno())
                made = place_file(part, target, overwrite=overwrite)
        return Path(path) if made == target else made

    return finish


def _target_of(path: PathLike) -> Path:
    """The file that `path` stands for, links followed, once it is known that a file can stand there."""
    if Path(path).suffix.lower() != ".mp4":
        raise RequestError(f"output: must end in .mp4, got {os.fspath(path)!r}; clip.mp4 would work")
    if not _is_storable(path):
        raise RequestError(f"output: must be a name a file can have, got {os.fspath(path)!r}; clip.mp4 would work")
    with _writing(path):
        target = Path(os.path.realpath(path))
        try:
            mode = target.stat().st_mode
        except FileNotFoundError:
            if not target.parent.is_dir():
                raise MediaError(f"{path}: folder {target.parent} does not exist; create it first") from None
            return target
    if stat.S_ISDIR(mode):
        raise MediaError(f"{path}: is a folder; give a file name, such as {Path(path) / 'clip.mp4'}")
    if not stat.S_ISREG(mode):
        raise MediaError(f"{path}: is a device or a pipe; give the name of a file")
    return target


def _is_storable(path: PathLike) -> bool:
    """Tell whether the system can be asked for the name at all: no NUL, no character without an encoding."""
    try:
        return b"\0" not in os.fsencode(path)
    except UnicodeEncodeError:
        return False


def _part_of(target: Path) -> Path:
    """Make up a hidden name in the target's folder, short enough for 255 bytes even if the target's just fits."""
    return target.parent / f".{target.name[:60]}.part-{secrets.token_hex(4)}"


@contextlib.contextmanager
def _writing(path: PathLike) -> Iterator[None]:
    """Turn the system's and the encoder's errors into one that names the output."""
    try:
        yield
    except MediaError:
        raise
    except (OSError, av.error.FFmpegError) as error:
        reason = error.strerror or str(error)
        raise MediaError(f"{path}: cannot be written ({reason}); choose a writable folder with free space") from error


def _each_chunk(chunks: Iterable[Tensor | Pixels]) -> Iterator[Pixels]:
    """Yield what holds frames, all of one size."""
    size: tuple[int, ...] | None = None
    for chunk in chunks:
        array = chunk.cpu().numpy() if isinstance(chunk, Tensor) else chunk
        if array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] != 3:
            raise ValueError(f"chunks: must be uint8 [frames, height, width, 3], got {array.dtype} {array.shape}")
        if size is not None and array.shape[1:] != size:
            raise ValueError(f"chunks: must all have frames of shape {size}, got {array.shape[1:]}")
        size = array.shape[1:]
        if len(array):
            yield array


def _encode(path: PathLike, part: Path, chunks: Iterator[Pixels], fps: int, comment: str) -> Mp4Encoder:
    """Hand all frames to an encoder of `part`; errors name `path`, and those of `chunks` itself pass as they are."""
    first = next(chunks, None)
    if first is None:
        raise ValueError("chunks: must hold at least one frame, got none")
    height, width = first.shape[1:3]
    with _writing(path):
        encoder = Mp4Encoder(part, height=height, width=width, fps=fps, comment=comment)
    with _abandoned_on_failure(encoder):
        chunk: Pixels | None = first
        del first  # the encoder has it, for as long as it needs it
        while chunk is not None:
            with _writing(path):
                encoder.put(chunk)
            del chunk
            chunk = next(chunks, None)
    return encoder


@contextlib.contextmanager
def _abandoned_on_failure(encoder: Mp4Encoder) -> Iterator[None]:
    try:
        yield
    except BaseException:
        encoder.abandon()
        raise


@contextlib.contextmanager
def _removed_on_failure(part: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink()
        raise


def _to_comment(settings: Mapping[str, Any]) -> str:
    try:
        text = json.dumps({"wanfast": dict(settings)}, ensure_ascii=False, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"settings: must be JSON values under string keys, got others ({error})") from error
    data = text.encode("utf-8", "backslashreplace")  # a lone surrogate becomes its own JSON escape
    if len(data) > _MAX_SETTINGS_BYTES:
        raise ValueError(f"settings: must be at most {_MAX_SETTINGS_BYTES} bytes of JSON, got {len(data)}")
    return data.decode("utf-8")


def _from_comment(comment: str) -> dict[str, Any] | None:
    """The settings in a comment tag, or None where wanfast did not write it; the tag may be anybody's."""
    if len(comment) > _MAX_SETTINGS_BYTES:
        return None
    try:
        payload = json.loads(comment)
    except (ValueError, RecursionError):
        return None
    settings = payload.get("wanfast") if isinstance(payload, dict) else None
    return settings if isinstance(settings, dict) else None


@contextlib.contextmanager
def _reading(path: PathLike) -> Iterator[tuple[InputContainer, VideoStream]]:
    """Open an mp4; whatever fails inside is told as an error that names the file."""
    try:
        # Absolute, so that no part of the name is taken for a protocol; one demuxer, so that no playlist is followed.
        with av.open(os.path.abspath(path), format="mp4", metadata_errors="replace") as container:
            if not container.streams.video or container.streams.video[0].codec_context is None:
                raise MediaError(f"{path}: holds no video that can be decoded; give an mp4 written by wanfast")
            yield container, container.streams.video[0]
    except MediaError:
        raise
    except (OSError, ValueError, av.error.FFmpegError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise MediaError(f"{path}: cannot be read as an mp4 ({reason}); give an mp4 written by wanfast") from error


def read_settings(path: PathLike) -> dict[str, Any]:
    """Read the settings that `write_video` embedded. They are as untrusted as the file: validate them as a user's.

    Raises:
        MediaError: the file is missing, is no mp4, or carries no settings of wanfast's.
    """
    with _reading(path) as (container, _):
        settings = _from_comment(container.metadata.get("comment", ""))
    if settings is None:
        raise MediaError(f"{path}: carries no wanfast settings; a clip as wanfast wrote it, not re-encoded, does")
    return settings


def probe_video(path: PathLike) -> dict[str, Any]:
    """Describe an mp4 without decoding it.

    Returns:
        frames, fps, width, height (pixels), seconds, codec, pixel_format, colour (H.273 numbers of matrix, primaries
        and transfer, and whether the range is full), settings (None where there are none); all JSON values.

    Raises:
        MediaError: the file is missing or is no mp4.
    """
    with _reading(path) as (container, stream):
        codec = stream.codec_context
        fps = stream.average_rate
        seconds = None if stream.duration is None or stream.time_base is None else stream.duration * stream.time_base
        return {
            "frames": stream.frames,
            "fps": None if fps is None else float(fps),
            "width": codec.width,
            "height": codec.height,
            "seconds": None if seconds is None else float(seconds),
            "codec": codec.name,
            "pixel_format": codec.pix_fmt,
            "colour": {
                "matrix": int(codec.colorspace),
                "primaries": int(codec.color_primaries),
                "transfer": int(codec.color_trc),
                "full_range": codec.color_range == ColorRange.JPEG,
            },
            "settings": _from_comment(container.metadata.get("comment", "")),
        }


def read_video(path: PathLike) -> Tensor:
    """Decode every frame of an mp4, with the colour matrix and range the file names.

    Returns:
        uint8 [F, H, W, 3], RGB.

    Raises:
        MediaError: the file is missing, is no mp4, or is cut off.
    """
    with _reading(path) as (container, stream):
        frames = [_to_rgb(frame) for frame in container.decode(stream)]
        if not frames or len(frames) != stream.frames:
            raise MediaError(f"{path}: is cut off: {len(frames)} of {stream.frames} frames can be read; copy it again")
        return torch.from_numpy(np.stack(frames))


def _to_rgb(frame: av.VideoFrame) -> Pixels:
    rgb = frame.reformat(
        format="rgb24",
        src_colorspace=Colorspace.ITU709 if frame.colorspace == BT709 else Colorspace.ITU601,
        src_color_range=ColorRange.JPEG if frame.color_range == ColorRange.JPEG else ColorRange.MPEG,
        dst_color_range=ColorRange.JPEG,
        interpolation="BICUBIC",
    )
    return np.asarray(rgb.to_ndarray(), dtype=np.uint8)
