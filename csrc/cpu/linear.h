// x [m, k] times packed weights: every output is one running sum over k, in order, for every m.
//
// A micro kernel holds the sums of MR rows x NP panels of 16 columns in registers. What shares a call only
// decides which sums are held at once, never the order within one, so a row's bits do not depend on m, on
// where the row lies, or on the number of threads; threads split panels and rows, never k.
#pragma once

#include "args.h"
#include "simd.h"

#include <omp.h>

namespace trunkline {
namespace TRUNKLINE_ISA {

constexpr int NV = PANEL / W;  // vectors across a panel
constexpr int MAX_ROWS = REGISTERS == 32 ? 6 : W == 8 ? 6 : 2;
constexpr int ROW_BLOCK = 96;  // rows whose sums are kept at hand while a panel is read
constexpr int TILE_PANELS = 8;
constexpr long SERIAL_WORK = 1 << 15;  // weights x rows below which threads cost more than they save

// Panels whose sums fit the registers beside MR rows.
constexpr int panels_for(int rows) {
    int fit = (REGISTERS == 32 ? 24 : W == 8 ? 12 : 8) / (rows * NV);
    return fit >= 8 ? 8 : fit >= 4 ? 4 : fit >= 2 ? 2 : 1;
}
constexpr int BLOCK_PANELS = panels_for(MAX_ROWS);
constexpr long K_BLOCK = BLOCK_PANELS >= 4 ? 256 : 512;  // inputs of a panel that stay in the first cache

// How weights and activations meet. `pair`: activations and weights are taken two at a time.
struct Float32 {  // panel [k][16]
    typedef float X;
    typedef float Weight;
    template <int MR, int NP>
    INLINE void run(VF (&acc)[MR][NP * NV], const X* x, long ldx, const Weight* w, long panel, long k0, long k1) {
        for (long k = k0; k < k1; k++) {
            VF b[NP * NV];
#pragma GCC unroll 8
            for (int i = 0; i < NP * NV; i++) b[i] = load(w + i / NV * panel + k * PANEL + i % NV * W);
#pragma GCC unroll 8
            for (int r = 0; r < MR; r++) {
                VF a = splat(x[r * ldx + k]);
#pragma GCC unroll 8
                for (int i = 0; i < NP * NV; i++) acc[r][i] = fma(a, b[i], acc[r][i]);
            }
        }
    }
};

struct Widened {  // panel [k / 2][16][2] of bfloat16, widened as it is read
    typedef float X;
    typedef uint16_t Weight;
    template <int MR, int NP>
    INLINE void run(VF (&acc)[MR][NP * NV], const X* x, long ldx, const Weight* w, long panel, long k0, long k1) {
        for (long k = k0; k < k1; k += 2) {
            VU b[NP * NV];
#pragma GCC unroll 8
            for (int i = 0; i < NP * NV; i++) {
                const Weight* at = w + i / NV * panel + k * PANEL + i % NV * W * 2;
                if (MR == 1 && i % NV == 0) __builtin_prefetch(at + 1024, 0, 3);
                b[i] = load_as<VU>(at);
            }
#pragma GCC unroll 8
            for (int r = 0; r < MR; r++) {
                VF a = splat(x[r * ldx + k]);
#pragma GCC unroll 8
                for (int i = 0; i < NP * NV; i++) acc[r][i] = fma(a, (VF)(b[i] << 16), acc[r][i]);
            }
#pragma GCC unroll 8
            for (int r = 0; r < MR; r++) {
                VF a = splat(x[r * ldx + k + 1]);
#pragma GCC unroll 8
                for (int i = 0; i < NP * NV; i++) acc[r][i] = fma(a, (VF)(b[i] & 0xffff0000u), acc[r][i]);
            }
        }
    }
};

#if defined(__AVX512BF16__)
struct Pairs {  // the same panels, multiplied by bfloat16 activations in one instruction
    typedef uint16_t X;
    typedef uint16_t Weight;
    template <int MR, int NP>
    INLINE void run(VF (&acc)[MR][NP * NV], const X* x, long ldx, const Weight* w, long panel, long k0, long k1) {
        for (long k = k0; k < k1; k += 2) {
            __m512bh b[NP * NV];
#pragma GCC unroll 8
            for (int i = 0; i < NP * NV; i++) {
                const Weight* at = w + i * panel + k * PANEL;
                if (MR == 1) __builtin_prefetch(at + 1024, 0, 3);
                b[i] = load_as<__m512bh>(at);
            }
#pragma GCC unroll 8
            for (int r = 0; r < MR; r++) {
                __m512bh a = (__m512bh)_mm512_set1_epi32(load_as<int>(x + r * ldx + k));
#pragma GCC unroll 8
                for (int i = 0; i < NP * NV; i++)
                    acc[r][i] = (VF)_mm512_dpbf16_ps((__m512)acc[r][i], a, b[i]);
            }
        }
    }
};
#else
typedef Widened Pairs;
#endif

// Sums of MR rows x NP panels over [k0, k1), continued from `c` unless k0 is 0.
template <class Kind, int MR, int NP>
static void micro(const typename Kind::X* x, long ldx, const typename Kind::Weight* w, long panel, long k0,
                  long k1, float* c, long ldc) {
    VF acc[MR][NP * NV];
#pragma GCC unroll 8
    for (int r = 0; r < MR; r++)
#pragma GCC unroll 8
        for (int i = 0; i < NP * NV; i++) acc[r][i] = k0 ? load(c + r * ldc + i * W) : VF{};
    Kind::template run<MR, NP>(acc, x, ldx, w, panel, k0, k1);
#pragma GCC unroll 8
    for (int r = 0; r < MR; r++)
#pragma GCC unroll 8
        for (int i = 0; i < NP * NV; i++) store(c + r * ldc + i * W, acc[r][i]);
}

template <class Kind, int MR, int NP>
static void panels_of(const typename Kind::X* x, long ldx, const typename Kind::Weight* w, long panel, long count,
                      long k0, long k1, float* c, long ldc) {
    long p = 0;
    for (; p + NP <= count; p += NP)
        micro<Kind, MR, NP>(x, ldx, w + p * panel, panel, k0, k1, c + p * PANEL, ldc);
    for (; p < count; p++) micro<Kind, MR, 1>(x, ldx, w + p * panel, panel, k0, k1, c + p * PANEL, ldc);
}

// A few rows at once: as many panels as the registers hold.
template <class Kind, int MR = MAX_ROWS>
INLINE void few_rows(long rows, const typename Kind::X* x, long ldx, const typename Kind::Weight* w, long panel,
                     long count, long k0, long k1, float* c, long ldc) {
    if (rows == MR)
        panels_of<Kind, MR, panels_for(MR)>(x, ldx, w, panel, count, k0, k1, c, ldc);
    else if constexpr (MR > 1)
        few_rows<Kind, MR - 1>(rows, x, ldx, w, panel, count, k0, k1, c, ldc);
}

template <class Kind>
static void tile(long rows, const typename Kind::X* x, long ldx, const typename Kind::Weight* w, long panel,
                 long count, long k, float* c, long ldc) {
    if (rows <= MAX_ROWS) return few_rows<Kind>(rows, x, ldx, w, panel, count, 0, k, c, ldc);
    for (long k0 = 0; k0 < k; k0 += K_BLOCK) {
        long k1 = k0 + K_BLOCK < k ? k0 + K_BLOCK : k;
        for (long p = 0; p < count; p += BLOCK_PANELS) {
            long some = count - p < BLOCK_PANELS ? count - p : BLOCK_PANELS;
            for (long r = 0; r < rows; r += MAX_ROWS)
                few_rows<Kind>(rows - r < MAX_ROWS ? rows - r : MAX_ROWS, x + r * ldx, ldx, w + p * panel, panel,
                               some, k0, k1, c + r * ldc + p * PANEL, ldc);
        }
    }
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

// Rows [row, row + rows) x panels [first, last).
template <class Kind>
static void region(const LinearArgs& args, const typename Kind::X* x, long ldx, long row, long rows, long first,
                   long last) {
    float c[ROW_BLOCK * TILE_PANELS * PANEL];
    const long k = padded_k(args.k, args.panels_bf16), panel = k * PANEL, unit = args.gated ? 2 : 1;
    const long width = rows <= MAX_ROWS ? TILE_PANELS : BLOCK_PANELS < unit ? unit : BLOCK_PANELS;
    const auto* panels = (const typename Kind::Weight*)args.panels;
    for (long p = first; p < last; p += width) {
        long count = last - p < width ? last - p : width, ldc = count * PANEL;
        tile<Kind>(rows, x + row * ldx, ldx, panels + p * panel, panel, count, k, c, ldc);
        for (long r = 0; r < rows; r++) {
            for (long i = 0; i < count; i += unit) {
                long column = (p + i) / unit * PANEL;
                if (args.out_bf16)
                    finish<uint16_t>(args, row + r, column, p + i, c + r * ldc + i * PANEL);
                else
                    finish<float>(args, row + r, column, p + i, c + r * ldc + i * PANEL);
            }
        }
    }
}

INLINE void stage_row(const float* from, float* to, long k, long padded) {
    __builtin_memcpy(to, from, k * 4);
    if (padded > k) to[k] = 0;
}
INLINE void stage_row(const uint16_t* from, uint16_t* to, long k, long padded) {
    __builtin_memcpy(to, from, k * 2);
    if (padded > k) to[k] = 0;
}
INLINE void stage_row(const uint16_t* from, float* to, long k, long padded) {
    long i = 0;
    for (; i + W <= k; i += W) store(to + i, load(from + i));
    for (; i < k; i++) to[i] = widen(from[i]);
    if (padded > k) to[k] = 0;
}

template <class Kind, class Given>
static void product(const LinearArgs& args) {
    typedef typename Kind::X X;
    const long k = padded_k(args.k, args.panels_bf16), m = args.m;
    const bool in_place = sizeof(X) == sizeof(Given) && k == args.k;
    const Given* given = (const Given*)args.x;
    const X* x = in_place ? (const X*)args.x : (const X*)args.staging;
    const long ldx = in_place ? args.x_stride : k;
    const long unit = args.gated ? 2 : 1;
    const long units = num_panels(args.n, args.gated) / unit;
    const long blocks = (m + ROW_BLOCK - 1) / ROW_BLOCK, total = blocks * units;
    int threads = m * args.n * k < SERIAL_WORK ? 1 : args.threads;
    const bool stage_first = !in_place && m * k < SERIAL_WORK;
    if (stage_first)
        for (long r = 0; r < m; r++) stage_row(given + r * args.x_stride, (X*)args.staging + r * k, args.k, k);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        if (!in_place && !stage_first) {
#pragma omp for schedule(static)
            for (long r = 0; r < m; r++)
                stage_row(given + r * args.x_stride, (X*)args.staging + r * k, args.k, k);
        }
        const long team = omp_get_num_threads(), me = omp_get_thread_num();
        const long end = total * (me + 1) / team;
        for (long u = total * me / team; u < end;) {
            long block = u / units, first = u % units;
            long last = units - first < end - u ? units : first + end - u;
            long row = block * ROW_BLOCK, rows = m - row < ROW_BLOCK ? m - row : ROW_BLOCK;
            region<Kind>(args, x, ldx, row, rows, first * unit, last * unit);
            u += last - first;
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
