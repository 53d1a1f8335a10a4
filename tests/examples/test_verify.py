"""`wanfast verify` tells a tier that changes what is shown from one that only changes pixels."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from data import is_held_out, make_scene, render
from evaluate import SEED
from reference.formats import make_original, write_official

from wanfast.__main__ import main
from wanfast.bench.difference import Frames
from wanfast.judge import wanted
from wanfast.verify import compare, format_columns, held_out_captions

CAPTIONS = [make_scene(SEED, index, kind="single", held_out=True).caption for index in range(30)]


def truth(caption: str, seed: int) -> Frames:
    scene = make_scene(SEED, seed, kind="single", held_out=True)
    assert scene.caption == caption  # the number of the caption is its seed
    return (render(scene) * 255).round().astype(np.uint8)


def brighter(caption: str, seed: int) -> Frames:
    return np.minimum(truth(caption, seed), 253) + np.uint8(2)


def backwards(caption: str, seed: int) -> Frames:
    return np.ascontiguousarray(truth(caption, seed)[::-1])


def slower(caption: str, seed: int) -> Frames:
    return truth(caption, seed)[np.arange(17) // 2]


def grey(caption: str, seed: int) -> Frames:
    return np.full((17, 64, 64, 3), 115, np.uint8)


def nothing_told(stage: str, done: int, total: int) -> None:
    pass


def test_the_captions_are_those_no_training_saw() -> None:
    captions = held_out_captions()
    assert captions == [make_scene(SEED, index, kind="single", held_out=True).caption for index in range(200)]
    assert len(set(captions)) == 200
    for caption in captions:
        (one,) = wanted(caption)
        assert is_held_out(one.colour, one.shape, one.direction)


def test_pixels_that_change_nothing_shown_are_no_loss() -> None:
    exact, same, lighter = compare({"exact": truth, "same": truth, "lighter": brighter}, CAPTIONS, nothing_told)
    assert exact.following["follows"] == same.following["follows"] == lighter.following["follows"] == 1.0
    assert (same.psnr, same.ssim, same.worst_pixel, same.motion_error) == (None, 1.0, 0, 0.0)
    assert (lighter.lost, lighter.gained, lighter.worst_pixel, lighter.is_worse) == (0, 0, 2, False)
    assert lighter.psnr == pytest.approx(42.1, abs=0.15)  # 2 of 255 in every pixel, and white ones less


def test_what_is_shown_wrongly_is_seen() -> None:
    makers = {"exact": truth, "backwards": backwards, "slower": slower, "grey": grey}
    _, turned, slow, empty = compare(makers, CAPTIONS, nothing_told)
    still = sum(wanted(caption)[0].direction == "still" for caption in CAPTIONS)
    assert (turned.following["colour"], turned.following["shape"]) == (1.0, 1.0)
    assert turned.lost == len(CAPTIONS) - still
    assert turned.is_worse
    speeds = np.mean([wanted(caption)[0].speed for caption in CAPTIONS])
    assert turned.motion_error == pytest.approx(2 * speeds, rel=0.05)
    assert slow.motion_error == pytest.approx(speeds / 2, rel=0.1)
    assert slow.following["speed_error"] == pytest.approx(speeds / 2, rel=0.1)
    assert (empty.following["follows"], empty.lost, empty.motion_error) == (0.0, len(CAPTIONS), None)
    assert empty.is_worse


def test_what_exact_gets_wrong_is_no_loss_of_others() -> None:
    _, better = compare({"exact": grey, "better": truth}, CAPTIONS[:5], nothing_told)
    assert (better.lost, better.gained, better.is_worse) == (0, 5, False)


def test_one_caption_in_fifty_may_be_lost() -> None:
    def losing(numbers: set[int]) -> bool:
        makers = {"exact": truth, "other": lambda caption, seed: (grey if seed in numbers else truth)(caption, seed)}
        captions = [make_scene(SEED, index, kind="single", held_out=True).caption for index in range(50)]
        return compare(makers, captions, nothing_told)[1].is_worse

    assert not losing({3})
    assert losing({3, 4})


def test_the_table_has_a_column_for_each_tier() -> None:
    table = format_columns(compare({"exact": truth, "same": truth, "grey": grey}, CAPTIONS[:4], nothing_told))
    lines = {line.split("  ")[0].strip(): line.split() for line in table.splitlines()}
    assert lines[""] == ["exact", "same", "grey"]
    assert lines["colour, shape and direction"][-6:] == ["100.0", "%", "100.0", "%", "0.0", "%"]
    assert lines["captions only exact follows"][-2:] == ["0", "4"]
    assert "identical" in lines["PSNR to exact"]
    assert lines["motion error to exact, per frame"][-1] == "-"


def test_the_command_judges_its_tiers(capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["verify", "--suite", "tiny", "--captions", "1", "--tiers", "fp32,exact", "--steps", "2", "--json"])
    columns = json.loads(capsys.readouterr().out)
    assert code == 0
    assert [column["name"] for column in columns] == ["exact", "fp32", "exact, as asked"]
    assert all(column["num_captions"] == 1 for column in columns)
    assert columns[2]["psnr"] is not None  # its steps are others


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--captions", "0"], "captions: must be from 1 to 200, got 0"),
        (["--captions", "201"], "captions: must be from 1 to 200, got 201"),
        (["--tiers", "exact"], "tiers: must differ from exact"),
        (["--tiers", "fp7"], "tiers: each must be a precision"),
        (["--lora", "gone.safetensors", "--captions", "1"], "gone.safetensors"),
    ],
)
def test_bad_lines_are_refused(words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", *words]) in (1, 2)
    assert says in capsys.readouterr().err


def test_a_model_that_needs_a_picture_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write_official(make_original("i2v"), tmp_path, torch.bfloat16)["model"]
    assert main(["verify", "--model", str(model)]) == 2
    assert "model: must make videos from text alone" in capsys.readouterr().err
