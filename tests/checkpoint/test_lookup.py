"""Finding a model's files from what a user names, and saying what was found."""

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from reference.single_files import text_state, vae_state, write, write_comfy
from reference.tiny import random_tiny

from wanfast.checkpoint import hub
from wanfast.checkpoint.lookup import Sources, find_checkpoint
from wanfast.checkpoint.nearby import expert_by_name, partner_paths
from wanfast.errors import CheckpointError, RequestError

HIGH, LOW = (f"wan2.2_t2v_{word}_noise_14B_fp8_scaled.safetensors" for word in ("high", "low"))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_comfy(tmp_path_factory.mktemp("comfy") / "models")


@pytest.fixture
def models(written: Path, tmp_path: Path) -> Path:
    """A ComfyUI `models/` folder that a test may change."""
    return Path(shutil.copytree(written, tmp_path / "models"))


@pytest.mark.parametrize("where", ["models", "comfy", "high", "low", "both"])
def test_a_pair_is_found_from_its_folder_or_either_file(models, where):
    dits = models / "diffusion_models"
    sources = {
        "models": Sources(model=models),
        "comfy": Sources(model=models.parent),
        "high": Sources(model=dits / HIGH),
        "low": Sources(model=str(dits / LOW)),
        "both": Sources(high=dits / HIGH, low=dits / LOW),
    }[where]
    checkpoint = find_checkpoint(sources)
    assert (checkpoint.layout, checkpoint.task, checkpoint.vae_version) == ("files", "t2v", "2.1")
    assert {name: reader.path.name for name, reader in checkpoint.experts.items()} == {
        "high_noise": HIGH,
        "low_noise": LOW,
    }
    assert list(checkpoint.experts) == ["high_noise", "low_noise"]
    assert checkpoint.vae.path.name == "wan_2.1_vae.safetensors"
    assert checkpoint.text.path.name == "umt5_xxl_fp8_e4m3fn_scaled.safetensors"
    assert checkpoint.tokenizer == models / "text_encoders" / "tokenizer.json"
    if where in ("high", "low"):
        assert any(
            f"noise expert: {dits / (LOW if where == 'high' else HIGH)} (by its name)" in n for n in checkpoint.notes
        )


def test_a_model_with_one_dit_is_found(tmp_path):
    models = write_comfy(tmp_path / "models", task="ti2v")
    for model in (models, models / "diffusion_models" / "wan2.2_ti2v_5B_fp8_scaled.safetensors"):
        checkpoint = find_checkpoint(Sources(model=model))
        assert (checkpoint.task, list(checkpoint.experts), checkpoint.vae_version) == ("ti2v", ["single"], "2.2")
    with pytest.raises(RequestError, match=r"^high: must be left out for a model with one DiT"):
        find_checkpoint(Sources(high=models / "diffusion_models" / "wan2.2_ti2v_5B_fp8_scaled.safetensors"))


