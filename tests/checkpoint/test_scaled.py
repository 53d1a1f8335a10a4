"""Files with 8-bit weights: the model they make is the one their numbers stand for; what does not fit is refused."""

import json
import logging
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.quantised import FORMS, FP8, comfy_fp8, comfy_new, lightx2v, turbowan
from safetensors.torch import save_file
from tolerance import assert_close
from torch import Tensor

from wanfast.checkpoint.bind import check_names, read_tensor
from wanfast.checkpoint.part import open_part, open_parts
from wanfast.checkpoint.reader import Reader, memory_reader, open_file
from wanfast.checkpoint.scaled_format import open_scaled
from wanfast.config import DiTConfig
from wanfast.dit.model import predict_velocities
from wanfast.dit.weights import expected_tensors, load_block, load_outer
from wanfast.errors import CheckpointError
from wanfast.linear import expand
from wanfast.open_file import OpenFile
from wanfast.random_weights import random_tensors
from wanfast.stored import ScaledWeight

CONFIG = DiTConfig(
    in_channels=16,
    out_channels=16,
    dim=256,
    ffn_dim=200,  # not a multiple of 128: its last block of scales is cut off
    num_heads=2,
    num_layers=2,
    text_dim=24,
    text_len=16,
    freq_dim=32,
    patch_size=(1, 2, 2),
    eps=1e-6,
)


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return random_tensors(expected_tensors(CONFIG), seed="dit")


def write(path: Path, file: dict[str, Tensor], *, prefix: str = "") -> Path:
    named = {prefix + name: tensor.contiguous() for name, tensor in file.items()}
    if path.suffix == ".pth":
        torch.save(named, path)
    else:
        save_file(named, path)
    return path


def velocity(reader: Reader, dtype: torch.dtype = torch.float32) -> Tensor:
    check_names(reader, expected_tensors(CONFIG), part="diffusion transformer")
    generator = torch.Generator().manual_seed(1)
    latents, context = torch.randn(1, 16, 2, 4, 6, generator=generator), torch.randn(1, 5, 24, generator=generator)
    blocks = [load_block(reader, CONFIG, index, dtype) for index in range(CONFIG.num_layers)]
    outer = load_outer(reader, CONFIG, dtype)
    return predict_velocities(latents, 700, [context], outer, blocks, CONFIG)[0]


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("form", FORMS)
def test_a_model_is_the_one_its_numbers_stand_for(tmp_path, state, form, suffix):
    file, plain = FORMS[form](state)
    reader = open_part(write(tmp_path / f"model{suffix}", file), "dit").reader
    weight = reader.load("blocks.1.ffn.0.weight")
    assert isinstance(weight, ScaledWeight) and weight.values.dtype in (torch.int8, FP8)
    for name, tensor in plain.items():
        assert torch.equal(read_tensor(reader, name, expected_tensors(CONFIG)[name], dtype=torch.float32), tensor), name
    got, want = velocity(reader), velocity(memory_reader(plain))
    assert_close(got=got, want=want, op="dit_fp32")  # not to the bit: tensors in a file lie at other addresses
    error = (got - velocity(memory_reader(state))).square().mean().sqrt() / want.square().mean().sqrt()
    assert 1e-4 < error < 0.2  # 8 bits are not exact, but they are the same model


@pytest.mark.parametrize("form", FORMS)
def test_bf16_computes_with_weights_rounded_to_bf16(state, form):
    file, plain = FORMS[form](state)
    got, want = (
        velocity(reader, torch.bfloat16) for reader in (open_scaled(memory_reader(file)), memory_reader(plain))
    )
    assert torch.equal(got, want)


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "diffusion_model."])
def test_a_prefix_is_taken_off(tmp_path, state, prefix):
    file, plain = comfy_fp8(state)
    reader = open_part(write(tmp_path / "model.safetensors", file, prefix=prefix), "dit").reader
    assert reader.names() == plain.keys()
    assert reader.ref("blocks.0.ffn.0.weight").stored_name == f"{prefix}blocks.0.ffn.0.weight"


def test_the_marker_may_stand_outside_the_prefix(tmp_path, state):
    file, plain = comfy_fp8(state)
    marker = file.pop("scaled_fp8")
    named = {f"model.diffusion_model.{name}": tensor for name, tensor in file.items()} | {"scaled_fp8": marker}
    assert open_part(write(tmp_path / "model.safetensors", named), "dit").reader.names() == plain.keys()


