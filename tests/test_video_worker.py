"""The thread that encodes: it keeps up or the decoder waits; whatever fails, wherever, the end is quick and clean."""

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from av import VideoFrame
from clips import SETTINGS, noise, smooth
from torch import Tensor

from wanfast import mp4
from wanfast.errors import MediaError
from wanfast.mp4 import MOST_CHUNKS
from wanfast.video import write_video

PATIENCE = 20.0  # seconds until a test that waits has failed


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("wanfast")] == []


class Encoder:
    """Stands before the real one: waits for a permit for each frame, or fails at one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, fails_at: int = -1, error: BaseException | None = None):
        self.permits = threading.Semaphore(0)
        self.begun = threading.Event()
        self.taken = self.encoded = 0
        self._is_open = False
        self._real, self._fails_at, self._error = mp4._to_yuv, fails_at, error
        monkeypatch.setattr(mp4, "_to_yuv", self)

    def open(self) -> "Encoder":
        self._is_open = True
        self.permits.release(1000)
        return self

    def __call__(self, frame: Any, index: int) -> VideoFrame:
        self.taken += 1
        self.begun.set()
        if not self._is_open:
            assert self.permits.acquire(timeout=PATIENCE)
        if index == self._fails_at and self._error is not None:
            raise self._error
        self.encoded += 1
        return self._real(frame, index)


def one_by_one(frames: Tensor, asked: list[int]) -> Iterator[Tensor]:
    for index, frame in enumerate(frames.split(1)):
        asked.append(index)
        yield frame


def test_the_next_chunk_is_made_while_one_is_encoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, asked = Encoder(monkeypatch), list[int]()

    def chunks() -> Iterator[Tensor]:
        for index, frame in enumerate(smooth(4).split(1)):
            if index == 1:
                assert encoder.begun.wait(PATIENCE)  # in place, this would wait for the frame behind it
            asked.append(encoder.encoded)
            yield frame
            if index == 1:
                encoder.open()

    write_video(tmp_path / "clip.mp4", chunks(), fps=16, settings={})
    assert asked[:2] == [0, 0]


def test_an_encoder_that_falls_behind_holds_the_decoder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, frames = Encoder(monkeypatch), smooth(12)
    ahead: list[int] = []

    def chunks() -> Iterator[Tensor]:
        for index, frame in enumerate(frames.split(1)):
            ahead.append(index - encoder.encoded)  # taken, and not encoded to the end
            yield frame

    def permit() -> None:
        for _ in range(len(frames)):
            time.sleep(0.02)  # the decoder needs no time at all
            encoder.permits.release()

    slow = threading.Thread(target=permit)
    slow.start()
    path = write_video(tmp_path / "clip.mp4", chunks(), fps=16, settings=SETTINGS)
    slow.join()
    assert max(ahead) <= MOST_CHUNKS
    assert sum(count == MOST_CHUNKS for count in ahead) >= 6, "the decoder was never held back"
    monkeypatch.undo()
    assert path.read_bytes() == write_video(tmp_path / "x.mp4", [frames], fps=16, settings=SETTINGS).read_bytes()


@pytest.mark.parametrize("fails_at", [0, 5, 11])
@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), MediaError, r"clip\.mp4: cannot be written \(No space left"),
        (RuntimeError("broken"), RuntimeError, "^broken$"),
        (MemoryError("none left"), MemoryError, "none left"),
    ],
    ids=["disk", "own", "memory"],
)
def test_an_error_of_the_thread_is_told_and_stops_the_decoder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, kind: type, words: str, fails_at: int
) -> None:
    (tmp_path / "clip.mp4").write_bytes(b"before")
    asked: list[int] = []
    Encoder(monkeypatch, fails_at=fails_at, error=error).open()
    with pytest.raises(kind, match=words):
        write_video(tmp_path / "clip.mp4", one_by_one(smooth(12), asked), fps=16, settings={})
    assert len(asked) <= fails_at + MOST_CHUNKS + 1
    assert os.listdir(tmp_path) == ["clip.mp4"]
    assert (tmp_path / "clip.mp4").read_bytes() == b"before"


def test_an_error_of_the_decoder_does_not_wait_for_what_is_queued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = Encoder(monkeypatch)

    def chunks() -> Iterator[Tensor]:
        yield noise(300)
        assert encoder.begun.wait(PATIENCE)
        threading.Timer(0.1, encoder.permits.release).start()  # the frame that is being encoded, and no other
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match=r"^mine$"):
        write_video(tmp_path / "clip.mp4", chunks(), fps=16, settings={})
    assert encoder.taken == encoder.encoded == 1
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("waits_for", ["room", "the end"])
def test_ctrl_c_ends_the_wait_for_a_slow_encoder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, waits_for: str
) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are born without it
    encoder, asked = Encoder(monkeypatch), list[int]()
    count = {"room": 12, "the end": MOST_CHUNKS}[waits_for]

    def interrupt() -> None:
        assert encoder.begun.wait(PATIENCE)
        deadline = time.monotonic() + PATIENCE
        while len(asked) < min(count, MOST_CHUNKS + 1) and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.05)
        encoder.permits.release()  # the frame under way ends some time

    other = threading.Thread(target=interrupt)
    other.start()
    with pytest.raises(KeyboardInterrupt):
        write_video(tmp_path / "clip.mp4", one_by_one(smooth(count), asked), fps=16, settings={})
    other.join()
    assert encoder.taken == 1
    assert os.listdir(tmp_path) == []


KILLED = """
import os, signal, sys, torch
from wanfast.video import write_video

def chunks():
    for index in range(50):
        if index == 40:
            os.kill(os.getpid(), signal.SIGKILL)
        yield torch.randint(0, 256, (4, 96, 96, 3), dtype=torch.uint8)

write_video(os.path.join(sys.argv[1], "clip.mp4"), chunks(), fps=16, settings={})
"""


def test_a_killed_process_leaves_no_clip(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, tmp_path], cwd=Path(mp4.__file__).parents[1])
    assert done.returncode == -signal.SIGKILL
    assert all(name.startswith(".clip.mp4.part-") for name in os.listdir(tmp_path))
