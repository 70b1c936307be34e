// Operations that take each row by itself: RMS norm, rotary position with an optional norm before it, storing KV.
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
INLINE void scale_row(const T* x, const T* gain, float scale, O* out, long dim) {
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
        const T* x = (const T*)a.x + token * a.x_stride + head * a.dim;
        scale_row(x, (const T*)a.gain + (a.gain_heads == 1 ? 0 : head) * a.dim, norm_scale(x, a.dim, a.eps),
                  (T*)a.out + token * a.out_stride + head * a.dim, a.dim);
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
    constexpr long SCALES = 8;  // that are computed one after another: each is a chain of its own
#pragma omp parallel for schedule(static) num_threads(a.threads) if (a.threads > 1 && a.tokens * a.heads * a.dim > SERIAL_ELEMENTS)
    for (long token = 0; token < a.tokens; token++) {
        float wide[MAX_HEAD_DIM], scales[SCALES];
        const T *x = (const T*)a.x + token * a.x_stride, *gain = (const T*)a.gain;
        T* out = (T*)a.out + token * a.out_stride;
        for (long head = 0; head < a.heads; head++, x += a.dim, out += a.dim) {
            if (gain && head % SCALES == 0)
                for (long i = 0; i < SCALES && head + i < a.heads; i++) scales[i] = norm_scale(x + i * a.dim, a.dim, a.eps);
            if (gain)
                scale_row(x, gain + (a.gain_heads == 1 ? 0 : head) * a.dim, scales[head % SCALES], wide, a.dim);
            else
                for (long i = 0; i < a.dim; i++) wide[i] = widen(x[i]);
            rotate_head(wide, a.table + token * 2 * a.dim, out, a.dim);
        }
    }
}

// Round one head; see StoreArgs.
template <class T>
static void store_whole(const T* x, long dim, int8_t* to) {
    VF most = {}, excess = {};  // the excess is NaN where a number is not finite
    long i = 0;
    for (; i + W <= dim; i += W) {
        const VF v = load(x + i);
        most = larger((VF)((VU)v & 0x7fffffffu), most);
        excess += v - v;
    }
    float top = largest(most), rest = sum(excess);
    for (; i < dim; i++) {
        const float v = widen(x[i]), size = v < 0 ? -v : v;
        top = size > top ? size : top;
        rest += v - v;
    }
    const uint16_t bits = narrow(top / 127.0f + rest);
    const float scale = widen(bits);
    __builtin_memcpy(to + dim, &bits, SCALE_BYTES);
    const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
    for (i = 0; i < dim; i++) {
        const float level = widen(x[i]) / scale;
        const float whole = level >= -127.0f ? level <= 127.0f ? (level + magic) - magic : 127.0f : -127.0f;
        to[i] = scale > 0 ? int8_t(whole) : 0;
    }
}

template <class T, class P>
static void store_heads(const StoreArgs& a) {
    const long width = head_width(a.store, a.dim);
#pragma omp parallel for schedule(static) num_threads(a.threads) if (a.threads > 1 && a.tokens * a.heads * a.dim > SERIAL_ELEMENTS)
    for (long token = 0; token < a.tokens; token++) {
        const T* from = (const T*)a.rows + token * a.stride;
        const long page = a.slots[token] / a.page_size, offset = a.slots[token] % a.page_size;
        P* to = (P*)a.pool + (page * a.heads * a.page_size + offset) * width;
        for (long head = 0; head < a.heads; head++, from += a.dim, to += a.page_size * width) {
            if constexpr (sizeof(P) == 1)
                store_whole(from, a.dim, to);
            else if constexpr (sizeof(T) == sizeof(P))
                __builtin_memcpy(to, from, a.dim * sizeof(P));
            else
                for (long i = 0; i < a.dim; i++) store_one(to + i, widen(from[i]));
        }
    }
}

static void store_rows(const StoreArgs& a) {
    if (a.store == Store::int8)
        a.bf16 ? store_heads<uint16_t, int8_t>(a) : store_heads<float, int8_t>(a);
    else if (a.store == Store::bfloat16)
        a.bf16 ? store_heads<uint16_t, uint16_t>(a) : store_heads<float, uint16_t>(a);
    else
        a.bf16 ? store_heads<uint16_t, float>(a) : store_heads<float, float>(a);
}

static void rms_norm(const NormArgs& a) { a.bf16 ? norm_rows<uint16_t>(a) : norm_rows<float>(a); }
static void rotate(const NormArgs& a) { a.bf16 ? rotate_rows<uint16_t>(a) : rotate_rows<float>(a); }

}  // namespace TRUNKLINE_ISA
}  // namespace trunkline
