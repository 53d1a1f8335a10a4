"""Video out and in: what is in the file, that its settings come back, and that other files are refused."""

import json
import os
import shutil
import struct
import subprocess
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from clips import SETTINGS, noise, psnr, smooth

from wanfast.errors import MediaError, RequestError
from wanfast.pixels import to_uint8
from wanfast.video import Video, probe_video, read_settings, read_video, write_video


def boxes(path: Path) -> list[str]:
    """Names of an mp4's outermost boxes in order."""
    data, at, names = path.read_bytes(), 0, []
    while at < len(data):
        size, name = struct.unpack(">I4s", data[at : at + 8])
        names.append(name.decode())
        at += size
    return names


def mp4_with(path: Path, comment: str) -> Path:
    """A clip of somebody else's with this comment tag."""
    with av.open(str(path), "w", format="mp4") as container:
        container.metadata["comment"] = comment
        stream = container.add_stream("libx264", rate=16)
        stream.width = stream.height = 16
        container.mux(stream.encode(av.VideoFrame(16, 16, "yuv420p")))
        container.mux(stream.encode(None))
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_frames_are_clamped_scaled_and_truncated(dtype: torch.dtype) -> None:
    values = torch.tensor([-3.0, -1.0, -0.5, 0.0, 0.25, 0.75, 1.0, 7.0], dtype=dtype)
    frames = torch.zeros(1, 3, 2, 2, 4, dtype=dtype)
    frames[0, 1] = values.reshape(2, 4)
    got = to_uint8(frames)
    assert got.shape == (2, 2, 4, 3) and got.dtype == torch.uint8 and got.is_contiguous()
    # 0.25 is 159.375 and 0.75 is 223.125; 0 is 127.5, which rounding would make 128
    assert got[1, ..., 1].flatten().tolist() == [0, 0, 63, 127, 159, 223, 255, 255]
    assert got[..., 0].unique().tolist() == [127]


def test_truncation_is_that_of_fp32_arithmetic() -> None:
    levels = torch.linspace(-1, 1, 4096)
    got = to_uint8(levels.expand(1, 3, 1, 1, 4096))[0, 0, :, 2]
    want = np.floor((levels.numpy() + np.float32(1)) / np.float32(2) * np.float32(255)).astype(np.uint8)
    assert np.array_equal(got.numpy(), want)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_frames_that_are_not_finite_are_refused(bad: float) -> None:
    frames = torch.zeros(1, 3, 1, 4, 4)
    frames[0, 2, 0, 3, 1] = bad
    with pytest.raises(RequestError, match="finite"):
        to_uint8(frames)


@pytest.mark.parametrize("shape", [(3, 1, 4, 4), (2, 3, 1, 4, 4), (1, 4, 1, 4, 4)])
def test_frames_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="frames"):
        to_uint8(torch.zeros(shape))


def test_a_clip_comes_back_as_it_was_written(tmp_path: Path) -> None:
    want = smooth()
    path = tmp_path / "clip.mp4"
    assert write_video(path, want.split([1, 4, 4]), fps=16, settings=SETTINGS) == path
    got = read_video(path)
    assert got.dtype == torch.uint8 and got.shape == want.shape
    assert psnr(got, want) > 40
    assert min(psnr(one, other) for one, other in zip(got, want, strict=True)) > 39  # in order, none twice
    assert probe_video(path) == {
        "frames": 9,
        "fps": 16.0,
        "width": 80,
        "height": 48,
        "seconds": 9 / 16,
        "codec": "h264",
        "pixel_format": "yuv420p",
        "colour": {"matrix": 1, "primaries": 1, "transfer": 1, "full_range": False},
        "settings": SETTINGS,
    }
    assert boxes(path)[:2] == ["ftyp", "moov"]
    assert os.listdir(tmp_path) == ["clip.mp4"]


