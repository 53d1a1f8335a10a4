"""Official and Diffusers folders whose parts are in 8 bits or GGUF: opened as the same files are by themselves."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import sentencepiece
import torch
from reference.checkpoints import write_diffusers, write_json, write_official, write_safetensors
from reference.gguf_files import write_gguf
from reference.quantised import FORMS, comfy_fp8, is_block_matrix, lightx2v
from reference.single_files import TEXT, comfy_text_encoder, dit_state, text_state, vae_state, write
from reference.split_folders import write_split
from reference.vocabulary import gguf_keys, train_spiece
from safetensors.torch import save_file
from torch import Tensor

from wanfast import linear
from wanfast.checkpoint.layout import open_checkpoint
from wanfast.checkpoint.lookup import Sources
from wanfast.checkpoint.names import dit_to_diffusers, text_to_llama_cpp, text_to_transformers, vae_to_diffusers
from wanfast.checkpoint.reader import Reader
from wanfast.errors import CheckpointError
from wanfast.model import open_model
from wanfast.random_weights import byte_tokenizer

State = dict[str, Tensor]
EXPERTS = ("high_noise", "low_noise")
FP8 = torch.float8_e4m3fn
_SCALES = ("scale_weight", "scale_input", "weight_scale", "input_scale", "comfy_quant")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    byte_tokenizer(TEXT.vocab_size).save(str(path))
    return path


def official(folder: Path, tokenizer: Path) -> Path:
    """A whole model in the official layout, in fp32."""
    experts = {name: dit_state("t2v", name) for name in EXPERTS}
    parts = {"experts": experts, "vae": vae_state(), "text": text_state()}
    return write_official(folder, task="t2v", num_heads=1, tokenizer=tokenizer, **parts)


def diffusers(folder: Path, tokenizer: Path, *, transformers: list[State], text: State) -> Path:
    vae = {vae_to_diffusers(name, "2.1"): tensor for name, tensor in vae_state().items()}
    parts = {"transformer": transformers[0], "transformer_2": transformers[1], "vae": vae, "text": text}
    return write_diffusers(folder, task="t2v", num_heads=1, boundary=0.875, tokenizer=tokenizer, **parts)


def renamed(state: Mapping[str, Tensor], rename: Callable[[str], str]) -> State:
    """The file's tensors under other names, scales beside their weights."""
    result: State = {}
    for name, tensor in state.items():
        layer, _, kind = name.rpartition(".")
        is_beside = kind in _SCALES
        other = rename(f"{layer}.weight" if is_beside else name)
        result[other.removesuffix("weight") + kind if is_beside else other] = tensor
    return result


def holds(reader: Reader, plain: Mapping[str, Tensor]) -> bool:
    """Whether a part gives these numbers; each is rounded once, to the dtype it is expanded to."""
    assert reader.names() == plain.keys()
    return all(torch.equal(linear.expand(reader.load(n)), t.to(reader.dtype(n))) for n, t in plain.items())


def single(folder: Path, state: State) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "wan2.2_A14b_int8.safetensors")


PLACED = {
    "one file": single,
    "shards": lambda folder, state: write_safetensors(folder, state, shards=3),
    "blocks": lambda folder, state: write_split(folder, state, index=False),
    "blocks and index": write_split,
    "under a prefix": lambda folder, state: single(folder, {f"diffusion_model.{n}": t for n, t in state.items()}),
}


@pytest.mark.parametrize("placed", PLACED)
@pytest.mark.parametrize("form", ["lightx2v_int8", "comfy_fp8", "turbowan"])
def test_experts_of_an_official_folder_may_be_in_8_bits(form, placed, tokenizer, tmp_path):
    folder = official(tmp_path / "model", tokenizer)
    for name in EXPERTS:
        (folder / f"{name}_model" / "diffusion_pytorch_model.safetensors").unlink()
        PLACED[placed](folder / f"{name}_model", FORMS[form](dit_state("t2v", name))[0])
    model = open_model(folder)
    assert model.config.dit.num_heads == 1
    for name in EXPERTS:
        assert holds(model.experts[name], FORMS[form](dit_state("t2v", name))[1])


