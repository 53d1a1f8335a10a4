// The innermost loops, one interface for three instruction sets and three formats.
#pragma once

#include <cstdint>

namespace wanfast {

struct Bf16 {
    std::uint16_t bits;
};

// One tile of work: up to `max_pixels` neighbouring pixels of one output row by `panels` panels of output channels.
// Inputs lie in lines of pixels x 16 slots: the pixels under the tile, borders included, of one input row; with a
// stride of two, every other pixel and then the rest. Strides are in slots.
struct Tile {
    const float* lines;         // of the first chunk of channels, frame and row
    std::int64_t chunk_stride;  // from a chunk's lines to the next chunk's
    std::int64_t frame_stride;  // ... from a frame's
    std::int64_t row_stride;    // ... from a row's
    const float* weights;       // [chunks][kt][kh][kw][slot][16] of the first panel
    std::int64_t panel_stride;  // from a panel's weights to the next panel's
    std::int64_t chunks;        // of input channels; all but the last hold 16 slots
    std::int64_t last_slots;    // in the last chunk, 1 to 16
    std::int64_t first_frame;   // of kt; those before it precede the first frame ever seen and are skipped
    std::int64_t kt, kh, kw;    // as in ConvShape
    std::int64_t columns[3];    // slots from a line's begin to what the first pixel multiplies by column k of a kernel
    float* sums;                // [pixels][...]: 16 * panels values per pixel are added to
    std::int64_t sums_stride;   // floats from a pixel to the next
};

// Neighbouring pixels of one input row on their way into lines.
struct Run {
    const void* source;         // of the first pixel, first channel to copy
    std::int64_t stride;        // channels from a pixel to the next
    std::int64_t positions;     // pixels
    std::int64_t channels;      // to copy of each
    float* lines;               // a chunk of channels goes into each
    std::int64_t chunk_stride;  // slots from one to the next
};

// Neighbouring pixels of an output row on their way from sums to memory.
struct Finish {
    float* sums;               // [pixels][sums_stride]; used as scratch
    std::int64_t sums_stride;  // at least the channels, rounded up to a panel
    std::int64_t pixels;
    std::int64_t channels;
    const void* residual;   // laid out as y, or null
    const float* norm;      // [channels, rounded up to a panel], or null
    void* y;                // [pixels][y_stride]
    std::int64_t y_stride;  // elements from a pixel to the next
};

// Inputs of neighbouring tiles of Winograd's convolution (winograd.inc), a chunk of channels each, on their way into
// lines of a cache line per tile.
struct TileInputs {
    const void* rows[4];          // of the picture, first channel of the chunk; null outside
    std::int64_t stride;          // channels from a pixel to the next
    std::int64_t width;           // of the picture
    std::int64_t column;          // of the first tile's first input; columns outside the picture are zero
    std::int64_t channels;        // in the chunk, 1 to 16; what follows the last is zero or left as it is
    std::int64_t tiles;
    float* lines;                 // [product][...][tiles][16]
    std::int64_t product_stride;  // floats from one of a tile's products to the next
};

// Packed weights of a chunk of input channels and a panel of outputs.
struct TileWeights {
    const float* packed;  // [sets][...][frames][taps][taps][slots][16]
    std::int64_t set_stride;
    std::int64_t frames, slots;
    float* transformed;  // [product][...][frames][slots][16]
    std::int64_t product_stride;
};

// Sums of products of neighbouring tiles, a panel of outputs, on their way to two rows of pixels.
struct TileSums {
    const float* products;  // [product][...][tiles][...]
    std::int64_t product_stride, tile_stride;
    std::int64_t tiles;
    const float* bias;
    float* sums;                            // [2][...][2 * tiles][...]
    std::int64_t row_stride, sums_stride;  // floats from a row, a pixel to the next
};

struct Transforms {
    int size;  // inputs of a tile along an axis, and products
    int step;  // inputs from a tile to the next
    void (*inputs)(const TileInputs&);
    void (*weights)(const TileWeights&);
    void (*sums)(const TileSums&);
};

struct Kernels {
    static constexpr int kMaxPixels = 14;
    static constexpr int kMaxPanels = 2;

    int max_pixels;
    int max_panels;
    void (*run[kMaxPanels][kMaxPixels])(const Tile&);  // [panels - 1][pixels - 1]
    void (*copy)(const Run&);
    // x [positions][channels] -> y, which may be x; norm as in Finish
    void (*norm_silu)(const void* x, std::int64_t positions, std::int64_t channels, const float* norm, void* y);
    void (*finish)(const Finish&);
    Transforms plain, doubled;  // for Form::same and double_picture; all null where weights are bf16
};

struct KernelSet {
    Kernels fp32, bf16_widened;
};

#if defined(__x86_64__)
extern const KernelSet avx512_kernels;
extern const Kernels avx512_bf16_kernels;  // bf16_pairs
extern const KernelSet avx2_kernels;
#endif
extern const KernelSet portable_kernels;

}  // namespace wanfast
