// 3D convolution that sees no later frame, fp32, on the host; frames lie in NDHWC ("channels last") memory.
//
//   y[b, t, h, w, o] = bias[o] + sum over c, i, j, k of
//                      weight[o, c, i, j, k] * frame[b, t + i - (kt - 1)][h + j - kh / 2, w + k - kw / 2, c]
//
// frame[b, n] is x[b, n] for n >= 0, history[b, history_frames + n] for the frames just before, and zero further back;
// rows and columns outside the picture are zero. Reference: wanfast/vae/conv.py, causal_conv3d_reference.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace wanfast {

struct ConvShape {
    std::int64_t batch, channels, out_channels, frames, history_frames, height, width;
    std::int64_t kt, kh, kw;  // 1 or 3 each
};

// Output channels are computed in panels and input channels fetched in chunks of this many: one cache line of fp32.
constexpr std::int64_t kPanel = 16;

// fp32 values in a packed weight: [ceil(O / 16)][ceil(C / 16)][kt][kh][kw][c][16], where the last chunk of input
// channels may have fewer than 16 c, and values for o >= O are zero.
std::int64_t packed_size(std::int64_t out_channels, std::int64_t channels, std::int64_t taps);

// weight [O, C, kt, kh, kw] -> packed; taps = kt * kh * kw. One layout serves every instruction set.
void pack_weight(const float* weight, float* packed, std::int64_t out_channels, std::int64_t channels,
                 std::int64_t taps);

// What this CPU can run, best first; always ends in "portable".
std::vector<std::string> instruction_sets();

// x [B, T, H, W, C], history [B, h, H, W, C] (not read if h = 0), packed as above, bias [O] -> y [B, T, H, W, O].
// Each value is summed in one order, whatever the number of threads and however a sequence is cut into chunks.
// Throws std::invalid_argument for a kernel size or an instruction set it cannot serve.
void causal_conv3d(const float* x, const float* history, const float* packed, const float* bias, float* y,
                   const ConvShape& shape, int num_threads, const std::string& instruction_set);

}  // namespace wanfast
