"""GGUF files of DiTs and umT5 encoders, as gguf writes them and as people publish them."""

import resource
import time
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from reference.dit import diffusers_dit, golden_tensor, small_config
from reference.dit import official_state as dit_state
from reference.gguf_files import MATRIX_KINDS, pack, unpack, write_gguf, write_header
from reference.text import official_state as text_state
from reference.text import umt5_encoder
from torch import Tensor

from wanfast import linear
from wanfast.checkpoint.bind import check_names, read_linear
from wanfast.checkpoint.files import TensorRef
from wanfast.checkpoint.names import text_from_llama_cpp, text_to_llama_cpp, text_to_transformers
from wanfast.checkpoint.reader import Reader, memory_reader, open_file
from wanfast.config import I2V_A14B, T2V_A14B, UMT5_XXL, DiTConfig, TextConfig
from wanfast.dit import weights as dit_weights
from wanfast.dit.model import predict_velocities
from wanfast.errors import CheckpointError
from wanfast.kernels.gguf_blocks import FORMATS
from wanfast.open_file import origin
from wanfast.stored import GGUFWeight
from wanfast.text import weights as text_weights
from wanfast.text.umt5 import encode_text

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
DIT = small_config(dim=256, num_heads=2, num_layers=1, ffn_dim=256)
TEXT = TextConfig(
    vocab_size=40,
    dim=256,
    attention_dim=256,
    ffn_dim=256,
    num_heads=4,
    num_layers=1,
    num_buckets=32,
    max_distance=128,
    eps=1e-6,
)


def block_matrices(kind: str, rest: str = "F16"):
    """Quantise as the published files are: matrices inside the blocks alone, the patch embedding whole."""

    def choose(name: str, tensor: Tensor) -> str:
        if name.endswith("patch_embedding.weight"):
            return "F32"
        return kind if "blocks." in name and tensor.dim() == 2 else rest

    return choose


@pytest.fixture(scope="module")
def dit() -> dict[str, Tensor]:
    return dit_state(diffusers_dit(DIT))


@pytest.fixture(scope="module")
def text() -> dict[str, Tensor]:
    return text_state(umt5_encoder(TEXT))


def velocity(reader: Reader, dtype: torch.dtype, config: DiTConfig = DIT) -> Tensor:
    outer = dit_weights.load_outer(reader, config, dtype)
    blocks = [dit_weights.load_block(reader, config, index, dtype) for index in range(config.num_layers)]
    context = golden_tensor("context", 1, 5, config.text_dim).to(dtype)
    return predict_velocities(golden_tensor("x", 1, 16, 2, 4, 4), 611, [context], outer, blocks, config)[0]


def encode(reader: Reader, dtype: torch.dtype) -> Tensor:
    blocks = [text_weights.load_block(reader, TEXT, index, dtype) for index in range(TEXT.num_layers)]
    return encode_text([3, 14, 1], text_weights.load_outer(reader, TEXT, dtype), blocks, TEXT)


@DTYPES
@pytest.mark.parametrize("kind", MATRIX_KINDS)
def test_a_dit_gives_what_its_dequantised_weights_give(kind, dtype, dit, tmp_path):
    values = write_gguf(tmp_path / "dit.gguf", dit, block_matrices(kind))
    reader = open_file(tmp_path / "dit.gguf")
    assert dit_weights.dit_config(reader, num_heads=2, text_len=DIT.text_len) == DIT
    check_names(reader, dit_weights.expected_tensors(DIT), part="DiT")
    assert torch.equal(velocity(reader, dtype), velocity(memory_reader(values), dtype))


def test_a_lossless_file_gives_what_the_original_gives(dit, tmp_path):
    halves = {name: tensor.bfloat16().float() for name, tensor in dit.items()}
    write_gguf(tmp_path / "dit.gguf", halves, lambda _name, _tensor: "BF16")
    assert torch.equal(
        velocity(open_file(tmp_path / "dit.gguf"), torch.bfloat16), velocity(memory_reader(halves), torch.bfloat16)
    )


