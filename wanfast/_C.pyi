# Types of the C++ extension (csrc/bindings.cpp). Addresses are Tensor.data_ptr() of fp32 CPU memory; layouts and
# meaning are in csrc/causal_conv3d.h. Nothing is checked here: wanfast/vae/conv.py is the only caller.

def instruction_sets() -> list[str]: ...
def packed_size(out_channels: int, channels: int, taps: int) -> int: ...
def pack_weight(weight: int, packed: int, out_channels: int, channels: int, taps: int) -> None: ...
def causal_conv3d(
    *,
    x: int,
    history: int,
    packed: int,
    bias: int,
    y: int,
    batch: int,
    channels: int,
    out_channels: int,
    frames: int,
    history_frames: int,
    height: int,
    width: int,
    kt: int,
    kh: int,
    kw: int,
    num_threads: int,
    instruction_set: str,
) -> None: ...
