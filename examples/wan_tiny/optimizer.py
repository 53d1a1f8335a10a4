"""Muon for matrices and kernels, AdamW for the rest.

Muon replaces a matrix's gradient by the nearest matrix with orthogonal rows, so that rare directions are learnt as fast
as common ones; small networks on small budgets gain most of all.
Source: Keller Jordan and others, "Muon: an optimizer for hidden layers in neural networks" (2024).
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # of the quintic iteration; its fixed points lie near 1
_MOMENTUM = 0.95


class Muon(torch.optim.Optimizer):
    """Momentum with orthogonal updates, for parameters of two axes or more (all but the first are one)."""

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        lr: float,
        weight_decay: float = 0.0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(list(parameters), {"lr": lr, "weight_decay": weight_decay})
        self._dtype = dtype  # that updates are orthogonalised in

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Take a step."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                momentum = state["momentum"].lerp_(parameter.grad, 1 - _MOMENTUM)
                update = _orthogonal(parameter.grad.lerp(momentum, _MOMENTUM).flatten(1).to(self._dtype))
                # So scaled, an update changes every value by 0.2 lr on average, about as AdamW does.
                size = 0.2 * max(update.shape) ** 0.5
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update.to(parameter.dtype).view(parameter.shape), alpha=-group["lr"] * size)


def _orthogonal(gradient: Tensor) -> Tensor:
    """The matrix with the gradient's singular vectors, and singular values near 1."""
    a, b, c = _NEWTON_SCHULZ
    x = gradient / (gradient.norm() + 1e-7)
    is_tall = x.shape[0] > x.shape[1]
    x = x.T if is_tall else x
    for _ in range(5):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return x.T if is_tall else x


class Both:
    """Two optimizers that step together."""

    def __init__(
        self,
        module: nn.Module,
        adam: Iterable[str],
        lr: float,
        adam_lr: float,
        weight_decay: float = 0.0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Give every parameter of two axes to Muon, unless its name starts with one of `adam`.

        Args:
            module: to train.
            adam: starts of names.
            lr: peak rate of Muon.
            adam_lr: peak rate of AdamW.
            weight_decay: of Muon.
            dtype: that Muon orthogonalises updates in; bf16 is good enough and for wide matrices faster.
        """
        exceptions = tuple(adam)
        named = [(name, value) for name, value in module.named_parameters() if value.requires_grad]
        matrices = [
            value
            for name, value in named
            if value.dim() >= 2 and value[0].numel() > 1 and not name.startswith(exceptions)
            and not name.endswith(("gamma", "modulation"))
        ]  # fmt: skip
        chosen = {id(value) for value in matrices}
        rest = [value for _, value in named if id(value) not in chosen]
        kinds = [(lr, Muon(matrices, lr, weight_decay, dtype))] if matrices else []
        adams = [(adam_lr, torch.optim.AdamW(rest, adam_lr, betas=(0.9, 0.99), weight_decay=0.0))] if rest else []
        self._parts: list[tuple[float, torch.optim.Optimizer]] = [*kinds, *adams]

    def step(self, scale: float) -> None:
        """Take a step at a fraction of the peak rates, and forget the gradients."""
        for peak, optimizer in self._parts:
            for group in optimizer.param_groups:
                group["lr"] = peak * scale
            optimizer.step()
            optimizer.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        """Of both."""
        return {str(index): optimizer.state_dict() for index, (_, optimizer) in enumerate(self._parts)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Of both."""
        for index, (_, optimizer) in enumerate(self._parts):
            optimizer.load_state_dict(state[str(index)])