def test_experts_of_an_official_folder_may_be_gguf(tokenizer, tmp_path):
    folder = official(tmp_path / "model", tokenizer)
    values = {}
    for name in EXPERTS:
        (folder / f"{name}_model" / "diffusion_pytorch_model.safetensors").unlink()
        file = folder / f"{name}_model" / f"wan2.2_t2v_{name}_Q8_0.gguf"
        values[name] = write_gguf(
            file, dit_state("t2v", name), lambda n, t: "Q8_0" if is_block_matrix(n, t) and t.shape[1] == 128 else "F32"
        )
    model = open_model(folder)
    for name in EXPERTS:
        assert model.experts[name].ref("blocks.1.self_attn.q.weight").stored_as == "Q8_0"
        assert holds(model.experts[name], values[name])
    shutil.copy(file, file.with_name("other.gguf"))
    with pytest.raises(CheckpointError, match=r"low_noise_model: 2 files match \*\.gguf \(other\.gguf, wan2.*keep one"):
        open_model(folder)


def test_one_config_in_the_root_serves_both_experts(tokenizer, tmp_path):
    folder = official(tmp_path / "model", tokenizer)
    shutil.move(folder / "low_noise_model" / "config.json", folder / "config.json")
    assert open_model(folder).config.dit.num_heads == 1
    (folder / "high_noise_model" / "config.json").unlink()
    assert open_model(folder).config.dit.num_heads == 1
    write_json(folder / "config.json", json.loads((folder / "config.json").read_text()) | {"num_layers": 3})
    with pytest.raises(CheckpointError, match=r"model/config\.json: num_layers is 3"):
        open_model(folder)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"2 problems: .*high_noise_model/config\.json: missing; .*low_noise"):
        open_model(folder)


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize(
    "form", sorted(FORMS.keys() - {"turbowan"})
)  # whose own names exist in the official spelling alone
def test_every_part_of_a_diffusers_folder_may_be_in_8_bits(form, shards, tokenizer, tmp_path):
    written = [FORMS[form](dit_state("t2v", name)) for name in EXPERTS]
    text, plain_text = FORMS[form](text_state())
    folder = diffusers(
        tmp_path / "model",
        tokenizer,
        transformers=[renamed(file, dit_to_diffusers) for file, _ in written],
        text=renamed(text, text_to_transformers),
    )
    if shards == 2:
        (folder / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
        write_safetensors(folder / "transformer", renamed(written[0][0], dit_to_diffusers), shards=2)
    model = open_model(folder)
    for name, (_, plain) in zip(EXPERTS, written, strict=True):
        assert model.experts[name].ref("blocks.0.ffn.0.weight").stored_as in ("int8", "float8_e4m3fn")
        assert holds(model.experts[name], plain)
    assert holds(model.text, plain_text)


def test_a_scale_that_is_missing_in_a_folder_is_named(tokenizer, tmp_path):
    folder = official(tmp_path / "model", tokenizer)
    file, _ = lightx2v(dit_state(), torch.int8)
    del file["blocks.1.ffn.2.weight_scale"]
    write_safetensors(folder / "high_noise_model", file)
    with pytest.raises(CheckpointError, match=r"high_noise_model/.*: tensor blocks\.1\.ffn\.2\.weight has no scale"):
        open_checkpoint(folder)


@pytest.mark.parametrize("where", ["official", "diffusers"])
def test_a_header_that_tells_of_an_unknown_quantisation_is_refused(where, tokenizer, tmp_path):
    states = [dit_state("t2v", name) for name in EXPERTS]
    if where == "official":
        folder, place = official(tmp_path / "model", tokenizer), "high_noise_model"
    else:
        states = [renamed(state, dit_to_diffusers) for state in states]
        text = renamed(text_state(), text_to_transformers)
        folder, place = diffusers(tmp_path / "model", tokenizer, transformers=states, text=text), "transformer"
    note = json.dumps({"layers": {"blocks.0.ffn.0": {"format": "nvfp4"}}})
    file = folder / place / "diffusion_pytorch_model.safetensors"
    save_file(states[0], file, metadata={"_quantization_metadata": note})
    with pytest.raises(CheckpointError, match=rf"{place}/.*_quantization_metadata of blocks\.0\.ffn\.0 says .*nvfp4"):
        open_checkpoint(folder)


def _write_fp8_pth(folder: Path, spiece: bytes) -> tuple[Path, State]:
    file, plain = lightx2v(text_state(), FP8)
    torch.save(file, folder / "models_t5_umt5-xxl-enc-fp8.pth")
    return folder / "models_t5_umt5-xxl-enc-fp8.pth", plain


def _write_comfy(folder: Path, spiece: bytes) -> tuple[Path, State]:
    file, plain = comfy_text_encoder(text_state(), spiece)
    return write(folder / "umt5_xxl_fp8_e4m3fn_scaled.safetensors", file), plain


def _write_gguf(folder: Path, spiece: bytes) -> tuple[Path, State]:
    path, tensors = folder / "umt5-xxl-encoder-F16.gguf", {text_to_llama_cpp(n): t for n, t in text_state().items()}
    keys = gguf_keys(spiece, TEXT.vocab_size)
    values = write_gguf(path, tensors, lambda _name, _tensor: "F16", architecture="t5encoder", prepare=keys)
    return path, {name: values[text_to_llama_cpp(name)] for name in text_state()}


@pytest.mark.parametrize("writer", [_write_fp8_pth, _write_comfy, _write_gguf])
def test_the_text_encoder_of_an_official_folder_may_be_another_file(writer, tokenizer, tmp_path):
    folder, spiece = official(tmp_path / "model", tokenizer), train_spiece()
    (folder / "models_t5_umt5-xxl-enc-bf16.pth").unlink()
    path, plain = writer(folder, spiece)
    checkpoint = open_checkpoint(folder)
    assert checkpoint.text.path == path
    assert holds(checkpoint.text, plain)
    assert checkpoint.tokenizer == folder / "google" / "umt5-xxl" / "tokenizer.json"
    (folder / "google" / "umt5-xxl" / "tokenizer.json").unlink()
    if writer is _write_fp8_pth:
        with pytest.raises(CheckpointError, match=r"google/umt5-xxl/tokenizer\.json: missing \(the tokenizer\)$"):
            open_checkpoint(folder)
    else:  # the file brings the vocabulary along
        vocabulary = open_model(folder).tokenizer.vocabulary
        own = sentencepiece.SentencePieceProcessor(model_proto=spiece)
        assert vocabulary.encode("a red ball", add_special_tokens=False).ids == own.encode("a red ball")
    (folder / "google" / "umt5-xxl" / "spiece.model").write_bytes(spiece)
    assert open_checkpoint(folder).tokenizer == folder / "google" / "umt5-xxl" / "spiece.model"


def test_a_diffusers_text_encoder_may_bring_the_vocabulary(tokenizer, tmp_path):
    states = [renamed(dit_state("t2v", name), dit_to_diffusers) for name in EXPERTS]
    folder = diffusers(
        tmp_path / "model", tokenizer, transformers=states, text=renamed(text_state(), text_to_transformers)
    )
    shutil.rmtree(folder / "tokenizer")
    (folder / "text_encoder" / "model.safetensors").unlink()
    path, _ = _write_gguf(folder / "text_encoder", train_spiece())
    assert open_model(folder).tokenizer.path == path


def test_a_part_in_the_place_of_another_is_named(tokenizer, tmp_path):
    folder = official(tmp_path / "model", tokenizer)
    torch.save(text_state(), folder / "Wan2.1_VAE.pth")
    with pytest.raises(CheckpointError, match=r"Wan2\.1_VAE\.pth: holds a umT5 text encoder, but a VAE is wanted here"):
        open_checkpoint(folder)


def test_the_vae_of_an_official_folder_may_be_safetensors(tokenizer, tmp_path):
    folder = official(tmp_path / "model", tokenizer)
    (folder / "Wan2.1_VAE.pth").unlink()
    path = write(folder / "Wan2.1_VAE.safetensors", {name: t.half() for name, t in vae_state().items()})
    assert open_model(folder).vae.path == path


def test_the_formats_are_those_of_single_files(tokenizer, tmp_path):
    """A folder and the same two files named one by one give the same tensors."""
    folder = official(tmp_path / "model", tokenizer)
    for name in EXPERTS:
        write_safetensors(folder / f"{name}_model", comfy_fp8(dit_state("t2v", name))[0])
    whole = open_model(folder)
    named = {name.removesuffix("_noise"): folder / f"{name}_model" for name in EXPERTS}
    parts = open_model(Sources(**named))
    for name in EXPERTS:
        assert whole.experts[name].names() == parts.experts[name].names()
        for tensor in whole.experts[name].names():
            got, want = whole.experts[name].load(tensor), parts.experts[name].load(tensor)
            assert torch.equal(linear.expand(got), linear.expand(want))
