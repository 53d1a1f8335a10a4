"""The whole DiT against diffusers' and against values the official code produced."""

from dataclasses import replace

import pytest
import torch
from reference.dit import diffusers_dit, golden_state, golden_tensor, official_state, small_config
from tolerance import assert_close
from torch import Tensor

from wanfast.checkpoint.reader import memory_reader
from wanfast.config import DiTConfig
from wanfast.dit.model import predict_velocities, sinusoid
from wanfast.dit.weights import BlockWeights, OuterWeights, load_block, load_outer
from wanfast.errors import RequestError

Weights = tuple[OuterWeights, list[BlockWeights]]
GRIDS = [(3, 4, 6), (1, 2, 2), (2, 10, 14)]  # latent frames, rows, columns


def _load(state: dict[str, Tensor], config: DiTConfig, dtype: torch.dtype = torch.float32) -> Weights:
    reader = memory_reader(state)
    blocks = [load_block(reader, config, index, dtype) for index in range(config.num_layers)]
    return load_outer(reader, config, dtype), blocks


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _padded(context: Tensor, config: DiTConfig) -> Tensor:
    return torch.nn.functional.pad(context, (0, 0, 0, config.text_len - context.shape[1]))


GOLDEN = {
    "t2v": (
        {"latents": ("x", 16), "timestep": 937},
        (-0.04592848, 1.108061),
        {0: -0.078779, 1: 0.500291, 658: 0.391694, 1536: -0.726398, 2304: 1.68665, 3291: -0.63168, 4607: -0.260296},
    ),
    "i2v": (
        {"latents": ("x", 16), "timestep": 500, "condition": ("cond", 20)},
        (0.01591064, 1.176748),
        {0: 1.21942, 1: -1.82419, 658: -0.23085, 1536: 0.875134, 2304: 0.656181, 3291: -0.470849, 4607: -1.27972},
    ),
    "ti2v": (
        {"latents": ("x48", 48), "timestep": 321, "first_frame_timestep": 0.0},
        (0.01435472, 1.179927),
        {0: 0.633131, 1: 0.512323, 1974: -1.49509, 4608: -1.99758, 6912: -3.32524, 9874: -0.44981, 13823: -0.468289},
    ),
}


@pytest.mark.parametrize("task", GOLDEN)
def test_predict_velocities_gives_the_values_of_the_official_code(task: str) -> None:
    config = replace(small_config(task), dim=256, ffn_dim=384, num_heads=2, num_layers=2, text_dim=64, freq_dim=256)
    inputs, (mean, std), values = GOLDEN[task]
    arguments = {
        name: golden_tensor(value[0], value[1], 3, 8, 12)[None] if isinstance(value, tuple) else value
        for name, value in inputs.items()
    }
    outer, blocks = _load(golden_state(config), config)
    context = golden_tensor("ctx", 7, 64)[None]
    (velocity,) = predict_velocities(
        contexts=[context],
        outer=outer,
        blocks=blocks,
        config=config,
        **arguments,  # type: ignore[arg-type]
    )
    flat = velocity.double().flatten()
    got = torch.stack([flat.mean(), flat.std(correction=0), *(flat[index] for index in values)])
    assert_close(got=got, want=torch.tensor([mean, std, *values.values()], dtype=torch.float64), op="golden")


def test_sinusoid_gives_the_values_of_the_official_code() -> None:
    indices = [0, 1, 2, 64, 127, 128, 129, 192, 255]
    # fmt: off
    want = [0.692830613, 0.153432506, 0.638948033, -0.998500063, 0.994934968, 0.721100368, -0.98815913, 0.0547505702,
            0.100520695]
    # fmt: on
    torch.testing.assert_close(sinusoid([937], 256)[0, indices], torch.tensor(want), rtol=2e-7, atol=2e-8)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("task", ["t2v", "i2v"])
@torch.no_grad()
def test_predict_velocities_equals_diffusers(task: str, grid: tuple[int, int, int]) -> None:
    config = small_config(task)
    model = diffusers_dit(config)
    latents, context = _random(2, 16, *grid), _random(2, 9, config.text_dim, seed=1)
    condition = _random(2, config.in_channels - 16, *grid, seed=2) if task == "i2v" else None
    full = latents if condition is None else torch.cat([latents, condition], dim=1)
    want = model(full, torch.tensor([611, 611]), _padded(context, config)).sample
    outer, blocks = _load(official_state(model), config)
    (got,) = predict_velocities(latents, 611, [context], outer, iter(blocks), config, condition=condition)
    assert got.dtype == torch.float32
    assert_close(got=got, want=want, op="dit_fp32")


@pytest.mark.parametrize("grid", GRIDS)
@torch.no_grad()
def test_two_rows_of_modulation_equal_diffusers_with_a_timestep_per_token(grid: tuple[int, int, int]) -> None:
    config = small_config("ti2v")
    model = diffusers_dit(config)
    latents, context = _random(2, 48, *grid), _random(2, 9, config.text_dim, seed=1)
    frame_tokens = grid[1] * grid[2] // 4
    timesteps = torch.full((2, grid[0] * frame_tokens), 321)
    timesteps[:, :frame_tokens] = 0
    want = model(latents, timesteps, _padded(context, config)).sample
    outer, blocks = _load(official_state(model), config)
    (got,) = predict_velocities(latents, 321, [context], outer, blocks, config, first_frame_timestep=0.0)
    assert_close(got=got, want=want, op="dit_fp32")


@torch.no_grad()
def test_a_first_frame_timestep_equal_to_the_others_changes_nothing() -> None:
    config, outer, blocks, latents, context = _small_case("ti2v")
    (one,) = predict_velocities(latents, 321, [context], outer, blocks, config)
    (two,) = predict_velocities(latents, 321, [context], outer, blocks, config, first_frame_timestep=321)
    assert_close(got=two, want=one, op="dit_fp32")