def test_colours_are_converted_with_the_matrix_they_are_tagged_with(tmp_path: Path) -> None:
    colours = torch.tensor([(r, g, b) for r in (0, 255) for g in (0, 255) for b in (0, 255)], dtype=torch.uint8)
    chart = colours.repeat_interleave(32, 0).expand(3, 64, 256, 3)
    path = write_video(tmp_path / "chart.mp4", [chart], fps=24, settings={})
    assert psnr(read_video(path), chart) > 40
    with av.open(str(path)) as container:
        planes = next(container.decode(video=0)).to_ndarray()
    red, green, blue = colours.double().T / 255
    luma = 0.2126 * red + 0.7152 * green + 0.0722 * blue  # ITU-R BT.709, limited range
    cb, cr = 128 + 224 * (blue - luma) / 1.8556, 128 + 224 * (red - luma) / 1.5748
    assert np.abs(planes[32, 16::32] - (16 + 219 * luma.numpy())).max() < 2
    chroma = planes[64:].reshape(2, 32, 128)[:, 16, 8::16]
    assert np.abs(chroma - np.stack([cb.numpy(), cr.numpy()])).max() < 2


@pytest.mark.skipif(shutil.which("ffprobe") is None, reason="needs ffprobe")
def test_ffprobe_reads_settings_and_colours(tmp_path: Path) -> None:
    path = write_video(tmp_path / "clip.mp4", [smooth()], fps=24, settings=SETTINGS)
    command = ["ffprobe", "-v", "error", "-show_format", "-show_streams", "-of", "json", str(path)]
    shown = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    assert json.loads(shown["format"]["tags"]["comment"]) == {"wanfast": SETTINGS}
    stream = shown["streams"][0]
    assert [stream[f"color_{name}"] for name in ("space", "primaries", "transfer")] == ["bt709"] * 3
    assert (stream["color_range"], stream["r_frame_rate"], stream["nb_frames"]) == ("tv", "24/1", "9")


def test_settings_survive_whatever_their_text(tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "prompt": '色调艳丽 🎬 \x00 \x1f \ud800 \\ " ; = # \u2028',
        "long": "字" * 100_000,
        "nested": {"sizes": [832, 480], "none": None, "yes": True, "shift": 0.1 + 0.2},
    }
    path = write_video(tmp_path / "clip.mp4", [smooth(2)], fps=16, settings=settings)
    assert read_settings(path) == settings
    assert probe_video(path)["settings"] == settings


def test_the_same_frames_and_settings_give_the_same_bytes(tmp_path: Path) -> None:
    frames = smooth(20, 240, 416) + noise(20, 240, 416) // 20
    first = write_video(tmp_path / "first.mp4", frames.split(4), fps=16, settings=SETTINGS).read_bytes()
    backwards = dict(reversed(SETTINGS.items()))
    for _ in range(2):
        again = write_video(tmp_path / "again.mp4", [frames.numpy()], fps=16, settings=backwards)
        assert again.read_bytes() == first


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs a choice of cores")
def test_the_number_of_cores_does_not_change_the_bytes(tmp_path: Path) -> None:
    cores = os.sched_getaffinity(0)
    frames = smooth(8, 240, 416)
    many = write_video(tmp_path / "many.mp4", [frames], fps=16, settings={}).read_bytes()
    os.sched_setaffinity(0, {min(cores)})
    try:
        one = write_video(tmp_path / "one.mp4", [frames], fps=16, settings={}).read_bytes()
    finally:
        os.sched_setaffinity(0, cores)
    assert one == many


def test_chunks_are_taken_one_by_one_and_let_go(tmp_path: Path) -> None:
    alive: list[weakref.ref[np.ndarray]] = []
    most = 0

    def chunks() -> Iterator[np.ndarray]:
        nonlocal most
        for chunk in noise(40).split(2):
            array = chunk.numpy().copy()
            alive.append(weakref.ref(array))
            yield array
            del array
            most = max(most, sum(ref() is not None for ref in alive))

    write_video(tmp_path / "clip.mp4", chunks(), fps=16, settings={})
    assert len(alive) == 20 and most <= 2


def test_a_video_saves_itself(tmp_path: Path) -> None:
    made = Video(frames=smooth(), fps=24, settings=SETTINGS)
    path = made.save(tmp_path / "CLIP.MP4")
    assert psnr(read_video(path), made.frames) > 40
    assert read_settings(path) == SETTINGS
    assert probe_video(path)["fps"] == 24