@pytest.mark.parametrize(
    ("path", "expert"),
    [
        ("wan2.2_t2v_high_noise_14B_fp8_scaled.safetensors", "high_noise"),
        ("HighNoise/Wan2.2-T2V-A14B-HighNoise-Q4_K_M.gguf", "high_noise"),
        ("Wan2.2-I2V-A14B-LowNoise-Q8_0.gguf", "low_noise"),
        ("Wan2_2-T2V-A14B-LOW_fp8_e4m3fn_scaled_KJ.safetensors", "low_noise"),
        ("TurboWan2.2-I2V-A14B-high-720P-quant.pth", "high_noise"),
        ("low_noise_model/diffusion_pytorch_model.safetensors", "low_noise"),
        ("low-vram/wan2.2_high_noise.safetensors", "high_noise"),
        ("wan2.2_high_noise_for_low_vram.safetensors", "high_noise"),
        ("wan2.2_highres_slow.safetensors", None),
        ("wan_high_and_low.safetensors", None),
        ("below/flow_thigh.safetensors", None),
    ],
)
def test_a_file_says_by_its_name_which_expert_it_is(path, expert):
    assert expert_by_name(Path("models") / path) == expert


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("a_high_noise.safetensors", "a_low_noise.safetensors"),
        ("HighNoise/X-HighNoise-Q4.gguf", "LowNoise/X-LowNoise-Q4.gguf"),
        ("HIGH.gguf", "LOW.gguf"),
        ("high_noise/model.safetensors", "low_noise/model.safetensors"),
    ],
)
def test_partners_are_the_files_with_the_other_word(tmp_path, one, other):
    for name in (one, other, "elsewhere/a_low_noise.safetensors"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert partner_paths(tmp_path / one) == [tmp_path / other]
    assert partner_paths(tmp_path / other) == [tmp_path / one]


def test_one_expert_without_the_other_is_refused(models):
    (models / "diffusion_models" / LOW).unlink()
    with pytest.raises(CheckpointError, match=rf"{HIGH}: is the high-noise expert, and no file .* name it with --low"):
        find_checkpoint(Sources(model=models / "diffusion_models" / HIGH))
    with pytest.raises(CheckpointError, match=r"holds no whole Wan 2\.2 model"):
        find_checkpoint(Sources(model=models))


def test_two_files_for_one_expert_are_refused(models):
    dits = models / "diffusion_models"
    shutil.copy(dits / HIGH, dits / f"other_{HIGH}")
    for sources in (
        Sources(high=dits / HIGH, low=dits / f"other_{HIGH}"),
        Sources(high=dits / HIGH, low=dits / HIGH),
        Sources(model=dits / HIGH, high=dits / f"other_{HIGH}"),
    ):
        with pytest.raises(RequestError, match=r"^(low|model): "):
            find_checkpoint(sources)


def test_what_the_user_says_outranks_names_with_a_warning(models, caplog):
    dits = models / "diffusion_models"
    with caplog.at_level(logging.WARNING, logger="wanfast"):
        checkpoint = find_checkpoint(Sources(high=dits / LOW, low=dits / HIGH))
    assert checkpoint.experts["high_noise"].path.name == LOW
    assert "which their names contradict; they run as said" in caplog.text


def test_names_that_say_nothing_need_the_flags(models):
    dits = models / "diffusion_models"
    first, second = (dits / HIGH).rename(dits / "wan_a.safetensors"), (dits / LOW).rename(dits / "wan_b.safetensors")
    with pytest.raises(RequestError, match=r"^model: must have high or low in its name"):
        find_checkpoint(Sources(model=first))
    checkpoint = find_checkpoint(Sources(high=first, low=second))
    assert [reader.path for reader in checkpoint.experts.values()] == [first, second]
    checkpoint = find_checkpoint(Sources(model=first, high=second))
    assert [reader.path for reader in checkpoint.experts.values()] == [second, first]


def test_several_models_in_a_folder_are_listed_and_none_is_guessed(models):
    write_comfy(models, task="i2v")
    with pytest.raises(
        CheckpointError,
        match=r"2 Wan 2\.2 models; name one: --high /\S+/wan2\.2_i2v\S+ --low /\S+ \| --high /\S+/wan2\.2_t2v",
    ):
        find_checkpoint(Sources(model=models))


def test_experts_of_different_models_are_refused(models):
    write_comfy(models, task="i2v")
    dits = models / "diffusion_models"
    with pytest.raises(CheckpointError, match="the experts are of different models"):
        find_checkpoint(Sources(high=dits / HIGH, low=dits / LOW.replace("t2v", "i2v")))


def test_named_parts_are_used_and_checked(models, tmp_path):
    vae = write(tmp_path / "own" / "mine.safetensors", vae_state())
    text = write(tmp_path / "own" / "encoder.safetensors", text_state())
    tokenizer = models / "text_encoders" / "tokenizer.json"
    checkpoint = find_checkpoint(Sources(model=models, vae=vae, text_encoder=text, tokenizer=tokenizer))
    assert (checkpoint.vae.path, checkpoint.text.path, checkpoint.tokenizer) == (vae, text, tokenizer)
    with pytest.raises(CheckpointError, match=r"encoder\.safetensors: holds a umT5 text encoder, but a VAE is wanted"):
        find_checkpoint(Sources(model=models, vae=text))
    wrong = models / "vae" / "wan2.2_vae.safetensors"
    with pytest.raises(CheckpointError, match="48 latent channels"):
        find_checkpoint(Sources(model=models, vae=wrong))


@pytest.mark.parametrize(("part", "flag"), [("vae", "vae"), ("text_encoders", "text-encoder")])
def test_a_part_that_is_nowhere_is_asked_for(models, part, flag):
    shutil.rmtree(models / part)
    with pytest.raises(CheckpointError, match=rf"that fits it lies near it; name one with --{flag}"):
        find_checkpoint(Sources(model=models))


def test_of_several_that_fit_the_largest_is_taken(models):
    exact = write(models / "text_encoders" / "umt5_xxl_fp32.safetensors", text_state())
    checkpoint = find_checkpoint(Sources(model=models))
    assert checkpoint.text.path == exact
    assert any("of 2 that fit, the largest" in note for note in checkpoint.notes)


def test_a_damaged_neighbour_is_passed_over(models):
    (models / "vae" / "wan_broken_vae.safetensors").write_bytes(b"nothing")
    (models / "diffusion_models" / "wan_other.safetensors").write_bytes(b"nothing")
    write(models / "diffusion_models" / "wan_lora.safetensors", {"blocks.0.ffn.0.lora_A.weight": torch.ones(2, 2)})
    assert find_checkpoint(Sources(model=models)).vae.path.name == "wan_2.1_vae.safetensors"


@pytest.mark.parametrize(
    ("sources", "error", "message"),
    [
        (Sources(), RequestError, "^model: must be given"),
        (Sources(model="nowhere"), CheckpointError, "^nowhere: no such folder"),
        (Sources(model="no/where/at/all"), CheckpointError, "no such folder"),
        (Sources(high="nowhere.safetensors"), CheckpointError, r"nowhere\.safetensors: cannot be read"),
        (Sources(model=".", low="x"), RequestError, "^model: must be one DiT's file or folder, or left out"),
    ],
)
def test_what_is_not_there_is_said(sources, error, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=message):
        find_checkpoint(sources)


def test_a_folder_of_another_layout_takes_named_parts(tmp_path):
    folder = random_tiny(tmp_path / "tiny")
    moved = (folder / "Wan2.1_VAE.pth").rename(tmp_path / "my.pth")
    with pytest.raises(CheckpointError, match=r"Wan2\.1_VAE\.pth: missing"):
        find_checkpoint(Sources(model=folder))
    assert find_checkpoint(Sources(model=folder, vae=moved)).vae.path == moved


OFFLINE = """
import socket, sys
def refuse(*_): raise AssertionError("the network was used")
socket.socket.connect = refuse; socket.getaddrinfo = refuse
import json
from wanfast.checkpoint.lookup import Sources, find_checkpoint
from wanfast.errors import CheckpointError
told = []
for name in sys.argv[1:]:
    try:
        told.append(str(find_checkpoint(Sources(model=name)).path))
    except CheckpointError as error:
        told.append("refused: " + str(error))
print(json.dumps(told))
"""


def test_offline_the_cache_serves_and_no_call_is_made(tmp_path):
    repository = tmp_path / "hub" / "models--Wan-AI--Wan2.2-T2V-A14B"
    snapshot = repository / "snapshots" / ("a" * 40)
    snapshot.parent.mkdir(parents=True)
    random_tiny(tmp_path / "tiny").rename(snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    environment = os.environ | {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    names = ["t2v-a14b", "T2V-A14B", "Wan-AI/Wan2.2-T2V-A14B", "i2v-A14B", "someone/else"]
    command = [sys.executable, "-c", OFFLINE, *names]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    told = json.loads(result.stdout)
    assert told[:3] == [str(snapshot)] * 3
    assert told[3].startswith("refused: Wan-AI/Wan2.2-I2V-A14B: not complete in the cache, and HF_HUB_OFFLINE is set")
    assert told[4].startswith("refused: someone/else: not complete")


def test_a_repository_of_single_files_is_not_downloaded_whole(monkeypatch):
    files = [SimpleNamespace(rfilename="split_files/vae/wan_2.1_vae.safetensors", size=10)]
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub.huggingface_hub.HfApi, "model_info", lambda *_, **__: SimpleNamespace(siblings=files))
    with pytest.raises(CheckpointError, match=r"^a/b: is not in .*`hf download a/b FILE` and name them"):
        hub.download("a/b")


@pytest.mark.parametrize("free", [10**12, 10])
def test_a_download_says_its_size_first_and_needs_the_room(free, monkeypatch, caplog, tmp_path):
    """The Hub is stood in for; what counts is the order: sizes, the disk, the warning, and only then the download."""

    def model_info(self, repository, files_metadata):
        files = [("config.json", 250), ("a.safetensors", 3_000_000_000), ("assets/x.json", 7), ("README.md", 9)]
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name, size=size) for name, size in files])

    def snapshot_download(repository, *, local_files_only=False, **_):
        if local_files_only:
            raise hub.errors.LocalEntryNotFoundError("none")
        assert "downloading Wan-AI/Wan2.2-T2V-A14B: 3.0 GB in 2 files" in caplog.text
        return str(random_tiny(tmp_path / "tiny"))

    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub.huggingface_hub.HfApi, "model_info", model_info)
    monkeypatch.setattr(hub.huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(hub.huggingface_hub, "try_to_load_from_cache", lambda *_: None)
    monkeypatch.setattr(hub.shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    with caplog.at_level(logging.WARNING, logger="wanfast"):
        if free > 10**10:
            assert find_checkpoint(Sources(model="t2v-a14b")).path == tmp_path / "tiny"
        else:
            with pytest.raises(CheckpointError, match=r"3\.0 GB in 2 files .* free some space"):
                find_checkpoint(Sources(model="t2v-a14b"))
