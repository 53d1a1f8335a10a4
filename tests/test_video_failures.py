"""Writing a video that fails: told in one line, before computing where it can be known, and nothing is left behind."""

import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from clips import SETTINGS, noise, psnr, smooth
from torch import Tensor

import wanfast.video as video
from wanfast.errors import MediaError, RequestError
from wanfast.video import check_writable, read_settings, read_video, write_video


def failing(frames: Tensor, error: BaseException) -> Iterator[Tensor]:
    yield frames
    raise error


def interrupted(frames: Tensor) -> Iterator[Tensor]:
    yield frames
    signal.raise_signal(signal.SIGINT)
    yield frames


BAD_CHUNKS: dict[str, tuple[list[Any], str]] = {
    "none": ([], "at least one frame"),
    "no frames": ([torch.zeros(0, 16, 16, 3, dtype=torch.uint8)], "at least one frame"),
    "float": ([torch.zeros(1, 16, 16, 3)], "uint8"),
    "one frame": ([torch.zeros(16, 16, 3, dtype=torch.uint8)], "uint8"),
    "channels first": ([torch.zeros(1, 3, 16, 16, dtype=torch.uint8)], "uint8"),
    "another size": ([smooth(1, 32, 48), smooth(1, 48, 32)], "frames of shape"),
    "another dtype": ([smooth(1), smooth(1).float()], "uint8"),
    "odd width": ([smooth(1, 16, 33)], "width: must be even.*nearest: 32"),
    "odd height": ([smooth(1, 1, 16)], "height: must be even.*nearest: 2"),
}


@pytest.mark.parametrize("before", [None, b"what was there before"])
@pytest.mark.parametrize("failure", ["error", "own OSError", "interrupt", "signal", *BAD_CHUNKS])
def test_a_failure_leaves_the_folder_as_it_was(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], failure: str, before: bytes | None
) -> None:
    path = tmp_path / "clip.mp4"
    if before is not None:
        path.write_bytes(before)
    chunks, kind, words = {
        "error": (failing(noise(60), ZeroDivisionError("mine")), ZeroDivisionError, "^mine$"),
        "own OSError": (failing(noise(9), OSError(errno.EIO, "mine")), OSError, "mine$"),
        "interrupt": (failing(noise(60), KeyboardInterrupt()), KeyboardInterrupt, None),
        "signal": (interrupted(noise(9)), KeyboardInterrupt, None),
        **{name: (iter(bad), ValueError, words) for name, (bad, words) in BAD_CHUNKS.items()},
    }[failure]
    with pytest.raises(kind, match=words) as caught:
        write_video(path, chunks, fps=16, settings={})
    assert not isinstance(caught.value, MediaError)
    assert os.listdir(tmp_path) == ([] if before is None else ["clip.mp4"])
    assert before is None or path.read_bytes() == before
    assert capfd.readouterr() == ("", "")


def test_a_complete_clip_replaces_an_older_one_and_follows_a_link(tmp_path: Path) -> None:
    real, link = tmp_path / "real.mp4", tmp_path / "link.mp4"
    real.write_bytes(b"old")
    link.symlink_to(real)
    write_video(link, [smooth()], fps=16, settings=SETTINGS)
    assert link.is_symlink() and read_settings(real) == SETTINGS
    assert sorted(os.listdir(tmp_path)) == ["link.mp4", "real.mp4"]
    mask = os.umask(0)
    os.umask(mask)
    assert real.stat().st_mode & 0o777 == 0o666 & ~mask


def never() -> Iterator[Tensor]:
    pytest.fail("a chunk was asked for")
    yield


def test_what_cannot_be_written_is_refused_before_the_first_chunk(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "folder.mp4").mkdir()
    os.mkfifo(tmp_path / "pipe.mp4")
    (tmp_path / "lost.mp4").symlink_to(tmp_path / "gone" / "clip.mp4")
    before = sorted(os.listdir(tmp_path))
    for path, words in {
        tmp_path / "gone" / "clip.mp4": "gone does not exist",
        tmp_path / "lost.mp4": "gone does not exist",
        tmp_path / "file" / "clip.mp4": "Not a directory",
        tmp_path / "folder.mp4": "is a folder",
        tmp_path / "pipe.mp4": "a device or a pipe",
        tmp_path / f"{'n' * 300}.mp4": "File name too long",
        Path("/proc/clip.mp4"): "cannot be written",
    }.items():
        for refuse in (check_writable, lambda path: write_video(path, never(), fps=16, settings={})):
            with pytest.raises(MediaError) as caught:
                refuse(path)
            message = str(caught.value)
            assert message.startswith(f"{path}: ") and words in message and "\n" not in message
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(MediaError, match="Permission denied"):
        check_writable(tmp_path / "clip.mp4")


