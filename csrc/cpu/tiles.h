// Products on tiles (Intel AMX): 16 rows x 16 columns of sums in a register, 16 lines of a panel in another.
//
// The lines of a slab are what a tile of weights wants, 64 bytes each: a panel's 16 next lines are loaded where they
// lie. A step is 16 lines of 4 bytes a column: 32 inputs of bfloat16, 64 of int8. An instruction sums the products
// of a step from zero, even and odd inputs apart for bfloat16, and adds that to the sums: so a sum runs over steps
// that begin at multiples of 16 lines, for one row as for a thousand, and fewer than 16 lines at the end are
// followed by zeros. Rows of a tile do not meet.
//
// The compiler knows nothing of tiles here (its own intrinsics order them against no memory): tile numbers are
// fixed. 0-3 hold sums, 4 and 5 activations, 6 and 7 weights. Of two groups of rows the second has 2, 3 and 5.
#pragma once

#include "micro.h"

#if defined(TRUNKLINE_TILES)

namespace trunkline {
namespace TRUNKLINE_ISA {

constexpr long TILE_HEIGHT = 16, TILE_LINES = 16;
constexpr long TILE_STRETCH = 4;  // steps of a slab that stay in the first cache while groups of rows take turns
constexpr long INT4_STRETCH = 16;  // the same, of int4: lines, which are twice as many when unpacked

// Tiles of `rows` rows of sums and activations, of `below` in a second group; steps of `lines` lines. Each thread sets
// them for itself, and lets go when it is done.
struct TileSetup {
    explicit TileSetup(long rows) : TileSetup(rows, rows) {}
    TileSetup(long rows, long below, long lines = TILE_LINES) {
        alignas(64) uint8_t config[64] = {1};  // the palette
        for (int t = 0; t < 8; t++) {
            config[16 + 2 * t] = uint8_t(t == 4 || t == 5 ? 4 * lines : LINE);
            config[48 + t] = uint8_t(t > 5 ? lines : t == 2 || t == 3 || t == 5 ? below : rows);
        }
        asm volatile("ldtilecfg %0" ::"m"(config) : "memory");
    }
    ~TileSetup() { asm volatile("tilerelease" ::: "memory"); }
    TileSetup(const TileSetup&) = delete;
    TileSetup& operator=(const TileSetup&) = delete;
};

template <int T>
INLINE void tile_load(const void* from, long stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(T) : "memory");
}
template <int T>
INLINE void tile_store(void* to, long stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(T) : "memory");
}
template <int T>
INLINE void tile_zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(T));
}

struct TilePairs {  // bfloat16
    static constexpr int DEPTH = 2, UNIT = 32;
    static constexpr bool TILES = true, NARROW = false;
    typedef uint16_t X;
    typedef TileSetup Setup;
    typedef VF Sum;
    template <int C, int A, int B>
    INLINE void dot() {
        asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
    }
};

struct TileBytes {  // int8 weights, activations 128 higher than they are, as `Bytes`
    static constexpr int DEPTH = 4, UNIT = 64;
    static constexpr bool TILES = true, NARROW = false;
    typedef uint8_t X;
    typedef TileSetup Setup;
    typedef VI Sum;
    template <int C, int A, int B>
    INLINE void dot() {
        asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
    }
};

// int4 weights as -8..7 in tile B, signed activations in tile 4.
template <int C, int B>
INLINE void dot_levels() {
    asm volatile("tdpbssd %%tmm%c1, %%tmm4, %%tmm%c0" ::"i"(C), "i"(B));
}

// Where tiles of activations lie: bytes from one row, step and group of 16 rows to the next.
struct TileInput {
    const char* at;
    long row, step, group;
};

// Memory to fetch meanwhile: `lines` lines at each call, up to the end. `near`: into the first cache.
struct Fetch {
    const char* at;
    const char* end;
    long lines;
    bool near;

    inline __attribute__((always_inline)) void step() {
        const char* stop = at + lines * LINE;
        if (stop > end) stop = end;
        if (near)
            for (; at < stop; at += LINE) __builtin_prefetch(at, 0, 3);
        else
#pragma GCC unroll 4
            for (; at < stop; at += LINE) __builtin_prefetch(at, 0, 2);
    }
};

