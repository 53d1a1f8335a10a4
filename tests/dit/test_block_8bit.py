"""The DiT in 8 bits: near fp32 by a stated margin, from weights in any form, with LoRAs, in any runs of tokens."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from reference.dit import golden_state, golden_tensor, small_config
from reference.families import make_family
from reference.gguf_files import pack
from torch import Tensor

from wanfast import kernels
from wanfast.adapter import Change, attach
from wanfast.checkpoint.quantize import quantize_rows
from wanfast.checkpoint.reader import Reader, memory_reader
from wanfast.config import DiTConfig
from wanfast.dit.model import predict_velocities
from wanfast.dit.packed import _joined, multiplies_e4m3, pack_block, prepare_block, refuse_unfit
from wanfast.dit.weights import BlockWeights, load_block, load_outer
from wanfast.errors import RequestError
from wanfast.linear import Linear, LowRank, expand
from wanfast.loaded import LoadedModel
from wanfast.model import open_model
from wanfast.residency.packing import lay_out, unpack
from wanfast.stored import GGUFWeight, ScaledWeight

INT8, FP8 = torch.int8, torch.float8_e4m3fn
DTYPES = pytest.mark.parametrize("dtype", [INT8, FP8], ids=["int8", "fp8"])
# RMS error of the velocity, relative; seen over three widths and 4 blocks: bf16 0.0035, int8 0.0089, fp8 0.028.
LIMIT = {None: 0.006, INT8: 0.013, FP8: 0.04}
SHAPES = {"heads of 128": (256, 2, 512), "heads of 64": (256, 4, 384), "no groups": (96, 3, 200)}


def config_of(shape: str, num_layers: int = 2) -> DiTConfig:
    dim, heads, ffn_dim = SHAPES[shape]
    sizes = {"dim": dim, "num_heads": heads, "ffn_dim": ffn_dim}
    return replace(small_config("ti2v"), **sizes, num_layers=num_layers, text_len=32)


class Case:
    """A small model in fp32, with outliers as Wan's activations have them."""

    def __init__(self, shape: str, num_layers: int = 2) -> None:
        self.config = config_of(shape, num_layers)
        state = golden_state(self.config)
        for index in range(num_layers):
            state[f"blocks.{index}.self_attn.k.bias"][::16] += 4  # channels that all keys share
            state[f"blocks.{index}.modulation"][:, 1, ::50] += 6  # channels that a norm's scale blows up
        self.reader = memory_reader(state)
        self.latents = golden_tensor("x48", 1, 48, 3, 12, 10)
        self.contexts = [golden_tensor("ctx", 1, 9, self.config.text_dim)]

    def blocks(self, dtype: torch.dtype = torch.bfloat16) -> list[BlockWeights]:
        return [load_block(self.reader, self.config, i, dtype) for i in range(self.config.num_layers)]

    def run(self, blocks: list[Any], dtype: torch.dtype = torch.bfloat16, **options: Any) -> Tensor:
        outer = load_outer(self.reader, self.config, dtype)
        contexts = [context.to(dtype) for context in self.contexts]
        options = {"first_frame_timestep": 0.0} | options
        return predict_velocities(self.latents, 500, contexts, outer, blocks, self.config, **options)[0]

    def truth(self) -> Tensor:
        return self.run(self.blocks(torch.float32), torch.float32)


def packed(blocks: list[BlockWeights], dtype: torch.dtype) -> list[Any]:
    return [pack_block(prepare_block(block, dtype), dtype) for block in blocks]


def error(got: Tensor, want: Tensor) -> float:
    return float((got - want).square().mean().sqrt() / want.square().mean().sqrt())


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_8_bits_stay_near_fp32(shape: str) -> None:
    case = Case(shape)
    want = case.truth()
    errors = {None: error(case.run(case.blocks()), want)}
    errors |= {dtype: error(case.run(packed(case.blocks(), dtype)), want) for dtype in (INT8, FP8)}
    assert all(errors[dtype] < LIMIT[dtype] for dtype in LIMIT), errors
    assert errors[None] < errors[INT8] < errors[FP8]


@DTYPES
@pytest.mark.parametrize("chunk_tokens", [7, 64])
@torch.no_grad()
def test_runs_of_tokens_give_what_all_at_once_give(dtype: torch.dtype, chunk_tokens: int) -> None:
    case = Case("heads of 128")
    blocks = packed(case.blocks(), dtype)
    whole, runs = case.run(blocks), case.run(blocks, chunk_tokens=chunk_tokens)
    assert error(runs, whole) < 1e-3  # each token is rounded by itself: only sums in another order differ
    assert torch.equal(case.run(blocks), whole)