def test_sizes_are_those_of_the_file(state):
    file, _ = lightx2v(state, torch.int8)
    reader = open_scaled(memory_reader(file))
    ref = reader.ref("blocks.0.ffn.0.weight")
    assert (ref.stored_as, ref.num_bytes, ref.shape) == ("int8", 200 * 256 + 4 * 200, (200, 256))
    assert sum(reader.ref(name).num_bytes for name in reader.names()) == sum(tensor.nbytes for tensor in file.values())


def test_a_file_without_8_bit_weights_is_left_as_it_is(state):
    reader = memory_reader(state)
    assert open_scaled(reader) is reader


def test_high_precision_exceptions_beside_scaled_weights_stay_plain(state):
    file, _ = comfy_fp8(state)
    for name in ("scale_weight", "scale_input"):
        del file[f"blocks.0.ffn.0.{name}"]
    file["blocks.0.ffn.0.weight"] = state["blocks.0.ffn.0.weight"].half()
    weight = open_scaled(memory_reader(file)).load("blocks.0.ffn.0.weight")
    assert isinstance(weight, Tensor) and weight.dtype == torch.float16


def test_full_attention_in_place_of_the_trained_one_is_said(state, caplog):
    file, _ = turbowan(state)
    with caplog.at_level(logging.WARNING, logger="wanfast"):
        open_scaled(memory_reader(file, "turbo-quant.pth"))
    assert "turbo-quant.pth was trained with sparse-linear attention" in caplog.text


