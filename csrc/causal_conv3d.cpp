#include "causal_conv3d.h"

#include <algorithm>
#include <stdexcept>
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "convolution.h"
#include "threads.h"
#include "winograd.h"

namespace wanfast {
namespace {

using std::int64_t;

// Pixels that one thread norms at a time.
constexpr int64_t kPixels = 64;

const Kernels& find_kernels(const std::string& name, Format format) {
    const std::vector<std::string> sets = instruction_sets();
    if (name != "auto" && std::find(sets.begin(), sets.end(), name) == sets.end())
        throw std::invalid_argument("instruction_set: must be one this CPU has, got " + name);
    const std::string& chosen = name == "auto" ? sets.front() : name;
    const KernelSet* kernels = &portable_kernels;
#if defined(__x86_64__)
    if (chosen == "avx512" && format == Format::bf16_pairs && has_bf16_products()) return avx512_bf16_kernels;
    if (chosen == "avx512") kernels = &avx512_kernels;
    if (chosen == "avx2") kernels = &avx2_kernels;
#endif
    if (format == Format::bf16_pairs)
        throw std::invalid_argument("instruction_set: " + chosen + " has no bf16 products here; pack fp32 weights");
    return format == Format::fp32 ? kernels->fp32 : kernels->bf16_widened;
}

template <typename Value>
void pack(const Value* weight, Value* packed, int64_t out_channels, int64_t channels, int64_t taps) {
    constexpr int64_t in_slot = 4 / sizeof(Value);
    const int64_t slots = divide_up(channels, in_slot);
    for (int64_t panel = 0; panel < out_channels; panel += kPanel)
        for (int64_t chunk = 0; chunk < slots; chunk += kSlots)
            for (int64_t tap = 0; tap < taps; ++tap)
                for (int64_t slot = chunk; slot < std::min(chunk + kSlots, slots); ++slot)
                    for (int64_t o = panel; o < panel + kPanel; ++o)
                        for (int64_t c = slot * in_slot; c < (slot + 1) * in_slot; ++c)
                            *packed++ = o < out_channels && c < channels ? weight[(o * channels + c) * taps + tap]
                                                                         : Value{};
}

}  // namespace

int64_t packed_slots(int64_t out_channels, int64_t channels, int64_t taps, Format format) {
    return divide_up(out_channels, kPanel) * kPanel * divide_up(channels, format == Format::bf16_pairs ? 2 : 1) * taps;
}

void pack_weight(const void* weight, void* packed, int64_t out_channels, int64_t channels, int64_t taps,
                 Format format) {
    if (format == Format::bf16_pairs)
        pack(static_cast<const Bf16*>(weight), static_cast<Bf16*>(packed), out_channels, channels, taps);
    else
        pack(static_cast<const float*>(weight), static_cast<float*>(packed), out_channels, channels, taps);
}

std::vector<std::string> instruction_sets() {
    std::vector<std::string> names;
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
        if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
            __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
            names.push_back("avx512");
        names.push_back("avx2");
    }
#endif
    names.push_back("portable");
    return names;
}

bool has_bf16_products() {
#if defined(__x86_64__)
    return instruction_sets().front() == "avx512" && __builtin_cpu_supports("avx512bf16");
#else
    return false;
#endif
}

bool has_bf16_matrices() {
#if defined(__x86_64__)
    unsigned a = 0, b = 0, c = 0, d = 0;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 && (d >> 22 & 1) != 0;
#else
    return false;
#endif
}

void causal_conv3d(const ConvArguments& arguments, int num_threads, const std::string& instruction_set, Method method) {
    const ConvShape& shape = arguments.shape;
    const bool is_doubled = shape.form == Form::double_picture;
    for (const int64_t size : {shape.kt, shape.kh, shape.kw})
        if (size != 1 && size != (is_doubled ? 2 : 3))
            throw std::invalid_argument("weight: kernel sizes must be 1 or 3, got " + std::to_string(size));
    const Kernels& kernels = find_kernels(instruction_set, arguments.format);
    if (method == Method::winograd && !Winograd::serves(arguments))
        throw std::invalid_argument("method: winograd takes 3 x 3 kernels of stride 1, fp32 weights; direct takes all");
    if (method == Method::fastest)
        method = Winograd::serves(arguments) && Winograd::is_faster(shape) ? Method::winograd : Method::direct;
    if (method == Method::winograd)
        Winograd(arguments, num_threads, kernels).run();
    else
        Convolution(arguments, num_threads, kernels).run();
}

void norm_silu(const void* x, const float* norm, void* y, int64_t pixels, int64_t channels, Format format,
               int num_threads, const std::string& instruction_set) {
    const Kernels& kernels = find_kernels(instruction_set, format);
    const Floats weight = padded(norm, channels);
    const int64_t runs = divide_up(pixels, kPixels);
    const int64_t bytes = channels * (format == Format::fp32 ? 4 : 2);
    std::atomic<int64_t> next{0};
    on_threads(static_cast<int>(std::min<int64_t>(std::max(num_threads, 1), runs)), [&](int) {
        for (int64_t i = next.fetch_add(1); i < runs; i = next.fetch_add(1)) {
            const int64_t at = i * kPixels * bytes;
            kernels.norm_silu(static_cast<const std::byte*>(x) + at, std::min(kPixels, pixels - i * kPixels), channels,
                              weight.get(), static_cast<std::byte*>(y) + at);
        }
    });
}

}  // namespace wanfast