@DTYPES
@torch.no_grad()
def test_two_prompts_in_one_pass_equal_each_alone(dtype: torch.dtype) -> None:
    case = Case("heads of 64")
    blocks = packed(case.blocks(), dtype)
    prompts = [golden_tensor(name, 1, 9, case.config.text_dim) for name in ("one", "two")]
    case.contexts = prompts
    outer = load_outer(case.reader, case.config, torch.bfloat16)
    contexts = [prompt.bfloat16() for prompt in prompts]
    both = predict_velocities(case.latents, 500, contexts, outer, blocks, case.config)
    for got, context in zip(both, contexts, strict=True):
        (alone,) = predict_velocities(case.latents, 500, [context], outer, blocks, case.config)
        assert torch.equal(got, alone)
    assert not torch.equal(*both)


@DTYPES
def test_what_is_stored_for_it_is_used_as_it_is(dtype: torch.dtype) -> None:
    case = Case("heads of 128")
    once = prepare_block(case.blocks()[0], dtype)
    again = prepare_block(once, dtype)
    for name in ("q", "k", "v", "o"):
        weight = getattr(again.self_attn, name).weight
        assert weight is getattr(once.self_attn, name).weight
        assert weight.values.dtype == dtype


def stored_as(weight: Tensor, form: str) -> ScaledWeight | GGUFWeight:
    if form in ("Q8_0", "Q4_0"):
        return GGUFWeight(torch.from_numpy(pack(weight, form)), form, weight.shape[1], torch.bfloat16)
    dtype = FP8 if "fp8" in form else INT8
    if form == "fp8 without a scale":
        return ScaledWeight(weight.to(FP8), torch.ones(()), torch.bfloat16)
    largest = 448 if dtype == FP8 else 127
    rows = weight.float().abs()
    scale = rows.amax(1, keepdim=True) / largest if "rows" in form else rows.amax() / largest
    values = (weight.float() / scale).clamp(-largest, largest)
    return ScaledWeight((values.round() if dtype == INT8 else values).to(dtype), scale, torch.bfloat16)


def in_form(block: BlockWeights, form: str) -> BlockWeights:
    def changed(layer: Linear) -> Linear:
        return replace(layer, weight=stored_as(layer.weight, form))

    def attention(weights: Any) -> Any:
        return replace(weights, **{name: changed(getattr(weights, name)) for name in ("q", "k", "v", "o")})

    return replace(
        block,
        self_attn=attention(block.self_attn),
        cross_attn=attention(block.cross_attn),
        ffn_up=changed(block.ffn_up),
        ffn_down=changed(block.ffn_down),
    )


@DTYPES
@pytest.mark.parametrize("form", ["fp8 rows", "fp8", "fp8 without a scale", "int8 rows", "Q8_0", "Q4_0"])
@torch.no_grad()
def test_weights_in_any_form_compute_in_8_bits(form: str, dtype: torch.dtype) -> None:
    """Against the same stored weights multiplied in bf16: what 8-bit arithmetic adds is what it adds anywhere."""
    case = Case("heads of 128")
    blocks = [in_form(block, form) for block in case.blocks()]
    want = case.run(blocks)
    got = case.run(packed(blocks, dtype))
    # Numbers of a file that are taken over were rounded once; int8 that is not rotated meets the outliers.
    assert 1e-4 < error(got, want) < (0.03 if dtype == INT8 else 0.05)


@pytest.mark.parametrize("form", ["fp8 rows", "fp8", "fp8 without a scale", "int8 rows", "Q8_0"])
def test_numbers_stay_where_fp16_sums_hold_them(form: str) -> None:
    packed_block = pack_block(prepare_block(in_form(Case("heads of 128").blocks()[0], form), FP8), FP8)
    for layer in (packed_block.queries_keys, packed_block.attended, packed_block.ffn_down, packed_block.text_queries):
        assert 10 < float(layer.weight.values.float().abs().amax()) <= 28


@torch.no_grad()
def test_int8_of_a_file_is_neither_rounded_again_nor_rotated() -> None:
    block = in_form(Case("heads of 128").blocks()[0], "int8 rows")
    got = pack_block(prepare_block(block, INT8), INT8)
    assert not got.values.weight.rotated
    assert torch.equal(got.values.weight.values, block.self_attn.v.weight.values)
    assert torch.equal(got.queries_keys.weight.values[256:], block.self_attn.k.weight.values)


@torch.no_grad()
def test_projections_of_mixed_forms_share_their_input() -> None:
    case = Case("heads of 128")
    blocks = case.blocks()
    want = case.run(blocks)
    own = blocks[0].self_attn
    mixed = replace(
        own,
        q=replace(own.q, weight=stored_as(own.q.weight, "int8 rows")),
        k=replace(own.k, weight=stored_as(own.k.weight, "Q8_0")),
        v=replace(own.v, weight=quantize_rows(own.v.weight, INT8)),
    )
    blocks[0] = replace(blocks[0], self_attn=mixed)
    assert error(case.run(packed(blocks, INT8)), want) < 0.03


