// x [m, k] times packed weights, with what is done to the sums while they are at hand.
//
// A row's bits do not depend on m, on where the row lies, or on the number of threads: see micro.h. Threads split
// slabs and rows, never k.
#pragma once

#include "micro.h"

#include <omp.h>

namespace trunkline {
namespace TRUNKLINE_ISA {

constexpr long ROW_BLOCK = 96;         // rows whose sums are kept at hand while a slab is read
constexpr long SERIAL_WORK = 1 << 15;  // weights x rows below which threads cost more than they save

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
            v = silu(v) * up;
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

// Rows [row, row + rows), staged at x, times one slab.
template <class Kind>
static void region(const LinearArgs& args, const typename Kind::X* x, long row, long rows, long slab) {
    float c[ROW_BLOCK * SLAB * PANEL];
    const long k = padded_k(args.k, args.panels_bf16), first = slab * SLAB, unit = args.gated ? 2 : 1;
    const long left = num_panels(args.n, args.gated) - first, width = left < SLAB ? left : SLAB;
    multiply<Kind>(rows, x, (const typename Kind::Weight*)args.panels + first * k * PANEL, width, k, c, width * PANEL);
    for (long r = 0; r < rows; r++)
        for (long p = 0; p < width; p += unit) {
            const float* sums = c + (r * width + p) * PANEL;
            if (args.out_bf16)
                finish<uint16_t>(args, row + r, (first + p) / unit * PANEL, first + p, sums);
            else
                finish<float>(args, row + r, (first + p) / unit * PANEL, first + p, sums);
        }
}

template <class Kind, class Given>
static void product(const LinearArgs& args) {
    typedef typename Kind::X X;
    const long k = padded_k(args.k, args.panels_bf16), m = args.m;
    const bool in_place = m == 1 && sizeof(X) == sizeof(Given) && k == args.k;
    const bool stage_alone = !in_place && m * k < SERIAL_WORK;
    const Given* given = (const Given*)args.x;
    X* staged = (X*)args.staging;
    const X* x = in_place ? (const X*)args.x : staged;
    const long blocks = (m + ROW_BLOCK - 1) / ROW_BLOCK;  // of nearly the same number of rows
    auto begin_of = [&](long block) { return m * block / blocks; };
    auto stage_share = [&](long part, long parts) {
        for (long block = 0; block < blocks; block++) {
            const long row = begin_of(block), rows = begin_of(block + 1) - row, groups = num_groups(rows);
            for (long g = groups * part / parts; g < groups * (part + 1) / parts; g++)
                stage<Kind>(rows, g, given + row * args.x_stride, args.x_stride, staged + row * k, args.k, k);
        }
    };
    const long slabs = (num_panels(args.n, args.gated) + SLAB - 1) / SLAB, total = blocks * slabs;
    const int threads = m * args.n * k < SERIAL_WORK ? 1 : args.threads;
    if (stage_alone) stage_share(0, 1);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        const long team = omp_get_num_threads(), me = omp_get_thread_num();
        if (!in_place && !stage_alone) {
            stage_share(me, team);
#pragma omp barrier
        }
        for (long u = total * me / team; u < total * (me + 1) / team; u++) {
            const long row = begin_of(u / slabs);
            region<Kind>(args, x + row * k, row, begin_of(u / slabs + 1) - row, u % slabs);
        }
    }
}

static void linear(const LinearArgs& args) {
    if (args.m == 0) return;
    if (!args.panels_bf16)
        args.x_bf16 ? product<Float32, uint16_t>(args) : product<Float32, float>(args);
    else if (!args.x_bf16)
        product<Widened, float>(args);
    else
        product<Pairs, uint16_t>(args);
}

}  // namespace TRUNKLINE_ISA
}  // namespace trunkline
