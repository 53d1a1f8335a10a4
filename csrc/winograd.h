// Winograd's convolution: 3 x 3 taps over rows and columns with 2.25 times fewer products, or 1.78 times fewer than the
// four sets of 2 x 2 taps that a doubled picture takes.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

#include "convolution.h"

namespace wanfast {

// Output pixels are computed in tiles of 2 x 2, in three steps: a tile's inputs are transformed to 16 vectors of
// channels (9 of a doubled picture), each is multiplied by a matrix of its own, made of the weights, summed over
// channels and frames, and the 16 sums are transformed to four pixels. The products, all but a few percent of the time,
// are those of a 1 x 1 convolution, and go through the same micro-kernels. Formulas: winograd.inc.
//
// A unit is a run of tiles of one output frame, row after row, computed by one thread from start to end. Some chunks of
// channels at a time, its inputs are transformed for all frames of the kernel; then, panel by panel, the weights are,
// and meet all its tiles. Weights are packed as for the direct sum, and transformed anew for each unit: it takes time,
// but kept transformed they would take 16 / 9 of the memory, and as much more reading of it for each unit.
//
// Tiles lie on even rows and columns of the output, and nothing in a tile depends on where a unit begins: bits depend
// neither on threads, chunks of frames nor on how a picture is cut, as long as it is cut at even places.
//
// Source: Lavin and Gray, Fast Algorithms for Convolutional Neural Networks, 2015, section 4.1.
class Winograd {
  public:
    // Whether it has the form, the kernel and the format for it.
    static bool serves(const ConvArguments& arguments);
    // Whether it is the faster way as well: measured, 1.2 to 1.8 times with 16 channels and more (least with 1024 of
    // 15 x 26 pixels), and about as fast with fewer. Only channels decide: strips are computed as the whole picture is.
    static bool is_faster(const ConvShape& shape);

    Winograd(const ConvArguments& arguments, int num_threads, const Kernels& kernels);

    void run();

  private:
    struct Unit {  // tiles [begin, begin + tiles) of one output frame
        std::int64_t batch, frame, begin, tiles;
        std::int64_t first_frame;  // of the kernel's; those before it precede the first frame ever seen
    };

    struct Pass {  // some chunks of input channels times some panels of outputs
        std::int64_t chunk, chunks, panel, panels;
    };

    struct Scratch {    // of one thread
        float* inputs;    // [products][kt][block chunks][tiles][16]
        float* weights;   // [products][panels of a pass][kt * slots of the block][16]
        float* products;  // [panels of a pass][products][tiles][16 of each panel of the pass]
        float* sums;      // [2 rows][columns][sums_stride_]
    };

    void cut(int num_threads);
    void work(float* memory);
    void compute(const Unit& unit, const Scratch& scratch) const;
    void transform_inputs(const Unit& unit, const Pass& pass, const Scratch& scratch) const;
    const float* packed(std::int64_t chunk, std::int64_t panel) const;
    void transform_weights(const Pass& pass, const Scratch& scratch) const;
    void prefetch_weights(const Pass& pass, std::int64_t part, std::int64_t parts) const;
    void multiply(const Unit& unit, const Pass& pass, const Pass& next, const Scratch& scratch) const;
    void finish(const Unit& unit, const Scratch& scratch) const;
    void finish_row(const Unit& unit, std::int64_t row, std::int64_t begin, std::int64_t end, float* sums) const;

    ConvArguments arguments_;
    ConvShape shape_;
    const Kernels& kernels_;
    const Transforms& transforms_;
    std::int64_t element_bytes_, num_products_, height_, width_;  // of the output
    std::int64_t tile_rows_, tile_columns_, frame_units_, unit_tiles_;
    std::int64_t chunks_, block_chunks_, sums_stride_;
    // Floats from one to the next; odd numbers of cache lines, which do not all fall on the same sets of a cache.
    std::int64_t chunk_stride_, input_stride_, weight_stride_;
    std::int64_t inputs_size_, weights_size_, products_size_, sums_size_;  // floats of one thread
    int num_threads_;
    Floats bias_, norm_;
    std::atomic<std::int64_t> next_unit_{0};
};

}  // namespace wanfast
