"""Sparse attention in the DiT: its order of tokens, its lists of blocks, and what it leaves alone."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from reference.dit import diffusers_dit, golden_state, golden_tensor, official_state, small_config
from tolerance import assert_close
from torch import Tensor
from tracked import tracked_peak

import wanfast.dit.block as block_module
import wanfast.dit.block_8bit as block_8bit_module
from wanfast.checkpoint.reader import memory_reader
from wanfast.dit.block import self_attention
from wanfast.dit.model import predict_velocities
from wanfast.dit.packed import pack_block, prepare_block
from wanfast.dit.token_order import token_order
from wanfast.dit.weights import load_block, load_outer
from wanfast.kernels import BlockLists, block_mask, block_means, choose_blocks, choosing_bytes
from wanfast.kernels.block_mask import token_mask
from wanfast.rope import rope_rotations

GRIDS = [(1, 1, 1), (1, 30, 52), (21, 30, 52), (31, 22, 40), (31, 40, 22), (2, 3, 5), (5, 1, 7), (4, 9, 2)]
ALL = 0.9999  # of the blocks: each is listed, by way of the lists
INT8 = torch.int8


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_every_token_has_one_place_and_the_first_frame_s_are_the_first(grid: tuple[int, int, int]) -> None:
    order = token_order(grid)
    frame = grid[1] * grid[2]
    assert order.sort().values.tolist() == list(range(grid[0] * frame))
    assert order[:frame].max() == frame - 1


@pytest.mark.parametrize("grid", [(21, 30, 52), (21, 45, 80), (31, 22, 40), (31, 40, 22), (21, 52, 30)], ids=str)
@pytest.mark.parametrize("block", [64, 128])
def test_blocks_are_compact(grid: tuple[int, int, int], block: int) -> None:
    """A token's distance from the middle of its block, RMS: at most 1.15 times that in the most compact cuboid."""
    frame, num_tokens = grid[1] * grid[2], grid[0] * grid[1] * grid[2]
    places = torch.cartesian_prod(*(torch.arange(size) for size in grid)).double()[token_order(grid)]
    last = frame + (num_tokens - frame) // block * block
    for blocks, sides in (
        (places[frame:last], (4, 4, block // 16)),
        (places[: frame // block * block], (8, block // 8)),
    ):
        middle = blocks.view(-1, block, 3)
        seen = (middle - middle.mean(1, keepdim=True)).square().sum(-1).mean().sqrt()
        ideal = sum((side**2 - 1) / 12 for side in sides) ** 0.5
        assert seen < 1.15 * ideal, (float(seen), ideal)


class Case:
    """A small model whose keys differ by place, with 640 tokens: 5 blocks of queries, 10 of keys."""

    def __init__(self, task: str = "t2v", dtype: torch.dtype = torch.float32, precision: torch.dtype | None = None):
        sizes = {"dim": 256, "num_heads": 2, "ffn_dim": 256} if precision else {}
        self.config = replace(small_config(task), num_layers=3, text_len=32, **sizes)
        state = official_state(diffusers_dit(self.config)) if precision is None else golden_state(self.config)
        reader = memory_reader(state)
        self.outer = load_outer(reader, self.config, dtype)
        self.blocks: list[Any] = [load_block(reader, self.config, index, dtype) for index in range(3)]
        if precision is not None:
            self.blocks = [pack_block(prepare_block(block, precision), precision) for block in self.blocks]
        self.grid = (4, 10, 16)
        self.latents = golden_tensor("x", 1, self.config.out_channels, 4, 20, 32)
        condition = self.config.in_channels - self.config.out_channels
        self.condition = golden_tensor("cond", 1, condition, 4, 20, 32) if condition else None
        self.contexts = [golden_tensor(name, 1, 7, self.config.text_dim).to(dtype) for name in ("one", "two")]
        self.first = 0.0 if task == "ti2v" else None

    def run(self, *, is_ordered: bool = True, contexts: list[Tensor] | None = None, **options: Any) -> list[Tensor]:
        order = token_order(self.grid) if is_ordered else None
        return predict_velocities(
            self.latents,
            500,
            contexts or self.contexts,
            self.outer,
            self.blocks,
            self.config,
            condition=self.condition,
            first_frame_timestep=self.first,
            **{"order": order} | options,
        )


def difference(got: Tensor, want: Tensor) -> float:
    return float((got - want).square().mean().sqrt() / want.square().mean().sqrt())


@pytest.mark.parametrize("task", ["t2v", "i2v", "ti2v"])
@pytest.mark.parametrize("density", [1.0, ALL])
@torch.no_grad()
def test_order_and_full_lists_change_nothing(task: str, density: float) -> None:
    case = Case(task)
    want = case.run(is_ordered=False)
    rotations = rope_rotations(case.grid, case.config.head_dim)[token_order(case.grid)]
    for got in (
        case.run(attention_density=density),
        case.run(attention_density=density, chunk_tokens=128),
        case.run(attention_density=density, rotations=rotations),
    ):
        for one, other in zip(got, want, strict=True):
            assert_close(got=one, want=other, op="dit_fp32")


@pytest.mark.parametrize("precision", [INT8, torch.float8_e4m3fn], ids=["int8", "fp8"])
@torch.no_grad()
def test_full_lists_are_dense_attention_bit_for_bit_in_8_bits(precision: torch.dtype) -> None:
    case = Case("ti2v", torch.bfloat16, precision)
    dense, listed = case.run(), case.run(attention_density=ALL)
    assert all(torch.equal(one, other) for one, other in zip(listed, dense, strict=True))
    in_order = case.run(is_ordered=False)
    assert difference(dense[0], in_order[0]) < (0.01 if precision == INT8 else 0.03)  # rounds keys with other ones


class Seen:
    """Lists as blocks choose them."""

    def __init__(self, module: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.lists: list[BlockLists] = []
        self.means: list[tuple[Tensor, Tensor, float]] = []  # of queries and keys, and the scale, where they are given
        own = getattr(module, name)

        def choose(*arguments: Any, **options: Any) -> BlockLists:
            self.lists.append(own(*arguments, **options))
            self.means.append((*arguments, options.get("scale", 1.0)))
            return self.lists[-1]

        monkeypatch.setattr(module, name, choose)


@torch.no_grad()
def test_self_attention_equals_float64_with_the_same_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case()
    config, weights, order = case.config, case.blocks[1], token_order(case.grid)
    tokens, heads = len(order), config.num_heads
    seen = Seen(block_module, "block_mask", monkeypatch)
    hidden = golden_tensor("hidden", 1, tokens, config.dim)
    modulation = golden_tensor("modulation", 1, 1, 6, config.dim)
    rotations = rope_rotations(case.grid, config.head_dim)[order]
    got = hidden.clone()
    options = {"num_heads": heads, "eps": 1e-6, "chunk_tokens": 256}
    self_attention(got, weights, modulation, rotations, attention_density=0.3, **options)
    (lists,) = seen.lists

    def project(x: Tensor, layer: Any, norm: Tensor | None = None) -> Tensor:
        x = x @ layer.weight.double().T + layer.bias.double()
        if norm is not None:
            x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * norm.double()
        x = x.unflatten(-1, (heads, -1))
        if norm is None:
            return x
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * rotations.to(torch.complex128)[:, None]).flatten(-2)

    shift, scale, gate = modulation.double()[:, 0, :3].unbind(1)
    x = F.layer_norm(hidden.double(), (config.dim,), eps=1e-6) * (1 + scale) + shift
    own = weights.self_attn
    q, k, v = project(x, own.q, own.norm_q), project(x, own.k, own.norm_k), project(x, own.v)
    chosen = block_mask(q, k, density=0.3)
    assert torch.equal(chosen.counts, lists.counts) and torch.equal(chosen.columns, lists.columns)
    attended = torch.empty_like(q)
    for n in range(heads):
        mask = token_mask(lists, 0, n, tokens, tokens)
        scores = (q[0, :, n] @ k[0, :, n].T / config.head_dim**0.5).masked_fill(~mask, float("-inf"))
        attended[0, :, n] = scores.softmax(-1) @ v[0, :, n]
    want = hidden.double() + gate * (attended.flatten(2) @ own.o.weight.double().T + own.o.bias.double())
    assert_close(got=got, want=want, op="dit_fp32")
    dense = hidden.clone()
    self_attention(dense, weights, modulation, rotations, **options)
    assert difference(dense, want.float()) > 1e-3, "the mask must matter"


@pytest.mark.parametrize("precision", [None, INT8], ids=["16 bits", "int8"])
@torch.no_grad()
def test_lists_keep_the_density_and_the_diagonal(
    precision: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case("t2v", torch.bfloat16, precision)
    module, name = (block_module, "block_mask") if precision is None else (block_8bit_module.kernels, "choose_blocks")
    seen = Seen(module, name, monkeypatch)
    case.run(attention_density=0.3, chunk_tokens=256)
    assert len(seen.lists) == 2 * 2, "all blocks but the first, of two prompts"
    for lists in seen.lists:
        assert tuple(lists.counts.shape) == (1, case.config.num_heads, 5)
        assert lists.counts.min() >= 3 and lists.counts.max() <= 5  # of 10, and the two of the diagonal
        for n in range(case.config.num_heads):
            assert token_mask(lists, 0, n, 640, 640).diagonal().all()


@torch.no_grad()
def test_8_bits_choose_what_16_bits_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries in 8 bits carry the softmax's factor in their scales; with another one other blocks would be chosen."""
    case = Case("t2v", torch.bfloat16, INT8)
    seen = Seen(block_8bit_module.kernels, "choose_blocks", monkeypatch)
    kept: list[tuple[Tensor, Tensor]] = []
    quantize = block_8bit_module.kernels.rms_norm_rope_quantize

    def spy(x: Tensor, weight: Tensor, rotations: Tensor, **options: Any) -> Any:
        q = block_8bit_module.kernels.rms_norm_rope(x, weight, rotations, eps=options["eps"])
        kept.append((q, quantize(x, weight, rotations, **options)))
        return kept[-1][1]

    keys: list[Tensor] = []
    round_keys = block_8bit_module.kernels.rms_norm_rope_quantize_keys

    def spy_keys(x: Tensor, weight: Tensor, rotations: Tensor, mean: Tensor, **options: Any) -> Any:
        keys.append(block_8bit_module.kernels.rms_norm_rope(x, weight, rotations, eps=options["eps"]))
        return round_keys(x, weight, rotations, mean, **options)

    monkeypatch.setattr(block_8bit_module.kernels, "rms_norm_rope_quantize", spy)
    monkeypatch.setattr(block_8bit_module.kernels, "rms_norm_rope_quantize_keys", spy_keys)
    case.run(attention_density=0.4, chunk_tokens=256, contexts=case.contexts[:1])
    num_runs = len(kept) // 3  # the first block's are dense
    for index, (q_mean, k_mean, scale) in enumerate(seen.means, 1):
        q = torch.cat([q for q, _ in kept[index * num_runs : (index + 1) * num_runs]], 1)
        k = torch.cat(keys[index * num_runs : (index + 1) * num_runs], 1)
        got = scale * (q_mean @ k_mean.transpose(-1, -2))
        want = block_means(q, 128) @ block_means(k, 64).transpose(-1, -2) / case.config.head_dim**0.5
        # A softmax does not see what keys are less.
        assert difference(*(scores - scores.mean(-1, keepdim=True) for scores in (got, want))) < 0.02
        same = choose_blocks(q_mean, k_mean, queries=640, keys=640, density=0.4, scale=scale)
        assert torch.equal(same.columns, seen.lists[index - 1].columns)
    assert len(seen.lists) == 2


@pytest.mark.parametrize("precision", [None, INT8], ids=["16 bits", "int8"])
@torch.no_grad()
def test_prompts_in_turn_give_what_they_give_together(precision: torch.dtype | None) -> None:
    case = Case("t2v", torch.bfloat16, precision)
    together = case.run(attention_density=0.3)
    alone = [case.run(attention_density=0.3, contexts=[context])[0] for context in case.contexts]
    assert all(torch.equal(one, other) for one, other in zip(together, alone, strict=True))
    assert not torch.equal(*together)
    dense = case.run()
    assert difference(together[0], dense[0]) > 1e-4


@torch.no_grad()
def test_a_single_block_is_dense() -> None:
    case = Case()
    case.config, case.blocks = replace(case.config, num_layers=1), case.blocks[:1]
    dense, sparse = case.run(), case.run(attention_density=0.1)
    assert torch.equal(dense[0], sparse[0])


@pytest.mark.parametrize("density", [0.1, 0.9])
@torch.no_grad()
def test_choosing_blocks_takes_no_more_memory_than_is_counted(density: float) -> None:
    q, k = torch.randn(2, 1, 3000, 4, 64).bfloat16()
    counted = choosing_bytes(heads=4, tokens=3000, head_dim=64, density=density)
    got = tracked_peak(lambda: block_mask(q, k, density=density))
    wide = 128 * 4 * 64 * 4  # the reference of the means widens a block of tokens
    assert 0.3 * counted < got < counted + wide, (got, counted)
