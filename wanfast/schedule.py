"""Noise schedules: the sigmas a solver visits, and the timestep the DiT is told at each of them.

Source: Wan-Video/Wan2.2, wan/utils/fm_solvers_unipc.py and fm_solvers.py; euler: ModelTC/Wan2.2-Lightning.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wanfast.config import NUM_TRAIN_TIMESTEPS, SolverName

# The reference takes its first level from a training table held in fp32, so 1 - 1/1000 comes out of it rounded.
_UNIPC_FIRST_SIGMA = float(np.float32(1.0 - 1.0 / NUM_TRAIN_TIMESTEPS))


@dataclass(frozen=True, slots=True)
class Schedule:
    """The noise levels of one run: N timesteps, and N + 1 sigmas because every step has an end."""

    sigmas: tuple[float, ...]  # each exactly an fp32 value, falling, the last 0
    timesteps: tuple[int, ...] | tuple[float, ...]  # in [0, 1000]


def sigmas_and_timesteps(solver: SolverName, num_inference_steps: int, shift: float) -> Schedule:
    """Place the noise levels of a run, denser near 1 the larger `shift` is.

    Args:
        solver: unipc starts just below 1, dpmpp and euler at 1.
        num_inference_steps: N, at least 1.
        shift: s in sigma -> s sigma / (1 + (s - 1) sigma), above 0; 1 leaves the levels evenly spaced.

    Returns:
        N + 1 sigmas and N timesteps. unipc and dpmpp tell the model 1000 sigma cut to an integer, although they solve
        with the uncut sigma; euler tells it 1000 sigma as it is. So the makers of the weights sample them.
    """
    if solver == "euler":
        levels = np.linspace(NUM_TRAIN_TIMESTEPS, 0, num_inference_steps + 1).astype(np.float32)[:-1]
        sigmas32 = _shifted(levels / np.float32(NUM_TRAIN_TIMESTEPS), np.float32(shift))
        # Where shift is no fp32 value, the first level can round to just above 1.
        sigmas32 = np.minimum(sigmas32, np.float32(1))
        return Schedule(_closed(sigmas32), tuple((sigmas32 * np.float32(NUM_TRAIN_TIMESTEPS)).tolist()))
    first = _UNIPC_FIRST_SIGMA if solver == "unipc" else 1.0
    sigmas = _shifted(np.linspace(first, 0.0, num_inference_steps + 1)[:-1], shift)
    return Schedule(_closed(sigmas), tuple((sigmas * NUM_TRAIN_TIMESTEPS).astype(np.int64).tolist()))


def _shifted(sigmas: NDArray[Any], shift: float | np.float32) -> NDArray[Any]:
    shifted: NDArray[Any] = shift * sigmas / (1 + (shift - 1) * sigmas)
    return shifted


def _closed(sigmas: NDArray[Any]) -> tuple[float, ...]:
    return (*(float(sigma) for sigma in sigmas.astype(np.float32)), 0.0)
