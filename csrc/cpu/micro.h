// Products of activations with packed panels: the inner loops of `linear` and of attention.
//
// Weights lie in panels of 16 columns, and up to SLAB panels side by side in a slab, so that a thread reads one
// stream of memory: [k / UNIT][panel of the slab][16][UNIT]. A micro kernel holds the sums of MR rows x NP panels
// in registers and runs along k. What shares a call only decides which sums are held at once, never the order
// within one: every sum runs over k from 0 upwards, for one row as for a thousand.
#pragma once

#include "args.h"
#include "simd.h"

namespace trunkline {
namespace TRUNKLINE_ISA {

constexpr int NV = PANEL / W;  // vectors across a panel
constexpr int MAX_ROWS = REGISTERS == 32 ? 6 : W == 8 ? 6 : 2;
constexpr int DIRECT_ROWS = MAX_ROWS < 4 ? MAX_ROWS : 4;  // that read bfloat16 panels as they are
constexpr long STREAM_AHEAD = 2048;  // bytes between a weight in use and the one that is fetched

// Panels whose sums and weights fit the registers beside the input of one of MR rows.
constexpr int panels_for(int rows) {
    int fit = rows == 1 ? 8 / NV : (REGISTERS - 1) / ((rows + 1) * NV);
    return fit >= 4 ? 4 : fit >= 2 ? 2 : 1;
}
constexpr int BLOCK_PANELS = panels_for(MAX_ROWS);
constexpr long K_BLOCK = BLOCK_PANELS >= 4 ? 128 : 256;  // inputs of a slab that stay in the first cache

// Cache lines to fetch while a micro kernel runs: so many at each step along k.
struct Ahead {
    const char* at;
    long lines;

