"""What every kernel compiles to on each GPU generation, read from the machine code; no GPU is needed.

    python tests/machine_code                                 every case, in lines; what is not as designed
    python tests/machine_code --family rows --write           replace tests/data/machine_code/rows.json
    python tests/machine_code --case rms_norm/C5120/sm_89     one case: resources, CTAs per SM, the main loop
        [--sass | --ptx | --ttgir]                            and its code

Triton compiles either for its interpreter or for a GPU in one process, so tests run this as a process of its own,
without TRITON_INTERPRET. `cases/` holds one file for each family of kernels.
"""