def test_saving_over_a_file_replaces_it_when_the_new_one_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"precious")
    odd = Video(frames=torch.zeros(1, 15, 16, 3, dtype=torch.uint8), fps=24, settings={})
    with pytest.raises(RequestError, match="height"):
        odd.save(path)
    assert path.read_bytes() == b"precious"
    with open(path, "rb") as older:  # a player that has the old one open keeps it whole
        assert Video(frames=smooth(), fps=24, settings=SETTINGS).save("~/clip.mp4") == path
        assert older.read() == b"precious"
    assert read_settings(path) == SETTINGS
    assert os.listdir(tmp_path) == ["clip.mp4"]


@pytest.mark.parametrize("path", [None, 5, b"clip.mp4"])
def test_saving_needs_a_name(path: Any) -> None:
    with pytest.raises(ValueError, match=r"^path: must be a file name, got "):
        Video(frames=smooth(1), fps=24, settings={}).save(path)


BAD_COMMENTS = [
    "",
    "made with love",
    "[1, 2]",
    '"wanfast"',
    '{"prompt": "x"}',
    '{"wanfast": "x"}',
    '{"wanfast": {"prompt": "x"}',
    "[" * 100_000,
    '{"wanfast": {"seed": ' + "9" * 5000 + "}}",
    '{"wanfast": {"x": "' + "y" * 2**20 + '"}}',
]


@pytest.mark.parametrize("comment", BAD_COMMENTS, ids=range(len(BAD_COMMENTS)))
def test_a_clip_without_settings_of_ours_is_refused_but_described(tmp_path: Path, comment: str) -> None:
    path = mp4_with(tmp_path / "other.mp4", comment)
    with pytest.raises(MediaError, match="carries no wanfast settings"):
        read_settings(path)
    assert probe_video(path)["settings"] is None
    assert read_video(path).shape == (1, 16, 16, 3)


@pytest.mark.parametrize("read", [read_settings, probe_video, read_video])
@pytest.mark.parametrize(
    "kind", ["missing", "folder", "empty", "text", "playlist", "half", "unknown codec", "no video"]
)
def test_what_is_no_clip_is_refused_in_one_line_with_its_name(tmp_path: Path, kind: str, read: Any) -> None:
    path = tmp_path / "file: clip.mp4"
    whole = write_video(tmp_path / "whole.mp4", [smooth()], fps=16, settings=SETTINGS)
    contents = {
        "empty": b"",
        "text": b"no clip at all\n" * 99,
        "playlist": f"ffconcat version 1.0\nfile {whole}\n".encode(),
        "half": whole.read_bytes()[:600],
        "unknown codec": whole.read_bytes().replace(b"avc1", b"zzzz"),
    }
    if kind in contents:
        path.write_bytes(contents[kind])
    elif kind == "folder":
        path.mkdir()
    elif kind == "no video":
        with av.open(str(path), "w", format="mp4") as container:
            sound = container.add_stream("mp3", rate=48_000)
            silence = av.AudioFrame(format="fltp", layout="stereo", samples=1152)
            silence.sample_rate = 48_000
            container.mux(sound.encode(silence))
            container.mux(sound.encode(None))
    with pytest.raises(MediaError) as caught:
        read(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and ";" in message and "\n" not in message


def test_a_clip_that_is_cut_off_is_refused_by_who_needs_every_frame(tmp_path: Path) -> None:
    path = write_video(tmp_path / "clip.mp4", [noise(9)], fps=16, settings=SETTINGS)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert read_settings(path) == SETTINGS
    with pytest.raises(MediaError, match=r"clip\.mp4: "):
        read_video(path)


def test_reading_uses_the_colour_matrix_the_file_names(tmp_path: Path) -> None:
    chart = torch.tensor([255, 0, 0], dtype=torch.uint8).expand(2, 32, 32, 3)
    path = tmp_path / "bt601.mp4"
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=16, options={"crf": "1"})
        stream.width = stream.height = 32
        for index in range(2):
            frame = av.VideoFrame.from_ndarray(chart[0].numpy().copy(), format="rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace="ITU601", src_color_range=2, dst_color_range=1)
            frame.pts = index
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    assert psnr(read_video(path), chart) > 40
