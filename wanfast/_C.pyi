# Types of the C++ extension (csrc/bindings.cpp). Addresses are Tensor.data_ptr() of CPU memory, 0 for none; layouts and
# meaning are in csrc/causal_conv3d.h. Nothing is checked here: wanfast/vae/extension.py is the only caller.

class Form:
    same: Form
    half_picture: Form
    half_frames: Form
    double_picture: Form
    double_frames: Form

class Format:
    fp32: Format
    bf16_widened: Format
    bf16_pairs: Format

class Method:
    fastest: Method
    direct: Method
    winograd: Method

def instruction_sets() -> list[str]: ...
def has_bf16_products() -> bool: ...
def has_bf16_matrices() -> bool: ...
def packed_slots(*, out_channels: int, channels: int, taps: int, format: Format) -> int: ...
def pack_weight(*, weight: int, packed: int, out_channels: int, channels: int, taps: int, format: Format) -> None: ...
def causal_conv3d(
    *,
    x: int,
    history: int,
    packed: int,
    bias: int,
    residual: int,
    norm: int,
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
    form: Form,
    format: Format,
    num_threads: int,
    instruction_set: str,
    method: Method,
) -> None: ...
def norm_silu(
    *, x: int, norm: int, y: int, pixels: int, channels: int, format: Format, num_threads: int, instruction_set: str
) -> None: ...
