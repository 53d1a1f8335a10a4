"""WanFastTransformer3DModel from the single files that people have."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from peft import LoraConfig
from reference.gguf_files import write_gguf
from reference.pipelines import furthest
from reference.quantised import comfy_fp8
from reference.single_files import TEXT, dit_state, write
from torch import Tensor

import wanfast
from wanfast.checkpoint.names import dit_to_diffusers
from wanfast.errors import CheckpointError, RequestError

State = dict[str, Tensor]


def official(path: Path, state: State) -> tuple[Path, State]:
    return write(path / "model.safetensors", state), state


def diffusers_names(path: Path, state: State) -> tuple[Path, State]:
    return write(path / "model.safetensors", {dit_to_diffusers(name): t for name, t in state.items()}), state


def comfy(path: Path, state: State) -> tuple[Path, State]:
    return write(path / "model.safetensors", {f"model.diffusion_model.{n}": t for n, t in state.items()}), state


def scaled(path: Path, state: State) -> tuple[Path, State]:
    file, plain = comfy_fp8(state)
    return write(path / "model.safetensors", file), plain


def gguf(path: Path, state: State) -> tuple[Path, State]:
    def kind(name: str, tensor: Tensor) -> str:
        return "Q8_0" if name.startswith("blocks.") and tensor.dim() == 2 else "F32"

    return path / "model.gguf", write_gguf(path / "model.gguf", state, kind)


FORMS: list[Callable[[Path, State], tuple[Path, State]]] = [official, diffusers_names, comfy, scaled, gguf]


def diffusers_model(task: str, state: State) -> Any:
    """Build the same model in diffusers."""
    taken = {"t2v": 16, "i2v": 36, "ti2v": 48}[task]
    model = WanTransformer3DModel(
        num_attention_heads=1,
        attention_head_dim=128,
        in_channels=taken,
        out_channels=48 if task == "ti2v" else 16,
        text_dim=TEXT.dim,
        freq_dim=32,
        ffn_dim=160,
        num_layers=2,
    )
    model.load_state_dict({dit_to_diffusers(name): tensor.float() for name, tensor in state.items()})
    return model.eval()


def run(model: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, model.config.in_channels, 2, 4, 6, generator=generator)
    text = torch.randn(1, 5, TEXT.dim, generator=generator)
    with torch.no_grad():
        sample: Tensor = model(hidden.to(model.dtype), torch.tensor([300]), text.to(model.dtype)).sample
    return sample


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_from_single_file(form: Callable[[Path, State], tuple[Path, State]], tmp_path: Path) -> None:
    path, values = form(tmp_path, {name: tensor.float() for name, tensor in dit_state().items()})
    want = run(diffusers_model("t2v", values))
    model = wanfast.WanFastTransformer3DModel.from_single_file(path, torch_dtype=torch.float32)
    assert not model.training and model.dtype == torch.float32
    assert furthest(run(model), want) <= 1e-4 * float(want.abs().max())
    in_16_bits = wanfast.WanFastTransformer3DModel.from_single_file(path, torch_dtype=torch.bfloat16)
    assert in_16_bits.dtype == torch.bfloat16 and in_16_bits.scale_shift_table.dtype == torch.float32
    assert 0 < furthest(run(in_16_bits), want) <= 0.05 * float(want.abs().max())


@pytest.mark.parametrize("task", ["t2v", "i2v", "ti2v"])
def test_sizes_are_read_from_the_tensors(task: str, tmp_path: Path) -> None:
    state = {name: tensor.float() for name, tensor in dit_state(task).items()}
    model = wanfast.WanFastTransformer3DModel.from_single_file(official(tmp_path, state)[0])
    theirs = diffusers_model(task, state)
    assert {name: value for name, value in model.config.items() if name[0] != "_"} == {
        name: value for name, value in theirs.config.items() if name[0] != "_"
    }
    torch.testing.assert_close(dict(model.named_buffers()), dict(theirs.named_buffers()), rtol=0, atol=0)
    assert furthest(run(model), run(theirs)) <= 1e-3


def test_stored_dtype_is_kept(tmp_path: Path) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        path, _ = official(tmp_path / str(dtype), {name: tensor.to(dtype) for name, tensor in dit_state().items()})
        model = wanfast.WanFastTransformer3DModel.from_single_file(path)
        assert model.blocks[0].attn1.to_q.weight.dtype == dtype
    path, _ = scaled(tmp_path, {name: tensor.float() for name, tensor in dit_state().items()})
    assert wanfast.WanFastTransformer3DModel.from_single_file(path).blocks[0].ffn.net[2].weight.dtype == torch.bfloat16


def test_writing_to_a_weight_does_not_reach_the_file(tmp_path: Path) -> None:
    path, _ = official(tmp_path, {name: tensor.float() for name, tensor in dit_state().items()})
    before = path.read_bytes()
    model = wanfast.WanFastTransformer3DModel.from_single_file(path)
    with torch.no_grad():
        model.proj_out.weight.mul_(2)
    assert path.read_bytes() == before


@pytest.mark.parametrize("vram", [None, "1KB"])
def test_what_is_fused_in_memory_counts(vram: str | None, tmp_path: Path) -> None:
    """A weight is a page of its file until LoRAs are fused into it; what is in memory counts then."""
    path, _ = official(tmp_path, {name: tensor.float() for name, tensor in dit_state().items()})
    model = wanfast.WanFastTransformer3DModel.from_single_file(path, vram=vram)
    model.blocks[1].ffn.net[2].weight.data.mul_(1.5)
    plain = run(model)
    torch.manual_seed(0)
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    for change in (model.fuse_lora, model.unfuse_lora, model.unload_lora):
        change()
        theirs = copy.deepcopy(model)
        theirs.__class__ = WanTransformer3DModel
        got = run(model)
        assert furthest(got, run(theirs)) <= 1e-3
        assert (furthest(got, plain) <= 1e-3) == (change == model.unload_lora)


def test_files_that_are_no_transformer(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nothing\.safetensors"):
        wanfast.WanFastTransformer3DModel.from_single_file(tmp_path / "nothing.safetensors")
    state = {name: tensor.float() for name, tensor in dit_state().items()}
    del state["blocks.1.ffn.2.bias"]
    with pytest.raises(CheckpointError, match=r"missing \(blocks\.1\.ffn\.2\.bias\)"):
        wanfast.WanFastTransformer3DModel.from_single_file(official(tmp_path, state)[0])


def test_options(tmp_path: Path) -> None:
    path, _ = official(tmp_path, {name: tensor.float() for name, tensor in dit_state().items()})
    want = run(wanfast.WanFastTransformer3DModel.from_single_file(path))
    assert furthest(run(wanfast.WanFastTransformer3DModel.from_single_file(path, vram="1KB")), want) == 0
    assert furthest(run(wanfast.WanFastTransformer3DModel.from_single_file(path, precision="exact")), want) > 0
    for options in ({"precision": "best"}, {"vram": "some"}):
        with pytest.raises(RequestError, match=f"^{next(iter(options))}: must be"):
            wanfast.WanFastTransformer3DModel.from_single_file(path, **options)
    with pytest.raises(TypeError, match="quantization_config"):
        wanfast.WanFastTransformer3DModel.from_single_file(path, quantization_config=None)  # type: ignore[call-arg]
