#include "winograd.h"

#include <algorithm>

#include "threads.h"

namespace wanfast {
namespace {

using std::int64_t;

// kt x chunks of input channels summed in registers before they are added to the sums in memory.
constexpr int64_t kBlockTaps = 3;
// Tiles of a unit: their inputs, 3 KiB each, stay in a core's L2 cache with the weights and the sums of a pass.
constexpr int64_t kUnitTiles = 112;
// Sums of a unit: at most 4 MiB, of which one pass's are in use at a time.
constexpr int64_t kProductFloats = 1 << 20;
// Tiles of a row that become pixels at a time.
constexpr int64_t kRowTiles = 16;

int64_t odd_lines(int64_t lines) { return (lines | 1) * 16; }

}  // namespace

bool Winograd::serves(const ConvArguments& arguments) {
    const ConvShape& shape = arguments.shape;
    // In bf16 the sets of a doubled picture were rounded each on its own, and do not add up as they have to.
    if (shape.form == Form::double_picture) return arguments.format == Format::fp32;
    return shape.form == Form::same && shape.kh == 3 && shape.kw == 3 && arguments.format != Format::bf16_pairs;
}

bool Winograd::is_faster(const ConvShape& shape) { return shape.channels >= kSlots; }

Winograd::Winograd(const ConvArguments& arguments, int num_threads, const Kernels& kernels)
    : arguments_(arguments),
      shape_(arguments.shape),
      kernels_(kernels),
      transforms_(shape_.form == Form::double_picture ? kernels.doubled : kernels.plain) {
    element_bytes_ = arguments.format == Format::fp32 ? 4 : 2;
    num_products_ = int64_t{transforms_.size} * transforms_.size;
    height_ = shape_.height * 2 / transforms_.step;
    width_ = shape_.width * 2 / transforms_.step;
    tile_rows_ = divide_up(height_, 2);
    tile_columns_ = divide_up(width_, 2);
    sums_stride_ = divide_up(shape_.out_channels, kPanel) * kPanel;
    bias_ = padded(arguments.bias, shape_.out_channels);
    norm_ = padded(arguments.norm, shape_.out_channels);
    cut(num_threads);
}

// Chooses sizes so that a pass's inputs and weights stay in a core's cache, and there are units for all threads.
void Winograd::cut(int num_threads) {
    const int64_t tiles = tile_rows_ * tile_columns_, all_tiles = tiles * shape_.batch * shape_.frames;
    num_threads_ = threads_for(double(all_tiles * num_products_) * double(shape_.kt * shape_.channels * sums_stride_),
                               num_threads);
    chunks_ = divide_up(shape_.channels, kSlots);
    block_chunks_ = std::min(chunks_, std::max<int64_t>(1, kBlockTaps / shape_.kt));

    const int64_t smallest = kernels_.max_pixels;
    const int64_t most = std::clamp(kProductFloats / (num_products_ * sums_stride_), smallest, kUnitTiles);
    const int64_t share = std::clamp(all_tiles / (int64_t{4} * num_threads_), smallest, most);  // four units a thread
    frame_units_ = divide_up(tiles, share);
    unit_tiles_ = divide_up(tiles, frame_units_);
    chunk_stride_ = shape_.kt * odd_lines(unit_tiles_);
    input_stride_ = odd_lines(block_chunks_ * chunk_stride_ / 16);
    weight_stride_ = odd_lines(kernels_.max_panels * shape_.kt * block_chunks_ * kSlots);
    inputs_size_ = num_products_ * input_stride_;
    weights_size_ = num_products_ * weight_stride_;
    products_size_ = num_products_ * (unit_tiles_ + 1) * sums_stride_;
    sums_size_ = 2 * 2 * kRowTiles * sums_stride_;
}

void Winograd::run() {
    const int64_t size = inputs_size_ + weights_size_ + products_size_ + sums_size_;
    const Floats memory = allocate(size * num_threads_);
    on_threads(num_threads_, [&](int thread) { work(memory.get() + thread * size); });
}

void Winograd::work(float* memory) {
    const Scratch scratch{memory, memory + inputs_size_, memory + inputs_size_ + weights_size_,
                          memory + inputs_size_ + weights_size_ + products_size_};
    const int64_t units = shape_.batch * shape_.frames * frame_units_, tiles = tile_rows_ * tile_columns_;
    for (int64_t i = next_unit_.fetch_add(1); i < units; i = next_unit_.fetch_add(1)) {
        const int64_t frame = i / frame_units_, at = i % frame_units_;
        Unit unit;
        unit.batch = frame / shape_.frames;
        unit.frame = frame % shape_.frames;
        unit.begin = at * tiles / frame_units_;
        unit.tiles = (at + 1) * tiles / frame_units_ - unit.begin;
        unit.first_frame = std::max<int64_t>(0, shape_.kt - 1 - unit.frame - shape_.history_frames);
        compute(unit, scratch);
    }
}

void Winograd::compute(const Unit& unit, const Scratch& scratch) const {
    std::fill_n(scratch.products, products_size_, 0.0f);
    const int64_t panels = sums_stride_ / kPanel, most = kernels_.max_panels;
    const auto pass = [&](int64_t chunk, int64_t panel) {
        return Pass{chunk, std::min(block_chunks_, chunks_ - chunk), panel, std::min(most, panels - panel)};
    };
    for (int64_t chunk = 0; chunk < chunks_; chunk += block_chunks_) {
        transform_inputs(unit, pass(chunk, 0), scratch);
        for (int64_t panel = 0; panel < panels; panel += most) {
            transform_weights(pass(chunk, panel), scratch);
            const bool is_last = panel + most >= panels;
            const Pass next = is_last ? pass(chunk + block_chunks_, 0) : pass(chunk, panel + most);
            multiply(unit, pass(chunk, panel), next, scratch);
        }
    }
    finish(unit, scratch);
}

void Winograd::transform_inputs(const Unit& unit, const Pass& pass, const Scratch& scratch) const {
    const int64_t row_bytes = shape_.width * shape_.channels * element_bytes_;
    TileInputs inputs{};
    inputs.stride = shape_.channels;
    inputs.width = shape_.width;
    inputs.product_stride = input_stride_;
    for (int64_t i = unit.first_frame; i < shape_.kt; ++i) {
        const std::byte* frame = frame_at(arguments_, unit.batch, unit.frame + i - (shape_.kt - 1));
        for (int64_t at = 0; at < unit.tiles; at += inputs.tiles) {
            const int64_t row = (unit.begin + at) / tile_columns_, column = (unit.begin + at) % tile_columns_;
            inputs.tiles = std::min(tile_columns_ - column, unit.tiles - at);
            inputs.column = column * transforms_.step - 1;
            for (int64_t k = 0; k < pass.chunks; ++k) {
                const int64_t channel = (pass.chunk + k) * kSlots;
                for (int64_t j = 0; j < transforms_.size; ++j) {
                    const int64_t y = row * transforms_.step - 1 + j;
                    const bool is_inside = y >= 0 && y < shape_.height;
                    inputs.rows[j] = is_inside ? frame + y * row_bytes + channel * element_bytes_ : nullptr;
                }
                inputs.channels = std::min(kSlots, shape_.channels - channel);
                inputs.lines = scratch.inputs + k * chunk_stride_ + i * odd_lines(unit_tiles_) + at * 16;
                transforms_.inputs(inputs);
            }
        }
    }
}

// Where packed weights of a chunk of channels and a panel begin.
const float* Winograd::packed(int64_t chunk, int64_t panel) const {
    const int64_t slot = kPanel * shape_.kt * shape_.kh * shape_.kw;
    return static_cast<const float*>(arguments_.packed) + (panel * shape_.channels + chunk * kSlots) * slot;
}

void Winograd::transform_weights(const Pass& pass, const Scratch& scratch) const {
    TileWeights weights{};
    weights.set_stride = sums_stride_ * shape_.channels * shape_.kt * shape_.kh * shape_.kw;
    weights.frames = shape_.kt;
    weights.product_stride = weight_stride_;
    for (int64_t p = 0; p < pass.panels; ++p)
        for (int64_t k = 0; k < pass.chunks; ++k) {
            weights.packed = packed(pass.chunk + k, pass.panel + p);
            weights.slots = std::min(kSlots, shape_.channels - (pass.chunk + k) * kSlots);
            weights.transformed = scratch.weights + (p * block_chunks_ + k) * shape_.kt * kSlots * kPanel;
            transforms_.weights(weights);
        }
}

// Has a part of a pass's packed weights fetched while others are multiplied: measured at 384 channels, 7 to 12 % of
// the time.
void Winograd::prefetch_weights(const Pass& pass, int64_t part, int64_t parts) const {
    const int64_t sets = shape_.form == Form::double_picture ? 4 : 1, taps = shape_.kt * shape_.kh * shape_.kw;
    const int64_t lines = std::min(pass.chunks * kSlots, shape_.channels - pass.chunk * kSlots) * taps;
    for (int64_t set = 0; set < sets; ++set)
        for (int64_t p = 0; p < pass.panels; ++p) {
            const float* from = packed(pass.chunk, pass.panel + p) + set * sums_stride_ * shape_.channels * taps;
            for (int64_t line = part * lines / parts; line < (part + 1) * lines / parts; ++line)
                __builtin_prefetch(from + line * kPanel, 0, 2);
        }
}

// Adds the products of a pass to a unit's sums.
void Winograd::multiply(const Unit& unit, const Pass& pass, const Pass& next, const Scratch& scratch) const {
    Tile tile{};
    tile.chunk_stride = chunk_stride_;
    tile.frame_stride = odd_lines(unit_tiles_);
    tile.panel_stride = block_chunks_ * shape_.kt * kSlots * kPanel;
    tile.chunks = pass.chunks;
    tile.last_slots = std::min(kSlots, shape_.channels - (pass.chunk + pass.chunks - 1) * kSlots);
    tile.first_frame = unit.first_frame;
    tile.kt = shape_.kt;
    tile.kh = tile.kw = 1;
    tile.sums_stride = pass.panels * kPanel;
    float* products = scratch.products + pass.panel * num_products_ * (unit_tiles_ + 1) * kPanel;
    const int64_t groups = divide_up(unit.tiles, kernels_.max_pixels);
    for (int64_t product = 0; product < num_products_; ++product) {
        if (next.chunks > 0) prefetch_weights(next, product, num_products_);
        tile.weights = scratch.weights + product * weight_stride_;
        for (int64_t group = 0; group < groups; ++group) {
            const int64_t begin = group * unit.tiles / groups, tiles = (group + 1) * unit.tiles / groups - begin;
            tile.lines = scratch.inputs + product * input_stride_ + begin * kSlots;
            tile.sums = products + product * odd_lines(unit_tiles_ * pass.panels) + begin * tile.sums_stride;
            kernels_.run[pass.panels - 1][tiles - 1](tile);
        }
    }
}

void Winograd::finish(const Unit& unit, const Scratch& scratch) const {
    const int64_t panels = sums_stride_ / kPanel;
    TileSums sums{};
    sums.sums_stride = sums_stride_;
    sums.row_stride = 2 * kRowTiles * sums_stride_;
    for (int64_t at = 0; at < unit.tiles; at += sums.tiles) {
        const int64_t row = (unit.begin + at) / tile_columns_, column = (unit.begin + at) % tile_columns_;
        sums.tiles = std::min({tile_columns_ - column, unit.tiles - at, kRowTiles});
        for (int64_t panel = 0; panel < panels; panel += kernels_.max_panels) {
            const int64_t width = std::min<int64_t>(kernels_.max_panels, panels - panel);
            sums.product_stride = odd_lines(unit_tiles_ * width);
            sums.tile_stride = width * kPanel;
            for (int64_t p = panel; p < panel + width; ++p) {
                sums.products = scratch.products + panel * num_products_ * (unit_tiles_ + 1) * kPanel +
                                at * sums.tile_stride + (p - panel) * kPanel;
                sums.bias = bias_.get() + p * kPanel;
                sums.sums = scratch.sums + p * kPanel;
                transforms_.sums(sums);
            }
        }
        const int64_t end = std::min(width_, 2 * (column + sums.tiles));
        for (int64_t i = 0; i < std::min<int64_t>(2, height_ - 2 * row); ++i)
            finish_row(unit, 2 * row + i, 2 * column, end, scratch.sums + i * sums.row_stride);
    }
}

// Columns [begin, end) of an output row: what follows the sums, and into y.
void Winograd::finish_row(const Unit& unit, int64_t row, int64_t begin, int64_t end, float* sums) const {
    const int64_t frame = unit.batch * shape_.frames + unit.frame;
    const int64_t at = ((frame * height_ + row) * width_ + begin) * shape_.out_channels * element_bytes_;
    Finish work{};
    work.sums = sums;
    work.sums_stride = sums_stride_;
    work.pixels = end - begin;
    work.channels = shape_.out_channels;
    work.residual = arguments_.residual == nullptr ? nullptr : static_cast<const std::byte*>(arguments_.residual) + at;
    work.norm = norm_.get();
    work.y = static_cast<std::byte*>(arguments_.y) + at;
    work.y_stride = shape_.out_channels;
    kernels_.finish(work);
}

}  // namespace wanfast