@pytest.mark.parametrize("name", ["clip.gif", "clip", "", ".mp4", "clip.mp4.webm"])
def test_another_suffix_is_refused_with_one_that_works(tmp_path: Path, name: str) -> None:
    with pytest.raises(RequestError, match=r"output: must end in \.mp4, got .*clip\.mp4"):
        write_video(name, never(), fps=16, settings={})


@pytest.mark.parametrize("name", ["a\0b.mp4", "a\ud800.mp4"])
def test_a_name_no_file_can_have_is_refused(name: str) -> None:
    for refuse in (check_writable, lambda path: write_video(path, never(), fps=16, settings={})):
        with pytest.raises(RequestError, match="output: must be a name a file can have"):
            refuse(name)


@pytest.mark.parametrize("settings", [{"x": object()}, {"x": float("nan")}, {(1, 2): 3}, {"x": "y" * 2**20}])
def test_settings_that_cannot_be_embedded_are_refused_before_the_first_chunk(
    tmp_path: Path, settings: dict[Any, Any]
) -> None:
    with pytest.raises(ValueError, match="settings"):
        write_video(tmp_path / "clip.mp4", never(), fps=16, settings=settings)
    with pytest.raises(ValueError, match="fps"):
        write_video(tmp_path / "clip.mp4", never(), fps=0, settings={})


def test_a_free_place_is_accepted_and_left_as_it_was(tmp_path: Path) -> None:
    longest = tmp_path / f"{'字' * 83}.mp4"  # 253 of 255 bytes
    (tmp_path / "old.mp4").write_bytes(b"old")
    for path in (tmp_path / "new.mp4", tmp_path / "old.mp4", longest):
        check_writable(path)
    assert os.listdir(tmp_path) == ["old.mp4"] and (tmp_path / "old.mp4").read_bytes() == b"old"
    assert psnr(read_video(write_video(longest, [smooth()], fps=16, settings={})), smooth()) > 40


def test_an_end_of_space_at_any_byte_is_told_and_leaves_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(video, "_PROBE_BYTES", 0)
    frames = noise(12)
    size = write_video(tmp_path / "whole.mp4", [frames], fps=16, settings={}).stat().st_size
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    # The last few are short of the room the index needs when it is moved to the front.
    for room in (0, 1, 40, size // 3, size - 1500, size - 900, size - 400, size - 100, size - 1):
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, unlimited[1]))
        try:
            with pytest.raises(MediaError) as caught:
                write_video(tmp_path / "clip.mp4", frames.split(4), fps=16, settings={})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
        assert str(caught.value).startswith(f"{tmp_path / 'clip.mp4'}: cannot be written (File too large)")
        assert os.listdir(tmp_path) == ["whole.mp4"]
    assert capfd.readouterr() == ("", "")


FULL_DISK = """
import os, sys, torch
from wanfast.errors import MediaError
from wanfast.video import check_writable, write_video
folder = sys.argv[1]
clip = os.path.join(folder, "clip.mp4")
frames = torch.randint(0, 256, (200, 96, 96, 3), dtype=torch.uint8)
for attempt in (lambda: write_video(clip, frames.split(4), fps=16, settings={}), lambda: check_writable(clip)):
    try:
        attempt()
        sys.exit("nothing was raised")
    except MediaError as error:
        print(error)
    assert os.listdir(folder) == ["other"] * os.path.exists(os.path.join(folder, "other")), os.listdir(folder)
    open(os.path.join(folder, "other"), "wb").write(bytes(1 << 20))
"""


def test_a_full_disk_is_told_while_writing_and_beforehand(tmp_path: Path) -> None:
    mount = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    script = 'mount -t tmpfs -o size=1536k tmpfs "$0" && exec "$@"'
    if (
        shutil.which("unshare") is None
        or subprocess.run([*mount, script, tmp_path, "true"], capture_output=True).returncode
    ):
        pytest.skip("needs a file system of its own")
    command = [*mount, script, tmp_path, sys.executable, "-c", FULL_DISK, tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(video.__file__).parents[1])
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count(f"{tmp_path}/clip.mp4: cannot be written (No space left on device)") == 2
