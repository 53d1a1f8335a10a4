"""`WanFastTransformer3DModel`: diffusers' Wan transformer with wanfast's forward.

It has diffusers' parameters, config and methods, so that whatever handles the one handles the other: LoRA calls, moves,
offload hooks, saving. Only the computation is wanfast's.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor

from wanfast.config import ExpertName
from wanfast.diffusers_backend.checks import REFUSED, NotCompiled, check_module, refuse_gradient, refused
from wanfast.diffusers_backend.experts import Experts, config_of
from wanfast.diffusers_backend.original import make
from wanfast.diffusers_backend.predict import predict_sample
from wanfast.diffusers_backend.single_file import read_single_file
from wanfast.errors import RequestError

_Base: Any = WanTransformer3DModel  # diffusers' annotations stop half-way


class WanFastTransformer3DModel(_Base):  # type: ignore[misc]
    """A drop-in for diffusers' WanTransformer3DModel of Wan 2.2, computed by wanfast.

    It is made by `from_pretrained`, by `from_single_file`, or of a pipeline's transformer by `wanfast.accelerate`.
    """

    _wanfast: tuple[Experts, ExpertName] | None = None
    _wanfast_device: torch.device | None = None  # where it computes, while its weights stay in host memory
    _torchdynamo_orig_callable = NotCompiled()

    @property
    def _engine(self) -> tuple[Experts, ExpertName]:
        """Whose weights, and which of them; a module that was copied, or made by its constructor, gets its own."""
        if self._wanfast is None:
            return self._own_engine("auto", None)
        experts, name = self._wanfast
        return (experts, name) if experts.owns(name, self) else self._own_engine(experts.precision, experts.budget)

    def _own_engine(self, precision: str, vram: int | str | None) -> tuple[Experts, ExpertName]:
        experts = Experts({"single": self}, precision, vram)
        self._wanfast = (experts, "single")
        return experts, "single"

    @classmethod
    def from_pretrained(
        cls, path: str | Path, *, precision: str = "auto", vram: int | str | None = None, **kwargs: Any
    ) -> "WanFastTransformer3DModel":
        """Load from a folder or the Hub, as diffusers does.

        Args:
            path: folder or Hub id; `subfolder="transformer"` where it is a whole pipeline's.
            precision: as of `wanfast.accelerate`.
            vram: as of `wanfast.accelerate`.
            **kwargs: of diffusers' own `from_pretrained`.

        Raises:
            RequestError: it is not a Wan 2.2 transformer with plain weights, or an argument is not as above.
        """
        return super().from_pretrained(path, **kwargs)._prepared(precision, vram)  # type: ignore[no-any-return]

    @classmethod
    def from_single_file(
        cls,
        path: str | Path,
        *,
        torch_dtype: torch.dtype | None = None,
        precision: str = "auto",
        vram: int | str | None = None,
    ) -> "WanFastTransformer3DModel":
        """Load one expert from any file that wanfast reads; sizes are read from its tensors, nothing is downloaded.

        Args:
            path: a local file or folder: official, Diffusers or ComfyUI naming; `.safetensors`, `.gguf` or `.pth`.
            torch_dtype: of the weights; None is that of the blocks' matrices, bf16 where they are 8-bit or GGUF. What
                diffusers keeps in fp32 is fp32.
            precision: as of `wanfast.accelerate`.
            vram: as of `wanfast.accelerate`.

        Raises:
            RequestError: precision or vram is not as above.
            CheckpointError: the file cannot be read or is not a Wan 2.2 transformer.
        """
        arguments, state = read_single_file(path, torch_dtype, cls._keep_in_fp32_modules)
        model = make(cls, arguments)
        model.load_state_dict(state, assign=True)
        return model.eval()._prepared(precision, vram)  # type: ignore[no-any-return]

    def _prepared(self, precision: str, vram: int | str | None) -> "WanFastTransformer3DModel":
        check_module("transformer", self)
        config_of(self)
        self._own_engine(precision, vram)
        return self

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_image: Tensor | None = None,
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Predict the velocity, with the arguments and the result of diffusers' forward.

        Args:
            hidden_states: [B, in_channels, F, H, W].
            timestep: [B], or [B, tokens] with one value in the first latent frame and one in the others.
            encoder_hidden_states: [B, S, text_dim]; all S rows are attended to.
            encoder_hidden_states_image: None; only Wan 2.1 has it.
            return_dict: give a Transformer2DModelOutput instead of a tuple.
            attention_kwargs: {"scale": strength of all LoRAs}, or None.

        Returns:
            The velocity [B, out_channels, F, H, W], in fp32 as the reference gives it. It has no gradient.

        Raises:
            RequestError: an argument, or the state the module is in, is not one that wanfast computes.
        """
        if torch.compiler.is_dynamo_compiling():
            return self._untraced(
                hidden_states,
                timestep,
                encoder_hidden_states,
                encoder_hidden_states_image,
                return_dict=return_dict,
                attention_kwargs=attention_kwargs,
            )
        if encoder_hidden_states_image is not None:
            raise RequestError("encoder_hidden_states_image: must be None for Wan 2.2, got a tensor; leave it out")
        if torch.is_grad_enabled():
            refuse_gradient("hidden_states", hidden_states)
            refuse_gradient("encoder_hidden_states", encoder_hidden_states)
        scale = _lora_scale(attention_kwargs) if attention_kwargs else 1.0
        experts, name = self._engine
        sample = predict_sample(experts, name, hidden_states, timestep, encoder_hidden_states, lora_scale=scale)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _untraced(self, *args: Any, **kwargs: Any) -> Any:
        """Run as it is within a function that somebody has compiled: to trace it would take minutes."""
        return self.forward(*args, **kwargs)

    @contextmanager
    def cache_context(self, name: str, **place: Any) -> Iterator[None]:
        """Take the pipeline's word on where in its loop it is; caches, which want to know, are refused."""
        yield

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self._wanfast_device or super().device

    def to(self, *args: Any, **kwargs: Any) -> "WanFastTransformer3DModel":
        """Move or cast; under a bound on memory, or in 8 bits, weights stay where they are, the computation moves."""
        if not self._engine[0].is_hosted:
            return super().to(*args, **kwargs)  # type: ignore[no-any-return]
        device, dtype, _, _ = torch._C._nn._parse_to(*args, **kwargs)
        if device is not None:
            self._wanfast_device = device
            if device.type == "cpu":
                self._engine[0].release()
        return self if dtype is None else super().to(dtype)  # type: ignore[no-any-return]

    def cuda(self, device: int | torch.device | None = None) -> "WanFastTransformer3DModel":
        """Move to a GPU, as `to` does."""
        index = device if device is not None else torch.cuda.current_device()
        return self.to(torch.device("cuda", index) if isinstance(index, int) else index)

    def cpu(self) -> "WanFastTransformer3DModel":
        """Move to the CPU, as `to` does."""
        return self.to(torch.device("cpu"))


def _lora_scale(attention_kwargs: dict[str, Any]) -> float:
    """Read the strength of all LoRAs, the one thing that may be asked of the attention."""
    others = [str(name) for name in attention_kwargs if name != "scale"]
    if others:
        raise RequestError(f"attention_kwargs: must hold nothing but scale, got {', '.join(others)}")
    scale: float | None = attention_kwargs["scale"]
    return 1.0 if scale is None else scale


for _name in REFUSED:
    setattr(WanFastTransformer3DModel, _name, refused(_name))
# diffusers looks classes up by name: to scale a LoRA's adapters, and to write what a saved folder is loaded with.
WanFastTransformer3DModel.__name__ = WanTransformer3DModel.__name__
WanFastTransformer3DModel.__module__ = WanTransformer3DModel.__module__
