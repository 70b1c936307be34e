// Vectors of W floats for the instruction set that this file is compiled for, once in each namespace.
//
// Nothing here may be a template or an inline function of the standard library: the linker would keep one
// copy for all instruction sets. Products and sums are fused only where `fma` says so (-ffp-contract=off).
#pragma once

#include "args.h"

#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#endif


namespace trunkline {
namespace TRUNKLINE_ISA {

#if defined(__AVX512F__)
constexpr int W = 16;
constexpr int REGISTERS = 32;
#elif defined(__AVX2__)
constexpr int W = 8;
constexpr int REGISTERS = 16;
#else
constexpr int W = 4;
constexpr int REGISTERS = 16;
#endif

typedef float VF __attribute__((vector_size(W * 4)));
typedef int32_t VI __attribute__((vector_size(W * 4)));
typedef uint32_t VU __attribute__((vector_size(W * 4)));
typedef uint16_t VH __attribute__((vector_size(W * 2)));
typedef float F4 __attribute__((vector_size(16)));

template <class V>
INLINE V load_as(const void* from) {
    V v;
    __builtin_memcpy(&v, from, sizeof v);
    return v;
}
INLINE VF load(const float* from) { return load_as<VF>(from); }
INLINE VF load(const uint16_t* from) { return (VF)(__builtin_convertvector(load_as<VH>(from), VU) << 16); }
INLINE VF load(const int8_t* from) {
#if defined(__AVX512F__)
    return (VF)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)from)));
#elif defined(__AVX2__)
    return (VF)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)from)));
#else
    typedef int8_t VB __attribute__((vector_size(W)));
    return __builtin_convertvector(__builtin_convertvector(load_as<VB>(from), VI), VF);
#endif
}
INLINE float widen(float value) { return value; }
INLINE float widen(uint16_t value) {
    uint32_t bits = uint32_t(value) << 16;
    float result;
    __builtin_memcpy(&result, &bits, 4);
    return result;
}

// The first W of n numbers, zeros beyond them.
template <class T>
INLINE VF load_some(const T* from, long n) {
    if (n >= W) return load(from);
    float values[W] = {};
    for (long i = 0; i < n; i++) values[i] = widen(from[i]);
    return load(values);
}

INLINE VF splat(float value) {
#if defined(__AVX512F__)
    return (VF)_mm512_set1_ps(value);
#elif defined(__AVX2__)
    return (VF)_mm256_set1_ps(value);
#else
    return VF{value, value, value, value};
#endif
}

// Round to nearest, ties to even; a NaN stays one.
INLINE uint16_t narrow(float value) {
    uint32_t bits;
    __builtin_memcpy(&bits, &value, 4);
    if (value != value) return uint16_t(bits >> 16 | 0x40);
    return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
INLINE VH narrow(VF v) {
#if defined(__AVX512BF16__)
    constexpr int SUBNORMAL = 0x20;  // which the instruction takes for zeros
    if (__builtin_expect(_mm512_fpclass_ps_mask((__m512)v, SUBNORMAL) == 0, 1)) return (VH)_mm512_cvtneps_pbh((__m512)v);
#endif
    VU bits = (VU)v;
    VU rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    VU kept = v != v ? bits >> 16 | 0x40 : rounded;
    return __builtin_convertvector(kept, VH);
}
INLINE void store(float* to, VF v) { __builtin_memcpy(to, &v, sizeof v); }
INLINE void store(uint16_t* to, VF v) {
    VH half = narrow(v);
    __builtin_memcpy(to, &half, sizeof half);
}
INLINE void store_one(float* to, float value) { *to = value; }
INLINE void store_one(uint16_t* to, float value) { *to = narrow(value); }

INLINE VF fma(VF a, VF b, VF c) {
#if defined(__AVX512F__)
    return (VF)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
    return (VF)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return a * b + c;
#endif
}

INLINE VI splat_int(int32_t value) {
#if defined(__AVX512F__)
    return (VI)_mm512_set1_epi32(value);
#elif defined(__AVX2__)
    return (VI)_mm256_set1_epi32(value);
#else
    return VI{value, value, value, value};
#endif
}
INLINE VI lanes() {
    VI v;
    for (int i = 0; i < W; i++) v[i] = i;
    return v;
}
// A bit for each lane of a comparison.
INLINE uint32_t bits_of(VI holds) {
#if defined(__AVX512DQ__)
    return _mm512_movepi32_mask((__m512i)holds);
#elif defined(__AVX2__)
    return uint32_t(_mm256_movemask_ps((__m256)holds));
#else
    uint32_t bits = 0;
    for (int i = 0; i < W; i++) bits |= uint32_t(holds[i] & 1) << i;
    return bits;
#endif
}
INLINE VF to_float(VI v) { return __builtin_convertvector(v, VF); }

// acc + the sum of four products of unsigned and signed bytes in each lane, exactly.
INLINE VI dot4(VI acc, VI unsigned_bytes, VI signed_bytes) {
#if defined(__AVX512VNNI__)
    return (VI)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)unsigned_bytes, (__m512i)signed_bytes);
