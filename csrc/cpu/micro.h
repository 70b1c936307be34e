// Products of activations with packed panels: the inner loops of `linear` and of attention.
//
// Weights lie in panels of 16 columns, and up to SLAB panels side by side in a slab, so that a thread reads one
// stream of memory: lines of 64 bytes, [k / DEPTH][panel of the slab][16][DEPTH]. A micro kernel holds the sums of
// MR rows x NP panels in registers and runs along k. What shares a call only decides which sums are held at once,
// never the order within one: every sum runs over k from 0 upwards, for one row as for a thousand.
#pragma once

#include "args.h"
#include "simd.h"

namespace trunkline {
namespace TRUNKLINE_ISA {

constexpr int NV = PANEL / W;  // vectors across a panel
constexpr int MAX_ROWS = REGISTERS == 32 ? 6 : W == 8 ? 6 : 2;
constexpr int DIRECT_ROWS = MAX_ROWS < 4 ? MAX_ROWS : 4;  // that read bfloat16 panels as they are
// Bytes between a weight in use and the one that is fetched. Not a multiple of 2048: one row of int8 took a sixth longer,
// as loads and fetches met in the same sets of a cache.
constexpr long STREAM_AHEAD = 3136;

// Panels whose sums and weights fit the registers beside the input of one of MR rows.
constexpr int panels_for(int rows) {
    int fit = rows == 1 ? 8 / NV : (REGISTERS - 1) / ((rows + 1) * NV);
    return fit >= 4 ? 4 : fit >= 2 ? 2 : 1;
}
constexpr int BLOCK_PANELS = panels_for(MAX_ROWS);
constexpr long STRETCH = BLOCK_PANELS >= 4 ? 64 : 128;  // lines of a slab that stay in the first cache

// Cache lines to fetch while a micro kernel runs: so many at each step along k.
struct Ahead {
    const char* at;
    long lines;

