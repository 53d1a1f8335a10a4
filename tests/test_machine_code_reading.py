"""What tests/machine_code reads from a disassembly, counts as occupancy, and refuses; no kernel is compiled here."""

from types import SimpleNamespace

import pytest
from machine_code import sass
from machine_code.case import Design
from machine_code.gates import faults
from machine_code.occupancy import ctas_per_sm

# An outer loop with a tensor instruction of its own, an inner one with more, one without, and the end's trap.
DISASSEMBLY = """
.text._kernel:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   LDG.E.128 R4, [R2.64] ;
.L_x_1:
        /*0020*/                   HMMA.16816.F32 R4, R8, R10, R4 ;
.L_x_0:
        /*0030*/                   LDSM.16.M88.4 R8, [R3] ;
        /*0040*/                   IMMA.16832.S8.S8.SAT R4, R8.ROW, R10.COL, R4 ;
        /*0050*/               @P1 BRA `(.L_x_2) ;
        /*0060*/                   IMMA.16832.S8.S8.SAT R4, R8.ROW, R10.COL, R4 ;
.L_x_2:
        /*0070*/                   PRMT R4, R5, 0x5410, R6 ;
        /*0080*/              @!P0 BRA `(.L_x_0) ;
        /*0090*/              @!P2 BRA `(.L_x_1) ;
.L_x_4:
        /*00a0*/                   FADD R1, R1, R2 ;
        /*00b0*/                   FADD R1, R1, R2 ;
        /*00c0*/                   FADD R1, R1, R2 ;
        /*00d0*/                   FADD R1, R1, R2 ;
        /*00e0*/                   FADD R1, R1, R2 ;
        /*00e8*/              @!P0 BRA `(.L_x_4) ;
        /*00f0*/              @UP0 STG.E.U16 [R2.64], R4 ;
        /*0100*/                   LDGSTS.E.BYPASS.128 [R3], [R2.64] ;
        /*0110*/                   EXIT ;
.L_x_3:
        /*0120*/                   BRA `(.L_x_3);
        /*0130*/                   NOP ;
"""


def test_instructions_are_read_with_guards_and_labels():
    code = sass.parse(DISASSEMBLY)
    assert len(code) == 21
    assert code[2].labels == (".L_x_1",) and code[2].opcode == "HMMA.16816.F32"
    assert [one.family for one in code if one.text.startswith("BRA")] == ["BRA"] * 5
    assert code[-2].labels == (".L_x_3",)


def test_the_main_loop_is_the_innermost_with_most_tensor_work():
    loop = sass.main_loop(sass.parse(DISASSEMBLY))
    assert (loop[0].at, loop[-1].at) == (0x30, 0x80)
    assert sass.tensor_opcodes(loop) == {"IMMA.16832.S8.S8.SAT": 2}
    assert sass.families(loop)["PRMT"] == 1


def test_without_tensor_instructions_the_longest_loop_is_the_main_one():
    lines = [line for line in DISASSEMBLY.splitlines() if "MMA" not in line]
    assert sass.main_loop(sass.parse("\n".join(lines)))[0].at == 0xA0
    assert sass.main_loop([]) == []


def test_two_labels_may_stand_before_one_instruction():
    lines = [line for line in DISASSEMBLY.splitlines() if "HMMA" not in line]
    starts = [(loop[0].at, loop[-1].at) for loop in sass.loops(sass.parse("\n".join(lines)))]
    assert starts == [(0x30, 0x90), (0xA0, 0xE8)]  # from one instruction two loops start: the wider is kept


def test_widths_of_global_accesses():
    widths = sass.access_widths(sass.parse(DISASSEMBLY))
    assert widths == {"loads": {"128 bit": 2}, "stores": {"16 bit": 1}}


@pytest.mark.parametrize(
    ("opcode", "work"),
    [("HGMMA.64x128x16.F32.BF16", 16), ("QGMMA.64x64x32.F32.E4M3.E4M3", 8), ("QMMA.16832.F16.E4M3.E4M3", 1)],
)
def test_a_warpgroup_instruction_counts_as_what_a_warp_does_of_it(opcode, work):
    one = sass.Instruction(0, opcode, opcode, ())
    assert one.is_tensor and sass.tensor_work([one]) == work


@pytest.mark.parametrize(
    ("arch", "registers", "warps", "shared", "want"),
    [
        (89, 255, 4, 49_152, 2),  # registers: 16,384 / 8,192 warps in each of four partitions
        (89, 168, 4, 28_672, 3),
        (89, 174, 8, 49_152, 1),  # 10 warps fit; 8 of them are one CTA
        (89, 184, 2, 0, 4),  # two warps in each partition; eleven would fit if it were one
        (89, 32, 4, 0, 12),  # 48 warps
        (89, 32, 1, 0, 24),
        (89, 128, 8, 50_176, 2),  # twice 49 KB and 1 KB
        (89, 128, 8, 50_177, 1),
        (89, 128, 8, 101_377, 0),
        (90, 32, 4, 0, 16),
        (90, 168, 4, 101_376, 2),
    ],
)
def test_ctas_per_sm(arch, registers, warps, shared, want):
    assert ctas_per_sm(arch=arch, registers=registers, warps=warps, shared=shared) == want


GOOD = {
    "spilled_bytes": 0,
    "shared_bytes": 101_376,
    "ctas_per_sm": 2,
    "loads": {"128 bit": 8},
    "stores": {"128 bit": 4},
    "loop": {"instructions": 200, "tensor": {"IMMA.16832.S8.S8.SAT": 64}, "tensor_work": 64, "PRMT": 4, "LOP3": 2},
}
DESIGN = Design(
    ctas_per_sm=2,
    tensor=frozenset({"IMMA.16832.S8.S8.SAT"}),
    shuffles=0,
    overhead=2.2,
    loads=frozenset({"128 bit"}),
    stores=frozenset({"128 bit"}),
)


def case(design=DESIGN):
    return SimpleNamespace(arch=89, design=design)


def test_a_row_as_designed_has_no_faults():
    assert faults(case(), GOOD) == []


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"spilled_bytes": 8}, "spilled"),
        ({"shared_bytes": 101_377}, "shared memory"),
        ({"ctas_per_sm": 1}, "CTAs per SM"),
        ({"loads": {"128 bit": 7, "32 bit": 1}}, "loads"),
        ({"stores": {"64 bit": 4}}, "stores"),
        ({"loop": {}}, "tensor instructions"),
        ({"loop": GOOD["loop"] | {"tensor": {"QMMA.16832.F32.E4M3.E4M3": 64}}}, "tensor instructions"),
        ({"loop": GOOD["loop"] | {"tensor": GOOD["loop"]["tensor"] | {"HMMA.16816.F32": 8}}}, "tensor instructions"),
        ({"loop": GOOD["loop"] | {"LOP3": 3}}, "PRMT and LOP3"),
        ({"loop": GOOD["loop"] | {"SHFL": 1}}, "SHFL"),
        ({"loop": GOOD["loop"] | {"STL": 1}}, "local memory"),
        ({"loop": GOOD["loop"] | {"warpgroup_starts": 64}}, "serialised"),
        ({"loop": GOOD["loop"] | {"instructions": 205}}, "other instructions"),
    ],
)
def test_each_gate_refuses(change, word):
    found = faults(case(), GOOD | change)
    assert len(found) == 1 and word in found[0]


def test_a_kernel_without_tensor_instructions_may_have_loops():
    row = GOOD | {"loop": {"instructions": 50, "tensor": {}, "tensor_work": 0, "LOP3": 40}}
    assert faults(case(Design(ctas_per_sm=2)), row) == []
