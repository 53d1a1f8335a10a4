// Prints the most fp32 GFLOP/s of one core: fused multiply-adds in registers, best of 8 spells, in CPU seconds; on a
// second line those of bf16 pairs, where the CPU multiplies such.
// Built by test_conv3d.py for the machine it runs on: g++ -O3 -march=native.
#include <algorithm>
#include <cstdio>
#include <ctime>
#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX2__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif
typedef float Vector __attribute__((vector_size(kBytes)));

constexpr int kChains = 12;  // more than the latency of an addition times the units that do one per cycle
constexpr int kSteps = 10'000'000;

double seconds() {
    timespec now;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &now);
    return now.tv_sec + 1e-9 * now.tv_nsec;
}

#if defined(__AVX512BF16__)
double bf16_peak() {
    __m512 sums[kChains];
    for (int chain = 0; chain < kChains; ++chain) sums[chain] = _mm512_set1_ps(static_cast<float>(chain));
    __m512i pairs = _mm512_set1_epi32(0x30003000);  // small enough that no sum overflows
    asm volatile("" : "+v"(pairs));                 // nothing is known of them
    double best = 1e9;
    for (int spell = 0; spell < 8; ++spell) {
        const double start = seconds();
        for (int step = 0; step < kSteps; ++step)
#pragma GCC unroll 12
            for (int chain = 0; chain < kChains; ++chain)
                sums[chain] = _mm512_dpbf16_ps(sums[chain], (__m512bh)pairs, (__m512bh)pairs);
        best = std::min(best, seconds() - start);
    }
    float used = 0;
    for (const __m512& sum : sums) used += sum[0];
    std::fprintf(stderr, "%g\n", used);
    return 4.0 * kChains * 16 * kSteps / best / 1e9;
}
#endif

int main() {
    Vector sums[kChains];
    // No two alike, and none at 1, where the sum below would stay: a compiler leaves out what it sees through.
    for (int chain = 0; chain < kChains; ++chain) sums[chain] = Vector{} + static_cast<float>(chain + 2);
    const Vector half = Vector{} + 0.5f;
    double best = 1e9;
    for (int spell = 0; spell < 8; ++spell) {
        const double start = seconds();
        for (int step = 0; step < kSteps; ++step)
#pragma GCC unroll 12
            for (int chain = 0; chain < kChains; ++chain) sums[chain] = sums[chain] * half + half;
        best = std::min(best, seconds() - start);
    }
    float used = 0;
    for (const Vector& sum : sums) used += sum[0];
    std::fprintf(stderr, "%g\n", used);  // so that nothing above is left out
    std::printf("%.1f\n", 2.0 * kChains * (kBytes / 4) * kSteps / best / 1e9);
#if defined(__AVX512BF16__)
    std::printf("%.1f\n", bf16_peak());
#endif
}
