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
constexpr int DIRECT_ROWS = MAX_ROWS < 4 ? MAX_ROWS : 4;  // that read bfloat16 panels as they are
constexpr int TILE_PANELS = 8;
constexpr long SERIAL_WORK = 1 << 15;  // weights x rows below which threads cost more than they save

// Panels whose sums and weights fit the registers beside the input of one of MR rows.
constexpr int panels_for(int rows) {
    if (rows == 1) return 8 / NV;  // each weight is used once: it takes no register for long
    int fit = (REGISTERS - 1) / ((rows + 1) * NV);
    return fit >= 8 ? 8 : fit >= 4 ? 4 : fit >= 2 ? 2 : 1;
}
constexpr int BLOCK_PANELS = panels_for(MAX_ROWS);
constexpr long K_BLOCK = BLOCK_PANELS >= 4 ? 128 : 256;  // inputs of a panel that stay in the first cache

// Where input k of row r is in a group of MR rows: rows lie side by side for each UNIT along k.
template <int MR, int UNIT>
INLINE long place(long r, long k) {
    return (k / UNIT * MR + r) * UNIT + k % UNIT;
}

// How weights and activations meet. `UNIT`: inputs that are taken at once.
struct Float32 {  // panel [k][16]
    static constexpr int UNIT = 1;
    static constexpr bool NARROW = false;
    typedef float X;
    typedef float Weight;
    template <int MR, int NP>
    INLINE void run(VF (&acc)[MR][NP * NV], const X* x, const Weight* w, long panel, long k0, long k1) {
        for (long k = k0; k < k1; k++) {
            VF b[NP * NV];
#pragma GCC unroll 8
            for (int i = 0; i < NP * NV; i++) b[i] = load(w + i / NV * panel + k * PANEL + i % NV * W);
#pragma GCC unroll 8
            for (int r = 0; r < MR; r++) {
                VF a = splat(x[place<MR, UNIT>(r, k)]);
#pragma GCC unroll 8
                for (int i = 0; i < NP * NV; i++) acc[r][i] = fma(a, b[i], acc[r][i]);
            }
        }
    }
};

struct Widened {  // panel [k / 2][16][2] of bfloat16, widened as it is read
    static constexpr int UNIT = 1;
    static constexpr bool NARROW = true;
    typedef float X;
    typedef uint16_t Weight;
    template <int MR, int NP>
    INLINE void run(VF (&acc)[MR][NP * NV], const X* x, const Weight* w, long panel, long k0, long k1) {
        for (long k = k0; k < k1; k += 2) {
#pragma GCC unroll 2
            for (int odd = 0; odd < 2; odd++) {
                VF b[NP * NV];
#pragma GCC unroll 8
                for (int i = 0; i < NP * NV; i++) {
                    const Weight* at = w + i / NV * panel + k * PANEL + i % NV * W * 2;
                    if (MR == 1 && i % NV == 0 && !odd) __builtin_prefetch(at + 1024, 0, 3);
                    VU pairs = load_as<VU>(at);
                    b[i] = (VF)(odd ? pairs & 0xffff0000u : pairs << 16);
                }
#pragma GCC unroll 8
                for (int r = 0; r < MR; r++) {
                    VF a = splat(x[place<MR, UNIT>(r, k + odd)]);
#pragma GCC unroll 8
                    for (int i = 0; i < NP * NV; i++) acc[r][i] = fma(a, b[i], acc[r][i]);
                }
            }
        }
    }
};