def test_a_quantised_weight_stays_as_small_as_in_the_file(dit, tmp_path):
    write_gguf(tmp_path / "dit.gguf", dit, block_matrices("Q4_K"))
    reader = open_file(tmp_path / "dit.gguf")
    name = "blocks.0.self_attn.q"
    weight = dit_weights.load_block(reader, DIT, 0, torch.bfloat16).self_attn.q.weight
    assert isinstance(weight, GGUFWeight)
    assert (weight.kind, weight.dtype, weight.shape) == ("Q4_K", torch.bfloat16, (256, 256))
    assert weight.blocks.nbytes == 256 * 144 == reader.ref(f"{name}.weight").num_bytes
    at = origin(weight.blocks)
    assert at is not None and at.file.path == tmp_path / "dit.gguf"  # the file's own bytes
    assert torch.equal(reader.load_rows(f"{name}.weight", [3, 0]).blocks, weight.blocks[[3, 0]])
    assert reader.ref(f"{name}.weight").stored_as == "Q4_K"
    assert reader.ref(f"{name}.weight").first_bytes(200) == weight.blocks.flatten()[:200].numpy().tobytes()
    assert reader.dtype(f"{name}.bias") == torch.float16
    assert reader.ref(f"{name}.bias").num_bytes == 512


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model."])
@pytest.mark.parametrize("architecture", ["wan", "pig", "cow", None])
def test_a_dit_is_known_under_every_converters_names(prefix, architecture, dit, tmp_path):
    stored = {prefix + name: tensor for name, tensor in dit.items()}
    write_gguf(tmp_path / "dit.gguf", stored, block_matrices("Q8_0"), architecture=architecture)
    reader = open_file(tmp_path / "dit.gguf")
    check_names(reader, dit_weights.expected_tensors(DIT), part="DiT")
    assert reader.ref("head.head.weight").stored_name == f"{prefix}head.head.weight"


