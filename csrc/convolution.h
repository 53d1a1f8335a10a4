// How one call of causal_conv3d is cut into work, and the buffers that work goes through.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

#include "causal_conv3d.h"
#include "microkernel.h"

namespace wanfast {

struct Free {
    void operator()(float* pointer) const { ::operator delete[](pointer, std::align_val_t{64}); }
};
using Floats = std::unique_ptr<float[], Free>;

// Not initialised.
inline Floats allocate(std::int64_t count) {
    return Floats(
        static_cast<float*>(::operator new[](sizeof(float) * static_cast<std::size_t>(count), std::align_val_t{64})));
}

inline std::int64_t divide_up(std::int64_t value, std::int64_t by) { return (value + by - 1) / by; }

// `count` values followed by zeros up to a multiple of 32, so that any chunk or vector of them can be read whole; null
// for null.
Floats padded(const float* values, std::int64_t count);

// Frame `at` of a batch entry, counted from x's first; null before the history's first.
const std::byte* frame_at(const ConvArguments& arguments, std::int64_t batch, std::int64_t at);

// One where a second thread costs more than it saves.
int threads_for(double products, int num_threads);

// The direct sum, the whole call. Output rows are cut into tiles, and tiles gathered into units: rectangles of one
// frame that one thread computes from start to end. Some chunks of channels at a time, a unit's inputs are copied from
// where they lie into lines as the micro-kernels read them, borders filled in; each panel's weights then meet all its
// tiles. When a unit's sums are complete, they go through the residual, the norm and SiLU on their way to y: a unit has
// all channels of its pixels, in its core's cache.
//
// The norm and SiLU before a convolution are the end of the convolution before it, or else a pass (norm_silu). Done as
// pixels are copied into lines, each would be normed about four times, once for every kernel frame and unit that
// reads it: measured at 96 channels, 3 % of the convolution in fp32 and 16 % in bf16, and the pass 1.2 % and 3.6 %.
class Convolution {
  public:
    Convolution(const ConvArguments& arguments, int num_threads, const Kernels& kernels);

    void run();

  private:
    void cut(int num_threads);

    struct Unit {  // rows [row, row + rows) x tiles [tile, tile + tiles) of one output frame, or of a phase of one
        std::int64_t batch, frame, phase, row, rows, tile, tiles;
        std::int64_t begin, width;  // the columns under its tiles
    };

    struct Scratch {   // of one thread
        float* lines;  // [chunks][kt][unit rows + kh - 1][unit tiles][positions][16]
        float* sums;   // [unit rows][unit columns][sums_stride_]
    };

    void work(float* memory);
    void compute(const Unit& unit, const Scratch& scratch) const;
    void gather(const Unit& unit, std::int64_t chunk, std::int64_t chunks, float* lines) const;
    void gather_line(const Unit& unit, const std::byte* row, std::int64_t chunk, std::int64_t chunks,
                     std::int64_t tile, float* line) const;
    void multiply(const Unit& unit, std::int64_t chunk, std::int64_t chunks, std::int64_t panel, std::int64_t width,
                  const Scratch& scratch) const;
    void finish(const Unit& unit, const Scratch& scratch) const;

    // Where tile `tile` of a row begins: tiles are as equal as they can be.
    std::int64_t column(std::int64_t tile) const { return tile * width_ / row_tiles_; }
    // Rows above, or columns to the left, of a pixel that its sum begins with.
    std::int64_t lead(std::int64_t kernel_size, std::int64_t parity) const;

    ConvArguments arguments_;
    ConvShape shape_;                     // pixels of a 1 x 1 kernel as one row
    std::int64_t frames_, height_, width_;  // of the output, or of a phase of it
    std::int64_t stride_, stride_frames_, lead_frames_, phases_, groups_;
    const Kernels& kernels_;
    int num_threads_;
    std::int64_t element_bytes_, slot_channels_, slots_;  // of frames; channels in a slot; slots of a pixel
    std::int64_t chunks_, block_chunks_, gather_chunks_, line_slots_, row_tiles_;
    std::int64_t unit_rows_, unit_tiles_;                    // of the largest unit
    std::int64_t row_stride_, frame_stride_, chunk_stride_;  // slots between lines
    std::int64_t sums_stride_;                               // floats between pixels of sums
    std::int64_t lines_size_, sums_size_;                    // floats of one thread
    Floats bias_, norm_;
    std::atomic<std::int64_t> next_unit_{0};
};

}  // namespace wanfast
