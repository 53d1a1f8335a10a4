import dataclasses
from collections.abc import Iterator

import pytest
import torch
from reference.text import SMALL, golden_tensor, official_state, umt5_encoder
from tolerance import assert_close
from torch import Tensor
from transformers import UMT5EncoderModel

from wanfast.checkpoint.reader import Reader, memory_reader
from wanfast.config import UMT5_XXL, TextConfig
from wanfast.errors import CheckpointError, RequestError
from wanfast.text.umt5 import encode_text, encode_texts, relative_buckets
from wanfast.text.weights import TextBlockWeights, expected_tensors, load_block, load_outer, text_config

TEXT_LEN = 512
# A sum in another order may fall on the other side of a rounding (1 u = 2^-8), and later blocks carry that on: up
# to 2 u of the largest value was seen. The same formula with its roundings in other places is 4 u and more away.
ROUNDING_FLIPS = 3 * 2**-8

CONFIGS = {
    "small": SMALL,
    "one head": dataclasses.replace(SMALL, attention_dim=16, num_heads=1, num_layers=1),
    "many heads": dataclasses.replace(SMALL, attention_dim=104, num_heads=13),
    "few buckets": dataclasses.replace(SMALL, num_buckets=8, max_distance=20, eps=1e-2),
}


def blocks_of(reader: Reader, config: TextConfig, dtype: torch.dtype) -> Iterator[TextBlockWeights]:
    return (load_block(reader, config, index, dtype) for index in range(config.num_layers))


def encode(model: UMT5EncoderModel, config: TextConfig, ids: list[int], dtype: torch.dtype) -> Tensor:
    reader = memory_reader(official_state(model))
    return encode_text(ids, load_outer(reader, config, dtype), blocks_of(reader, config, dtype), config)


def padded_reference(model: UMT5EncoderModel, ids: list[int], length: int = TEXT_LEN) -> Tensor:
    """Encode as Wan does: pad with zeros, hide the padding, keep the true rows."""
    padded = torch.zeros(1, length, dtype=torch.int64)
    padded[0, : len(ids)] = torch.tensor(ids)
    mask = (torch.arange(length) < len(ids)).long()[None]
    return model(padded, attention_mask=mask).last_hidden_state[0, : len(ids)]


def random_ids(length: int, config: TextConfig = SMALL) -> list[int]:
    generator = torch.Generator().manual_seed(length)
    return [*torch.randint(2, config.vocab_size, (length - 1,), generator=generator).tolist(), 1]


def test_the_official_code_s_values() -> None:
    config = dataclasses.replace(
        SMALL, vocab_size=100, dim=64, attention_dim=64, ffn_dim=160, num_heads=4, num_layers=2
    )
    reader = memory_reader({name: golden_tensor(name, shape) for name, shape in expected_tensors(config).items()})
    assert text_config(reader) == config
    outer = load_outer(reader, config, torch.float32)
    got = encode_text([5, 17, 99, 3, 42, 8, 1], outer, blocks_of(reader, config, torch.float32), config)
    assert got.shape == (7, 64)
    wide = got.double()
    moments = torch.stack([wide.mean(), wide.std(correction=0)])
    assert_close(got=moments, want=torch.tensor([-0.07510588, 1.013076]).double(), op="golden")
    values = torch.tensor([1.03536, 0.525006, -1.00141, -0.409525, 0.193499, 0.741483, -0.721716])
    assert_close(got=got.flatten()[[0, 1, 64, 149, 224, 320, 447]], want=values, op="golden")


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("length", [1, 7, 130])
def test_fp32_equals_transformers_with_padding_and_mask(name: str, length: int) -> None:
    config = CONFIGS[name]
    model = umt5_encoder(config, seed=1)
    ids = random_ids(length, config)
    got = encode(model, config, ids, torch.float32)
    assert_close(got=got, want=padded_reference(model, ids, 160), op="umt5_fp32")


@pytest.mark.parametrize("length", [20, TEXT_LEN])
def test_fp32_equals_transformers_at_wan_s_own_length(length: int) -> None:
    model = umt5_encoder(SMALL, seed=9)
    ids = random_ids(length)
    assert_close(got=encode(model, SMALL, ids, torch.float32), want=padded_reference(model, ids), op="umt5_fp32")


def test_bf16_at_full_length_has_the_bits_of_transformers() -> None:
    model = umt5_encoder(SMALL, seed=2).bfloat16()
    ids = random_ids(TEXT_LEN)
    got = encode(model, SMALL, ids, torch.bfloat16)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, padded_reference(model, ids))


@pytest.mark.parametrize("length", [1, 60, 300])
def test_bf16_without_padding_stays_within_a_rounding_of_transformers_with(length: int) -> None:
    model = umt5_encoder(SMALL, seed=3).bfloat16()
    ids = random_ids(length)
    got, want = encode(model, SMALL, ids, torch.bfloat16).float(), padded_reference(model, ids).float()
    assert (got - want).abs().max() <= ROUNDING_FLIPS * want.abs().max()


def test_bf16_stays_within_a_stated_distance_of_fp32() -> None:
    model = umt5_encoder(SMALL, seed=4).bfloat16()  # both see the rounded weights
    ids = random_ids(100)
    got, want = encode(model, SMALL, ids, torch.bfloat16), encode(model, SMALL, ids, torch.float32)
    error = (got.float() - want).square().mean().sqrt() / want.square().mean().sqrt()
    assert 0 < error < 0.03  # 1.2 % was measured, transformers in bf16 the same


