// Operations that take each row by itself: RMS norm, and rotary position with an optional norm before it.
#pragma once

#include "args.h"
#include "simd.h"

#include <omp.h>

namespace trunkline {
namespace TRUNKLINE_ISA {

constexpr long SERIAL_ELEMENTS = 1 << 14;  // below this, threads cost more than they save

// 1 / sqrt(mean(x^2) + eps)
template <class T>
INLINE float norm_scale(const T* x, long dim, float eps) {
    VF squares = {};
    long i = 0;
    for (; i + W <= dim; i += W) {
        VF v = load(x + i);
        squares = fma(v, v, squares);
    }
    float rest = 0;
    for (; i < dim; i++) rest += widen(x[i]) * widen(x[i]);
    return 1.0f / __builtin_sqrtf((sum(squares) + rest) / float(dim) + eps);
}

template <class T, class O>
INLINE void normalize(const T* x, const T* gain, O* out, long dim, float eps) {
    const float scale = norm_scale(x, dim, eps);
    long i = 0;
    for (; i + W <= dim; i += W) store(out + i, load(x + i) * scale * load(gain + i));
    for (; i < dim; i++) store_one(out + i, widen(x[i]) * scale * widen(gain[i]));
}

template <class T>
static void norm_rows(const NormArgs& a) {
    const long rows = a.tokens * a.heads;
#pragma omp parallel for schedule(static) num_threads(a.threads) if (a.threads > 1 && rows * a.dim > SERIAL_ELEMENTS)
    for (long row = 0; row < rows; row++) {
        long token = row / a.heads, head = row % a.heads;
        normalize((const T*)a.x + token * a.x_stride + head * a.dim,
                  (const T*)a.gain + (a.gain_heads == 1 ? 0 : head) * a.dim,
                  (T*)a.out + token * a.out_stride + head * a.dim, a.dim, a.eps);
    }
}

// out[i] = x[i] * cos[i] + x[i +- dim / 2] * sin[i]
template <class T>
INLINE void rotate_head(const float* x, const float* table, T* out, long dim) {
    const long half = dim / 2;
    const float* sine = table + dim;
    for (long base = 0; base < dim; base += half) {
        const float* other = x + (base ? 0 : half);
        long i = 0;
        for (; i + W <= half; i += W)
            store(out + base + i, fma(load(x + base + i), load(table + base + i), load(other + i) * load(sine + base + i)));
        for (; i < half; i++)
            store_one(out + base + i, x[base + i] * table[base + i] + other[i] * sine[base + i]);
    }
}

template <class T>
static void rotate_rows(const NormArgs& a) {
    const long rows = a.tokens * a.heads;
#pragma omp parallel for schedule(static) num_threads(a.threads) if (a.threads > 1 && rows * a.dim > SERIAL_ELEMENTS)
    for (long row = 0; row < rows; row++) {
        float wide[MAX_HEAD_DIM];
        long token = row / a.heads, head = row % a.heads;
        const T* x = (const T*)a.x + token * a.x_stride + head * a.dim;
        if (a.gain)
            normalize(x, (const T*)a.gain + (a.gain_heads == 1 ? 0 : head) * a.dim, wide, a.dim, a.eps);
        else
            for (long i = 0; i < a.dim; i++) wide[i] = widen(x[i]);
        rotate_head(wide, a.table + token * 2 * a.dim, (T*)a.out + token * a.out_stride + head * a.dim, a.dim);
    }
}

static void rms_norm(const NormArgs& a) { a.bf16 ? norm_rows<uint16_t>(a) : norm_rows<float>(a); }
static void rotate(const NormArgs& a) { a.bf16 ? rotate_rows<uint16_t>(a) : rotate_rows<float>(a); }

}  // namespace TRUNKLINE_ISA
}  // namespace trunkline
