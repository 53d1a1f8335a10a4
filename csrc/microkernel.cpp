#include "microkernel.h"

#include <cstddef>
#include <utility>

namespace wanfast {

#if defined(__x86_64__)
namespace avx512 {  // 14 x 2 sums, 2 weights, 1 pixel in 32 registers
#define LANES 16
#define PIXELS 14
#define PANELS 2
#define TARGET __attribute__((target("avx512f,avx2,fma")))
#include "microkernel.inc"
#undef LANES
#undef PIXELS
#undef PANELS
#undef TARGET
}  // namespace avx512
const MicroKernels avx512_kernels = avx512::make_kernels();

namespace avx2 {  // 6 x 2 sums, 2 weights, 1 pixel in 16 registers
#define LANES 8
#define PIXELS 6
#define PANELS 1
#define TARGET __attribute__((target("avx2,fma")))
#include "microkernel.inc"
#undef LANES
#undef PIXELS
#undef PANELS
#undef TARGET
}  // namespace avx2
const MicroKernels avx2_kernels = avx2::make_kernels();
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
#include "microkernel.inc"
#undef LANES
#undef PIXELS
#undef PANELS
#undef TARGET
}  // namespace portable
const MicroKernels portable_kernels = portable::make_kernels();

}  // namespace wanfast
