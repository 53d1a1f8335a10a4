// The innermost loops, one interface for three instruction sets.
#pragma once

#include <cstdint>

namespace wanfast {

// One tile of work: up to `max_pixels` neighbouring pixels of one output row by `panels` panels of output channels.
// Inputs lie in lines of `positions` pixels x 16 channels: pixels under the tile, borders included, of one input row.
struct Tile {
    const float* lines;          // of the first chunk of channels, frame and row
    std::int64_t chunk_stride;   // floats from a chunk's lines to the next chunk's
    std::int64_t frame_stride;   // ... from a frame's
    std::int64_t row_stride;     // ... from a row's
    const float* weights;        // [chunks][kt][kh][kw][c][16] of the first panel
    std::int64_t panel_stride;   // floats from a panel's weights to the next panel's
    std::int64_t chunks;         // of input channels; all but the last hold 16
    std::int64_t last_channels;  // input channels in the last chunk, 1 to 16
    std::int64_t first_frame;    // of kt; those before it precede the first frame ever seen and are skipped
    std::int64_t kt, kh, kw;     // as in ConvShape
    float* y;                    // [pixels][...]: 16 * panels values per pixel are added to
    std::int64_t y_stride;       // floats from a pixel to the next
};

struct MicroKernels {
    static constexpr int kMaxPixels = 14;
    static constexpr int kMaxPanels = 2;
    using Run = void (*)(const Tile&);
    // Copies `channels` values of each of `positions` neighbouring pixels to lines of 16, a chunk of channels in each.
    using Copy = void (*)(const float* source, std::int64_t stride, std::int64_t positions, std::int64_t channels,
                          float* lines, std::int64_t chunk_stride);

    int max_pixels;
    int max_panels;
    Run run[kMaxPanels][kMaxPixels];  // [panels - 1][pixels - 1]
    Copy copy;
};

#if defined(__x86_64__)
extern const MicroKernels avx512_kernels;
extern const MicroKernels avx2_kernels;
#endif
extern const MicroKernels portable_kernels;

}  // namespace wanfast