// 16 * R rows x P panels over `steps` steps of a slab, continued from c if `resume`.
template <class Kind, int R, int P>
INLINE void micro_tiles(TileInput x, const char* w, long width, long steps, bool resume, float* c, long ldc, Fetch& after) {
    static_assert(R * P <= 4 && R <= 2, "the sums fit tiles 0 to 3");
    const long stride = width * LINE, of_row = ldc * 4;
    Fetch fetch = after;  // in registers, whatever is inlined
    float* below = c + TILE_HEIGHT * ldc;
    if (resume) {
        tile_load<0>(c, of_row);
        if constexpr (P > 1) tile_load<1>(c + PANEL, of_row);
        if constexpr (P > 2) tile_load<2>(c + 2 * PANEL, of_row), tile_load<3>(c + 3 * PANEL, of_row);
        if constexpr (R > 1) tile_load<2>(below, of_row);
        if constexpr (R > 1 && P > 1) tile_load<3>(below + PANEL, of_row);
    } else {
        tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
    }
    for (long s = 0; s < steps; s++, x.at += x.step, w += TILE_LINES * stride) {
        fetch.step();
        tile_load<6>(w, stride);
        tile_load<4>(x.at, x.row);
        Kind::template dot<0, 4, 6>();
        if constexpr (R > 1) {
            fetch.step();
            tile_load<5>(x.at + x.group, x.row);
            Kind::template dot<2, 5, 6>();
        }
        if constexpr (P > 1) {
            fetch.step();
            tile_load<7>(w + LINE, stride);
            Kind::template dot<1, 4, 7>();
            if constexpr (R > 1) {
                fetch.step();
                Kind::template dot<3, 5, 7>();
            }
        }
        if constexpr (P > 2) {
            fetch.step();
            tile_load<6>(w + 2 * LINE, stride);
            Kind::template dot<2, 4, 6>();
            fetch.step();
            tile_load<7>(w + 3 * LINE, stride);
            Kind::template dot<3, 4, 7>();
        }
    }
    after = fetch;
    tile_store<0>(c, of_row);
    if constexpr (P > 1) tile_store<1>(c + PANEL, of_row);
    if constexpr (P > 2) tile_store<2>(c + 2 * PANEL, of_row), tile_store<3>(c + 3 * PANEL, of_row);
    if constexpr (R > 1) tile_store<2>(below, of_row);
    if constexpr (R > 1 && P > 1) tile_store<3>(below + PANEL, of_row);
}

// `steps` steps of the first `panels` panels of a slab times `groups` groups of rows, two at a time.
template <class Kind>
static void turn_tiles(long groups, TileInput x, const char* w, long width, long panels, long steps, bool resume, float* c,
                       long ldc, Fetch& fetch) {
    for (long g = 0; g < groups; g += 2, x.at += 2 * x.group, c += 2 * TILE_HEIGHT * ldc) {
        long p = 0;
        if (g + 1 < groups) {
            for (; p + 2 <= panels; p += 2)
                micro_tiles<Kind, 2, 2>(x, w + p * LINE, width, steps, resume, c + p * PANEL, ldc, fetch);
            if (p < panels) micro_tiles<Kind, 2, 1>(x, w + p * LINE, width, steps, resume, c + p * PANEL, ldc, fetch);
        } else {
            for (; p + 4 <= panels; p += 4)
                micro_tiles<Kind, 1, 4>(x, w + p * LINE, width, steps, resume, c + p * PANEL, ldc, fetch);
            for (; p + 2 <= panels; p += 2)
                micro_tiles<Kind, 1, 2>(x, w + p * LINE, width, steps, resume, c + p * PANEL, ldc, fetch);
            if (p < panels) micro_tiles<Kind, 1, 1>(x, w + p * LINE, width, steps, resume, c + p * PANEL, ldc, fetch);
        }
    }
}

// c [groups * 16, width * 16] = x times a slab of `lines` lines, while memory [fetch, fetch_end) is fetched. Of a
// tile of fewer rows (`TileSetup`) only those are written.
template <class Kind>
static void multiply_tiles(long groups, TileInput x, const char* w, long width, long lines, float* c, const char* fetch,
                           const char* fetch_end) {
    const long steps = lines / TILE_LINES, ldc = width * PANEL, stretch = groups == 1 ? steps : TILE_STRETCH;
    const long calls = steps * groups * width;
    Fetch ahead{fetch, fetch_end, ((fetch_end - fetch) / LINE + calls - 1) / (calls ? calls : 1), groups == 1};
    for (long s = 0; s < steps; s += stretch) {
        const long some = steps - s < stretch ? steps - s : stretch;
        TileInput at = x;
        at.at += s * x.step;
        turn_tiles<Kind>(groups, at, w + s * TILE_LINES * width * LINE, width, width, some, s > 0, c, ldc, ahead);
    }
    const long rest = lines - steps * TILE_LINES;
    if (rest == 0) return;
    alignas(LINE) char last[TILE_LINES * SLAB * LINE];
    __builtin_memcpy(last, w + steps * TILE_LINES * width * LINE, rest * width * LINE);
    __builtin_memset(last + rest * width * LINE, 0, (TILE_LINES - rest) * width * LINE);
    x.at += steps * x.step;
    turn_tiles<Kind>(groups, x, last, width, width, 1, steps > 0, c, ldc, ahead);
}

}  // namespace TRUNKLINE_ISA
}  // namespace trunkline

#endif