@DTYPES
def test_matrices_of_a_slot_are_joined_without_a_copy(dtype: torch.dtype) -> None:
    block = prepare_block(Case("heads of 128").blocks()[0], dtype)
    layout, parts = lay_out(block)
    run = torch.zeros(layout.num_bytes, dtype=torch.uint8)
    for part in parts:
        run[part.place.offset : part.place.offset + part.data.nbytes] = part.data
    in_slot = unpack(layout, run)
    got = pack_block(in_slot, dtype).queries_keys
    ends = run.data_ptr() + run.nbytes
    for tensor in (got.weight.values, got.bias):
        assert run.data_ptr() <= tensor.data_ptr() < ends
    assert got.weight.values.shape == (512, 256)
    want = pack_block(block, dtype).queries_keys
    assert torch.equal(got.weight.values.view(torch.uint8), want.weight.values.view(torch.uint8))
    assert torch.equal(got.weight.scale, want.weight.scale)
    assert torch.equal(got.bias, want.bias)


@DTYPES
@torch.no_grad()
def test_low_rank_terms_ride_along(dtype: torch.dtype) -> None:
    """Against the terms merged into fp32 weights: on q, k and v alone, together, and on every other layer."""
    case = Case("heads of 128")
    fields = [
        "self_attn.q",
        "self_attn.k",
        "self_attn.v",
        "self_attn.o",
        "cross_attn.q",
        "cross_attn.k",
        "cross_attn.o",
    ]
    fields += ["ffn_up", "ffn_down"]
    changes = [{field: terms(case.blocks()[0], field, rank) for rank, field in enumerate(fields, 2)} for _ in range(2)]
    merged = [{field: Change(merged=change.low_rank) for field, change in of_block.items()} for of_block in changes]
    plain = case.truth()
    want = case.run([attach(*pair) for pair in zip(case.blocks(torch.float32), merged, strict=True)], torch.float32)
    assert error(plain, want) > 0.1  # the terms matter
    prepared = [prepare_block(block, dtype) for block in case.blocks()]
    attached = [pack_block(attach(*pair), dtype) for pair in zip(prepared, changes, strict=True)]
    assert error(case.run(attached), want) < 1.5 * LIMIT[dtype]
    rounded_again = [pack_block(attach(*pair), dtype) for pair in zip(prepared, merged, strict=True)]
    assert error(case.run(rounded_again), want) < 1.5 * LIMIT[dtype]