@torch.no_grad()
def test_fractional_timesteps_are_not_rounded() -> None:
    config, outer, blocks, latents, context = _small_case("t2v")
    model = diffusers_dit(config)
    want = model(latents, torch.tensor([0.5]), _padded(context, config)).sample
    (got,) = predict_velocities(latents, 0.5, [context], outer, blocks, config)
    assert_close(got=got, want=want, op="dit_fp32")


def _small_case(task: str) -> tuple[DiTConfig, OuterWeights, list[BlockWeights], Tensor, Tensor]:
    config = small_config(task)
    outer, blocks = _load(official_state(diffusers_dit(config)), config)
    return config, outer, blocks, _random(1, config.out_channels, 3, 4, 6), _random(1, 9, config.text_dim, seed=1)


@torch.no_grad()
def test_two_contexts_in_one_pass_equal_each_alone() -> None:
    config, outer, blocks, latents, context = _small_case("t2v")
    contexts = [context, _random(1, 3, config.text_dim, seed=5)]
    passes = iter(blocks)  # a second pass over it would find nothing
    together = predict_velocities(latents, 400, contexts, outer, passes, config)
    alone = [predict_velocities(latents, 400, [one], outer, blocks, config)[0] for one in contexts]
    assert len(together) == 2
    assert not torch.equal(together[0], together[1])
    for got, want in zip(together, alone, strict=True):
        assert torch.equal(got, want)


@torch.no_grad()
def test_padding_rows_of_the_text_are_attended_to() -> None:
    config, outer, blocks, latents, context = _small_case("t2v")
    (got,) = predict_velocities(latents, 400, [context], outer, blocks, config)
    zeros = torch.nn.functional.pad(context, (0, 0, 0, 4))
    assert torch.equal(predict_velocities(latents, 400, [zeros], outer, blocks, config)[0], got)
    unpadded = replace(config, text_len=context.shape[1])  # as if padding were masked
    (masked,) = predict_velocities(latents, 400, [context], outer, blocks, unpadded)
    assert (masked - got).abs().max() > 1e-2 * got.abs().max()


@torch.no_grad()
def test_bf16_stays_near_fp32() -> None:
    config = small_config("ti2v", dim=128, num_heads=2, num_layers=4)
    state = official_state(diffusers_dit(config))
    latents, context = _random(1, 48, 3, 8, 8), _random(1, 9, config.text_dim, seed=1)
    velocities = []
    for dtype in (torch.float32, torch.bfloat16):
        outer, blocks = _load(state, config, dtype)
        (velocity,) = predict_velocities(
            latents, 500, [context.to(dtype)], outer, blocks, config, first_frame_timestep=0.0
        )
        assert velocity.dtype == torch.float32
        velocities.append(velocity)
    assert not torch.equal(*velocities)
    assert_close(got=velocities[1], want=velocities[0], op="dit_bf16")


@torch.no_grad()
def test_nothing_is_written_to() -> None:
    config, outer, blocks, latents, context = _small_case("t2v")
    before = latents.clone(), context.clone(), blocks[0].modulation.clone(), outer.head_modulation.clone()
    first = predict_velocities(latents, 400, [context, context], outer, blocks, config)
    for was, now in zip(before, (latents, context, blocks[0].modulation, outer.head_modulation), strict=True):
        assert torch.equal(was, now)
    assert torch.equal(predict_velocities(latents, 400, [context], outer, blocks, config)[0], first[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latents": torch.zeros(1, 16, 3, 5, 6)}, r"latents: .*multiples of \(1, 2, 2\), got \(3, 5, 6\)"),
        ({"latents": torch.zeros(1, 12, 3, 4, 6)}, "latents: .*16 channels, got 12"),
        ({"latents": torch.zeros(16, 3, 4, 6)}, r"latents: must be fp32 \[B, C, F, H, W\]"),
        ({"latents": torch.zeros(1, 16, 3, 4, 6).half()}, "latents: must be fp32 .*float16"),
        ({"latents": torch.zeros(1, 16, 0, 4, 6)}, "latents: must be fp32 .*none of them 0"),
        ({"condition": torch.zeros(1, 20, 3, 4, 6)}, "latents: .*16 channels, got 36"),
        ({"condition": torch.zeros(1, 20, 2, 4, 6)}, "condition: must be .* like latents"),
        ({"contexts": []}, "contexts: must hold at least one"),
        ({"contexts": [torch.zeros(1, 17, 24)]}, r"contexts: each must be \[1, at most 16, 24\], got \(1, 17, 24\)"),
        ({"contexts": [torch.zeros(1, 9, 23)]}, r"contexts: .*got \(1, 9, 23\)"),
        ({"contexts": [torch.zeros(2, 9, 24)]}, r"contexts: .*got \(2, 9, 24\)"),
        ({"blocks": []}, "blocks: must be all 2 blocks of the model, got 0"),
    ],
)
def test_predict_velocities_refuses_by_name(change: dict[str, object], message: str) -> None:
    config, outer, blocks, latents, context = _small_case("t2v")
    arguments = {"latents": latents, "contexts": [context], "blocks": blocks} | change
    with pytest.raises(RequestError, match=message):
        predict_velocities(timestep=400, outer=outer, config=config, **arguments)  # type: ignore[arg-type]


@torch.no_grad()
def test_predict_velocities_refuses_surplus_blocks() -> None:
    config, outer, blocks, latents, context = _small_case("t2v")
    with pytest.raises(RequestError, match="blocks: must be all 2 blocks of the model, got 3"):
        predict_velocities(latents, 400, [context], outer, [*blocks, blocks[0]], config)
