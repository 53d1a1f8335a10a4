#include "microkernel.h"

#include <cstddef>
#include <utility>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace wanfast {

#if defined(__x86_64__)
namespace avx512 {  // 14 x 2 sums, 2 weights, 1 pixel in 32 registers
#define LANES 16
#define PIXELS 14
#define PANELS 2
#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")))
#include "pixels.inc"
#include "winograd.inc"
INLINE void multiply_add(Vector& sums, Vector weights, const float* slot) { sums += weights * *slot; }
#include "microkernel.inc"
#undef TARGET
}  // namespace avx512
const KernelSet avx512_kernels{avx512::make_kernels<float, float>(), avx512::make_kernels<Bf16, float>()};

namespace avx512_bf16 {  // two products at a time in each lane
typedef int Pair __attribute__((may_alias));
#define TARGET __attribute__((target("avx512bf16,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")))
#include "pixels.inc"
#include "winograd.inc"
INLINE void multiply_add(Vector& sums, Vector weights, const float* slot) {
    const __m512i pair = _mm512_set1_epi32(*reinterpret_cast<const Pair*>(slot));
    sums = (Vector)_mm512_dpbf16_ps((__m512)sums, (__m512bh)weights, (__m512bh)pair);
}
#include "microkernel.inc"
#undef LANES
#undef PIXELS
#undef PANELS
#undef TARGET
}  // namespace avx512_bf16
const Kernels avx512_bf16_kernels = avx512_bf16::make_kernels<Bf16, Bf16>();

namespace avx2 {  // 6 x 2 sums, 2 weights, 1 pixel in 16 registers
#define LANES 8
#define PIXELS 6
#define PANELS 1
#define TARGET __attribute__((target("avx2,fma")))
#include "pixels.inc"
#include "winograd.inc"
INLINE void multiply_add(Vector& sums, Vector weights, const float* slot) { sums += weights * *slot; }
#include "microkernel.inc"
#undef LANES
#undef PIXELS
#undef PANELS
#undef TARGET
}  // namespace avx2
const KernelSet avx2_kernels{avx2::make_kernels<float, float>(), avx2::make_kernels<Bf16, float>()};
#endif

namespace portable {
#define LANES 4
#if defined(__aarch64__)
#define PIXELS 6  // 32 registers
#else
#define PIXELS 3
#endif
#define PANELS 1
#define TARGET
#include "pixels.inc"
#include "winograd.inc"
INLINE void multiply_add(Vector& sums, Vector weights, const float* slot) { sums += weights * *slot; }
#include "microkernel.inc"
#undef LANES
#undef PIXELS
#undef PANELS
#undef TARGET
}  // namespace portable
const KernelSet portable_kernels{portable::make_kernels<float, float>(), portable::make_kernels<Bf16, float>()};

}  // namespace wanfast