    inline __attribute__((always_inline)) void step() {
        for (long i = 0; i < lines; i++) __builtin_prefetch(at + 64 * i, 0, 3);
        at += 64 * lines;
    }
};

// Where input k of row r is in a group of MR rows: rows lie side by side for each UNIT along k.
template <int MR, int UNIT>
INLINE long place(long r, long k) {
    return (k / UNIT * MR + r) * UNIT + k % UNIT;
}

struct NoSetup {
    explicit NoSetup(long, long = 0, long = 0) {}
};

// How weights and activations meet. DEPTH: inputs of a line; UNIT: inputs of a row that lie side by side. A thread
// makes a `Setup` of the most rows that are taken at once, and of those in a second group, before it multiplies.
struct Float32 {
    static constexpr int DEPTH = 1, UNIT = 1;
    static constexpr bool TILES = false, NARROW = false;
    typedef float X;
    typedef NoSetup Setup;
    typedef VF Sum;
    template <int MR, int NP>
    INLINE void step(VF (&acc)[MR][NP * NV], const X* x, const char* w) {
        VF b[NP * NV];
#pragma GCC unroll 8
        for (int i = 0; i < NP * NV; i++) b[i] = load_as<VF>(w + i * W * 4);
#pragma GCC unroll 8
        for (int r = 0; r < MR; r++) {
            VF a = splat(x[r]);
#pragma GCC unroll 8
            for (int i = 0; i < NP * NV; i++) acc[r][i] = fma(a, b[i], acc[r][i]);
        }
    }
};

struct Widened {  // bfloat16 weights, widened as they are read
    static constexpr int DEPTH = 2, UNIT = 1;
    static constexpr bool TILES = false, NARROW = true;
    typedef float X;
    typedef NoSetup Setup;
    typedef VF Sum;
    template <int MR, int NP>
    INLINE void step(VF (&acc)[MR][NP * NV], const X* x, const char* w) {
#pragma GCC unroll 2
        for (int odd = 0; odd < 2; odd++) {
            VF b[NP * NV];
#pragma GCC unroll 8
            for (int i = 0; i < NP * NV; i++) {
                VU pairs = load_as<VU>(w + i * W * 4);
                b[i] = (VF)(odd ? pairs & 0xffff0000u : pairs << 16);
            }
#pragma GCC unroll 8
            for (int r = 0; r < MR; r++) {
                VF a = splat(x[odd * MR + r]);
#pragma GCC unroll 8
                for (int i = 0; i < NP * NV; i++) acc[r][i] = fma(a, b[i], acc[r][i]);
            }
        }
    }
};

#if defined(__AVX512BF16__)
struct Pairs {  // the same weights, multiplied by bfloat16 activations in one instruction
    static constexpr int DEPTH = 2, UNIT = 2;
    static constexpr bool TILES = false, NARROW = false;
    typedef uint16_t X;
    typedef NoSetup Setup;
    typedef VF Sum;
    template <int MR, int NP>
    INLINE void step(VF (&acc)[MR][NP * NV], const X* x, const char* w) {
        __m512bh b[NP];
#pragma GCC unroll 8
        for (int i = 0; i < NP; i++) b[i] = load_as<__m512bh>(w + i * LINE);
#pragma GCC unroll 8
        for (int r = 0; r < MR; r++) {
            __m512bh a = (__m512bh)_mm512_set1_epi32(load_as<int>(x + 2 * r));
#pragma GCC unroll 8
            for (int i = 0; i < NP; i++) acc[r][i] = (VF)_mm512_dpbf16_ps((__m512)acc[r][i], a, b[i]);
        }
    }
};
#else
typedef Widened Pairs;
#endif

struct Bytes {  // int8 weights, activations 128 higher than they are; sums are exact
    static constexpr int DEPTH = 4, UNIT = 4;
    static constexpr bool TILES = false, NARROW = false;
    typedef uint8_t X;
    typedef NoSetup Setup;
    typedef VI Sum;
    template <int MR, int NP>
    INLINE void step(VI (&acc)[MR][NP * NV], const X* x, const char* w) {
        VI b[NP * NV];
#pragma GCC unroll 8
        for (int i = 0; i < NP * NV; i++) b[i] = load_as<VI>(w + i * W * 4);
#pragma GCC unroll 8
        for (int r = 0; r < MR; r++) {
            VI a = splat_int(load_as<int32_t>(x + 4 * r));
#pragma GCC unroll 8
            for (int i = 0; i < NP * NV; i++) acc[r][i] = dot4(acc[r][i], a, b[i]);
        }
    }
};

// Sums of MR rows x NP panels over `lines` lines of a slab, continued from `c` if `resume`. x: see `place`.
template <class Kind, int MR, int NP>
static void micro(const typename Kind::X* x, const char* w, long width, long lines, bool resume, float* c, long ldc,
                  Ahead ahead) {
    typedef typename Kind::Sum Sum;
    Sum acc[MR][NP * NV];
#pragma GCC unroll 8
    for (int r = 0; r < MR; r++)
#pragma GCC unroll 8
        for (int i = 0; i < NP * NV; i++) acc[r][i] = resume ? load_as<Sum>(c + r * ldc + i * W) : Sum{};
    for (long l = 0; l < lines; l++, x += MR * Kind::DEPTH, w += width * LINE) {
        ahead.step();
        Kind::template step<MR, NP>(acc, x, w);
    }
#pragma GCC unroll 8
    for (int r = 0; r < MR; r++)
#pragma GCC unroll 8
        for (int i = 0; i < NP * NV; i++) __builtin_memcpy(c + r * ldc + i * W, &acc[r][i], sizeof(Sum));
}

// One group of rows x a slab: as many panels at once as the registers hold.
template <class Kind, int MR = MAX_ROWS>
static void group(long rows, const typename Kind::X* x, const char* w, long width, long lines, bool resume, float* c,
                  long ldc, Ahead ahead) {
    if (rows < MR) {
        if constexpr (MR > 1) group<Kind, MR - 1>(rows, x, w, width, lines, resume, c, ldc, ahead);
        return;
    }
    constexpr int NP = panels_for(MR);
    long p = 0;
    for (; p + NP <= width; p += NP, ahead.lines = 0)
        micro<Kind, MR, NP>(x, w + p * LINE, width, lines, resume, c + p * PANEL, ldc, ahead);
    for (; p < width; p++, ahead.lines = 0)
        micro<Kind, MR, 1>(x, w + p * LINE, width, lines, resume, c + p * PANEL, ldc, ahead);
}

// Rows go through the micro kernels in groups of nearly the same size. Group g of m rows begins here:
INLINE long num_groups(long m) { return (m + MAX_ROWS - 1) / MAX_ROWS; }
INLINE long group_begin(long m, long g) { return m * g / num_groups(m); }

// `lines` lines of panels [from, from + some) of a bfloat16 slab as twice as many of float32.
INLINE void widen_panels(const char* w, long width, long from, long some, long lines, float* to) {
    for (long l = 0; l < lines; l++, w += width * LINE, to += 2 * some * PANEL)
        for (long i = 0; i < some * NV; i++) {
            VU pairs = load_as<VU>(w + from * LINE + i * W * 4);
            store(to + i * W, (VF)(pairs << 16));
            store(to + some * PANEL + i * W, (VF)(pairs & 0xffff0000u));
        }
}

// c [rows, width * 16] (rows `ldc` apart) = x (as `stage` leaves it) times one slab of `lines` lines. A few rows
// stream the slab once, as it is. Many take turns on a stretch of it that stays in the first cache, widened for
// all of them where it must be, while the next stretch is fetched.
template <class Kind>
static void multiply(long rows, const typename Kind::X* x, const char* w, long width, long lines, float* c, long ldc) {
    if (rows <= (Kind::NARROW ? DIRECT_ROWS : MAX_ROWS))
        return group<Kind>(rows, x, w, width, lines, false, c, ldc, {w + STREAM_AHEAD, width});
    const long groups = num_groups(rows), k = lines * Kind::DEPTH;
    for (long l = 0; l < lines; l += STRETCH) {
        const long some = lines - l < STRETCH ? lines - l : STRETCH;
        const char* at = w + l * width * LINE;
        if constexpr (Kind::NARROW) {
            float wide[2 * STRETCH * PANEL * BLOCK_PANELS];
            for (long p = 0; p < width; p += BLOCK_PANELS) {
                long panels = width - p < BLOCK_PANELS ? width - p : BLOCK_PANELS;
                widen_panels(at, width, p, panels, some, wide);
                for (long g = 0; g < groups; g++) {
                    const long r = group_begin(rows, g), mine = group_begin(rows, g + 1) - r;
                    group<Float32>(mine, x + r * k + 2 * l * mine, (const char*)wide, panels, 2 * some, l > 0,
                                   c + r * ldc + p * PANEL, ldc, {nullptr, 0});
                }
            }
        } else {
            const long fetched = width <= groups ? 1 : width / groups;
            for (long g = 0; g < groups; g++) {
                const long r = group_begin(rows, g), mine = group_begin(rows, g + 1) - r;
                group<Kind>(mine, x + r * k + l * Kind::DEPTH * mine, at, width, some, l > 0, c + r * ldc, ldc,
                            {at + (width + g * fetched) * some * LINE, g * fetched < width ? fetched : 0});
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
    long i = 0;
    if constexpr (Kind::UNIT == 2 && sizeof(Given) == 2)  // pairs as they are
        for (; i + 2 <= k; i += 2)
            for (int r = 0; r < MR; r++) __builtin_memcpy(to + i * MR + 2 * r, from + r * stride + i, 4);
    for (; i < padded; i++)
        for (int r = 0; r < MR; r++) {
            typename Kind::X* at = to + place<MR, Kind::UNIT>(r, i);
            if (i < k)
                convert(from[r * stride + i], at);
            else
                *at = 0;
        }
}

// Copy a group of rows of k inputs (zeros up to `padded`) to where the micro kernels read them. Tiles take `height`
// rows at once, of which the last may be missing.
template <class Kind, class Given>
static void stage(long rows, long height, const Given* from, long stride, typename Kind::X* to, long k, long padded) {
    if constexpr (!Kind::TILES) return stage_group<MAX_ROWS, Kind>(rows, from, stride, to, k, padded);
    for (long r = 0; r < rows; r++)
        for (long i = 0; i < padded; i += Kind::UNIT) {
            const long some = k - i < Kind::UNIT ? k - i : Kind::UNIT;
            typename Kind::X* at = to + (i / Kind::UNIT * height + r) * Kind::UNIT;
            if (some == Kind::UNIT) {
                __builtin_memcpy(at, from + r * stride + i, sizeof(Given) * Kind::UNIT);
            } else {
                __builtin_memset(at, 0, sizeof(Given) * Kind::UNIT);
                __builtin_memcpy(at, from + r * stride + i, sizeof(Given) * some);
            }
        }
}

}  // namespace TRUNKLINE_ISA
}  // namespace trunkline
