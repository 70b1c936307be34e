// Squares of W x W numbers of 32 bits, turned in registers.
#pragma once

#include "simd.h"

namespace trunkline {
namespace TRUNKLINE_ISA {

// Row i becomes column i.
INLINE void transpose(VU (&r)[W]) {
    VU t[W];
#if defined(__AVX512F__)
    constexpr __mmask16 ALL32 = 0xffff;  // GCC 12 warns about the intrinsics without a mask
    constexpr __mmask8 ALL64 = 0xff;
#define LOW_32(a, b) (VU) _mm512_maskz_unpacklo_epi32(ALL32, (__m512i)(a), (__m512i)(b))
#define HIGH_32(a, b) (VU) _mm512_maskz_unpackhi_epi32(ALL32, (__m512i)(a), (__m512i)(b))
#define LOW_64(a, b) (VU) _mm512_maskz_unpacklo_epi64(ALL64, (__m512i)(a), (__m512i)(b))
#define HIGH_64(a, b) (VU) _mm512_maskz_unpackhi_epi64(ALL64, (__m512i)(a), (__m512i)(b))
#define EVEN_128(a, b) (VU) _mm512_maskz_shuffle_i32x4(ALL32, (__m512i)(a), (__m512i)(b), 0x88)
#define ODD_128(a, b) (VU) _mm512_maskz_shuffle_i32x4(ALL32, (__m512i)(a), (__m512i)(b), 0xdd)
    // Rows 4q .. 4q + 3 as 4 x 4 squares, whose column c of each square ends in row 4q + c.
#pragma GCC unroll 4
    for (int q = 0; q < W; q += 4) {
        VU a = LOW_32(r[q], r[q + 1]), b = HIGH_32(r[q], r[q + 1]);
        VU c = LOW_32(r[q + 2], r[q + 3]), d = HIGH_32(r[q + 2], r[q + 3]);
        t[q] = LOW_64(a, c), t[q + 1] = HIGH_64(a, c), t[q + 2] = LOW_64(b, d), t[q + 3] = HIGH_64(b, d);
    }
#pragma GCC unroll 4
    for (int c = 0; c < 4; c++) {
        VU a = EVEN_128(t[c], t[c + 4]), b = ODD_128(t[c], t[c + 4]);
        VU e = EVEN_128(t[c + 8], t[c + 12]), f = ODD_128(t[c + 8], t[c + 12]);
        r[c] = EVEN_128(a, e), r[c + 8] = ODD_128(a, e), r[c + 4] = EVEN_128(b, f), r[c + 12] = ODD_128(b, f);
    }
#undef LOW_32
#undef HIGH_32
#undef LOW_64
#undef HIGH_64
#undef EVEN_128
#undef ODD_128
#elif defined(__AVX2__)
#pragma GCC unroll 4
    for (int q = 0; q < W; q += 4) {
        __m256i a = _mm256_unpacklo_epi32((__m256i)r[q], (__m256i)r[q + 1]);
        __m256i b = _mm256_unpackhi_epi32((__m256i)r[q], (__m256i)r[q + 1]);
        __m256i c = _mm256_unpacklo_epi32((__m256i)r[q + 2], (__m256i)r[q + 3]);
        __m256i d = _mm256_unpackhi_epi32((__m256i)r[q + 2], (__m256i)r[q + 3]);
        t[q] = (VU)_mm256_unpacklo_epi64(a, c), t[q + 1] = (VU)_mm256_unpackhi_epi64(a, c);
        t[q + 2] = (VU)_mm256_unpacklo_epi64(b, d), t[q + 3] = (VU)_mm256_unpackhi_epi64(b, d);
    }
#pragma GCC unroll 4
    for (int c = 0; c < 4; c++) {
        r[c] = (VU)_mm256_permute2x128_si256((__m256i)t[c], (__m256i)t[c + 4], 0x20);
        r[c + 4] = (VU)_mm256_permute2x128_si256((__m256i)t[c], (__m256i)t[c + 4], 0x31);
    }
#else
    VU a = __builtin_shufflevector(r[0], r[1], 0, 4, 1, 5), b = __builtin_shufflevector(r[0], r[1], 2, 6, 3, 7);
    VU c = __builtin_shufflevector(r[2], r[3], 0, 4, 1, 5), d = __builtin_shufflevector(r[2], r[3], 2, 6, 3, 7);
    t[0] = __builtin_shufflevector(a, c, 0, 1, 4, 5), t[1] = __builtin_shufflevector(a, c, 2, 3, 6, 7);
    t[2] = __builtin_shufflevector(b, d, 0, 1, 4, 5), t[3] = __builtin_shufflevector(b, d, 2, 3, 6, 7);
    for (int i = 0; i < W; i++) r[i] = t[i];
#endif
}

}  // namespace TRUNKLINE_ISA
}  // namespace trunkline