#if defined(__AVX512BF16__)
struct Pairs {  // the same panels, multiplied by bfloat16 activations in one instruction
    static constexpr int UNIT = 2;
    static constexpr bool NARROW = false;
    typedef uint16_t X;
    typedef uint16_t Weight;
    template <int MR, int NP>
    INLINE void run(VF (&acc)[MR][NP * NV], const X* x, const Weight* w, long panel, long k0, long k1) {
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
                __m512bh a = (__m512bh)_mm512_set1_epi32(load_as<int>(x + place<MR, UNIT>(r, k)));
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

// Sums of MR rows x NP panels over [k0, k1), continued from `c` if `resume`.
template <class Kind, int MR, int NP>
static void micro(const typename Kind::X* x, const typename Kind::Weight* w, long panel, long k0, long k1,
                  bool resume, float* c, long ldc) {
    VF acc[MR][NP * NV];
#pragma GCC unroll 8
    for (int r = 0; r < MR; r++)
#pragma GCC unroll 8
        for (int i = 0; i < NP * NV; i++) acc[r][i] = resume ? load(c + r * ldc + i * W) : VF{};
    Kind::template run<MR, NP>(acc, x, w, panel, k0, k1);
#pragma GCC unroll 8
    for (int r = 0; r < MR; r++)
#pragma GCC unroll 8
        for (int i = 0; i < NP * NV; i++) store(c + r * ldc + i * W, acc[r][i]);
}

// One group of rows x `count` panels: as many panels at once as the registers hold.
template <class Kind, int MR = MAX_ROWS>
static void group(long rows, const typename Kind::X* x, const typename Kind::Weight* w, long panel, long count,
                  long k0, long k1, bool resume, float* c, long ldc) {
    if (rows < MR) {
        if constexpr (MR > 1) group<Kind, MR - 1>(rows, x, w, panel, count, k0, k1, resume, c, ldc);
        return;
    }
    constexpr int NP = panels_for(MR);
    long p = 0;
    for (; p + NP <= count; p += NP)
        micro<Kind, MR, NP>(x, w + p * panel, panel, k0, k1, resume, c + p * PANEL, ldc);
    for (; p < count; p++) micro<Kind, MR, 1>(x, w + p * panel, panel, k0, k1, resume, c + p * PANEL, ldc);
}

// `count` bfloat16 panels over [k0, k1) as float32 panels of that length.
INLINE void widen_panels(const uint16_t* w, long panel, long count, long k0, long k1, float* to) {
    for (long p = 0; p < count; p++)
        for (long k = k0; k < k1; k += 2, to += 2 * PANEL)
            for (int i = 0; i < NV; i++) {
                VU pairs = load_as<VU>(w + p * panel + k * PANEL + i * W * 2);
                store(to + i * W, (VF)(pairs << 16));
                store(to + PANEL + i * W, (VF)(pairs & 0xffff0000u));
            }
}

// Few rows read each panel once, as it is. Many take turns on a stretch of it that stays in the first cache,
// widened for all of them where it must be.
template <class Kind>
static void tile(long rows, const typename Kind::X* x, const typename Kind::Weight* w, long panel, long count,
                 long k, float* c, long ldc) {
    if (rows <= (Kind::NARROW ? DIRECT_ROWS : MAX_ROWS))
        return group<Kind>(rows, x, w, panel, count, 0, k, false, c, ldc);
    for (long k0 = 0; k0 < k; k0 += K_BLOCK) {
        long k1 = k0 + K_BLOCK < k ? k0 + K_BLOCK : k;
        for (long p = 0; p < count; p += BLOCK_PANELS) {
            long some = count - p < BLOCK_PANELS ? count - p : BLOCK_PANELS;
            float wide[Kind::NARROW ? K_BLOCK * PANEL * BLOCK_PANELS : 1];
            if constexpr (Kind::NARROW) widen_panels(w + p * panel, panel, some, k0, k1, wide);
            for (long r = 0; r < rows; r += MAX_ROWS) {
                long mine = rows - r < MAX_ROWS ? rows - r : MAX_ROWS;
                float* sums = c + r * ldc + p * PANEL;
                if constexpr (Kind::NARROW)
                    group<Float32>(mine, x + r * k + k0 * mine, wide, (k1 - k0) * PANEL, some, 0, k1 - k0, k0 > 0,
                                   sums, ldc);
                else
                    group<Kind>(mine, x + r * k, w + p * panel, panel, some, k0, k1, k0 > 0, sums, ldc);
            }
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
static void region(const LinearArgs& args, const typename Kind::X* x, long row, long rows, long first, long last) {
    float c[ROW_BLOCK * TILE_PANELS * PANEL];
    const long k = padded_k(args.k, args.panels_bf16), panel = k * PANEL, unit = args.gated ? 2 : 1;
    const long width = rows <= MAX_ROWS ? TILE_PANELS : BLOCK_PANELS < unit ? unit : BLOCK_PANELS;
    const auto* panels = (const typename Kind::Weight*)args.panels;
    for (long p = first; p < last; p += width) {
        long count = last - p < width ? last - p : width, ldc = count * PANEL;
        tile<Kind>(rows, x + row * k, panels + p * panel, panel, count, k, c, ldc);
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

INLINE void convert(float from, float* to) { *to = from; }
INLINE void convert(uint16_t from, float* to) { *to = widen(from); }
INLINE void convert(uint16_t from, uint16_t* to) { *to = from; }

// Copy MR rows of k inputs (zeros up to `padded`) to where `place` says.
template <int MR, class Kind, class Given>
static void stage(long rows, const Given* from, long stride, typename Kind::X* to, long k, long padded) {
    if (rows < MR) {
        if constexpr (MR > 1) stage<MR - 1, Kind>(rows, from, stride, to, k, padded);
        return;
    }
    for (long i = 0; i < padded; i++)
        for (int r = 0; r < MR; r++) {
            typename Kind::X* at = to + place<MR, Kind::UNIT>(r, i);
            if (i < k)
                convert(from[r * stride + i], at);
            else
                *at = 0;
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
    auto stage_groups = [&](long from, long to) {
        for (long r = from * MAX_ROWS; r < m && r < to * MAX_ROWS; r += MAX_ROWS)
            stage<MAX_ROWS, Kind>(m - r < MAX_ROWS ? m - r : MAX_ROWS, given + r * args.x_stride, args.x_stride,
                                  staged + r * k, args.k, k);
    };
    const long groups = (m + MAX_ROWS - 1) / MAX_ROWS;
    const long unit = args.gated ? 2 : 1;
    const long units = num_panels(args.n, args.gated) / unit;
    const long blocks = (m + ROW_BLOCK - 1) / ROW_BLOCK, total = blocks * units;
    const int threads = m * args.n * k < SERIAL_WORK ? 1 : args.threads;
    if (stage_alone) stage_groups(0, groups);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        if (!in_place && !stage_alone) {
#pragma omp for schedule(static)
            for (long g = 0; g < groups; g++) stage_groups(g, g + 1);
        }
        const long team = omp_get_num_threads(), me = omp_get_thread_num();
        const long end = total * (me + 1) / team;
        for (long u = total * me / team; u < end;) {
            long block = u / units, first = u % units;
            long last = units - first < end - u ? units : first + end - u;
            long row = block * ROW_BLOCK, rows = m - row < ROW_BLOCK ? m - row : ROW_BLOCK;
            region<Kind>(args, x, row, rows, first * unit, last * unit);
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