#elif defined(__AVX512F__)
    __m512i u = (__m512i)unsigned_bytes, s = (__m512i)signed_bytes, low = _mm512_set1_epi16(255);
    __m512i even = _mm512_madd_epi16(_mm512_and_si512(u, low), _mm512_srai_epi16(_mm512_slli_epi16(s, 8), 8));
    __m512i odd = _mm512_madd_epi16(_mm512_srli_epi16(u, 8), _mm512_srai_epi16(s, 8));
    return acc + (VI)_mm512_add_epi32(even, odd);
#elif defined(__AVX2__)
    __m256i u = (__m256i)unsigned_bytes, s = (__m256i)signed_bytes, low = _mm256_set1_epi16(255);
    __m256i even = _mm256_madd_epi16(_mm256_and_si256(u, low), _mm256_srai_epi16(_mm256_slli_epi16(s, 8), 8));
    __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(u, 8), _mm256_srai_epi16(s, 8));
    return acc + (VI)_mm256_add_epi32(even, odd);
#else
    for (int shift = 24; shift >= 0; shift -= 8)
        acc += (VI)((VU)unsigned_bytes << shift >> 24) * (signed_bytes << shift >> 24);
    return acc;
#endif
}

// float16 to float32, without infinities and NaN.
INLINE VF from_half(const uint16_t* from) {
#if defined(__AVX512F__)
    return (VF)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)from));
#else
    VU bits = __builtin_convertvector(load_as<VH>(from), VU);
    VF magnitude = (VF)((bits & 0x7fff) << 13) * splat(0x1p112f);
    return (VF)((VU)magnitude | (bits & 0x8000) << 16);
#endif
}

// b where either is no number.
INLINE VF larger(VF a, VF b) {
#if defined(__AVX512F__)
    return (VF)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
    return (VF)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return a > b ? a : b;
#endif
}
INLINE VF smaller(VF a, VF b) {
#if defined(__AVX512F__)
    return (VF)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
    return (VF)_mm256_min_ps((__m256)a, (__m256)b);
#else
    return a < b ? a : b;
#endif
}

// Sum of lanes, always as the same tree.
INLINE F4 fold(VF v) {
#if defined(__AVX512F__)
    auto half = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) +
                __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
    return __builtin_shufflevector(half, half, 0, 1, 2, 3) + __builtin_shufflevector(half, half, 4, 5, 6, 7);
#elif defined(__AVX2__)
    return __builtin_shufflevector(v, v, 0, 1, 2, 3) + __builtin_shufflevector(v, v, 4, 5, 6, 7);
#else
    return v;
#endif
}
INLINE float sum(VF v) {
    F4 f = fold(v);
    return (f[0] + f[2]) + (f[1] + f[3]);
}
// The sums of four vectors side by side, each by the tree of `sum`.
INLINE F4 sums(VF a, VF b, VF c, VF d) {
    F4 fa = fold(a), fb = fold(b), fc = fold(c), fd = fold(d);
    F4 ab = __builtin_shufflevector(fa, fb, 0, 4, 1, 5) + __builtin_shufflevector(fa, fb, 2, 6, 3, 7);
    F4 cd = __builtin_shufflevector(fc, fd, 0, 4, 1, 5) + __builtin_shufflevector(fc, fd, 2, 6, 3, 7);
    return __builtin_shufflevector(ab, cd, 0, 1, 4, 5) + __builtin_shufflevector(ab, cd, 2, 3, 6, 7);
}
// The largest lane of each of four vectors of numbers.
INLINE F4 largest(VF a, VF b, VF c, VF d) {
    auto quarter = [](VF v) {
#if defined(__AVX512F__)
        auto low = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7), high = __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
        auto half = low > high ? low : high;
        F4 x = __builtin_shufflevector(half, half, 0, 1, 2, 3), y = __builtin_shufflevector(half, half, 4, 5, 6, 7);
        return x > y ? x : y;
#elif defined(__AVX2__)
        F4 x = __builtin_shufflevector(v, v, 0, 1, 2, 3), y = __builtin_shufflevector(v, v, 4, 5, 6, 7);
        return x > y ? x : y;
#else
        return v;
#endif
    };
    auto pair = [](F4 x, F4 y) {
        F4 even = __builtin_shufflevector(x, y, 0, 4, 1, 5), odd = __builtin_shufflevector(x, y, 2, 6, 3, 7);
        return even > odd ? even : odd;
    };
    F4 ab = pair(quarter(a), quarter(b)), cd = pair(quarter(c), quarter(d));
    F4 even = __builtin_shufflevector(ab, cd, 0, 1, 4, 5), odd = __builtin_shufflevector(ab, cd, 2, 3, 6, 7);
    return even > odd ? even : odd;
}
INLINE float largest(VF v) { return largest(v, v, v, v)[0]; }

