"""Noise schedules, against numbers that the reference printed."""

from itertools import pairwise

import numpy as np
import pytest

from wanfast.schedule import sigmas_and_timesteps

GOLDEN_TIMESTEPS = {
    (
        "unipc",
        40,
        12.0,
    ): "999,997,995,993,990,988,985,982,979,976,972,969,965,961,956,952,947,941,936,929,922,915,907,898,"
    "888,877,865,852,837,819,799,776,749,717,678,631,571,492,386,235",
    (
        "unipc",
        40,
        5.0,
    ): "999,994,989,983,978,972,965,959,952,944,937,929,920,911,902,892,882,870,859,846,833,818,803,786,768,"
    "749,728,706,681,654,624,591,555,514,468,416,356,288,208,113",
    (
        "unipc",
        50,
        5.0,
    ): "999,995,991,987,982,978,973,968,963,957,952,946,940,934,927,920,913,906,898,890,882,873,863,854,843,"
    "833,821,809,796,783,768,753,737,720,701,681,660,636,611,584,555,522,487,448,405,356,302,241,172,92",
    (
        "dpmpp",
        40,
        12.0,
    ): "1000,997,995,993,990,988,985,982,979,976,972,969,965,961,957,952,947,941,936,929,923,915,907,898,"
    "888,878,865,852,837,819,800,776,750,717,679,631,571,493,387,235",
    ("unipc", 6, 5.0): "999,961,908,833,713,499",
    ("dpmpp", 6, 5.0): "1000,961,909,833,714,500",
}

GOLDEN_SIGMAS = {
    ("unipc", 6, 5.0): (0.999799848, 0.961316407, 0.908842802, 0.833055377, 0.713979423, 0.499699891, 0.0),
    ("dpmpp", 6, 5.0): (1.0, 0.961538434, 0.909090936, 0.833333313, 0.714285731, 0.5, 0.0),
    ("euler", 4, 5.0): (1.0, 0.9375, 0.833333313, 0.625, 0.0),
}


@pytest.mark.parametrize(("solver", "num_steps", "shift"), GOLDEN_TIMESTEPS)
def test_timesteps_are_the_reference_s(solver, num_steps, shift):
    want = [int(t) for t in GOLDEN_TIMESTEPS[solver, num_steps, shift].split(",")]
    got = sigmas_and_timesteps(solver, num_steps, shift).timesteps
    assert list(got) == want
    assert all(type(t) is int for t in got)


@pytest.mark.parametrize(("solver", "num_steps", "shift"), GOLDEN_SIGMAS)
def test_sigmas_are_the_reference_s(solver, num_steps, shift):
    got = sigmas_and_timesteps(solver, num_steps, shift).sigmas
    want = GOLDEN_SIGMAS[solver, num_steps, shift]
    assert [f"{s:.9g}" for s in got] == [f"{s:.9g}" for s in want]


def test_first_second_and_last_sigma_of_t2v_are_the_reference_s():
    sigmas = sigmas_and_timesteps("unipc", 40, 12.0).sigmas
    assert [f"{sigmas[i]:.9g}" for i in (0, 1, 39, 40)] == ["0.999916613", "0.997782648", "0.235109538", "0"]


def test_euler_tells_the_model_uncut_timesteps():
    got = sigmas_and_timesteps("euler", 4, 5.0).timesteps
    assert got == pytest.approx([1000, 937.5, 2500 / 3, 625], rel=1e-7)
    assert got[2] != int(got[2])


@pytest.mark.parametrize("solver", ["unipc", "dpmpp", "euler"])
@pytest.mark.parametrize("num_steps", [1, 2, 40, 1000])
@pytest.mark.parametrize("shift", [0.01, 1.0, 12.0, 100.0])
def test_sigmas_are_fp32_values_that_fall_to_zero(solver, num_steps, shift):
    schedule = sigmas_and_timesteps(solver, num_steps, shift)
    sigmas = schedule.sigmas
    assert len(sigmas) == num_steps + 1 == len(schedule.timesteps) + 1
    assert all(sigma == float(np.float32(sigma)) for sigma in sigmas)
    assert all(left > right for left, right in pairwise(sigmas))
    assert sigmas[0] <= 1.0
    assert sigmas[-1] == 0.0
    assert sigmas[0] < 1.0 or solver != "unipc"  # lambda would be infinite there, and unipc divides by it


def test_shift_one_leaves_the_levels_even():
    assert sigmas_and_timesteps("dpmpp", 4, 1.0).sigmas == (1.0, 0.75, 0.5, 0.25, 0.0)


def test_unipc_starts_from_the_fp32_neighbour_of_0_999():
    sigma = sigmas_and_timesteps("unipc", 7, 1.0).sigmas[1]
    assert sigma == float(np.float32(0.9990000128746033 * 6 / 7))
    assert sigma != float(np.float32(0.999 * 6 / 7))
