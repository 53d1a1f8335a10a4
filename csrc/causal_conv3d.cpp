#include "causal_conv3d.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <new>
#include <stdexcept>
#if defined(_OPENMP) && !defined(__clang__)
#include <omp.h>
#else
#include <system_error>
#include <thread>
#endif

#include "microkernel.h"

namespace wanfast {
namespace {

using std::int64_t;

// kt x kh x chunks of input channels summed in registers before y is written.
constexpr int64_t kBlockTaps = 18;
// Inputs of one such block under a unit: 84 KiB, which with their weights stay in a core's L2 cache.
constexpr int64_t kBlockFloats = 21 << 10;
// Blocks gathered at a time: a pixel's channels are then read in longer runs.
constexpr int64_t kGatherBlocks = 3;
// Multiplications below which a second thread costs more than it saves.
constexpr double kThreadWork = 2 << 20;

int64_t divide_up(int64_t value, int64_t by) { return (value + by - 1) / by; }

struct Free {
    void operator()(float* pointer) const { ::operator delete[](pointer, std::align_val_t{64}); }
};
using Floats = std::unique_ptr<float[], Free>;

Floats allocate(int64_t count) {
    return Floats(
        static_cast<float*>(::operator new[](sizeof(float) * static_cast<std::size_t>(count), std::align_val_t{64})));
}

const MicroKernels& find_kernels(const std::string& name) {
    const std::vector<std::string> sets = instruction_sets();
    if (name != "auto" && std::find(sets.begin(), sets.end(), name) == sets.end())
        throw std::invalid_argument("instruction_set: must be one this CPU has, got " + name);
    const std::string& chosen = name == "auto" ? sets.front() : name;
#if defined(__x86_64__)
    if (chosen == "avx512") return avx512_kernels;
    if (chosen == "avx2") return avx2_kernels;
#endif
    (void)chosen;
    return portable_kernels;
}

// The whole call. Output rows are cut into tiles, and tiles gathered into units: rectangles of one frame that one
// thread computes from start to end. Some chunks of channels at a time, a unit's inputs are copied from where they lie
// into lines as the micro-kernels read them, borders filled in; each panel's weights then meet all its tiles.
class Convolution {
  public:
    Convolution(const float* x, const float* history, const float* packed, const float* bias, float* y,
                const ConvShape& shape, int num_threads, const MicroKernels& kernels)
        : x_(x), history_(history), packed_(packed), bias_(bias), y_(y), shape_(shape), kernels_(kernels) {
        if (shape.kh == 1 && shape.kw == 1) {  // pixels are independent: one long row leaves no short tiles
            shape_.width *= shape.height;
            shape_.height = 1;
        }
        chunks_ = divide_up(shape.channels, kPanel);
        block_chunks_ = std::min(chunks_, std::max<int64_t>(1, kBlockTaps / (shape.kt * shape.kh)));
        gather_chunks_ = kGatherBlocks * block_chunks_;
        line_floats_ = (kernels.max_pixels + 2) * kPanel;
        row_tiles_ = divide_up(shape_.width, kernels.max_pixels);
        const int64_t tiles = shape.batch * shape.frames * shape_.height * row_tiles_;
        const int64_t sums = tiles * kernels.max_pixels * shape.out_channels;
        const int64_t terms = shape.kt * shape.kh * shape.kw * shape.channels;
        num_threads_ = double(sums) * double(terms) < kThreadWork ? 1 : std::max(num_threads, 1);

        const int64_t lines = std::max<int64_t>(shape.kh, kBlockFloats / (block_chunks_ * shape.kt * line_floats_));
        const int64_t most_tiles = std::max<int64_t>(1, tiles / (int64_t{4} * num_threads_));  // four units a thread
        unit_rows_ = std::min({lines - shape.kh + 1, shape_.height, most_tiles});
        unit_tiles_ =
            std::clamp(std::min(lines / (unit_rows_ + shape.kh - 1), most_tiles / unit_rows_), int64_t{1}, row_tiles_);
        row_stride_ = unit_tiles_ * line_floats_;
        frame_stride_ = (unit_rows_ + shape.kh - 1) * row_stride_;
        chunk_stride_ = shape.kt * frame_stride_;
    }

    void run() {
        const int64_t patch_floats = std::min(gather_chunks_, chunks_) * chunk_stride_;
        const Floats scratch = allocate(patch_floats * num_threads_);
#if defined(_OPENMP) && !defined(__clang__)
        // GCC's runtime is torch's too: its threads, which spin for a while after torch's own work, do this.
#pragma omp parallel num_threads(num_threads_)
        work(scratch.get() + omp_get_thread_num() * patch_floats);
#else
        std::vector<std::thread> helpers;
        helpers.reserve(static_cast<std::size_t>(num_threads_));
        try {
            for (int i = 1; i < num_threads_; ++i)
                helpers.emplace_back([this, patch = scratch.get() + i * patch_floats] { work(patch); });
        } catch (const std::system_error&) {
            // No further thread to be had: those there are do all units.
        }
        work(scratch.get());
        for (std::thread& helper : helpers) helper.join();
#endif
    }

