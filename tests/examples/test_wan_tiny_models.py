"""The recipe's networks compute what diffusers' and transformers' do with the same weights, under official names."""

import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from dit_model import BOUNDARY, DiT, DiTSizes, Text, draw_sigmas, timestep_of
from text_model import DIM, FFN_DIM, HEADS, LAYERS, VOCABULARY, TextEncoder, make_tokenizer, tokenize
from torch import nn
from train_vae import make_vae
from transformers import UMT5Config, UMT5EncoderModel
from vae22_model import VAE22
from vae_model import VAE

from wanfast.checkpoint.names import dit_from_diffusers, text_from_transformers, vae_from_diffusers
from wanfast.config import DEFAULT_NEGATIVE_PROMPT

CAPTIONS = ["A red circle moves left slowly on a black background.", "a blue cross rests", ""]


def shaken(module: nn.Module) -> nn.Module:
    """Away from the zeros and ones it starts with, which would hide mistakes."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return module.eval()


def copy_weights(own: nn.Module, theirs: nn.Module, names: dict[str, str]) -> None:
    state, wanted = own.state_dict(), theirs.state_dict()
    assert set(names.values()) == set(state)
    left = theirs.load_state_dict({name: state[official] for name, official in names.items()}, strict=False)
    assert not left.unexpected_keys
    assert set(left.missing_keys) <= {"encoder.embed_tokens.weight"}  # the token table's other name
    assert set(names) <= set(wanted)


@pytest.mark.parametrize("num_frames", [1, 9])
def test_the_vae_is_wans(num_frames: int) -> None:
    own, theirs = shaken(VAE(8)), AutoencoderKLWan(base_dim=8, z_dim=16).eval()
    copy_weights(own, theirs, dict(vae_from_diffusers(theirs.state_dict(), "2.1")))
    video = torch.rand(1, 3, num_frames, 32, 40, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.no_grad():
        mean, _ = own.encode(video)
        assert (mean - theirs.encode(video).latent_dist.mode()).abs().max() < 2e-5 * mean.abs().max()
        decoded = own.decode(mean).clamp(-1, 1)
        assert (decoded - theirs.decode(mean).sample).abs().max() < 2e-5


@pytest.mark.parametrize("num_frames", [1, 9])
def test_the_vae_of_ti2v_is_wans(num_frames: int) -> None:
    own = shaken(VAE22(8, 12))
    theirs = AutoencoderKLWan(
        base_dim=8, decoder_base_dim=12, z_dim=48, is_residual=True, in_channels=12, out_channels=12, patch_size=2,
        scale_factor_spatial=16,
    ).eval()  # fmt: skip
    copy_weights(own, theirs, dict(vae_from_diffusers(theirs.state_dict(), "2.2")))
    video = torch.rand(1, 3, num_frames, 32, 48, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.no_grad():
        mean, _ = own.encode(video)
        assert mean.shape == (1, 48, (num_frames - 1) // 4 + 1, 2, 3)
        assert (mean - theirs.encode(video).latent_dist.mode()).abs().max() < 2e-5 * mean.abs().max()
        decoded = own.decode(mean).clamp(-1, 1)
        assert (decoded - theirs.decode(mean).sample).abs().max() < 2e-5


@pytest.fixture(scope="module")
def text() -> Text:
    encoder = shaken(TextEncoder())
    ids, lengths = tokenize(make_tokenizer(), CAPTIONS)
    with torch.no_grad():
        return Text(encoder(ids, lengths), lengths)


def test_the_text_encoder_is_umt5() -> None:
    own = shaken(TextEncoder())
    config = UMT5Config(
        vocab_size=VOCABULARY, d_model=DIM, d_kv=DIM // HEADS, d_ff=FFN_DIM, num_layers=LAYERS, num_heads=HEADS
    )
    theirs = UMT5EncoderModel(config).eval()
    names = text_from_transformers(theirs.state_dict())
    copy_weights(own, theirs, names)
    ids, lengths = tokenize(make_tokenizer(), CAPTIONS)
    is_true = torch.arange(ids.shape[1]) < lengths[:, None]
    with torch.no_grad():
        got, want = own(ids, lengths), theirs(ids, attention_mask=is_true.long()).last_hidden_state
    assert (got - want)[is_true].abs().max() < 1e-5


def test_the_transformer_is_wans_with_512_rows_of_text(text: Text) -> None:
    sizes = DiTSizes(dim=64, ffn_dim=96, num_layers=2, head_dim=32)
    own = shaken(DiT(sizes))
    theirs = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=32, in_channels=16, out_channels=16, text_dim=DIM, freq_dim=256,
        ffn_dim=96, num_layers=2, cross_attn_norm=True,
    ).eval()  # fmt: skip
    copy_weights(own, theirs, dict(dit_from_diffusers(theirs.state_dict())))
    generator = torch.Generator().manual_seed(2)
    latents, timesteps = torch.randn(3, 16, 3, 4, 6, generator=generator), torch.tensor([999.0, 500.0, 3.0])
    rows = torch.zeros(3, 512, DIM)
    rows[:, : text.rows.shape[1]] = text.rows
    with torch.no_grad():
        got, want = own(latents, timesteps, text), theirs(latents, timesteps, rows).sample
        per_token = own(latents, timesteps[:, None].expand(3, 18), text)
    assert (got - want).abs().max() < 2e-5 * want.abs().max()
    assert (got - per_token).abs().max() < 1e-5 * want.abs().max()


def test_a_fresh_vae_treats_frames_alone() -> None:
    vae = make_vae(base=8)
    video = torch.rand(1, 3, 5, 16, 16, generator=torch.Generator().manual_seed(3)) * 2 - 1
    with torch.no_grad():
        whole, first = vae.encode(video)[0], vae.encode(video[:, :, :1])[0]
        last = vae.encode(video[:, :, 4:])[0]
    assert torch.allclose(whole[:, :, :1], first, atol=1e-5)
    assert torch.allclose(whole[:, :, 1:], last, atol=1e-5)  # a latent frame starts as its newest frame


def test_the_tokenizer_knows_the_captions_and_reads_chinese_as_nothing() -> None:
    tokenizer = make_tokenizer()
    assert tokenizer.encode("A Small red circle.").tokens == ["▁a", "▁small", "▁red", "▁circle", ".", "</s>"]
    assert tokenizer.encode(DEFAULT_NEGATIVE_PROMPT).tokens == tokenizer.encode("").tokens == ["</s>"]
    assert 3 not in tokenizer.encode("Ünknown wörds – kept as letters & bytes").ids
    assert tokenizer.get_vocab_size() == VOCABULARY


@pytest.mark.parametrize(("low", "high", "shift"), [(0.0, 1.0, 5.0), (BOUNDARY, 1.0, 12.0), (0.0, BOUNDARY, 5.0)])
def test_noise_levels_stay_on_their_side(low: float, high: float, shift: float) -> None:
    sigmas = draw_sigmas(20_000, shift, low, high, torch.Generator().manual_seed(0))
    assert low - 1e-6 <= sigmas.min() < low + 0.02
    assert high - 0.02 < sigmas.max() <= high + 1e-6
    assert timestep_of(sigmas).max() <= 1000
    # The share of a schedule with this shift that lies below the middle of the range.
    middle = (low + high) / 2
    level = [sigma / (shift - (shift - 1) * sigma) for sigma in (low, middle, high)]
    want = (level[1] - level[0]) / (level[2] - level[0])
    assert (sigmas < middle).float().mean() == pytest.approx(want, abs=0.015)