// e^x by Cody-Waite reduction and the polynomial of Cephes' expf: relative error below 2e-7. Zero below
// -87.3, infinity above 88.4; NaN stays NaN.
INLINE VF exp(VF x) {
    VF low = splat(-87.336544f), high = splat(88.722839f);
    VF c = smaller(high, larger(low, x));
    VF magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    VF n = (c * splat(1.44269504f) + magic) - magic;
    VF r = fma(n, splat(-0.693359375f), c);
    r = fma(n, splat(2.12194440e-4f), r);
    VF p = splat(1.9875691500e-4f);
    p = fma(p, r, splat(1.3981999507e-3f));
    p = fma(p, r, splat(8.3334519073e-3f));
    p = fma(p, r, splat(4.1665795894e-2f));
    p = fma(p, r, splat(1.6666665459e-1f));
    p = fma(p, r, splat(5.0000001201e-1f));
    p = fma(p, r * r, r + 1.0f);
#if defined(__AVX512F__)
    return (VF)_mm512_maskz_scalef_ps(_mm512_cmp_ps_mask((__m512)x, (__m512)low, _CMP_NLT_UQ), (__m512)p, (__m512)n);
#else
    VF whole = n == n ? n : VF{};
    VF result = p * (VF)((__builtin_convertvector(whole, VI) + 127) << 23);
    return x < low ? VF{} : result;
#endif
}

// 2^x for x <= 0: relative error below 2e-7, exactly 1 for 0, zero below -126 (or a little lower); NaN stays NaN. The
// polynomial is the one of degree 5 with the least relative error on [-1/2, 1/2] and the value 1 at 0.
INLINE VF power_of_two(VF x) {
#if defined(__AVX512F__)
    const VF n = (VF)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), r = x - n;
#else
    VF magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    const VF c = larger(splat(-127.0f), x), shifted = c + magic, r = c - (shifted - magic);
#endif
    VF p = splat(1.326472731e-3f);
    p = fma(p, r, splat(9.671512991e-3f));
    p = fma(p, r, splat(5.550733581e-2f));
    p = fma(p, r, splat(2.402224243e-1f));
    p = fma(p, r, splat(6.931470037e-1f));
    p = fma(p, r, splat(1.0f));
#if defined(__AVX512F__)
    return (VF)_mm512_maskz_scalef_ps(_mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ), (__m512)p, (__m512)n);
#else
    return p * (VF)(((VU)shifted << 23) + 0x3f800000u);
#endif
}

INLINE VF silu(VF x) { return x / (exp(-x) + 1.0f); }

// x * Phi(x), Phi the normal distribution: erf(t) / t by a polynomial in t^2 below 1, else erfc(t) = e^-P(t).
INLINE VF gelu(VF x) {
    const VF size = (VF)((VU)x & 0x7fffffffu) * splat(0.70710678f), square = size * size;
    VF near = splat(7.889119405e-5f);
    near = fma(near, square, splat(-8.020841244e-4f));
    near = fma(near, square, splat(5.189535336e-3f));
    near = fma(near, square, splat(-2.685444459e-2f));
    near = fma(near, square, splat(1.128360018e-1f));
    near = fma(near, square, splat(-3.761262714e-1f));
    near = fma(near, square, splat(1.128379166f));
    const VF most = splat(6.5f), t = size > most ? most : size;  // beyond, erfc is taken as zero
    VF far = splat(-5.733430344e-7f);
    far = fma(far, t, splat(2.120053801e-5f));
    far = fma(far, t, splat(-3.482493592e-4f));
    far = fma(far, t, splat(3.376859318e-3f));
    far = fma(far, t, splat(-2.176398634e-2f));
    far = fma(far, t, splat(1.004066246e-1f));
    far = fma(far, t, splat(6.438660271e-1f));
    far = fma(far, t, splat(1.122058885f));
    far = fma(far, t, splat(1.991159264e-3f));
    const VF tail = (size < splat(1.0f) ? 1.0f - size * near : size > most ? VF{} : exp(-far)) * 0.5f;
    return x * (x < VF{} ? tail : 1.0f - tail);
}

// x / (1 + e^-2u), u = sqrt(2 / pi) * (x + 0.044715 x^3): the approximation of `gelu` by tanh.
INLINE VF gelu_tanh(VF x) {
    const VF u = fma(x * x * splat(0.044715f), x, x) * splat(-1.5957691216f);
    return x / (exp(u) + 1.0f);
}

// Relative error below 3e-7: near zero an odd polynomial of Cephes' tanhf, else from e^2x. NaN stays NaN.
INLINE VF tanh(VF x) {
    const VU sign = (VU)x & 0x80000000u;
    const VF size = (VF)((VU)x & 0x7fffffffu), square = x * x;
    VF p = splat(-5.70498872745e-3f);
    p = fma(p, square, splat(2.06390887954e-2f));
    p = fma(p, square, splat(-5.37397155531e-2f));
    p = fma(p, square, splat(1.33314422036e-1f));
    p = fma(p, square, splat(-3.33332819422e-1f));
    const VF near = fma(p * square, x, x);
    const VF far = (VF)((VU)(1.0f - 2.0f / (exp(size + size) + 1.0f)) | sign);
    return size < splat(0.625f) ? near : far;
}

}  // namespace TRUNKLINE_ISA
}  // namespace trunkline
