"""What a clip says of itself is believed only where it is whole: each field there, each of its type."""

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from wanfast.__main__ import main
from wanfast.config import I2V_A14B, T2V_A14B, TI2V_5B, ModelConfig
from wanfast.errors import MediaError, RequestError
from wanfast.plan import make_plan, request_of
from wanfast.request import Request
from wanfast.settings import RecordedLora, image_digest, read_recorded, settings_of
from wanfast.video import write_video

LORA = RecordedLora(
    path="/a.safetensors", sha256="0" * 64, strength=0.5, target="both", is_rank_stabilised=False, is_merged=True
)


def settings(config: ModelConfig = T2V_A14B, prompt: str | None = "a ball", **others: Any) -> dict[str, Any]:
    """As a clip holds them."""
    image = Image.new("RGB", (64, 48)) if config.task == "i2v" else None
    request = Request(prompt, image_size=None if image is None else image.size, seed=7)
    plan = make_plan(config, request, precision="fp32")
    made = settings_of(plan, version="1", model_path="/models/wan", image=image, image_path="/a.png", **others)
    return json.loads(json.dumps(made))


@pytest.mark.parametrize("config", [T2V_A14B, I2V_A14B, TI2V_5B])
def test_what_was_recorded_is_read_back(config: ModelConfig) -> None:
    recorded = read_recorded(settings(config, loras=[LORA], model_files={"vae": "/vae.pth"}), "a.mp4")
    plan = make_plan(config, recorded.request, precision="fp32")
    assert request_of(plan) == recorded.request
    assert (recorded.model, recorded.model_path, recorded.precision) == (config.name, "/models/wan", "fp32")
    assert (recorded.loras, recorded.model_files) == ((LORA,), {"vae": "/vae.pth"})
    pictured = ("/a.png", image_digest(Image.new("RGB", (64, 48)))) if config.task == "i2v" else (None, None)
    assert (recorded.image_path, recorded.image_sha256) == pictured
    assert read_recorded(settings(config, loras=[]) | {"note": "of a newer one"}, "a.mp4").loras == ()


def test_a_prompt_may_be_missing_beside_a_picture_alone() -> None:
    assert read_recorded(settings(I2V_A14B, prompt=""), "a.mp4").request.prompt is None


def damaged(path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    changed = deepcopy(settings(loras=[LORA], model_files={"vae": "/vae.pth"}))
    place = changed
    for key in path[:-1]:
        place = place[key]
    if value is ...:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return changed


WRONG: dict[tuple[Any, ...], tuple[Any, ...]] = {
    ("format",): (..., True, 1.0, "1", 2, None),
    ("wanfast",): (..., 5),
    ("model",): (..., None, 5),
    ("model_path",): (..., 5, [1], "", "a\0b", "\ud800"),
    ("model_files",): (..., [], {"vae": 5}, {"other": "/a"}, {"vae": "a\0b"}),
    ("precision",): (..., "auto", "bf16", None, ["fp32"]),
    ("is_repeatable",): (..., "no", 1, None),
    ("image",): (..., "x", [1], {}, {"path": "/a.png"}, {"path": 5, "sha256": "0"}, {"path": "/a.png", "sha256": "0"}),
    ("loras",): (..., {}, None, [5], [{}]),
    ("loras", 0, "path"): (..., 5, None),
    ("loras", 0, "strength"): (..., "1", True, float("nan"), 10**400),
    ("loras", 0, "target"): (..., "low", 5, ["both"]),
    ("loras", 0, "is_rank_stabilised"): (..., 1, None),
    ("loras", 0, "more"): (1,),
    ("request",): (..., {}, [], "x", None),
    ("request", "prompt"): (..., None, 5, ["a"]),
    ("request", "negative_prompt"): (..., None, 5),
    ("request", "image_size"): (..., [1], [], {"a": 1}, 5, [1, 2], [1.0, 2], [1, True]),
    ("request", "width"): (..., None, 832.0, True, "832"),
    ("request", "num_frames"): (..., None, "5"),
    ("request", "guidance"): (..., 4.0, "4"),
    ("request", "guidance_high"): (..., None, "4", float("inf")),
    ("request", "guidance_low"): (..., None, [4.0]),
    ("request", "shift"): (..., None, False, 10**400),
    ("request", "solver"): (..., None, "other", ["unipc"]),
    ("request", "seed"): (..., None, -1, 1.0, True),
    ("request", "fps"): (..., None, "16"),
    ("request", "attention_density"): (None, "0.5", True, float("nan")),
    ("request", "more"): (1,),
}


@pytest.mark.parametrize("path", WRONG, ids=lambda path: ".".join(map(str, path)))
def test_a_field_that_is_missing_or_of_another_type_is_refused_by_name(path: tuple[Any, ...]) -> None:
    for value in WRONG[path]:
        with pytest.raises(MediaError) as caught:
            read_recorded(damaged(path, value), "a.mp4")
        message = str(caught.value)
        assert message.startswith("a.mp4: its settings ") and "\n" not in message and len(message) < 400
        assert str(path[-1] if path[-1] != "more" else path[0]) in message


def test_a_clip_from_before_there_was_sparse_attention_is_dense() -> None:
    assert read_recorded(settings(), "a.mp4").request.attention_density == 1
    older = read_recorded(damaged(("request", "attention_density"), ...), "a.mp4")
    assert make_plan(T2V_A14B, older.request, precision="fp32").attention_density == 1


def test_a_clip_from_the_caller_s_own_latents_cannot_be_repeated() -> None:
    with pytest.raises(RequestError, match="clip: must come from prompts and a seed alone"):
        read_recorded(settings(is_repeatable=False), "a.mp4")


@pytest.mark.parametrize(
    ("path", "value", "code"),
    [
        (("model_path",), [1], 1),
        (("image",), "x", 1),
        (("request",), {}, 1),
        (("request", "image_size"), {"a": 1}, 1),
        (("model_path",), "/no/such\nfolder", 1),
        (("model_files",), {"high": "/no/such/file"}, 2),  # beside a model that is no file
        (("is_repeatable",), False, 2),
    ],
)
def test_rerun_of_edited_settings_is_one_line(
    path: tuple[Any, ...], value: Any, code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    frames = torch.zeros(1, 16, 16, 3, dtype=torch.uint8)
    changed = damaged(path, value) | {"loras": []}
    clip = write_video(tmp_path / "a.mp4", [frames], fps=16, settings=changed)
    assert main(["rerun", str(clip), "-o", str(tmp_path / "b.mp4")]) == code
    err = capsys.readouterr().err
    assert err.startswith("wanfast rerun: ") and len(err.strip().splitlines()) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"]


def test_a_clip_of_no_files_says_what_made_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    frames = torch.zeros(1, 16, 16, 3, dtype=torch.uint8)
    changed = damaged(("model_path",), None) | {"loras": [], "model_files": {}}
    clip = write_video(tmp_path / "a.mp4", [frames], fps=16, settings=changed)
    assert main(["rerun", str(clip), "-o", str(tmp_path / "b.mp4")]) == 2
    assert "random weights that is no longer built in; add --model FOLDER" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"]