    INLINE_MEMBER void step() {
        for (long i = 0; i < lines; i++) __builtin_prefetch(at + 64 * i, 0, 3);
        at += 64 * lines;
    }
};

// Where input k of row r is in a group of MR rows: rows lie side by side for each UNIT along k.
template <int MR, int UNIT>
INLINE long place(long r, long k) {
    return (k / UNIT * MR + r) * UNIT + k % UNIT;
}

// How weights and activations meet. `UNIT`: inputs that are taken at once.
struct Float32 {  // [k][panel][16]
    static constexpr int UNIT = 1;
    static constexpr bool NARROW = false;
    typedef float X;
    typedef float Weight;
    template <int MR, int NP>
    INLINE void run(VF (&acc)[MR][NP * NV], const X* x, const Weight* w, long width, long k0, long k1, Ahead ahead) {
        for (long k = k0; k < k1; k++) {
            ahead.step();
            VF b[NP * NV];
#pragma GCC unroll 8
            for (int i = 0; i < NP * NV; i++) b[i] = load(w + k * width * PANEL + i * W);
#pragma GCC unroll 8
            for (int r = 0; r < MR; r++) {
                VF a = splat(x[place<MR, UNIT>(r, k)]);
#pragma GCC unroll 8
                for (int i = 0; i < NP * NV; i++) acc[r][i] = fma(a, b[i], acc[r][i]);
            }
        }
    }
};

struct Widened {  // [k / 2][panel][16][2] of bfloat16, widened as it is read
    static constexpr int UNIT = 1;
    static constexpr bool NARROW = true;
    typedef float X;
    typedef uint16_t Weight;
    template <int MR, int NP>
    INLINE void run(VF (&acc)[MR][NP * NV], const X* x, const Weight* w, long width, long k0, long k1, Ahead ahead) {
        for (long k = k0; k < k1; k += 2) {
            ahead.step();
#pragma GCC unroll 2
            for (int odd = 0; odd < 2; odd++) {
                VF b[NP * NV];
#pragma GCC unroll 8
                for (int i = 0; i < NP * NV; i++) {
                    VU pairs = load_as<VU>(w + k * width * PANEL + i * W * 2);
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
    INLINE void run(VF (&acc)[MR][NP * NV], const X* x, const Weight* w, long width, long k0, long k1, Ahead ahead) {
        for (long k = k0; k < k1; k += 2) {
            ahead.step();
            __m512bh b[NP * NV];
#pragma GCC unroll 8
            for (int i = 0; i < NP * NV; i++) b[i] = load_as<__m512bh>(w + k * width * PANEL + i * W * 2);
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
static void micro(const typename Kind::X* x, const typename Kind::Weight* w, long width, long k0, long k1,
                  bool resume, float* c, long ldc, Ahead ahead) {
    VF acc[MR][NP * NV];
#pragma GCC unroll 8
    for (int r = 0; r < MR; r++)
#pragma GCC unroll 8
        for (int i = 0; i < NP * NV; i++) acc[r][i] = resume ? load(c + r * ldc + i * W) : VF{};
    Kind::template run<MR, NP>(acc, x, w, width, k0, k1, ahead);
#pragma GCC unroll 8
    for (int r = 0; r < MR; r++)
#pragma GCC unroll 8
        for (int i = 0; i < NP * NV; i++) store(c + r * ldc + i * W, acc[r][i]);
}

// One group of rows x a slab: as many panels at once as the registers hold.
template <class Kind, int MR = MAX_ROWS>
static void group(long rows, const typename Kind::X* x, const typename Kind::Weight* w, long width, long k0, long k1,
                  bool resume, float* c, long ldc, Ahead ahead) {
    if (rows < MR) {
        if constexpr (MR > 1) group<Kind, MR - 1>(rows, x, w, width, k0, k1, resume, c, ldc, ahead);
        return;
    }
    constexpr int NP = panels_for(MR);
    constexpr long PAIR = sizeof(typename Kind::Weight) == 2 ? 2 : 1;
    long p = 0;
    for (; p + NP <= width; p += NP, ahead.lines = 0)
        micro<Kind, MR, NP>(x, w + p * PANEL * PAIR, width, k0, k1, resume, c + p * PANEL, ldc, ahead);
    for (; p < width; p++, ahead.lines = 0)
        micro<Kind, MR, 1>(x, w + p * PANEL * PAIR, width, k0, k1, resume, c + p * PANEL, ldc, ahead);
}

// Rows go through the micro kernels in groups of nearly the same size. Group g of m rows begins here:
INLINE long num_groups(long m) { return (m + MAX_ROWS - 1) / MAX_ROWS; }
INLINE long group_begin(long m, long g) { return m * g / num_groups(m); }

// Panels [from, from + some) of a bfloat16 slab over [k0, k1) as a float32 slab.
INLINE void widen_panels(const uint16_t* w, long width, long from, long some, long k0, long k1, float* to) {
    for (long k = k0; k < k1; k += 2, to += 2 * some * PANEL)
        for (long i = 0; i < some * NV; i++) {
            VU pairs = load_as<VU>(w + (k * width + from * 2) * PANEL + i * W * 2);
            store(to + i * W, (VF)(pairs << 16));
            store(to + some * PANEL + i * W, (VF)(pairs & 0xffff0000u));
        }
}

// c [rows, width * 16] (rows `ldc` apart) = x (as `stage` leaves it) times one slab. A few rows stream the slab
// once, as it is. Many take turns on a stretch of it that stays in the first cache, widened for all of them where
// it must be, while the next stretch is fetched.
template <class Kind>
static void multiply(long rows, const typename Kind::X* x, const typename Kind::Weight* w, long width, long k,
                     float* c, long ldc) {
    constexpr long UNIT = sizeof(typename Kind::Weight) == 2 ? 2 : 1;  // of the slab
    if (rows <= (Kind::NARROW ? DIRECT_ROWS : MAX_ROWS))
        return group<Kind>(rows, x, w, width, 0, k, false, c, ldc, {(const char*)w + STREAM_AHEAD, width});
    const long groups = num_groups(rows);
    for (long k0 = 0; k0 < k; k0 += K_BLOCK) {
        const long k1 = k0 + K_BLOCK < k ? k0 + K_BLOCK : k;
        const char* next = (const char*)(w + k1 * width * PANEL);
        const long bytes = 64 * ((k1 - k0) / UNIT);
        for (long p = 0; p < width; p += Kind::NARROW ? BLOCK_PANELS : width) {
            long some = !Kind::NARROW ? width : width - p < BLOCK_PANELS ? width - p : BLOCK_PANELS;
            float wide[Kind::NARROW ? K_BLOCK * PANEL * BLOCK_PANELS : 1];
            if constexpr (Kind::NARROW) widen_panels(w, width, p, some, k0, k1, wide);
            for (long g = 0; g < groups; g++) {
                const long r = group_begin(rows, g), mine = group_begin(rows, g + 1) - r;
                float* sums = c + r * ldc + p * PANEL;
                const long lines = width <= groups ? 1 : width / groups;
                Ahead ahead{next + g * lines * bytes, g * lines < width ? lines : 0};
                if constexpr (Kind::NARROW)
                    group<Float32>(mine, x + r * k + k0 * mine, wide, some, 0, k1 - k0, k0 > 0, sums, ldc, {nullptr, 0});
                else
                    group<Kind>(mine, x + r * k, w, width, k0, k1, k0 > 0, sums, ldc, ahead);
            }
        }
    }
}

INLINE void convert(float from, float* to) { *to = from; }
INLINE void convert(uint16_t from, float* to) { *to = widen(from); }
INLINE void convert(uint16_t from, uint16_t* to) { *to = from; }

template <int MR, class Kind, class Given>
static void stage_group(long rows, const Given* from, long stride, typename Kind::X* to, long k, long padded) {
    if (rows < MR) {
        if constexpr (MR > 1) stage_group<MR - 1, Kind>(rows, from, stride, to, k, padded);
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

// Copy group g of m rows of k inputs (zeros up to `padded`) to where the micro kernels read them.
template <class Kind, class Given>
static void stage(long m, long g, const Given* from, long stride, typename Kind::X* to, long k, long padded) {
    const long begin = group_begin(m, g);
    stage_group<MAX_ROWS, Kind>(group_begin(m, g + 1) - begin, from + begin * stride, stride, to + begin * padded, k,
                                padded);
}

}  // namespace TRUNKLINE_ISA
}  // namespace trunkline
