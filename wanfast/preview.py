"""Previews on disk: a small animated picture that is replaced as steps go by, and never in a run's way."""

import logging
import os
import threading
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from PIL import Image, features
from torch import Tensor

from wanfast.errors import MediaError, RequestError

_log = logging.getLogger("wanfast")

_FORMATS: dict[str, dict[str, Any]] = {
    ".webp": {"format": "WEBP", "quality": 75, "method": 0},
    ".gif": {"format": "GIF"},
}
_LONGER_SIDE = 320  # pixels that a preview is enlarged to, or a little less, by whole factors


def check_preview(path: str | os.PathLike[str]) -> Path:
    """Refuse before anything is computed what could not become a preview.

    Raises:
        RequestError: the name ends in neither .webp nor .gif.
        MediaError: its folder is missing.
    """
    file = Path(path).expanduser()
    if file.suffix.lower() not in _FORMATS or b"\0" in os.fsencode(file):
        raise RequestError(f"preview: must end in .webp or .gif, got {os.fspath(path)!r}; preview.webp would work")
    if file.suffix.lower() == ".webp" and not features.check("webp"):
        raise RequestError(f"preview: must end in .gif, as this pillow writes no WebP, got {os.fspath(path)!r}")
    if not file.parent.is_dir():
        raise MediaError(f"{path}: folder {file.parent} does not exist; create it first")
    return file


class PreviewWriter:
    """Keeps the newest preview in a file. Writing is done in a thread; a failure is one warning and no more previews.

    The file is whole at any moment: each preview is written beside it and moved there.
    """

    def __init__(self, file: Path, *, seconds_per_frame: float) -> None:
        """Write nothing yet.

        Args:
            file: from `check_preview`; replaced if it is there.
            seconds_per_frame: that each picture is shown.
        """
        self._file = file
        self._part = file.with_name(f".{file.name[:60]}.part-{os.getpid()}")
        self._milliseconds = max(round(1000 * seconds_per_frame), 20)
        self._thread = threading.Thread(target=self._run, name="wanfast-preview", daemon=True)
        self._changed = threading.Condition()  # guards what follows
        self._newest: Tensor | None = None
        self._is_closed = False

    def __enter__(self) -> "PreviewWriter":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Wait for the newest preview, however the run ended."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._thread.join()

    def update(self, frames: Tensor) -> None:
        """Take a preview, in place of one that is still waiting; returns at once.

        Args:
            frames: uint8 [F, H, W, 3], RGB, CPU; not to be written to any more.
        """
        with self._changed:
            self._newest = frames
            self._changed.notify()

    def _run(self) -> None:
        try:
            while (frames := self._wait()) is not None:
                self._write(frames)
        except Exception as error:  # whatever it is, the run goes on
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            _log.warning("%s: the preview cannot be written (%s)", self._file, reason)
        finally:
            with suppress(OSError):
                self._part.unlink()

    def _wait(self) -> Tensor | None:
        with self._changed:
            while self._newest is None and not self._is_closed:
                self._changed.wait()
            frames, self._newest = self._newest, None
            return frames

    def _write(self, frames: Tensor) -> None:
        height, width = frames.shape[1:3]
        factor = max(_LONGER_SIDE // max(height, width), 1)
        size = (width * factor, height * factor)
        first, *others = (Image.fromarray(frame).resize(size, Image.Resampling.BICUBIC) for frame in frames.numpy())
        options = _FORMATS[self._file.suffix.lower()]
        first.save(self._part, save_all=True, append_images=others, duration=self._milliseconds, loop=0, **options)
        self._part.replace(self._file)
