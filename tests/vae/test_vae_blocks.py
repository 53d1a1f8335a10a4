"""Blocks of the VAEs: closed forms, and what they leave alone."""

import torch
import torch.nn.functional as F
from reference.vae import golden_input, golden_tensors, small_config

from wanfast.checkpoint.reader import memory_reader
from wanfast.vae.blocks import attention_block, downsample, norm_silu, residual_block, rms_norm, upsample
from wanfast.vae.weights import VAEWeights, expected_tensors, load_vae


def _golden_vae(version: str) -> tuple[VAEWeights, dict[str, torch.Tensor]]:
    config = small_config(version)
    tensors = golden_tensors(expected_tensors(config))
    return load_vae(memory_reader(tensors), config), tensors


def _input(*shape: int) -> torch.Tensor:
    return golden_input("input", shape).contiguous(memory_format=torch.channels_last_3d)


def test_rms_norm_is_the_formula_and_maps_zero_to_zero() -> None:
    x, weight = _input(2, 8, 3, 4, 5), golden_input("gamma", (8, 1, 1, 1))
    x[:, :, 0] = 0.0
    want = F.normalize(x.double(), dim=1, eps=1e-12) * 8**0.5 * weight
    got = rms_norm(x, weight * 8**0.5)
    assert torch.allclose(got.double(), want, atol=1e-6)
    assert torch.equal(got[:, :, 0], torch.zeros_like(got[:, :, 0]))


def test_norm_silu_overwrites_only_when_told() -> None:
    x, weight = _input(1, 8, 2, 4, 4), golden_input("gamma", (8, 1, 1, 1))
    before = x.clone()
    got = norm_silu(x, weight)
    assert torch.equal(x, before)
    again = norm_silu(x, weight, overwrite=True)
    assert again.data_ptr() == x.data_ptr()
    assert torch.equal(again, got)


def test_upsampling_equals_nearest_doubling_and_one_convolution() -> None:
    vae, tensors = _golden_vae("2.1")
    spatial = vae.decoder.levels[2][1]
    assert spatial is not None and spatial.time is None
    x = _input(2, 16, 3, 5, 4)
    got, history = upsample(x, spatial, None)
    assert history is None
    doubled = F.interpolate(x.transpose(1, 2).flatten(0, 1), scale_factor=2.0, mode="nearest-exact")
    name = "decoder.upsamples.11.resample.1"
    want = F.conv2d(doubled, tensors[f"{name}.weight"], tensors[f"{name}.bias"], padding=1)
    assert torch.allclose(got.transpose(1, 2).flatten(0, 1), want, atol=1e-5)


def test_the_first_frame_is_not_seen_by_temporal_upsampling() -> None:
    vae, _ = _golden_vae("2.2")
    weights = vae.decoder.levels[0][1]
    assert weights is not None and weights.time is not None
    second = golden_input("second", (1, 64, 1, 2, 3))
    outputs = []
    for name in ("first", "another"):
        y, history = upsample(golden_input(name, (1, 64, 1, 2, 3)), weights, None)
        assert y.shape[2] == 1
        outputs.append(upsample(second, weights, history)[0])
    assert outputs[0].shape == (1, 64, 2, 4, 6)
    assert torch.equal(*outputs)


def test_blocks_never_write_to_their_input() -> None:
    vae, _ = _golden_vae("2.1")
    level, down = vae.encoder.levels[1]
    up = vae.decoder.levels[0][1]
    assert down is not None and up is not None
    x, deep = _input(1, 8, 2, 4, 4), _input(1, 32, 2, 4, 4)
    kept, deep_kept = x.clone(), deep.clone()
    residual_block(x, level[0], (None, None))
    downsample(_input(1, 16, 4, 4, 4), down, _input(1, 16, 1, 2, 2))
    attention_block(deep, vae.decoder.middle.attention)
    residual_block(deep, vae.decoder.middle.block_1, (None, None))
    upsample(deep, up, deep[:, :, :0])
    assert torch.equal(x, kept)
    assert torch.equal(deep, deep_kept)


def test_attention_is_a_softmax_over_the_pixels_of_one_frame() -> None:
    vae, tensors = _golden_vae("2.1")
    x = _input(2, 32, 2, 3, 4)
    got = attention_block(x, vae.encoder.middle.attention)
    name = "encoder.middle.1"
    flat = {key: tensors[f"{name}.{key}"].double().flatten(1) for key in ("to_qkv.weight", "proj.weight")}
    for batch in range(2):
        for frame in range(2):
            pixels = x[batch, :, frame].double().flatten(1).T  # [H W, C]
            normed = F.normalize(pixels, dim=1) * 32**0.5 * tensors[f"{name}.norm.gamma"].flatten()
            q, k, v = (normed @ flat["to_qkv.weight"].T + tensors[f"{name}.to_qkv.bias"]).chunk(3, dim=1)
            attended = torch.softmax(q @ k.T / 32**0.5, dim=1) @ v
            want = attended @ flat["proj.weight"].T + tensors[f"{name}.proj.bias"] + pixels
            assert torch.allclose(got[batch, :, frame].double().flatten(1).T, want, atol=1e-5)


def test_history_does_not_keep_a_chunk_alive() -> None:
    vae, _ = _golden_vae("2.1")
    level, down = vae.encoder.levels[1]
    assert down is not None
    x = _input(1, 8, 4, 4, 4)
    y, histories = residual_block(x, level[0], (None, None))
    _, last = downsample(y, down, None)
    for history in (*histories, last):
        assert history is not None and history.shape[2] <= 2
        assert history.untyped_storage().nbytes() == history.numel() * history.element_size()