def test_stored_bf16_is_computed_in_fp32_when_asked() -> None:
    model = umt5_encoder(SMALL, seed=5).bfloat16()
    ids = random_ids(9)
    got = encode(model, SMALL, ids, torch.float32)
    assert got.dtype == torch.float32
    assert_close(got=got, want=padded_reference(model.float(), ids, 16), op="umt5_fp32")


# (least distance, bucket of a key at or before the query); a key after the query has 16 more.
BUCKETS = [*((d, d) for d in range(8)), (8, 8), (12, 9), (16, 10), (23, 11), (32, 12), (46, 13), (64, 14), (91, 15)]


@pytest.mark.parametrize("length", [1, 2, 9, 17, 92, TEXT_LEN])
def test_buckets_are_those_of_the_official_table(length: int) -> None:
    buckets = relative_buckets(length, UMT5_XXL).tolist()
    by_distance = [max(bucket for least, bucket in BUCKETS if distance >= least) for distance in range(length)]
    assert buckets == [by_distance[abs(offset)] + (16 if offset > 0 else 0) for offset in range(1 - length, length)]


@pytest.mark.parametrize(("num_buckets", "max_distance"), [(32, 128), (32, 64), (8, 20), (64, 1000), (4, 16)])
def test_buckets_are_those_of_transformers(num_buckets: int, max_distance: int) -> None:
    config = dataclasses.replace(SMALL, num_buckets=num_buckets, max_distance=max_distance, num_layers=1)
    attention = umt5_encoder(config).encoder.block[0].layer[0].SelfAttention
    want = attention._relative_position_bucket(torch.arange(1 - TEXT_LEN, TEXT_LEN))
    assert torch.equal(relative_buckets(TEXT_LEN, config), want)


def test_prompts_share_each_block_and_do_not_change_each_other() -> None:
    reader = memory_reader(official_state(umt5_encoder(SMALL, seed=6)))
    outer = load_outer(reader, SMALL, torch.float32)
    asked: list[int] = []

    def blocks() -> Iterator[TextBlockWeights]:
        for index in range(SMALL.num_layers):
            asked.append(index)
            yield load_block(reader, SMALL, index, torch.float32)

    prompts = [random_ids(40), [1], random_ids(7), random_ids(40)]
    together = encode_texts(prompts, outer, blocks(), SMALL)
    assert asked == [0, 1, 2]
    assert [len(context) for context in together] == [40, 1, 7, 40]
    for ids, context in zip(prompts, together, strict=True):
        assert torch.equal(context, encode_text(ids, outer, blocks(), SMALL))


def test_a_block_is_used_before_the_next_is_asked_for() -> None:
    reader = memory_reader(official_state(umt5_encoder(SMALL, seed=7)))
    outer = load_outer(reader, SMALL, torch.float32)

    def one_slot() -> Iterator[TextBlockWeights]:
        for index in range(SMALL.num_layers):
            state = {name: reader.load(name).clone() for name in reader.names()}
            block = load_block(memory_reader(state), SMALL, index, torch.float32)
            yield block
            for layer in (block.q, block.k, block.v, block.o, block.gate, block.up, block.down):
                layer.weight.fill_(torch.nan)  # as a slot that the next block overwrites

    want = encode_text([9, 1], outer, blocks_of(reader, SMALL, torch.float32), SMALL)
    assert torch.equal(encode_text([9, 1], outer, one_slot(), SMALL), want)


def test_weights_are_not_written_to() -> None:
    state = official_state(umt5_encoder(SMALL, seed=8))
    before = {name: tensor.clone() for name, tensor in state.items()}
    reader = memory_reader(state)
    encode_text([9, 9, 1], load_outer(reader, SMALL, torch.float32), blocks_of(reader, SMALL, torch.float32), SMALL)
    assert all(torch.equal(tensor, before[name]) for name, tensor in state.items())


@pytest.mark.parametrize("ids", [[], [99], [5, -1, 1], [5, 1000, 1]])
def test_ids_outside_the_vocabulary_are_refused(ids: list[int]) -> None:
    reader = memory_reader(official_state(umt5_encoder(SMALL)))
    outer = load_outer(reader, SMALL, torch.float32)
    with pytest.raises(RequestError, match=r"ids: must be .* in \[0, 99\)"):
        encode_texts([[5, 1], ids], outer, iter(()), SMALL)


def test_a_missing_block_is_noticed() -> None:
    reader = memory_reader(official_state(umt5_encoder(SMALL)))
    outer = load_outer(reader, SMALL, torch.float32)
    with pytest.raises(ValueError, match="shorter"):
        encode_text([5, 1], outer, list(blocks_of(reader, SMALL, torch.float32))[:2], SMALL)


def test_a_token_whose_row_is_not_finite_is_refused() -> None:
    state = official_state(umt5_encoder(SMALL))
    state["token_embedding.weight"][5, 0] = torch.nan
    outer = load_outer(memory_reader(state, "enc.pth"), SMALL, torch.float32)
    with pytest.raises(CheckpointError, match=r"enc\.pth: tensor token_embedding\.weight"):
        encode_text([5, 1], outer, iter(()), SMALL)
