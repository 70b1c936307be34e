// x [m, k] times packed weights, with what is done to the sums while they are at hand.
//
// A row's bits do not depend on m, on where the row lies, or on the number of threads: see micro.h. Threads split
// slabs and rows, never k.
#pragma once

#include "quantized.h"

#include <omp.h>

namespace trunkline {
namespace TRUNKLINE_ISA {

constexpr long ROW_BLOCK = 96;         // rows whose sums are kept at hand while a slab is read
constexpr long SERIAL_WORK = 1 << 15;  // weights x rows below which threads cost more than they save

INLINE VF activate(VF x, Gate gate) {
    return gate == Gate::silu ? silu(x) : gate == Gate::gelu ? gelu(x) : gelu_tanh(x);
}

template <class T>
INLINE void finish(const LinearArgs& args, long row, long column, long panel, const float* c) {
    float values[PANEL];
    const float* bias = args.bias ? args.bias + panel * PANEL : nullptr;
    long at = row * args.n + column;
    long columns = args.n - column < PANEL ? args.n - column : PANEL;
    const T* residual = args.residual ? (const T*)args.residual + at : nullptr;
    T* out = (T*)args.out + at;
    for (int i = 0; i < NV; i++) {
        VF v = load(c + i * W);
        if (bias) v += load(bias + i * W);
        if (args.gated) {
            VF up = load(c + PANEL + i * W);
            if (bias) up += load(bias + PANEL + i * W);
            v = activate(v, args.gate) * up;
        }
        if (columns == PANEL) {
            if (residual) v += load(residual + i * W);
            store(out + i * W, v);
        } else {
            store(values + i * W, v);
        }
    }
    if (columns < PANEL)
        for (long i = 0; i < columns; i++) store_one(out + i, residual ? values[i] + widen(residual[i]) : values[i]);
}

// Join the columns from `column` on of a row's sums, `count` of them, with what is best so far. `mask`: null, or bits of
// the columns that the row may choose; the others must be finite too.
INLINE void keep_top(Top& top, const float* c, long column, long count, const uint32_t* mask) {
    const VF hidden = splat(-__builtin_inff());
    float seen[SLAB * PANEL];
    VF most = hidden, zeros = {};
    bool any = mask == nullptr;
    for (long i = 0; i < count; i += W) {
        VF v = load_some(c + i, count - i);
        zeros += v * 0.0f;  // NaN for what is not finite
        const VI lane = lanes() + int32_t(i);
        VI may = lane < int32_t(count);
        if (mask) {
            const uint32_t bits = mask[(column + i) / 32] >> (column + i) % 32;
            may &= (VI)((VU)splat_int(int32_t(bits)) >> (VU)lanes() & 1) != 0;
            any = any || (bits & ((1u << W) - 1)) != 0;
        }
        v = may ? v : hidden;
        store(seen + i, v);
        most = larger(most, v);
    }
    top.finite = top.finite && sum(zeros) == 0;
    const float best = largest(most);
    if (!any || (top.index >= 0 && !(best > top.value))) return;
    for (long i = 0; i < count; i++)
        if (seen[i] == best) {
            top.value = best, top.index = int32_t(column + i);
            return;
        }
}

// A thread's share of a product: x as `stage` leaves it.
template <class Kind>
struct Share {
    const LinearArgs& args;
    const typename Kind::X* x;
    const float* scales;  // of whole numbers, as `sums`
    const int32_t* sums;
    Top* top;  // [m] of this thread