  private:
    struct Unit {  // rows [row, row + rows) x tiles [tile, tile + tiles) of one output frame
        int64_t batch, frame, row, rows, tile, tiles;
    };

    void work(float* patch) {
        const int64_t bands = divide_up(shape_.height, unit_rows_);
        const int64_t columns = divide_up(row_tiles_, unit_tiles_);
        const int64_t units = shape_.batch * shape_.frames * bands * columns;
        for (int64_t i = next_unit_.fetch_add(1); i < units; i = next_unit_.fetch_add(1)) {
            const int64_t frame = i / (bands * columns), band = i / columns % bands, column = i % columns;
            Unit unit;
            unit.batch = frame / shape_.frames;
            unit.frame = frame % shape_.frames;
            unit.row = band * shape_.height / bands;
            unit.rows = (band + 1) * shape_.height / bands - unit.row;
            unit.tile = column * row_tiles_ / columns;
            unit.tiles = (column + 1) * row_tiles_ / columns - unit.tile;
            compute(unit, patch);
        }
    }

    // Where tile `tile` of a row begins: tiles are as equal as they can be.
    int64_t column(int64_t tile) const { return tile * shape_.width / row_tiles_; }

    float* output(const Unit& unit, int64_t row, int64_t column) const {
        const int64_t line = (unit.batch * shape_.frames + unit.frame) * shape_.height + row;
        return y_ + (line * shape_.width + column) * shape_.out_channels;
    }

    // Frame `at` of a batch entry, counted from x's first; none before the history's first.
    const float* input(int64_t batch, int64_t at) const {
        const int64_t size = shape_.height * shape_.width * shape_.channels;
        if (at >= 0) return x_ + (batch * shape_.frames + at) * size;
        const int64_t in_history = shape_.history_frames + at;
        return in_history >= 0 ? history_ + (batch * shape_.history_frames + in_history) * size : nullptr;
    }

    void compute(const Unit& unit, float* patch) const {
        const int64_t begin = column(unit.tile), end = column(unit.tile + unit.tiles);
        for (int64_t row = unit.row; row < unit.row + unit.rows; ++row)
            for (int64_t w = begin; w < end; ++w) std::copy_n(bias_, shape_.out_channels, output(unit, row, w));

        const int64_t panels = divide_up(shape_.out_channels, kPanel);
        for (int64_t chunk = 0; chunk < chunks_; chunk += block_chunks_) {
            if (chunk % gather_chunks_ == 0) gather(unit, chunk, std::min(gather_chunks_, chunks_ - chunk), patch);
            const float* lines = patch + chunk % gather_chunks_ * chunk_stride_;
            const int64_t chunks = std::min(block_chunks_, chunks_ - chunk);
            for (int64_t panel = 0; panel < panels; panel += kernels_.max_panels)
                multiply(unit, chunk, chunks, panel, std::min<int64_t>(kernels_.max_panels, panels - panel), lines);
        }
    }

    // Fills lines [chunks][kt][unit rows + kh - 1][unit tiles] with the inputs under a unit; zeros outside the picture.
    void gather(const Unit& unit, int64_t chunk, int64_t chunks, float* patch) const {
        for (int64_t i = 0; i < shape_.kt; ++i) {
            const float* frame = input(unit.batch, unit.frame + i - (shape_.kt - 1));
            if (frame == nullptr) continue;  // never read: see first_frame
            for (int64_t row = 0; row < unit.rows + shape_.kh - 1; ++row)
                for (int64_t tile = 0; tile < unit.tiles; ++tile)
                    gather_line(frame, chunk, chunks, unit.row + row - shape_.kh / 2, unit.tile + tile,
                                patch + i * frame_stride_ + row * row_stride_ + tile * line_floats_);
        }
    }

    void gather_line(const float* frame, int64_t chunk, int64_t chunks, int64_t row, int64_t tile, float* line) const {
        const int64_t begin = column(tile) - shape_.kw / 2, end = column(tile + 1) + shape_.kw / 2;
        const bool outside = row < 0 || row >= shape_.height;
        const int64_t first = outside ? end : std::max<int64_t>(begin, 0);
        const int64_t last = outside ? end : std::min(end, shape_.width);
        for (int64_t k = 0; k < chunks; ++k) {
            std::fill_n(line + k * chunk_stride_, (first - begin) * kPanel, 0.0f);
            std::fill_n(line + k * chunk_stride_ + (last - begin) * kPanel, (end - last) * kPanel, 0.0f);
        }
        if (outside) return;
        const int64_t channels = std::min(chunks * kPanel, shape_.channels - chunk * kPanel);
        const float* source = frame + (row * shape_.width + first) * shape_.channels + chunk * kPanel;
        kernels_.copy(source, shape_.channels, last - first, channels, line + (first - begin) * kPanel, chunk_stride_);
    }

