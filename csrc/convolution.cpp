#include "convolution.h"

#include <algorithm>

#include "threads.h"

namespace wanfast {
namespace {

using std::int64_t;

// kt x kh x chunks of input channels summed in registers before they are added to the sums in memory.
constexpr int64_t kBlockTaps = 18;
// Inputs of one such block under a unit: 84 KiB, which with their weights stay in a core's L2 cache.
constexpr int64_t kBlockSlots = 21 << 10;
// Sums of a unit: at most 1 MiB, of which one panel's are in use at a time.
constexpr int64_t kSumFloats = 256 << 10;
// Blocks gathered at a time: a pixel's channels are then read in longer runs.
constexpr int64_t kGatherBlocks = 3;
// Multiplications below which a second thread costs more than it saves.
constexpr double kThreadWork = 2 << 20;

}  // namespace

Floats padded(const float* values, int64_t count) {
    if (values == nullptr) return nullptr;
    Floats copy = allocate(divide_up(count, 32) * 32);
    std::fill(std::copy_n(values, count, copy.get()), copy.get() + divide_up(count, 32) * 32, 0.0f);
    return copy;
}

const std::byte* frame_at(const ConvArguments& arguments, int64_t batch, int64_t at) {
    const ConvShape& shape = arguments.shape;
    const int64_t size = shape.height * shape.width * shape.channels * (arguments.format == Format::fp32 ? 4 : 2);
    if (at >= 0) return static_cast<const std::byte*>(arguments.x) + (batch * shape.frames + at) * size;
    const int64_t in_history = shape.history_frames + at;
    if (in_history < 0) return nullptr;
    return static_cast<const std::byte*>(arguments.history) + (batch * shape.history_frames + in_history) * size;
}

int threads_for(double products, int num_threads) { return products < kThreadWork ? 1 : std::max(num_threads, 1); }

Convolution::Convolution(const ConvArguments& arguments, int num_threads, const Kernels& kernels)
    : arguments_(arguments), shape_(arguments.shape), kernels_(kernels) {
    const Form form = shape_.form;
    stride_ = form == Form::half_picture ? 2 : 1;
    stride_frames_ = form == Form::half_frames ? 2 : 1;
    lead_frames_ = form == Form::half_frames ? 1 : shape_.kt - 1;
    phases_ = form == Form::double_picture ? 4 : 1;
    groups_ = form == Form::double_frames ? 2 : 1;
    if (shape_.kh == 1 && shape_.kw == 1) {  // pixels are independent: one long row leaves no short tiles
        shape_.width *= shape_.height;
        shape_.height = 1;
    }
    frames_ = (lead_frames_ + shape_.frames - shape_.kt) / stride_frames_ + 1;
    height_ = shape_.height / stride_;
    width_ = shape_.width / stride_;
    element_bytes_ = arguments.format == Format::fp32 ? 4 : 2;
    slot_channels_ = arguments.format == Format::bf16_pairs ? 2 : 1;
    slots_ = divide_up(shape_.channels, slot_channels_);
    sums_stride_ = divide_up(shape_.out_channels, kPanel) * kPanel;
    bias_ = padded(arguments.bias, shape_.out_channels);
    norm_ = padded(arguments.norm, shape_.out_channels);
    cut(num_threads);
}

// Chooses sizes so that a unit's inputs and sums stay in a core's cache, and there are units for all threads.
void Convolution::cut(int num_threads) {
    chunks_ = divide_up(slots_, kSlots);
    block_chunks_ = std::min(chunks_, std::max<int64_t>(1, kBlockTaps / (shape_.kt * shape_.kh)));
    gather_chunks_ = kGatherBlocks * block_chunks_;
    line_slots_ = stride_ * (kernels_.max_pixels + 2) * kSlots;
    row_tiles_ = divide_up(width_, kernels_.max_pixels);
    const int64_t tiles = shape_.batch * frames_ * phases_ * height_ * row_tiles_;
    const int64_t sums = tiles * kernels_.max_pixels * shape_.out_channels;
    const int64_t terms = shape_.kt * shape_.kh * shape_.kw * shape_.channels;
    num_threads_ = threads_for(double(sums) * double(terms), num_threads);

    const int64_t line_tiles = std::max(shape_.kh, kBlockSlots / (block_chunks_ * shape_.kt * line_slots_));
    const int64_t sum_tiles = std::max<int64_t>(1, kSumFloats / (kernels_.max_pixels * sums_stride_));
    const int64_t most = std::clamp<int64_t>(tiles / (int64_t{4} * num_threads_), 1, sum_tiles);  // four units a thread
    unit_rows_ = std::min({(line_tiles - shape_.kh) / stride_ + 1, height_, most});
    const int64_t lines = (unit_rows_ - 1) * stride_ + shape_.kh;
    unit_tiles_ = std::clamp(std::min(line_tiles / lines, most / unit_rows_), int64_t{1}, row_tiles_);
    row_stride_ = unit_tiles_ * line_slots_;
    frame_stride_ = lines * row_stride_;
    chunk_stride_ = shape_.kt * frame_stride_;
    lines_size_ = std::min(gather_chunks_, chunks_) * chunk_stride_;
    sums_size_ = unit_rows_ * unit_tiles_ * kernels_.max_pixels * sums_stride_;
}

void Convolution::run() {
    const int64_t size = divide_up(lines_size_ + sums_size_, 16) * 16;
    const Floats memory = allocate(size * num_threads_);
    on_threads(num_threads_, [&](int thread) { work(memory.get() + thread * size); });
}

void Convolution::work(float* memory) {
    const Scratch scratch{memory, memory + lines_size_};
    const int64_t bands = divide_up(height_, unit_rows_);
    const int64_t columns = divide_up(row_tiles_, unit_tiles_);
    const int64_t units = shape_.batch * frames_ * phases_ * bands * columns;
    for (int64_t i = next_unit_.fetch_add(1); i < units; i = next_unit_.fetch_add(1)) {
        const int64_t frame = i / (bands * columns * phases_), band = i / columns % bands, at = i % columns;
        Unit unit;
        unit.batch = frame / frames_;
        unit.frame = frame % frames_;
        unit.phase = i / (bands * columns) % phases_;
        unit.row = band * height_ / bands;
        unit.rows = (band + 1) * height_ / bands - unit.row;
        unit.tile = at * row_tiles_ / columns;
        unit.tiles = (at + 1) * row_tiles_ / columns - unit.tile;
        unit.begin = column(unit.tile);
        unit.width = column(unit.tile + unit.tiles) - unit.begin;
        compute(unit, scratch);
    }
}

int64_t Convolution::lead(int64_t kernel_size, int64_t parity) const {
    if (stride_ == 2) return 0;
    return phases_ == 4 ? 1 - parity : kernel_size / 2;
}

void Convolution::compute(const Unit& unit, const Scratch& scratch) const {
    for (int64_t pixel = 0; pixel < unit.rows * unit.width; ++pixel)
        std::copy_n(bias_.get(), sums_stride_, scratch.sums + pixel * sums_stride_);

    const int64_t panels = sums_stride_ / kPanel;
    for (int64_t chunk = 0; chunk < chunks_; chunk += block_chunks_) {
        if (chunk % gather_chunks_ == 0) gather(unit, chunk, std::min(gather_chunks_, chunks_ - chunk), scratch.lines);
        const int64_t chunks = std::min(block_chunks_, chunks_ - chunk);
        for (int64_t panel = 0; panel < panels; panel += kernels_.max_panels)
            multiply(unit, chunk, chunks, panel, std::min<int64_t>(kernels_.max_panels, panels - panel), scratch);
    }
    finish(unit, scratch);
}

// Fills lines with the inputs under a unit, with zeros outside the picture.
void Convolution::gather(const Unit& unit, int64_t chunk, int64_t chunks, float* lines) const {
    const int64_t row_bytes = shape_.width * shape_.channels * element_bytes_;
    const int64_t first = stride_ * unit.row - lead(shape_.kh, unit.phase / 2);
    for (int64_t i = 0; i < shape_.kt; ++i) {
        const std::byte* frame = frame_at(arguments_, unit.batch, stride_frames_ * unit.frame + i - lead_frames_);
        if (frame == nullptr) continue;  // never read: see first_frame
        for (int64_t j = 0; j < stride_ * (unit.rows - 1) + shape_.kh; ++j) {
            const bool is_inside = first + j >= 0 && first + j < shape_.height;
            const std::byte* row = is_inside ? frame + (first + j) * row_bytes : nullptr;
            for (int64_t tile = 0; tile < unit.tiles; ++tile)
                gather_line(unit, row, chunk, chunks, unit.tile + tile,
                            lines + i * frame_stride_ + j * row_stride_ + tile * line_slots_);
        }
    }
}

// One line of each chunk, from a row of the picture, or from none.
void Convolution::gather_line(const Unit& unit, const std::byte* row, int64_t chunk, int64_t chunks, int64_t tile,
                              float* line) const {
    const int64_t begin = column(tile), pixels = column(tile + 1) - begin;
    const int64_t channel = chunk * kSlots * slot_channels_;
    Run run{};
    run.stride = stride_ * shape_.channels;
    run.channels = std::min(chunks * kSlots * slot_channels_, shape_.channels - channel);
    run.chunk_stride = chunk_stride_;
    for (int64_t part = 0; part < stride_; ++part, line += line_slots_ / stride_) {
        // Position p holds column stride * (begin + p) + part - lead; those of the picture are first to last.
        const int64_t count = pixels + (shape_.kw - 1 - part) / stride_;
        const int64_t left = lead(shape_.kw, unit.phase % 2) - part;
        const int64_t end = std::clamp<int64_t>(divide_up(shape_.width + left, stride_) - begin, 0, count);
        const int64_t first = row == nullptr ? count : std::clamp<int64_t>(divide_up(left, stride_) - begin, 0, end);
        const int64_t last = row == nullptr ? count : end;
        for (int64_t k = 0; k < chunks; ++k) {
            std::fill_n(line + k * chunk_stride_, first * kSlots, 0.0f);
            std::fill_n(line + k * chunk_stride_ + last * kSlots, (count - last) * kSlots, 0.0f);
        }
        if (first == last) continue;
        run.source = row + ((stride_ * (begin + first) - left) * shape_.channels + channel) * element_bytes_;
        run.positions = last - first;
        run.lines = line + first * kSlots;
        kernels_.copy(run);
    }
}

// Adds the products of some chunks of input channels to `width` panels of a unit's sums.
void Convolution::multiply(const Unit& unit, int64_t chunk, int64_t chunks, int64_t panel, int64_t width,
                           const Scratch& scratch) const {
    const int64_t taps = shape_.kt * shape_.kh * shape_.kw;
    Tile tile{};
    tile.chunk_stride = chunk_stride_;
    tile.frame_stride = frame_stride_;
    tile.row_stride = row_stride_;
    tile.panel_stride = slots_ * taps * kPanel;
    tile.weights = static_cast<const float*>(arguments_.packed) + unit.phase * sums_stride_ * slots_ * taps +
                   panel * tile.panel_stride + chunk * kSlots * taps * kPanel;
    tile.chunks = chunks;
    tile.last_slots = std::min(kSlots, slots_ - (chunk + chunks - 1) * kSlots);
    tile.first_frame = std::max<int64_t>(0, lead_frames_ - stride_frames_ * unit.frame - shape_.history_frames);
    tile.kt = shape_.kt;
    tile.kh = shape_.kh;
    tile.kw = shape_.kw;
    for (int64_t k = 0; k < shape_.kw; ++k)
        tile.columns[k] = k % stride_ * line_slots_ / stride_ + k / stride_ * kSlots;
    tile.sums_stride = sums_stride_;
    const float* lines = scratch.lines + chunk % gather_chunks_ * chunk_stride_;  // the first ones gathered lead
    for (int64_t row = 0; row < unit.rows; ++row)
        for (int64_t i = 0; i < unit.tiles; ++i) {
            const int64_t begin = column(unit.tile + i), pixels = column(unit.tile + i + 1) - begin;
            tile.lines = lines + stride_ * row * row_stride_ + i * line_slots_;
            tile.sums = scratch.sums + (row * unit.width + begin - unit.begin) * sums_stride_ + panel * kPanel;
            kernels_.run[width - 1][pixels - 1](tile);
        }
}

void Convolution::finish(const Unit& unit, const Scratch& scratch) const {
    const int64_t grown = phases_ == 4 ? 2 : 1, channels = shape_.out_channels / groups_;
    Finish work{};
    work.sums_stride = sums_stride_;
    work.pixels = unit.width;
    work.channels = channels;
    work.norm = norm_.get();
    work.y_stride = grown * channels;
    for (int64_t row = 0; row < unit.rows; ++row)
        for (int64_t group = 0; group < groups_; ++group) {
            const int64_t frame = (unit.batch * frames_ + unit.frame) * groups_ + group;
            const int64_t line = (frame * height_ + unit.row + row) * grown + unit.phase / 2;
            const int64_t pixel = (line * width_ + unit.begin) * grown + unit.phase % 2;
            const int64_t at = pixel * channels * element_bytes_;
            work.sums = scratch.sums + row * unit.width * sums_stride_ + group * channels;
            work.residual =
                arguments_.residual == nullptr ? nullptr : static_cast<const std::byte*>(arguments_.residual) + at;
            work.y = static_cast<std::byte*>(arguments_.y) + at;
            kernels_.finish(work);
        }
}

}  // namespace wanfast
