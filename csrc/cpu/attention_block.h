// What attention does to one block of keys: packing, products, softmax. See attention.h for how blocks are joined.
//
// Keys and values are packed into the slabs of micro.h: keys as columns of 64 (the sums run over the dimensions),
// values as 64 columns of the head (the sums run over the keys). Keys that nobody may see are zeros there.
// Few rows on tiles take them where they lie instead, with the same sums (see `IN_PLACE`).
#pragma once

#include "tiles.h"
#include "transpose.h"

namespace trunkline {
namespace TRUNKLINE_ISA {

constexpr long SPAN = SLAB * PANEL;   // columns of a slab
template <class T>
constexpr long DIM_STEP = 4 * W / sizeof(T) > 32 ? 4 * W / sizeof(T) : 32;  // heads are filled up to a multiple

// Rows as attention multiplies them: each row whole, `stride` apart from the next.
INLINE VF spread(const float* x) { return splat(*x); }
INLINE VF add_product(VF acc, VF a, VF b, float) { return fma(a, b, acc); }
#if defined(__AVX512BF16__)
INLINE VF spread(const uint16_t* x) { return (VF)_mm512_set1_epi32(load_as<int>(x)); }
INLINE VF add_product(VF acc, VF a, VF b, uint16_t) {
    return (VF)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b);
}
#endif

template <class X>
constexpr int unit_of = 4 / sizeof(X);  // numbers of a row that a line of a slab takes at once

// c [MR, NP * 16] = MR rows times NP panels over `lines` lines, which lie `step` bytes apart.
template <class X, int MR, int NP>
static void micro_rows(const X* x, long stride, const char* w, long step, long lines, float* c, long ldc) {
    VF acc[MR][NP * NV] = {};
    for (long l = 0; l < lines; l++, x += unit_of<X>, w += step) {
        VF b[NP * NV];
#pragma GCC unroll 8
        for (int i = 0; i < NP * NV; i++) b[i] = load_as<VF>(w + i * W * 4);
#pragma GCC unroll 8
        for (int r = 0; r < MR; r++) {
            VF a = spread(x + r * stride);
#pragma GCC unroll 8
            for (int i = 0; i < NP * NV; i++) acc[r][i] = add_product(acc[r][i], a, b[i], X());
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < MR; r++)
#pragma GCC unroll 8
        for (int i = 0; i < NP * NV; i++) store(c + r * ldc + i * W, acc[r][i]);
}

// Whether products of X take tiles: then for any number of rows, so that all sums have the same order.
template <class X>
#if defined(TRUNKLINE_TILES)
constexpr bool on_tiles = sizeof(X) == 2;
#else
constexpr bool on_tiles = false;
#endif
template <class X>
constexpr long AT_ONCE = on_tiles<X> ? 32 : MAX_ROWS;  // rows that are multiplied together
template <class X>
constexpr long SPARE = on_tiles<X> ? 32 : 0;  // rows that may be read and written beyond those
template <class X>
constexpr long KEY_STEP = unit_of<X>;  // panels of keys that weights are made of, and multiplied, at once

template <bool TILES>
struct SetupIf {
    typedef NoSetup Type;
};
#if defined(TRUNKLINE_TILES)
template <>
struct SetupIf<true> {
    typedef TileSetup Type;
};
#endif

// Turns of rows, and where turn n begins.
template <class X>
INLINE long num_turns(long rows) {
    return on_tiles<X> ? (rows + AT_ONCE<X> - 1) / AT_ONCE<X> : num_groups(rows);
}
template <class X>
INLINE long turn_begin(long rows, long n) {
    if (!on_tiles<X>) return group_begin(rows, n);
    return n * AT_ONCE<X> < rows ? n * AT_ONCE<X> : rows;
}

// Up to MAX_ROWS rows times panels [0, panels) of a slab that is `width` panels wide.
template <class X, int MR = MAX_ROWS>
static void multiply_rows(long rows, const X* x, long stride, const char* w, long width, long panels, long lines,
                          float* c, long ldc) {
    if (rows < MR) {
        if constexpr (MR > 1)
            multiply_rows<X, MR - 1>(rows, x, stride, w, width, panels, lines, c, ldc);
        return;
    }
    constexpr int NP = panels_for(MR);
    long p = 0;
    for (; p + NP <= panels; p += NP)
        micro_rows<X, MR, NP>(x, stride, w + p * LINE, width * LINE, lines, c + p * PANEL, ldc);
    for (; p < panels; p++)
        micro_rows<X, MR, 1>(x, stride, w + p * LINE, width * LINE, lines, c + p * PANEL, ldc);
}

// The same for up to AT_ONCE rows, by what X takes.
template <class X>
INLINE void multiply_turn(long rows, const X* x, long stride, const char* w, long width, long panels, long lines, float* c,
                          long ldc) {
#if defined(TRUNKLINE_TILES)
    if constexpr (on_tiles<X>) {
        Fetch nothing{nullptr, nullptr, 0, false};
        const TileInput from{(const char*)x, stride * 2, LINE, TILE_HEIGHT * stride * 2};
        return turn_tiles<TilePairs>((rows + 15) / 16, from, w, width, panels, lines / TILE_LINES, false, c, ldc, nothing);
    }
#endif
    multiply_rows(rows, x, stride, w, width, panels, lines, c, ldc);
}

// W units of a key: a float32, a pair of bfloat16, four whole numbers.
INLINE VU load_units(const float* from) { return load_as<VU>(from); }
INLINE VU load_units(const uint16_t* from) { return load_as<VU>(from); }
INLINE VU load_units(const int8_t* from) { return load_as<VU>(from); }
template <class T>
constexpr int numbers_of_unit = 4 / sizeof(T);

// Byte `at` of each unit as a number.
INLINE VF number_of(VU units, int at) { return to_float((VI)(units << (24 - 8 * at)) >> 24); }

// Units of 16 keys to lines that begin at `to`, `step` bytes apart. Products take them apart; whole numbers are exact
// in float32 and bfloat16.
template <class X, class T>
INLINE void put_units(VU units, long unit, char* to, long step) {
    if constexpr (unit_of<X> == numbers_of_unit<T>) {
        __builtin_memcpy(to + unit * step, &units, sizeof units);
    } else if constexpr (sizeof(T) == 1) {
        for (int i = 0; i < 4; i += unit_of<X>) {
            VU line = (VU)number_of(units, i);
            if constexpr (sizeof(X) == 2) line = line >> 16 | (VU)number_of(units, i + 1);
            __builtin_memcpy(to + (unit * 4 + i) / unit_of<X> * step, &line, sizeof line);
        }
    } else {
        VU low = units << 16, high = units & 0xffff0000u;
        __builtin_memcpy(to + 2 * unit * step, &low, sizeof low);
        __builtin_memcpy(to + (2 * unit + 1) * step, &high, sizeof high);
    }
}

// One panel of keys: 16 rows of `dim` numbers, a multiple of DIM_STEP.
template <class X, class T>
static void pack_keys(const T* const* rows, long dim, char* to, long step) {
    for (long unit = 0; unit < dim / numbers_of_unit<T>; unit += W) {
        for (long lane = 0; lane < PANEL; lane += W) {
            VU square[W];
#pragma GCC unroll 16
            for (int i = 0; i < W; i++) square[i] = load_units(rows[lane + i] + unit * numbers_of_unit<T>);
            transpose(square);
#pragma GCC unroll 16
            for (int i = 0; i < W; i++) put_units<X, T>(square[i], unit + i, to + lane * 4, step);
        }
    }
}

#if defined(__AVX512BF16__)
// Numbers of a vector of bfloat16 from `first` on, each beside that of another vector.
INLINE __m512i zip(int first) {
    typedef uint16_t V __attribute__((vector_size(64)));
    V v;
    for (int i = 0; i < 32; i++) v[i] = uint16_t(first + i / 2 + i % 2 * 32);
    return (__m512i)v;
}

// 32 values of two keys as a line of pairs.
INLINE void pack_pair(const uint16_t* first, const uint16_t* second, char* to) {
    const __m512i a = load_as<__m512i>(first), b = load_as<__m512i>(second);
    _mm512_storeu_si512(to, _mm512_permutex2var_epi16(a, zip(0), b));
    _mm512_storeu_si512(to + LINE, _mm512_permutex2var_epi16(a, zip(16), b));
}
#endif

// Whether products of few rows take keys and values as they lie in the pool: then packing would be most of the work.
template <class X, class T>
constexpr bool IN_PLACE = on_tiles<X> && sizeof(T) == 2;

// Rows of 32 keys or values, 16 and 16, each `step` numbers after the one before.
template <class T>
struct InPlace {
    const T *first, *second;
    long step;

    InPlace from(long d) const { return {first + d, second + d, step}; }
};

// Scores of such keys and of rows [from, to) of a panel of rows: keys are what tiles have as rows, the same products
// and sums as of rows and packed keys. `meanwhile(lines)` fetches what is next: all in all as much as is read here.
template <class T, class M>
INLINE void score_in_place(const InPlace<T>& keys, const char* panel, long dim, long from, long to, float* scores,
                           M& meanwhile) {
#if defined(TRUNKLINE_TILES)
    alignas(LINE) float sums[2 * PANEL * PANEL];
    Fetch nothing{nullptr, nullptr, 0, false};
    const char *const at = (const char*)keys.first, *const below = (const char*)keys.second;
    micro_tiles<TilePairs, 2, 1>({at, keys.step * 2, LINE, below - at}, panel, 1, dim / TilePairs::UNIT, false, sums, PANEL,
                                 nothing);
    for (long half = 0; half < 2; half++) {
        VU square[W];
#pragma GCC unroll 16
        for (int i = 0; i < W; i++) meanwhile(dim / 32), square[i] = load_as<VU>(sums + (half * PANEL + i) * PANEL);
        transpose(square);
        for (long r = from; r < to; r++) store(scores + r * BLOCK + half * PANEL, (VF)square[r]);
    }
#endif
}

// Sums of weights times values of panels [from, to), where `values(panel)` are, of P panels of the head. Values are
// packed by steps, which stay in the first cache.
template <int P, class F, class M>
INLINE void weigh_in_place(const uint16_t* weights, long from, long to, F values, float* sums, M& meanwhile) {
#if defined(TRUNKLINE_TILES)
    alignas(LINE) char packed[2][TILE_LINES * P * LINE];
    tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
    for (long p = from; p < to; p += 2, weights += TilePairs::UNIT) {
        const auto rows = values(p);
        char* const at = packed[p / 2 % 2];
        for (long half = 0; half < 2; half++) {
            const uint16_t* row = half ? rows.second : rows.first;
            char* to_line = at + half * PANEL / 2 * P * LINE;
            for (long i = 0; i < PANEL; i += 2, row += 2 * rows.step, to_line += P * LINE) {
                meanwhile(P);
#pragma GCC unroll 2
                for (long v = 0; v < P / 2; v++) pack_pair(row + v * 32, row + rows.step + v * 32, to_line + v * 2 * LINE);
            }
        }
        tile_load<4>(weights, BLOCK * 4);
        tile_load<6>(at, P * LINE);
        TilePairs::dot<0, 4, 6>();
        tile_load<7>(at + LINE, P * LINE);
        TilePairs::dot<1, 4, 7>();
        if constexpr (P > 2) {
            tile_load<6>(at + 2 * LINE, P * LINE);
            TilePairs::dot<2, 4, 6>();
            tile_load<7>(at + 3 * LINE, P * LINE);
            TilePairs::dot<3, 4, 7>();
        }
    }
    tile_store<0>(sums, SPAN * 4), tile_store<1>(sums + PANEL, SPAN * 4);
    if constexpr (P > 2) tile_store<2>(sums + 2 * PANEL, SPAN * 4), tile_store<3>(sums + 3 * PANEL, SPAN * 4);
#endif
}

// One line of values: those of one key, or of a pair of keys.
template <class T>
INLINE void pack_value(const T* const* rows, long d, char* to, float) {
    store((float*)to, load(rows[0] + d));
}
template <class T>
INLINE void pack_value(const T* const* rows, long d, char* to, uint16_t) {
    VU pairs = (VU)load(rows[0] + d) >> 16 | (VU)load(rows[1] + d);
    __builtin_memcpy(to, &pairs, sizeof pairs);
}

// `dim` is a multiple of 32.
template <class X, class T>
static void pack_values(const T* const* rows, long line, long dim, char* slabs) {
    for (long d = 0; d < dim; d += SPAN, slabs += SPAN * BLOCK * long(sizeof(X))) {
        const long columns = dim - d < SPAN ? dim - d : SPAN;
        char* to = slabs + line * columns * 4;
        for (long i = 0; i < columns; i += 32) {
#if defined(__AVX512BF16__)
            if constexpr (sizeof(X) == 2 && sizeof(T) == 2) {
                pack_pair(rows[0] + d + i, rows[1] + d + i, to + i * 4);
                continue;
            }
#endif
            for (long v = 0; v < 32; v += W) pack_value(rows, d + i + v, to + (i + v) * 4, X());
        }
    }
}

// The next weights of a row, rounded to what they are multiplied as. They are added to `total` as they became, or
// (with `scales` of W each) as they were.
template <class X>
constexpr long WEIGHTS = W * unit_of<X>;  // that are put at once

INLINE void put_weights(float* to, const VF* weights, const VF* scales, VF& total) {
    total += weights[0];
    store(to, scales ? weights[0] * scales[0] : weights[0]);
}
#if defined(__AVX512BF16__)
INLINE void put_weights(uint16_t* to, const VF* weights, const VF* scales, VF& total) {
    VF first = weights[0], second = weights[1];
    if (scales) {
        total += first;
        total += second;
        first *= scales[0], second *= scales[1];
    }
    const __m512bh rounded = _mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
    __builtin_memcpy(to, &rounded, sizeof rounded);
    if (!scales) total = (VF)_mm512_dpbf16_ps((__m512)total, rounded, (__m512bh)_mm512_set1_epi16(0x3f80));
}
#endif

// What becomes of the products of a query and keys before they are weighed.
struct Scoring {
    float factor;               // of scores, on the way to powers of two
    float inner, outer;         // outer != 0: outer * tanh(inner * score) first
    const float* key_scales;    // of whole numbers: one for each key of the block; or null
    const float* value_scales;  // weights are multiplied by them
};

INLINE void finish_scores(float* scores, long from, long to, const Scoring& how) {
    for (long j = from; j < to; j += W) {
        VF score = load(scores + j);
        if (how.key_scales) score *= load(how.key_scales + j);
        if (how.outer != 0) score = tanh(score * splat(how.inner)) * splat(how.outer);
        store(scores + j, score);
    }
}

// The scores of a row, of keys [from, to), that are not of keys [low, high), are hidden.
INLINE void hide(float* scores, long from, long to, long low, long high) {
    const VF hidden = splat(-__builtin_inff());
    for (long j = from; j < to; j += W) {
        if (j >= low && j + W <= high) continue;
        const VI key = lanes() + int32_t(j);
        store(scores + j, (key >= int32_t(low)) & (key < int32_t(high)) ? load(scores + j) : hidden);
    }
}

// Scores of N rows, BLOCK apart, of keys [from, to), multiples of 16, to weights, in place; of each row only keys
// [low, high) are seen. Writes the largest score of each, and the sum of the weights as they were rounded (of scaled
// ones: before scale and rounding). Rows do not meet: N are taken at once because each by itself is a chain.
template <class X, int N>
INLINE void weigh(float* scores, long from, long to, const int32_t* low, const int32_t* high, const Scoring& how,
                  float* tops_out, float* sums_out) {
    static_assert(N == 1 || N == 4, "reductions take one row or four");
    VF most[N], total[N] = {}, tops[N];
    for (int r = 0; r < N; r++) {
        most[r] = splat(-__builtin_inff());
        if (low[r] > from || high[r] < to) hide(scores + r * BLOCK, from, to, low[r], high[r]);
    }
    for (long j = from; j < to; j += W)
#pragma GCC unroll 4
        for (int r = 0; r < N; r++) most[r] = larger(load(scores + r * BLOCK + j), most[r]);
    const F4 largest_of = largest(most[0], most[N / 4], most[N / 2], most[N - 1]);
    for (int r = 0; r < N; r++) tops[r] = splat(largest_of[r]);
    const VF factors = splat(how.factor);
    for (long j = from; j < to; j += WEIGHTS<X>)
#pragma GCC unroll 4
        for (int r = 0; r < N; r++) {
            float* at = scores + r * BLOCK;
            VF weights[unit_of<X>], scales[unit_of<X>];
            for (int i = 0; i < unit_of<X>; i++) {
                weights[i] = power_of_two((load(at + j + i * W) - tops[r]) * factors);
                if (!how.value_scales) continue;
                const VI key = lanes() + int32_t(j + i * W);  // a scale that is not finite spoils only rows that see it
                scales[i] = (key >= low[r]) & (key < high[r]) ? load(how.value_scales + j + i * W) : VF{};
            }
            put_weights((X*)at + j, weights, how.value_scales ? scales : nullptr, total[r]);
        }
    const F4 sums_of = sums(total[0], total[N / 4], total[N / 2], total[N - 1]);
    __builtin_memcpy(tops_out, &largest_of, N * 4);
    __builtin_memcpy(sums_out, &sums_of, N * 4);
}

// A row that sees no key of the block.
template <class X>
INLINE void weigh_nothing(float* scores, long from, long to, float* top_out, float* sum_out) {
    __builtin_memset((X*)scores + from, 0, (to - from) * sizeof(X));
    *top_out = -__builtin_inff(), *sum_out = 0;
}

// The largest scores and sums of all keys so far, joined with those of the next block, for a multiple of 16 rows.
// Scales of what was added up before, and of the block, go to `scales` [2, rows].
INLINE void join(long rows, float* tops, float* weights, const float* block_tops, const float* block_weights,
                 float factor, float* scales) {
    for (long r = 0; r < rows; r += W) {
        VF top = load(tops + r), next = load(block_tops + r), added = load(block_weights + r);
        VF both = larger(next, top);
        VF old_scale = power_of_two((top - both) * splat(factor)), new_scale = power_of_two((next - both) * splat(factor));
        VI unseen = (next == splat(-__builtin_inff())) & (added == VF{});
        store(weights + r, unseen ? load(weights + r) : load(weights + r) * old_scale + added * new_scale);
        store(tops + r, unseen ? top : both);
        store(scales + r, old_scale);
        store(scales + rows + r, new_scale);
    }
}

INLINE void add_part(float* total, const float* part, float old_scale, float new_scale, long columns) {
    const VF before = splat(old_scale), added = splat(new_scale);
    for (long d = 0; d < columns; d += W) store(total + d, fma(load(total + d), before, load(part + d) * added));
}

template <class T>
INLINE bool finite(const T* from, long count) {
    if constexpr (sizeof(T) > 1) {
        VF wrong = {};
        for (long i = 0; i < count; i += W) {
            const VF values = load_some(from + i, count - i);
            wrong += values - values;
        }
        return bits_of(wrong == wrong) == (1u << W) - 1;
    }
    return true;
}

}  // namespace TRUNKLINE_ISA
}  // namespace trunkline