Q = "blocks.0.self_attn.q"
ROTATED = b'{"format": "int8_tensorwise", "convrot": true, "convrot_groupsize": 256}'
FAULTS = {
    "fp8 without its scale in a scaled file": (comfy_fp8, {f"{Q}.scale_weight": None}, rf"{Q}\.weight has no scale"),
    "int8 without a scale": (turbowan, {f"{Q}.int8_weight": None, f"{Q}.weight": torch.int8}, "weight has no scale"),
    "a block scale is missing": (turbowan, {f"{Q}.scale": None}, rf"{Q}\.int8_weight has no scale {Q}\.scale"),
    "two scales": (comfy_fp8, {f"{Q}.weight_scale": torch.ones(())}, "has two scales"),
    "a scale of another shape": (
        comfy_fp8,
        {f"{Q}.scale_weight": torch.ones(7)},
        r"has shape \[7\], which scales no weight",
    ),
    "a scale that is no number": (
        comfy_fp8,
        {f"{Q}.scale_weight": torch.ones((), dtype=torch.int32)},
        "is no scale of",
    ),
    "an unknown quantisation": (
        comfy_new,
        {f"{Q}.comfy_quant": torch.frombuffer(bytearray(b'{"format": "nvfp4"}'), dtype=torch.uint8)},
        "quantised as .*'nvfp4'.*; wanfast reads float8_e4m3fn",
    ),
    "a known quantisation of rotated weights": (
        comfy_new,
        {f"{Q}.comfy_quant": torch.frombuffer(bytearray(ROTATED), dtype=torch.uint8)},
        "quantised as .*'convrot': True",
    ),
    "a damaged note": (comfy_new, {f"{Q}.comfy_quant": torch.zeros(9, dtype=torch.uint8)}, "quantised as None"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_does_not_fit_is_refused_by_name(state, fault):
    form, changes, message = FAULTS[fault]
    file, _ = form(state)
    for name, value in changes.items():
        if value is None:
            del file[name]
        else:
            file[name] = torch.zeros(256, 256, dtype=value) if isinstance(value, torch.dtype) else value
    with pytest.raises(CheckpointError, match=rf"model\.safetensors.*{message}"):
        open_scaled(memory_reader(file, "model.safetensors"))


def test_a_header_that_tells_of_another_quantisation_is_refused(tmp_path, state):
    file, plain = lightx2v(state, torch.int8)
    known, rotated = ({"layers": {Q: json.loads(note)}} for note in (b'{"format": "int8_tensorwise"}', ROTATED))
    path = tmp_path / "model.safetensors"
    save_file(file, path, metadata={"_quantization_metadata": json.dumps(known)})
    assert open_part(path, "dit").reader.names() == plain.keys()
    for metadata, message in ((json.dumps(rotated), rf"of {Q} says .*convrot"), ("[]", "cannot be read")):
        save_file(file, path, metadata={"_quantization_metadata": metadata})
        with pytest.raises(CheckpointError, match=rf"model\.safetensors: .*_quantization_metadata .*{message}"):
            open_part(path, "dit")


def test_a_scale_that_is_not_finite_is_refused_when_loaded(state):
    file, _ = comfy_fp8(state)
    file[f"{Q}.scale_weight"] = torch.tensor(float("inf"))
    with pytest.raises(CheckpointError, match=rf"{Q}\.weight: 1 of 1 values are not finite"):
        load_block(open_scaled(memory_reader(file)), CONFIG, 0, torch.float32)


def test_a_leftover_scale_is_refused_as_unexpected(state):
    file, _ = comfy_fp8(state)
    file["blocks.0.norm3.scale_weight"] = torch.ones(())
    with pytest.raises(CheckpointError, match=r"1 unexpected \(blocks\.0\.norm3\.scale_weight"):
        check_names(open_scaled(memory_reader(file)), expected_tensors(CONFIG), part="diffusion transformer")


def test_one_file_may_hold_several_parts(tmp_path, state):
    file = {f"model.diffusion_model.{name}": tensor for name, tensor in state.items()}
    file |= {"text_encoders.umt5xxl.transformer.shared.weight": torch.ones(7, 24), "vae.conv1.weight": torch.ones(2, 2)}
    file |= {"vae.encoder.conv1.weight": torch.ones(2, 3), "text_encoders.umt5xxl.logit_scale": torch.ones(())}
    parts = open_parts(write(tmp_path / "all.safetensors", file))
    assert [part.kind for part in parts] == ["dit", "vae", "text"]
    assert [len(part.reader.names()) for part in parts] == [len(state), 2, 1]


LAYERS = st.sampled_from(["blocks.0.ffn.0", "blocks.1.self_attn.q", "patch_embedding", "head.head", "x", ""])
KINDS = st.sampled_from(
    ["weight", "int8_weight", "scale", "scale_weight", "weight_scale", "scale_input", "comfy_quant", "bias"]
)
DTYPES = st.sampled_from([torch.int8, torch.uint8, FP8, torch.float8_e5m2, torch.float16, torch.float32, torch.int64])
SHAPES = st.lists(st.sampled_from([0, 1, 2, 8, 200]), max_size=3).map(tuple)


@given(st.dictionaries(st.tuples(LAYERS, KINDS), st.tuples(SHAPES, DTYPES), max_size=8), st.booleans())
@settings(max_examples=400, deadline=None)
def test_any_mix_of_tensors_is_read_or_refused_by_file(entries, has_marker):
    tensors = {f"{layer}.{kind}": torch.zeros(shape).to(dtype) for (layer, kind), (shape, dtype) in entries.items()}
    reader = memory_reader(tensors | ({"scaled_fp8": torch.zeros(0, dtype=FP8)} if has_marker else {}), "mix.pth")
    try:
        opened = open_scaled(reader)
        for name in opened.names():
            weight = opened.load(name)
            assert tuple(weight.shape) == opened.shape(name)
            if isinstance(weight, ScaledWeight) and weight.values.numel():
                assert expand(weight).shape == weight.shape
    except CheckpointError as error:
        assert "mix.pth" in str(error)


@pytest.mark.parametrize("scale", [None, (), (1,), (300,), (300, 1), (3, 1)])
def test_of_an_8_bit_table_only_the_rows_are_read_that_are_asked_for(
    scale: tuple[int, ...] | None, tmp_path: Path
) -> None:
    """As of the token table of a umT5 in fp8, which has 1 GB."""
    generator = torch.Generator().manual_seed(1)
    file = {"shared.weight": torch.randn(300, 40, generator=generator).to(FP8)}
    if scale is not None:
        file["shared.weight_scale"] = torch.rand(scale, generator=generator) + 0.5
    reader = open_scaled(open_file(write(tmp_path / "a.safetensors", file)))
    rows = [299, 0, 7, 7, 130]
    want = expand(reader.load("shared.weight"))[rows]
    with pytest.MonkeyPatch.context() as patched:
        if scale != (3, 1):  # a scale per block of 128 rows is only read whole
            sizes: list[int] = []
            own = OpenFile.tensor
            patched.setattr(OpenFile, "tensor", lambda self, at, n, *more: sizes.append(n) or own(self, at, n, *more))
        got = reader.load_rows("shared.weight", rows)
    assert torch.equal(expand(got), want)
    assert scale == (3, 1) or max(sizes) <= 1200