    // Adds the products of some chunks of input channels to `width` panels of a unit's outputs.
    void multiply(const Unit& unit, int64_t chunk, int64_t chunks, int64_t panel, int64_t width,
                  const float* lines) const {
        const int64_t taps = shape_.kt * shape_.kh * shape_.kw;
        const int64_t outputs = std::min(width * kPanel, shape_.out_channels - panel * kPanel);
        Tile tile{};
        tile.chunk_stride = chunk_stride_;
        tile.frame_stride = frame_stride_;
        tile.row_stride = row_stride_;
        tile.panel_stride = shape_.channels * taps * kPanel;
        tile.weights = packed_ + panel * tile.panel_stride + chunk * kPanel * taps * kPanel;
        tile.chunks = chunks;
        tile.last_channels = std::min(kPanel, shape_.channels - (chunk + chunks - 1) * kPanel);
        tile.first_frame = std::max<int64_t>(0, shape_.kt - 1 - unit.frame - shape_.history_frames);
        tile.kt = shape_.kt;
        tile.kh = shape_.kh;
        tile.kw = shape_.kw;
        for (int64_t row = 0; row < unit.rows; ++row)
            for (int64_t i = 0; i < unit.tiles; ++i) {
                const int64_t begin = column(unit.tile + i), pixels = column(unit.tile + i + 1) - begin;
                tile.lines = lines + row * row_stride_ + i * line_floats_;
                float* y = output(unit, unit.row + row, begin) + panel * kPanel;
                if (outputs == width * kPanel) {
                    tile.y = y;
                    tile.y_stride = shape_.out_channels;
                    kernels_.run[width - 1][pixels - 1](tile);
                    continue;
                }
                // The last panel reaches past O: its sums go beside y first.
                float sums[MicroKernels::kMaxPixels * MicroKernels::kMaxPanels * kPanel] = {};
                tile.y = sums;
                tile.y_stride = width * kPanel;
                kernels_.run[width - 1][pixels - 1](tile);
                for (int64_t p = 0; p < pixels; ++p)
                    for (int64_t o = 0; o < outputs; ++o) y[p * shape_.out_channels + o] += sums[p * tile.y_stride + o];
            }
    }

    const float* x_;
    const float* history_;
    const float* packed_;
    const float* bias_;
    float* y_;
    ConvShape shape_;
    const MicroKernels& kernels_;
    int num_threads_;
    int64_t chunks_, block_chunks_, gather_chunks_, line_floats_, row_tiles_;
    int64_t unit_rows_, unit_tiles_;                    // of the largest unit
    int64_t row_stride_, frame_stride_, chunk_stride_;  // floats between lines of a patch
    std::atomic<int64_t> next_unit_{0};
};

}  // namespace

std::int64_t packed_size(std::int64_t out_channels, std::int64_t channels, std::int64_t taps) {
    return divide_up(out_channels, kPanel) * kPanel * channels * taps;
}

void pack_weight(const float* weight, float* packed, std::int64_t out_channels, std::int64_t channels,
                 std::int64_t taps) {
    for (int64_t panel = 0; panel < out_channels; panel += kPanel)
        for (int64_t chunk = 0; chunk < channels; chunk += kPanel)
            for (int64_t tap = 0; tap < taps; ++tap)
                for (int64_t c = chunk; c < std::min(chunk + kPanel, channels); ++c)
                    for (int64_t o = panel; o < panel + kPanel; ++o)
                        *packed++ = o < out_channels ? weight[(o * channels + c) * taps + tap] : 0.0f;
}

std::vector<std::string> instruction_sets() {
    std::vector<std::string> names;
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
        if (__builtin_cpu_supports("avx512f")) names.push_back("avx512");
        names.push_back("avx2");
    }
#endif
    names.push_back("portable");
    return names;
}

void causal_conv3d(const float* x, const float* history, const float* packed, const float* bias, float* y,
                   const ConvShape& shape, int num_threads, const std::string& instruction_set) {
    for (const int64_t size : {shape.kt, shape.kh, shape.kw})
        if (size != 1 && size != 3)
            throw std::invalid_argument("weight: kernel sizes must be 1 or 3, got " + std::to_string(size));
    Convolution(x, history, packed, bias, y, shape, num_threads, find_kernels(instruction_set)).run();
}

}  // namespace wanfast