@DTYPES
@pytest.mark.parametrize("kind", ["Q8_0", "Q6_K", "Q4_K", "Q5_0"])
@pytest.mark.parametrize("architecture", ["t5", "t5encoder"])
def test_a_text_encoder_gives_what_its_dequantised_weights_give(kind, architecture, dtype, text, tmp_path):
    def quantise_matrices(name: str, tensor: Tensor) -> str:
        return kind if tensor.dim() == 2 and "rel_b" not in name else "F32"

    def add_vocabulary(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("t5")
        writer.add_token_list([f"▁word{i}" for i in range(TEXT.vocab_size)])
        writer.add_token_scores([0.5] * TEXT.vocab_size)
        writer.add_precompiled_charsmap([7] * 1000)
        writer.add_eos_token_id(1)

    stored = {text_to_llama_cpp(name): tensor for name, tensor in text.items()}
    path = tmp_path / "umt5.gguf"
    values = write_gguf(path, stored, quantise_matrices, architecture=architecture, prepare=add_vocabulary)
    reader = open_file(path)
    assert text_weights.text_config(reader) == TEXT
    check_names(reader, text_weights.expected_tensors(TEXT), part="text encoder")
    want = memory_reader({name: values[text_to_llama_cpp(name)] for name in text})
    assert torch.equal(encode(reader, dtype), encode(want, dtype))


def test_only_the_rows_of_a_token_table_that_are_looked_up_are_expanded(text, tmp_path, monkeypatch):
    stored = {text_to_llama_cpp(name): tensor for name, tensor in text.items()}
    write_gguf(tmp_path / "umt5.gguf", stored, lambda name, _tensor: "Q8_0" if "embd" in name else "F32")
    outer = text_weights.load_outer(open_file(tmp_path / "umt5.gguf"), TEXT, torch.float32)
    expanded = []
    real = linear.kernels.dequantize_gguf

    def watched(blocks: Tensor, kind: str, **rest: object) -> Tensor:
        expanded.append(len(blocks))
        return real(blocks, kind, **rest)

    monkeypatch.setattr(linear.kernels, "dequantize_gguf", watched)
    assert text_weights.embed_tokens(torch.tensor([7, 7, 39]), outer).shape == (3, 256)
    assert expanded == [3]


def test_the_names_are_llama_cpps():
    official = text_weights.expected_tensors(UMT5_XXL)
    known = gguf.get_tensor_name_map(gguf.MODEL_ARCH.T5ENCODER, UMT5_XXL.num_layers)
    want = {name: known.get_name(text_to_transformers(name), try_suffixes=(".weight",)) for name in official}
    assert {name: text_to_llama_cpp(name) for name in official} == want
    assert text_from_llama_cpp(want.values()) == {stored: name for name, stored in want.items()}


def published(kind: str, values: str | None = None):
    """How the tools behind the published files choose each tensor's kind; `values` is that of *.v and ffn.2."""

    def choose(name: str, shape: tuple[int, ...]) -> str:
        if name == "patch_embedding.weight":
            return "F32"
        if not name.startswith("blocks.") or len(shape) != 2:
            return "F16"
        return values or kind if name.endswith((".v.weight", "ffn.2.weight")) else kind

    return choose


@pytest.mark.parametrize(
    ("config", "choose", "num_bytes"),
    [
        (T2V_A14B, published("Q4_K", "Q6_K"), 9_650_090_496),  # Wan2.2-T2V-A14B-HighNoise-Q4_K_M.gguf
        (I2V_A14B, published("Q4_K", "Q6_K"), 9_651_728_896),
        (I2V_A14B, published("Q5_K"), 10_137_514_496),
        (T2V_A14B, published("Q3_K"), 6_513_373_696),
    ],
    ids=["T2V-Q4_K_M", "I2V-Q4_K_M", "I2V-Q5_K_S", "T2V-Q3_K_S"],
)
def test_files_of_the_published_sizes_open_at_once_and_in_little_memory(config, choose, num_bytes, tmp_path):
    expected = dit_weights.expected_tensors(config.dit)
    entries = [(name, shape, choose(name, shape)) for name, shape in expected.items()]
    assert write_header(tmp_path / "dit.gguf", entries, architecture="wan", file_type=15) == num_bytes

    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    reader = open_file(tmp_path / "dit.gguf")
    check_names(reader, expected, part="DiT")
    assert time.perf_counter() - start < 2
    block = dit_weights.load_block(reader, config.dit, 39, torch.bfloat16)  # which is read whole
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500 * 1024
    assert isinstance(block.ffn_down.weight, GGUFWeight)
    assert sum(reader.ref(name).num_bytes for name in reader.names()) <= num_bytes


def test_the_patch_embedding_keeps_its_five_axes(dit, tmp_path):
    values = write_gguf(tmp_path / "dit.gguf", dit, block_matrices("Q8_0"))
    weight = open_file(tmp_path / "dit.gguf").load("patch_embedding.weight")
    assert weight.shape == (256, 16, 1, 2, 2)
    assert torch.equal(weight, values["patch_embedding.weight"])


def test_a_shape_the_format_could_not_hold_is_restored(tmp_path):
    weight = golden_tensor("w", 4, 16, 1, 2, 2)

    def add_shape(writer: gguf.GGUFWriter) -> None:
        writer.add_array("comfy.gguf.orig_shape.patch_embedding.weight", list(weight.shape))

    flat = {"patch_embedding.weight": weight.reshape(4, 64), "blocks.0.modulation": golden_tensor("m", 1, 6, 64)}
    values = write_gguf(tmp_path / "dit.gguf", flat, lambda _name, _tensor: "Q8_0", prepare=add_shape)
    reader = open_file(tmp_path / "dit.gguf")
    for name, shape in {"patch_embedding.weight": weight.shape, "blocks.0.modulation": (1, 6, 64)}.items():
        tensor = reader.load(name)
        assert (tensor.shape, tensor.dtype) == (reader.shape(name), reader.dtype(name)) == (shape, torch.float32)
        assert torch.equal(tensor, values[name].reshape(shape))


@pytest.mark.parametrize("alignment", [8, 64, 4096])
def test_tensors_are_found_at_any_alignment(alignment, tmp_path):
    tensors = {"blocks.0.ffn.0.weight": golden_tensor("a", 3, 32), "head.head.bias": golden_tensor("b", 5)}
    values = write_gguf(
        tmp_path / "dit.gguf",
        tensors,
        lambda _name, tensor: "Q8_0" if tensor.dim() == 2 else "F32",
        prepare=lambda writer: writer.add_custom_alignment(alignment),
    )
    reader = open_file(tmp_path / "dit.gguf")
    assert torch.equal(linear.expand(reader.load("blocks.0.ffn.0.weight")), values["blocks.0.ffn.0.weight"].bfloat16())
    assert torch.equal(reader.load("head.head.bias"), values["head.head.bias"])


def test_packing_and_unpacking_agree_in_size():
    values = golden_tensor("v", 2, 512)
    for kind in MATRIX_KINDS:
        got = unpack(pack(values, kind), kind)
        assert got.shape == values.shape
        assert 0.2 < got.std() / values.std() < 5, kind
        assert np.isfinite(got.numpy()).all()


def test_an_unreadable_file_is_refused_by_name(tmp_path):
    with pytest.raises(CheckpointError, match=r"none\.gguf: cannot be read"):
        open_file(tmp_path / "none.gguf")
    (tmp_path / "lfs.gguf").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(CheckpointError, match=r"lfs\.gguf: is a Git LFS pointer"):
        open_file(Path(tmp_path / "lfs.gguf"))


@pytest.mark.parametrize("kind", [kind for kind in MATRIX_KINDS if kind.startswith("Q")])
def test_a_scale_that_is_not_finite_is_refused_by_name(kind, dit, tmp_path):
    write_gguf(tmp_path / "wan.gguf", {"a.weight": dit["blocks.0.ffn.0.weight"]}, lambda name, tensor: kind)
    weight = open_file(tmp_path / "wan.gguf").load("a.weight")
    for place in FORMATS[kind].scales_at:
        blocks = weight.blocks.clone()
        blocks[3, place : place + 2] = torch.tensor([0x00, 0x7E], dtype=torch.uint8)  # NaN in fp16
        damaged = replace(weight, blocks=blocks)
        ref = TensorRef(
            tmp_path / "wan.gguf", "a.weight", tuple(weight.shape), "bfloat16", lambda _, w=damaged: w, bytes
        )
        with pytest.raises(CheckpointError, match=r"wan\.gguf.*a\.weight"):
            read_linear(Reader({"a.weight": ref}, ref.file), "a", *weight.shape, bias=False, dtype=torch.bfloat16)
