// 3D convolution that sees no later frame, on the host, with what follows it in a VAE in the same pass; frames lie in
// NDHWC ("channels last") memory, in fp32 or bf16, and sums are fp32.
//
//   y[b, t, h, w, o] = bias[o] + residual[b, t, h, w, o] + sum over c, i, j, k of
//                      weight[o, c, i, j, k] * frame[b, t' + i - (kt - 1)][h' + j - kh / 2, w' + k - kw / 2, c]
//
// and with a norm       n = y / max(length of y over o, 1e-12) * norm[o],   y = n / (1 + exp(-n))
//
// frame[b, n] is x[b, n] for n >= 0, history[b, history_frames + n] for the frames just before, and zero further back;
// rows and columns outside the picture are zero. Where t', h', w' are not t, h, w a form says it. y is rounded once;
// its norm is that of the rounded y, so that the two steps give the same bits when they are taken one after the other.
// Reference: wanfast/vae/conv.py, causal_conv3d_reference.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace wanfast {

// Which inputs an output sees, and where it is put.
enum class Form {
    same,            // t' = t, h' = h, w' = w; kernel sizes 1 or 3
    half_picture,    // 3 x 3, h' = 2 h + 1, w' = 2 w + 1: zeros on the right and at the bottom only
    half_frames,     // 3 frames, t' = 2 t + 1: the first output sees one frame before the chunk
    double_picture,  // 2 x 2, four sets of weights: outputs of an even row see the rows above and here, of an odd row
                     // here and below, likewise of columns. The taps of a 3 x 3 convolution of a picture doubled by
                     // repetition, summed where they fall on one pixel: over rows or columns, either parity's taps
                     // have the same sum, which Winograd's way relies on
    double_frames,   // as `same`, O / 2 outputs to a pixel: the first half of O is the even frames, the rest the odd
};

struct ConvShape {
    std::int64_t batch, channels, out_channels, frames, history_frames, height, width;  // of the input
    std::int64_t kt, kh, kw;
    Form form;
};

// What frames and packed weights hold.
enum class Format {
    fp32,
    bf16_widened,  // bf16 frames, fp32 weights: for every CPU
    bf16_pairs,    // bf16 frames and weights, multiplied two at a time: where has_bf16_products()
};

// How sums are computed: Winograd's way takes fewer products, has other roundings, and serves 3 x 3 taps of stride 1
// where weights are fp32.
enum class Method {
    fastest,
    direct,
    winograd,
};

struct ConvArguments {
    const void* x;         // [B, T, H, W, C]
    const void* history;   // [B, h, H, W, C]; not read if h = 0
    const void* packed;    // as pack_weight leaves it
    const float* bias;     // [O]
    const void* residual;  // [B, T', H', W', O'], as y; null for none; may be y
    const float* norm;     // [O]; null for none; not with double_frames
    void* y;               // [B, T', H', W', O']
    ConvShape shape;
    Format format;
};

// Output channels are computed in panels of this many.
constexpr std::int64_t kPanel = 16;
// Input channels are fetched in chunks of this many slots of 4 bytes, one cache line: a slot is an fp32 value, or a
// pair of bf16.
constexpr std::int64_t kSlots = 16;

// Slots in a packed weight: [ceil(O / 16)][ceil(C' / 16)][kt][kh][kw][slot][16], C' slots per pixel, where the last
// chunk may have fewer than 16 slots, and values for o >= O and c >= C are zero.
std::int64_t packed_slots(std::int64_t out_channels, std::int64_t channels, std::int64_t taps, Format format);

// weight [O, C, kt, kh, kw] -> packed; taps = kt * kh * kw. Sets of weights follow one another, (row, column) parities
// (0, 0), (0, 1), (1, 0), (1, 1). Both are bf16 for bf16_pairs, else fp32. One layout serves
// every instruction set.
void pack_weight(const void* weight, void* packed, std::int64_t out_channels, std::int64_t channels, std::int64_t taps,
                 Format format);

// What this CPU can run, best first; always ends in "portable".
std::vector<std::string> instruction_sets();

// Whether the first of them multiplies bf16 (AVX512-BF16).
bool has_bf16_products();

// Whether it has matrix units for bf16 (AMX), which nothing here uses: libraries that do are several times faster.
bool has_bf16_matrices();

// Each value is summed in one order, whatever the number of threads and however a sequence is cut into chunks.
// Throws std::invalid_argument for a kernel size, an instruction set, a format or a method it cannot serve.
void causal_conv3d(const ConvArguments& arguments, int num_threads, const std::string& instruction_set, Method method);

// The norm and SiLU alone: x [pixels, C] -> y, which may be x; both bf16 unless the format is fp32.
void norm_silu(const void* x, const float* norm, void* y, std::int64_t pixels, std::int64_t channels, Format format,
               int num_threads, const std::string& instruction_set);

}  // namespace wanfast
