"""The computed speeds: the model on loops whose cycles can be counted by hand, and the page's numbers."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from machine_code.sass import Instruction

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))

NUMBERS = json.loads((ROOT / "benchmarks" / "computed.json").read_text())
TABLES = [json.loads(path.read_text()) for path in (ROOT / "tests" / "data" / "machine_code").glob("*.json")]
WITHIN = 0.15  # of the published figures


@pytest.fixture(scope="module")
def model() -> Any:
    import multiprocessor

    return multiprocessor


def step(text: str, stall: int = 1, writes: int | None = None, waits: tuple[int, ...] = ()) -> Any:
    from scheduled import Control, Step

    return Step(Instruction(0, text.split()[0], text, ()), Control(stall, writes, None, waits))


IMMA, HMMA = "IMMA.16832.S8.S8.SAT R4", "HMMA.16816.F32 R4"


@pytest.mark.parametrize(("text", "cycles"), [(IMMA, 16), (HMMA, 32), ("QMMA.16832.F16.E4M3.E4M3 R4", 16)])
def test_tensor_instructions_take_their_pipe(model, text, cycles):
    loop = [step(text)] * 20
    assert model.cycles_per_iteration(loop, ctas=1, warps=4) == pytest.approx(20 * cycles)
    assert model.cycles_per_iteration(loop, ctas=1, warps=8) == pytest.approx(40 * cycles)
    assert model.busy(loop, warps=8)["tensor"] == 40 * cycles


def test_a_stall_delays_its_own_warp_alone(model):
    loop = [step("FADD R1", stall=10)] * 8
    alone = model.cycles_per_iteration(loop, ctas=1, warps=4)
    assert alone == 80 + model.BRANCH
    assert model.cycles_per_iteration(loop, ctas=4, warps=4) == pytest.approx(alone, rel=0.05)


def test_full_issue_shares_one_instruction_a_cycle(model):
    loop = [step("FFMA R1")] * 100
    assert model.cycles_per_iteration(loop, ctas=4, warps=4) == pytest.approx(400, rel=0.01)


def test_half_rate_and_exponentials(model):
    assert model.cycles_per_iteration([step("FMNMX R1")] * 50, ctas=2, warps=4) == pytest.approx(200, rel=0.02)
    assert model.cycles_per_iteration([step("MUFU.EX2 R1")] * 50, ctas=2, warps=4) == pytest.approx(800, rel=0.02)


def test_a_scoreboard_is_waited_for(model):
    loop = [step("LDS R1", writes=2), step("FADD R1", waits=(2,))]
    want = model.LATENCY["LDS"] + 4 + 1 + model.BRANCH  # four warps in turn at the port
    assert model.cycles_per_iteration(loop, ctas=1, warps=4) == pytest.approx(want, abs=4)


def test_shared_memory_has_one_port(model):
    loop = [step("LDSM.16.M88.4 R1")] * 10
    assert model.busy(loop, warps=8)["shared"] == 8 * 10 * 4
    waiting = [*loop[:-1], step("LDSM.16.M88.4 R1", writes=0), step("FADD R1", waits=(0,))]
    assert model.cycles_per_iteration(waiting, ctas=1, warps=8) >= 320


def test_two_programs_hide_each_others_gaps_and_one_cannot(model):
    loop = [*[step(IMMA)] * 20, *[step("FADD R1", stall=5)] * 60]  # 320 cycles of products, 300 of waiting
    alone = model.cycles_per_iteration(loop, ctas=1, warps=4)
    pair = model.cycles_per_iteration(loop, ctas=2, warps=4)
    assert alone == pytest.approx(620, rel=0.05)
    assert 640 <= pair < 0.8 * 2 * alone


def running(model: Any, loop: list[Any], *, warps: int) -> Any:
    return model._Model([model._operation(one) for one in loop], [0.0], warps)


def test_a_barrier_holds_all_warps_of_its_program(model):
    run = running(model, [step("BAR.SYNC.DEFER_BLOCKING 0x0"), step("FADD R1", stall=4)], warps=8)
    run.warps[3].ready = 500.0  # a warp that is late
    run.run()
    assert min(warp.ends[0] for warp in run.warps) >= 500 + model.BARRIER


def test_a_burst_of_copies_queues_at_the_port_to_l2(model):
    loop = [*[step("LDGSTS.E.BYPASS.128 [R1]")] * 16, step("LDGDEPBAR"), step("DEPBAR.LE SB0, 0x0")]
    assert running(model, loop, warps=4).run() >= model.COPY + 16 * 512 / model.L2_PORT


def test_copies_are_waited_for_by_group(model):
    copy = [step("LDGSTS.E.BYPASS.128 [R1]"), step("LDGDEPBAR")]
    now = [*copy, step("DEPBAR.LE SB0, 0x0"), *[step("FADD R1")] * 10]
    later = [*copy, step("DEPBAR.LE SB0, 0x1"), *[step("FADD R1")] * 10]
    assert model.cycles_per_iteration(now, ctas=1, warps=4) > model.COPY
    assert model.cycles_per_iteration(later, ctas=1, warps=4) < 0.6 * model.cycles_per_iteration(now, ctas=1, warps=4)


def test_loads_share_what_l2_gives_an_sm(model):
    loop = [*[step("LDGSTS.E.BYPASS.128 [R1]")] * 4, step("LDGDEPBAR"), step("DEPBAR.LE SB0, 0x1")]
    needs = 4 * 4 * 512 / model.L2  # four warps
    assert model.busy(loop, warps=4)["L2"] == pytest.approx(needs)
    assert model.cycles_per_iteration(loop, ctas=1, warps=4) >= 0.99 * needs
    assert model.loaded_bytes(step("LDG.E.U8 R1, [R2]").instruction) == 32
    assert model.loaded_bytes(step("LDG.E R1, [R2]").instruction) == 128


def test_control_bits_are_read():
    from scheduled import decode

    bits = 0b011001 << 11 | 7 << 8 | 2 << 5 | 1 << 4 | 9  # waits for 0, 3 and 4, sets 2, then nine cycles
    control = decode(bits << 41 | 0x1234)
    assert (control.stall, control.writes, control.reads, control.waits) == (9, 2, None, (0, 3, 4))


def test_an_unknown_tensor_instruction_is_refused(model):
    with pytest.raises(ValueError, match="OMMA"):
        model.tensor_cycles("OMMA.16864.F32")


def test_published_speeds_are_predicted():
    ratios = {row["name"]: row["computed"] / row["published"] for row in NUMBERS["published"]}
    assert len(ratios) == 8
    assert {name: ratio for name, ratio in ratios.items() if abs(ratio - 1) > WITHIN} == {}


def test_the_page_is_that_of_the_numbers():
    from computed_page import make_page

    assert (ROOT / "docs" / "kernels-computed.md").read_text() == make_page(NUMBERS), (
        "python benchmarks/cycles.py --write"
    )


def test_the_numbers_are_of_the_machine_code_in_the_tables():
    rows = {name: row for table in TABLES for name, row in table["cases"].items() if name.endswith("/sm_89")}
    want = {name: (row["registers"], row["loop"]) for name, row in rows.items() if row["loop"].get("tensor")}
    got = {f"{row['name']}/sm_89": (row["registers"], row["loop"]) for row in NUMBERS["cases"]}
    assert got == want, "python benchmarks/cycles.py --write"


def test_a_computed_number_is_computed_again():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "benchmarks/cycles.py", "SageAttention 2++", "--json"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    again = json.loads(result.stdout)
    if again["triton"] != NUMBERS["triton"]:
        pytest.skip(f"numbers were written with Triton {NUMBERS['triton']}")
    assert again["published"] == [row for row in NUMBERS["published"] if row["name"] == "SageAttention 2++"]