@pytest.mark.parametrize("chunk_tokens", [256, 500, 2048])
@torch.no_grad()
def test_what_keys_are_less_is_the_mean_of_some_of_them(chunk_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Computed ahead of the keys, with the modulation of the first frame's tokens, a bias and low-rank terms."""
    case = Case("heads of 128", num_layers=1)
    case.latents = golden_tensor("long", 1, 48, 3, 40, 36)
    block = prepare_block(case.blocks()[0], INT8)
    change = {field: terms(block, field, 3) for field in ("self_attn.q", "self_attn.k")}
    keys, means = [], []
    quantize = kernels.rms_norm_rope_quantize_keys

    def spy(x: Tensor, weight: Tensor, rotations: Tensor, mean: Tensor, **options: Any) -> Any:
        keys.append(kernels.rms_norm_rope(x, weight, rotations, eps=options["eps"], out_dtype=torch.float32))
        means.append(mean)
        return quantize(x, weight, rotations, mean, **options)

    monkeypatch.setattr(kernels, "rms_norm_rope_quantize_keys", spy)
    case.run([pack_block(attach(block, change), INT8)], chunk_tokens=chunk_tokens)
    k = torch.cat(keys, 1)
    assert k.shape == (1, 1080, 2, 128) and len(keys) == -(-1080 // (-(-chunk_tokens // 64) * 64))
    some = torch.arange(251) * 1080 // 251
    assert all(torch.equal(mean, means[0]) for mean in means)
    torch.testing.assert_close(means[0], k[:, some].double().mean(1).float(), rtol=1e-4, atol=1e-4)
    assert ((means[0] - k.mean(1)).abs() < 5 * k.std(1) / 251**0.5).all()


def terms(block: BlockWeights, field: str, rank: int) -> Change:
    layer = block
    for part in field.split("."):
        layer = getattr(layer, part)
    outputs, inputs = layer.weight.shape
    down = golden_tensor(f"down {field}", rank, inputs) / inputs**0.5
    up = golden_tensor(f"up {field}", outputs, rank) / rank**0.5
    return Change(low_rank=(LowRank(down.bfloat16(), up.bfloat16(), 0.4), LowRank(down.bfloat16(), up.bfloat16(), 0.1)))


@pytest.mark.parametrize("dtype", [INT8, FP8], ids=["int8", "fp8"])
def test_rounded_weights_expand_to_what_they_were(dtype: torch.dtype) -> None:
    weight = golden_tensor("w", 64, 256)
    stored = quantize_rows(weight, dtype)
    assert error(expand(stored), weight) < (0.01 if dtype == INT8 else 0.04)


@pytest.mark.parametrize("precision", ["int8", "fp8"])
@pytest.mark.parametrize(
    ("capability", "fits"),
    [
        ((7, 5), False),
        ((8, 9), True),
        ((9, 0), True),
        ((10, 0), False),
        ((10, 3), False),
        ((11, 0), False),
        ((12, 0), True),
        ((12, 1), True),
    ],
)
def test_8_bits_need_a_generation_that_kernels_are_compiled_for(
    precision: str, capability: tuple[int, int], fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA B200")
    gpu, config = torch.device("cuda", 0), config_of("heads of 128")
    if fits:
        refuse_unfit(config, precision, gpu)
        return
    name = f"sm_{capability[0]}{capability[1]}"
    with pytest.raises(RequestError, match=rf"^precision: {precision} runs on sm_80 .* B200 is {name}; try exact$"):
        refuse_unfit(config, precision, gpu)
    refuse_unfit(config, precision, torch.device("cpu"))


def test_a_model_without_whole_groups_is_refused_for_a_gpu() -> None:
    cpu = torch.device("cpu")
    refuse_unfit(config_of("heads of 64"), "fp8", cpu)
    with pytest.raises(RequestError, match=r"^precision: .* multiples of 128 on a GPU, got 96 and 200.*try exact"):
        refuse_unfit(config_of("no groups"), "int8", cpu)


@pytest.mark.parametrize(("capability", "fits"), [((8, 6), False), ((8, 9), True), ((9, 0), True), ((12, 0), True)])
def test_fp8_needs_a_gpu_that_has_it(capability: tuple[int, int], fits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA GeForce RTX 3090")
    gpu, config = torch.device("cuda", 0), config_of("heads of 128")
    refuse_unfit(config, "int8", gpu)
    assert multiplies_e4m3(gpu) == fits
    if fits:
        refuse_unfit(config, "fp8", gpu)
    else:
        with pytest.raises(RequestError, match=r"^precision: fp8 needs .* got NVIDIA GeForce RTX 3090; try int8"):
            refuse_unfit(config, "fp8", gpu)


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_a_gpu_without_8_bit_kernels_is_refused_before_anything_is_read(
    precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = open_model(make_family("t2v", tmp_path).write_official(tmp_path / "model"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA B200")
    monkeypatch.setattr(Reader, "load", lambda self, name: pytest.fail(f"{name} was read"))
    with pytest.raises(
        RequestError, match=f"^precision: {precision} runs on sm_80 .* NVIDIA B200 is sm_100; try exact"
    ):
        LoadedModel(model, precision=precision, device=torch.device("cuda", 0))


def test_matrices_that_lie_together_are_seen_as_one_and_others_are_copied() -> None:
    store = torch.arange(40.0).view(10, 4)
    first, second, third = store[:3], store[3:5], store[5:]
    together = _joined([first, second, third])
    assert torch.equal(together, store) and together.data_ptr() == store.data_ptr()
    apart = {
        "a gap": [first, third],
        "another order": [second, first],
        "other memory, where it would follow": [first, (store + 100)[3:5]],
        "columns": [store[:5, :2], store[5:, :2]],
        "the same twice": [first, first],
    }
    for name, parts in apart.items():
        joined = _joined(parts)
        assert torch.equal(joined, torch.cat(parts)), name
        assert joined.is_contiguous() and joined.data_ptr() != store.data_ptr(), name
    (alone,) = [_joined([second])]
    assert alone.data_ptr() == second.data_ptr()


@DTYPES
@torch.no_grad()
def test_a_batch_gives_what_each_sample_gives_alone(dtype: torch.dtype) -> None:
    case = Case("heads of 128")
    blocks, outer = packed(case.blocks(), dtype), load_outer(case.reader, case.config, torch.bfloat16)
    latents = torch.cat([case.latents, golden_tensor("other", *case.latents.shape)])
    contexts = golden_tensor("contexts", 2, 9, case.config.text_dim).bfloat16()
    options = {"first_frame_timestep": 0.0, "chunk_tokens": 64}
    (both,) = predict_velocities(latents, 500, [contexts], outer, blocks, case.config, **options)
    assert not torch.equal(*both)
    for sample in range(2):
        own, text = latents[sample : sample + 1], contexts[sample : sample + 1]
        (alone,) = predict_velocities(own, 500, [text], outer, blocks, case.config, **options)
        assert error(both[sample : sample + 1], alone) < 1e-3  # sums of the layers in 16 bits in another order
