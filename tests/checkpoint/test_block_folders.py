"""LightX2V's folders with a file for each block, as `--save_by_block` of its converter writes them."""

import logging
from pathlib import Path

import pytest
import torch
from reference.quantised import lightx2v
from reference.single_files import TEXT, dit_state, text_state, vae_state, write
from reference.split_folders import write_split
from safetensors.torch import save_file

from wanfast import linear
from wanfast.checkpoint.lookup import Sources, find_checkpoint
from wanfast.checkpoint.part import open_part
from wanfast.checkpoint.reader import open_folder
from wanfast.errors import CheckpointError, RequestError
from wanfast.model import open_model
from wanfast.random_weights import byte_tokenizer

FORMS = {
    "bf16": lambda state: ({n: t.bfloat16() for n, t in state.items()},) * 2,
    "int8": lambda state: lightx2v(state, torch.int8),
    "fp8": lambda state: lightx2v(state, torch.float8_e4m3fn),
}
NAMES = ("block_0.safetensors", "block_1.safetensors", "non_block.safetensors")


def write_pair(root: Path, form: str, *, index: bool = True, task: str = "t2v") -> dict[str, Path]:
    """Both experts under the names that LightX2V published, and the other parts beside them."""
    write(root / "wan_2.1_vae.safetensors", vae_state())
    write(root / "umt5_xxl.safetensors", text_state())
    byte_tokenizer(TEXT.vocab_size).save(str(root / "tokenizer.json"))
    return {
        word: write_split(
            root / f"wan2.2_{task}_A14b_{word}_noise_{form}_lightx2v_4step_split",
            FORMS[form](dit_state(task, word))[0],
            index=index,
        )
        for word in ("high", "low")
    }


@pytest.mark.parametrize("index", [True, False], ids=["index", "no index"])
@pytest.mark.parametrize("form", FORMS)
def test_a_pair_of_folders_is_one_model(form, index, tmp_path):
    folders = write_pair(tmp_path, form, index=index)
    for sources in (
        Sources(high=folders["high"], low=folders["low"]),
        Sources(model=folders["high"]),
        Sources(model=folders["low"]),
        Sources(low=folders["low"]),
    ):
        model = open_model(sources)
        assert list(model.experts) == ["high_noise", "low_noise"]
        for word in ("high", "low"):
            reader, want = model.experts[f"{word}_noise"], FORMS[form](dit_state("t2v", word))[1]
            assert {reader.file_of(name).parent for name in reader.names()} == {folders[word]}
            assert reader.names() == want.keys()
            for name, tensor in want.items():
                stored = reader.load(name)
                assert torch.equal(linear.expand(stored), tensor.to(reader.dtype(name))), name
    assert any("low_noise" in note and "(by its name)" in note for note in open_model(folders["high"]).notes)


@pytest.mark.parametrize("index", [True, False], ids=["index", "no index"])
@pytest.mark.parametrize("missing", NAMES)
def test_a_missing_file_is_named(missing, index, tmp_path):
    folders = write_pair(tmp_path, "int8", index=index)
    if missing == "block_1.safetensors" and not index:  # the last: only the other expert tells that there is one
        (folders["high"] / missing).unlink()
        with pytest.raises(CheckpointError, match=r"block_1\.safetensors: tensor blocks\.1\.\S+ is missing in .*high"):
            find_checkpoint(Sources(**folders))
        return
    (folders["high"] / missing).unlink()
    for sources in (Sources(**folders), Sources(model=folders["high"])):
        with pytest.raises(CheckpointError, match=rf"high\S+_split/{missing}: missing \(1 of"):
            find_checkpoint(sources)


