"""What is made of a prompt once: its padding, its keys and values, and block 0's self-attention."""

from dataclasses import replace

import pytest
import torch
from reference.dit import golden_state, golden_tensor, small_config
from tolerance import assert_close
from torch import Tensor

from wanfast.checkpoint.reader import memory_reader
from wanfast.dit import attention as attention_module
from wanfast.dit import block as block_module
from wanfast.dit import model as model_module
from wanfast.dit.attention import attention
from wanfast.dit.model import predict_velocities
from wanfast.dit.text import KeyValues, TextMemory, embed_text
from wanfast.dit.weights import load_block, load_outer

CONFIG = replace(small_config(), text_len=32, num_layers=3)
READER = memory_reader(golden_state(CONFIG))
OUTER = load_outer(READER, CONFIG, torch.float32)
BLOCKS = [load_block(READER, CONFIG, index, torch.float32) for index in range(CONFIG.num_layers)]
LATENTS = golden_tensor("x", 1, 16, 3, 4, 6)
CONTEXTS = [golden_tensor("prompt", 1, 9, CONFIG.text_dim), golden_tensor("negative", 1, 4, CONFIG.text_dim)]


def predict(memory: TextMemory | None = None, contexts: list[Tensor] | None = None) -> list[Tensor]:
    return predict_velocities(LATENTS, 400, contexts or CONTEXTS, OUTER, BLOCKS, CONFIG, text_memory=memory)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of rows of each text that keys and values are made of."""
    rows: list[int] = []
    own = model_module.text_key_values

    def counted(text, *arguments, **more):
        rows.append(text.rows.shape[1])
        return own(text, *arguments, **more)

    monkeypatch.setattr(model_module, "text_key_values", counted)
    return rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("last_count", [2, 3, 460])
def test_a_key_that_counts_many_times_weighs_as_many_keys(dtype: torch.dtype, last_count: int) -> None:
    q, k, v = golden_tensor("q", 2, 7, 3, 16), golden_tensor("k", 2, 5, 3, 16), golden_tensor("v", 2, 5, 3, 16)
    repeats = torch.tensor([1, 1, 1, 1, last_count])
    wide = [x.to(dtype).double() for x in (q, k, v)]
    want = attention(wide[0], *(x.repeat_interleave(repeats, dim=1) for x in wide[1:]))
    got = attention(*(x.to(dtype) for x in (q, k, v)), last_count=last_count)
    limit = 1e-6 if dtype == torch.float32 else 2**-7
    assert float((got.double() - want).abs().max() / want.abs().max()) < limit


@pytest.mark.parametrize("rows", [0, 1, 9, 31, 32])
def test_padding_is_one_row_that_counts_for_all(rows: int) -> None:
    context = golden_tensor("prompt", 2, rows, CONFIG.text_dim)
    text = embed_text(context, OUTER, CONFIG)
    assert text.rows.shape[1] == min(rows + 1, 32)
    assert text.rows.shape[1] - 1 + text.last_count == 32
    zeros = torch.nn.functional.pad(context, (0, 0, 0, 32 - rows))
    padded = embed_text(zeros, OUTER, CONFIG)
    assert torch.equal(padded.rows, text.rows)
    assert padded.last_count == text.last_count


def test_rows_of_zeros_inside_a_context_are_rows_like_others() -> None:
    context = golden_tensor("prompt", 1, 9, CONFIG.text_dim)
    context[:, 3:5] = 0
    assert embed_text(context, OUTER, CONFIG).rows.shape[1] == 10


def test_keys_and_values_are_made_once_for_all_steps(made: list[int]) -> None:
    want, memory = predict(), TextMemory()
    made.clear()
    first = predict(memory)
    assert sorted(made) == [5] * 3 + [10] * 3
    second, one = predict(memory), predict(memory, CONTEXTS[:1])
    assert len(made) == 6
    for got in (first, second):
        assert all(torch.equal(*pair) for pair in zip(got, want, strict=True))
    assert torch.equal(one[0], want[0])


def test_another_context_is_not_taken_for_the_one_before(made: list[int]) -> None:
    memory, prompt = TextMemory(), CONTEXTS[0].clone()
    predict(memory, [prompt])
    equal = prompt.clone()
    predict(memory, [equal])
    equal.mul_(2)
    got = predict(memory, [equal])
    assert len(made) == 9
    assert torch.equal(got[0], predict(contexts=[equal])[0])


def test_tensors_that_hide_their_changes_are_not_remembered() -> None:
    memory = TextMemory()
    with torch.inference_mode():
        prompt = CONTEXTS[0].clone()
        predict(memory, [prompt])
        prompt.mul_(2)
        got = predict(memory, [prompt])
    assert torch.equal(got[0], predict(contexts=[2 * CONTEXTS[0]])[0])


def test_what_is_beyond_the_limit_is_made_again(made: list[int]) -> None:
    want = predict()
    made.clear()
    size = 2 * 10 * CONFIG.dim * 4  # of the prompt's keys and values in one block
    memory = TextMemory(limit=size)
    for _ in range(2):
        assert all(torch.equal(*pair) for pair in zip(predict(memory), want, strict=True))
    assert len(made) == 6 + 5


def test_the_limit_is_free_again_for_other_contexts() -> None:
    memory, others = TextMemory(limit=100), [context.clone() for context in CONTEXTS]

    def rows(number: float) -> KeyValues:
        return KeyValues(torch.full((1, 1, 1, 10), float(number)), torch.zeros(1, 1, 1, 10), 1)  # 80 bytes

    (prompt,) = memory.texts([CONTEXTS[0]], OUTER, CONFIG)
    assert memory.key_values(prompt, 0, lambda: rows(1)).keys[0, 0, 0, 0] == 1
    assert memory.key_values(prompt, 0, lambda: rows(2)).keys[0, 0, 0, 0] == 1
    for text in memory.texts(others, OUTER, CONFIG)[:1]:
        assert memory.key_values(text, 0, lambda: rows(3)).keys[0, 0, 0, 0] == 3
        assert memory.key_values(text, 0, lambda: rows(4)).keys[0, 0, 0, 0] == 3


def test_what_is_let_go_is_made_again(made: list[int]) -> None:
    want, memory = predict(), TextMemory()
    made.clear()
    predict(memory)
    memory.let_go(0)
    got = predict(memory)
    assert len(made) == 12
    assert all(torch.equal(*pair) for pair in zip(got, want, strict=True))


def test_prompts_may_take_turns(made: list[int]) -> None:
    memory = TextMemory()
    for _ in range(3):
        for context in CONTEXTS:
            predict(memory, [context])
    assert len(made) == 6


def test_block_0_attends_to_itself_once_for_both_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[int] = []

    def counted(q: Tensor, k: Tensor, v: Tensor, *, last_count: int = 1, lists: None = None) -> Tensor:
        lengths.append(k.shape[1])
        return attention_module.attention(q, k, v, last_count=last_count)

    want = [predict(contexts=[context])[0] for context in CONTEXTS]
    monkeypatch.setattr(block_module, "attention", counted)
    got = predict()
    tokens = 3 * 2 * 3
    assert lengths.count(tokens) == 1 + 2 * (CONFIG.num_layers - 1)
    for pair in zip(got, want, strict=True):
        assert_close(got=pair[0], want=pair[1], op="dit_fp32")
