"""Frames become H.264 in an mp4, in a thread of its own: while one chunk is encoded, the next is being computed.

The thread takes chunks in their order and no other thread touches the container, so the bytes are those of encoding in
place. It may fall behind by two chunks: then whoever brings the next one waits, and memory never grows.
"""

import contextlib
import threading
from collections import deque
from pathlib import Path
from typing import TypeAlias

import av
import numpy as np
import numpy.typing as npt
from av.container import OutputContainer
from av.video.reformatter import ColorRange, Colorspace
from av.video.stream import VideoStream

from wanfast.errors import RequestError

Pixels: TypeAlias = npt.NDArray[np.uint8]

BT709 = 1  # this colour space, these primaries and this transfer curve are all number 1 in ITU-T H.273
MOST_CHUNKS = 2  # taken and not encoded to the end

# CRF 10 is what the reference's writer uses (imageio, quality 8); "veryfast" takes a third of the default preset's CPU
# time and measured within 0.1 dB of it. x264's macroblock tree gives other bytes from run to run on CPUs with AVX-512,
# so it is off. The number of threads changes the output too, so it is fixed: the same frames give the same bytes on any
# number of cores.
_X264 = {"preset": "veryfast", "crf": "10", "x264-params": "mbtree=0"}
_X264_THREADS = 8
_WAKE_SECONDS = 0.5  # how often a wait looks up, where no signal can interrupt it


class Mp4Encoder:
    """One mp4 being written. Errors of the thread are raised where the next chunk is brought, or the end waited for."""

    def __init__(self, file: Path, *, height: int, width: int, fps: int, comment: str) -> None:
        """Create the file; the thread starts with the first chunk.

        Args:
            file: to write; its name need not end in .mp4.
            height: of the frames, even.
            width: of the frames, even.
            fps: frames per second.
            comment: text of the `comment` tag.

        Raises:
            RequestError: height or width is odd.
            OSError, av.error.FFmpegError: the file cannot be written.
        """
        for name, pixels in (("height", height), ("width", width)):
            if pixels < 2 or pixels % 2:
                nearest = max(2, pixels - 1)
                raise RequestError(f"{name}: must be even for an mp4 (yuv420p), got {pixels}; nearest: {nearest}")
        options = {"movflags": "+faststart", "movie_timescale": str(1000 * fps)}  # else lengths are in milliseconds
        self._container = av.open(str(file), "w", format="mp4", options=options)
        try:
            self._stream = _add_stream(self._container, height=height, width=width, fps=fps)
        except BaseException:
            self._close()
            raise
        self._container.metadata["comment"] = comment
        self._thread = threading.Thread(target=self._run, name="wanfast-mp4", daemon=True)
        self._changed = threading.Condition()  # guards what follows
        self._chunks: deque[Pixels] = deque()  # the first one is being encoded
        self._error: BaseException | None = None
        self._is_complete = self._is_stopped = self._is_ended = False

    def put(self, chunk: Pixels) -> None:
        """Hand over frames; waits while two chunks are not encoded yet.

        Args:
            chunk: uint8 [F, height, width, 3], RGB; not to be written to any more.

        Raises:
            Exception: what the thread failed with, in this chunk or before.
        """
        with self._changed:
            while len(self._chunks) >= MOST_CHUNKS and self._error is None:
                self._changed.wait(_WAKE_SECONDS)
            if self._error is not None:
                raise self._error
            self._chunks.append(chunk)
            self._changed.notify_all()
            if self._thread.ident is None:
                self._thread.start()

    def finish(self) -> None:
        """Wait until every frame is encoded and the file is complete; raises as `put`."""
        with self._changed:
            self._is_complete = True
        self._wait_for_end()
        if self._error is not None:
            raise self._error

    def abandon(self) -> None:
        """Stop within a frame and close the file, which is of no use then; after `finish` nothing happens."""
        with self._changed:
            self._is_stopped = True
        self._wait_for_end()
        self._close()

    def _close(self) -> None:
        # A container left open would write on when it is collected.
        with contextlib.suppress(Exception):
            self._container.close()

    def _wait_for_end(self) -> None:
        with self._changed:
            self._changed.notify_all()
            # Not by `join`: before Python 3.13 one that is interrupted takes the thread for ended.
            while self._thread.ident is not None and not self._is_ended:
                self._changed.wait(_WAKE_SECONDS)
        if self._is_ended:
            self._thread.join()

    def _run(self) -> None:
        try:
            num_frames = 0
            while (chunk := self._wait_for_chunk()) is not None:
                num_frames += self._encode(chunk, num_frames)
                del chunk
                with self._changed:
                    self._chunks.popleft()
                    self._changed.notify_all()
            if not self._is_stopped:
                self._container.mux(self._stream.encode(None))
                self._container.close()
        except BaseException as error:
            with self._changed:
                self._error = error
                self._chunks.clear()
        finally:
            with self._changed:
                self._is_ended = True
                self._changed.notify_all()

    def _wait_for_chunk(self) -> Pixels | None:
        with self._changed:
            while not (self._chunks or self._is_complete or self._is_stopped):
                self._changed.wait()
            return self._chunks[0] if self._chunks and not self._is_stopped else None

    def _encode(self, chunk: Pixels, first: int) -> int:
        for index, frame in enumerate(chunk, first):
            if self._is_stopped:
                break
            self._container.mux(self._stream.encode(_to_yuv(frame, index)))
        return len(chunk)


def _add_stream(container: OutputContainer, *, height: int, width: int, fps: int) -> VideoStream:
    stream = container.add_stream("libx264", rate=fps, options=dict(_X264))
    stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
    codec = stream.codec_context
    codec.thread_type, codec.thread_count = "FRAME", _X264_THREADS  # PyAV's default, slices, costs quality
    codec.colorspace = codec.color_primaries = codec.color_trc = BT709
    codec.color_range = ColorRange.MPEG
    return stream


def _to_yuv(frame: Pixels, index: int) -> av.VideoFrame:
    yuv = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24").reformat(
        format="yuv420p",
        dst_colorspace=Colorspace.ITU709,  # the default is BT.601, whatever the tags say
        src_color_range=ColorRange.JPEG,
        dst_color_range=ColorRange.MPEG,
        interpolation="BICUBIC",
    )
    yuv.pts = index
    return yuv