def test_the_last_blocks_of_a_published_size_are_missed(tmp_path):
    """40 blocks 5120 wide, or 30 blocks 3072 wide: what is left without the last ones is no model."""
    shapes = {
        "patch_embedding.weight": (3072, 48, 1, 2, 2),
        "head.head.weight": (192, 3072),
        "text_embedding.0.weight": (3072, TEXT.dim),
    }
    shapes |= {f"blocks.{index}.modulation": (1, 6, 3072) for index in range(29)}
    state = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    folder = write_split(tmp_path / "ti2v_split", state, index=False)
    write(tmp_path / "wan2.2_vae.safetensors", vae_state("2.2"))
    write(tmp_path / "umt5_xxl.safetensors", text_state())
    byte_tokenizer(TEXT.vocab_size).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(CheckpointError, match=r"ti2v_split: has the tensors of 29 blocks, but the 30 of .*blocks\.29"):
        find_checkpoint(Sources(model=folder))
    save_file({"blocks.29.modulation": torch.zeros(1, 6, 3072)}, folder / "block_29.safetensors")
    assert find_checkpoint(Sources(model=folder)).task == "ti2v"


def test_several_missing_blocks_are_listed(tmp_path):
    state = {f"blocks.{index}.modulation": torch.ones(1, 6, 8) for index in range(6)} | {
        "head.modulation": torch.ones(2)
    }
    folder = write_split(tmp_path / "split", state, index=False)
    for index in (1, 4):
        (folder / f"block_{index}.safetensors").unlink()
    (folder / "block_99999999999999999999.safetensors").write_bytes((folder / "block_0.safetensors").read_bytes())
    with pytest.raises(
        CheckpointError, match=r"block_1\.safetensors: missing \(2 of .*: block_1\.safetensors, block_4\.safetensors\)"
    ):
        open_folder(folder)


@pytest.mark.parametrize("index", [True, False], ids=["index", "no index"])
def test_a_tensor_in_two_files_is_refused(index, tmp_path):
    folder = write_pair(tmp_path, "bf16", index=index)["high"]
    (folder / "block_1.safetensors").write_bytes((folder / "block_0.safetensors").read_bytes())
    with pytest.raises(
        CheckpointError, match=r"block_1\.safetensors: tensor blocks\.0\.\S+ is (also in block_0|not liste)"
    ):
        open_folder(folder)
    other = write_split(tmp_path / "other", dit_state(), index=False)
    write(other / "wan2.2_t2v.safetensors", dit_state())
    with pytest.raises(CheckpointError, match=r"wan2\.2_t2v\.safetensors: tensor \S+ is also in (non_)?block"):
        open_folder(other)


def test_scales_may_stand_in_any_of_the_files(tmp_path):
    state = lightx2v(dit_state(), torch.int8)[0]
    folder = write_split(tmp_path / "split", state, index=False)
    name = "blocks.0.ffn.0.weight_scale"
    held = {n: t for n, t in state.items() if n.startswith("blocks.0.") and n != name}
    save_file(held, folder / "block_0.safetensors")
    with pytest.raises(CheckpointError, match=r"block_0\.safetensors: tensor blocks\.0\.ffn\.0\.weight has no scale"):
        open_part(folder, "dit")
    save_file({name: state[name]}, folder / "scales.safetensors")
    assert open_part(folder, "dit").reader.ref("blocks.0.ffn.0.weight").stored_as == "int8"


def test_folders_that_say_nothing_by_their_names_need_the_flags(tmp_path, caplog):
    write_pair(tmp_path, "bf16")
    first, second = (
        path.rename(tmp_path / name) for path, name in zip(sorted(tmp_path.glob("*_split")), "ab", strict=True)
    )
    with pytest.raises(RequestError, match=r"^model: must have high or low in its name"):
        find_checkpoint(Sources(model=first))
    with caplog.at_level(logging.WARNING, logger="wanfast"):
        checkpoint = find_checkpoint(Sources(high=first, low=second))
    assert [reader.path.parent for reader in checkpoint.experts.values()] == [first, second]


def test_a_folder_of_loose_files_is_not_taken_for_one_model(tmp_path):
    for word in ("high", "low"):
        write(tmp_path / "loose" / f"wan2.2_t2v_{word}_noise.safetensors", dit_state("t2v", word))
    with pytest.raises(CheckpointError, match=r"loose: holds neither the official layout .* nor the Diffusers layout"):
        find_checkpoint(Sources(model=tmp_path / "loose"))
    folders = write_pair(tmp_path / "split", "bf16")
    with pytest.raises(RequestError, match=r"^model: must be one DiT's file or folder, or left out"):
        find_checkpoint(Sources(model=tmp_path / "loose", high=folders["high"]))