    // Rows [row, row + rows) times one slab.
    void region(long row, long rows, long slab) const {
        alignas(LINE) float c[ROW_BLOCK * SLAB * PANEL];
        const long k = padded_k(args.k, args.format), groups = scale_groups(args.k, args.format);
        const long first = slab * SLAB, width = slab_width(first, num_panels(args.n, args.gated));
        const char* w = (const char*)args.panels + first * panel_bytes(args.k, args.format);
        if (args.format.store == Store::int4) {
            multiply_int4(rows, (const uint8_t*)(x + row * k), w, width, k, args.format.group, scales + row * groups,
                          sums + row * groups, c, width * PANEL);
        } else {
            multiply<Kind>(rows, x + row * k, w, width, k / Kind::DEPTH, c, width * PANEL);
            if (args.format.store == Store::int8) scale_sums(rows, w, width, k / Kind::DEPTH, scales + row, c);
        }
        const long unit = args.gated ? 2 : 1, column = first / unit * PANEL;
        for (long r = 0; r < rows; r++) {
            const float* of_row = c + r * width * PANEL;
            if (top) {
                const long count = args.n - column < width * PANEL ? args.n - column : width * PANEL;
                keep_top(top[row + r], of_row, column, count, args.masks ? args.masks[row + r] : nullptr);
                continue;
            }
            for (long p = 0; p < width; p += unit)
                if (args.out_bf16)
                    finish<uint16_t>(args, row + r, column + p / unit * PANEL, first + p, of_row + p * PANEL);
                else
                    finish<float>(args, row + r, column + p / unit * PANEL, first + p, of_row + p * PANEL);
        }
    }
};

template <class Kind, class Given>
static void product(const LinearArgs& args) {
    typedef typename Kind::X X;
    const long k = padded_k(args.k, args.format), m = args.m;
    const bool whole = is_whole(args.format);
    const bool in_place = m == 1 && !whole && sizeof(X) == sizeof(Given) && k == args.k;
    const bool stage_alone = !in_place && m * k < SERIAL_WORK;
    const Given* given = (const Given*)args.x;
    X* staged = (X*)args.staging;
    float* scales = (float*)((char*)args.staging + m * k * 4);
    int32_t* sums = (int32_t*)(scales + m * scale_groups(args.k, args.format));
    const long blocks = (m + ROW_BLOCK - 1) / ROW_BLOCK;  // of nearly the same number of rows
    auto begin_of = [&](long block) { return m * block / blocks; };
    auto stage_share = [&](long part, long parts) {
        for (long block = 0; block < blocks; block++) {
            const long row = begin_of(block), rows = begin_of(block + 1) - row, groups = num_groups(rows);
            const long at = row * scale_groups(args.k, args.format);
            for (long g = groups * part / parts; g < groups * (part + 1) / parts; g++)
                if constexpr (Kind::UNIT == 4)
                    stage_whole(rows, g, given + row * args.x_stride, args.x_stride, staged + row * k, args.k,
                                args.format, scales + at, sums + at);
                else
                    stage<Kind>(rows, g, given + row * args.x_stride, args.x_stride, staged + row * k, args.k, k);
        }
    };
    const long slabs = (num_panels(args.n, args.gated) + SLAB - 1) / SLAB, total = blocks * slabs;
    const int threads = m * args.n * k < SERIAL_WORK ? 1 : args.threads;
    if (stage_alone) stage_share(0, 1);
    if (args.top)
        for (long i = 0; i < args.threads * m; i++) args.top[i] = {0, -1, true};
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        const long team = omp_get_num_threads(), me = omp_get_thread_num();
        if (!in_place && !stage_alone) {
            stage_share(me, team);
#pragma omp barrier
        }
        const Share<Kind> share{args, in_place ? (const X*)args.x : staged, scales, sums,
                                args.top ? args.top + me * m : nullptr};
        for (long u = total * me / team; u < total * (me + 1) / team; u++) {
            const long row = begin_of(u / slabs);
            share.region(row, begin_of(u / slabs + 1) - row, u % slabs);
        }
    }
    if (args.top)  // threads took columns in order, so equals keep the first
        for (long t = 1; t < args.threads; t++)
            for (long r = 0; r < m; r++) {
                const Top& other = args.top[t * m + r];
                Top& best = args.top[r];
                const bool finite = best.finite && other.finite;
                if (other.index >= 0 && (best.index < 0 || other.value > best.value)) best = other;
                best.finite = finite;
            }
}

static void linear(const LinearArgs& args) {
    if (args.m == 0) return;
    if (is_whole(args.format))
        args.x_bf16 ? product<Bytes, uint16_t>(args) : product<Bytes, float>(args);
    else if (args.format.store == Store::float32)
        args.x_bf16 ? product<Float32, uint16_t>(args) : product<Float32, float>(args);
    else if (!args.x_bf16)
        product<Widened, float>(args);
    else
        product<Pairs, uint16_t>(args);
}

}  // namespace TRUNKLINE_ISA
}  // namespace trunkline
