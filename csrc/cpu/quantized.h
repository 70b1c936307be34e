// Whole numbers: int8 and int4 weights, and activations that are rounded to int8 to meet them.
//
// An activation is scaled by its row's largest magnitude (of its group of inputs, for int4) to -127..127. Products
// and sums of whole numbers are exact, so no order matters within a group; groups are added in order of k.
// A row with an infinity or a NaN gets NaN for a scale.
#pragma once

#include "tiles.h"

namespace trunkline {
namespace TRUNKLINE_ISA {

constexpr float NOT_A_NUMBER = __builtin_nanf("");

// Nearest whole numbers, ties to even, of -2^22..2^22.
INLINE VI round_to_int(VF v) {
    const float magic = 12582912.0f;  // 1.5 * 2^23
    return (VI)(v + splat(magic)) - (VI)splat(magic);
}

INLINE float magnitude_of(float v) { return v < 0 ? -v : v; }

// The largest magnitude among n. NaN if one is not finite.
template <class T>
INLINE float largest_magnitude(const T* x, long n) {
    VF most = {}, zeros = {};
    for (long i = 0; i < n; i += W) {
        VF v = load_some(x + i, n - i);
        zeros += v * 0.0f;  // NaN for what is not finite
        most = larger((VF)((VI)v & 0x7fffffff), most);
    }
    return bits_of(zeros != zeros) == 0 ? largest(most) : NOT_A_NUMBER;
}

// The number of the largest magnitude, with its sign; of equals the first. NaN if one is not finite.
template <class T>
INLINE float extreme(const T* x, long n) {
    const float most = largest_magnitude(x, n);
    for (long i = 0; i < n; i++)
        if (magnitude_of(widen(x[i])) == most) return widen(x[i]);
    return most;
}

// The lanes' low bytes as bytes [first, first + W) of a row, of which UNIT lie side by side and the next ones `step`
// bytes on; up to `count`, a multiple of UNIT.
template <int UNIT>
INLINE void put_bytes(VI whole, uint8_t* to, long step, long first, long count) {
    typedef uint8_t VB __attribute__((vector_size(W)));
    VB narrow = __builtin_convertvector(whole, VB);
    if constexpr (UNIT >= W) {
        __builtin_memcpy(to + first / UNIT * step + first % UNIT, &narrow, W);
    } else {
        uint8_t bytes[W];
        __builtin_memcpy(bytes, &narrow, W);
        for (long i = 0; i < W && first + i < count; i += UNIT)
            __builtin_memcpy(to + (first + i) / UNIT * step, bytes + i, UNIT);
    }
}

// n inputs of one row (zeros up to `padded`, a multiple of UNIT) to bytes, `offset` higher. Returns the scale.
template <int UNIT, class T>
INLINE float to_bytes(const T* from, long n, long padded, int offset, uint8_t* to, long step, int32_t* whole_sum) {
    const float most = largest_magnitude(from, n);
    const VF factor = splat(most > 0 ? 127.0f / most : 0.0f);
    VI total = {};
    for (long i = 0; i < padded; i += W) {
        VI whole = round_to_int(load_some(from + i, n - i) * factor);
        if (most != most) whole = VI{};
        total += whole;
        put_bytes<UNIT>(whole + offset, to, step, i, padded);
    }
    *whole_sum = int32_t(sum(to_float(total)));  // exact: below 2^24
    return most / 127.0f;
}

// Inputs of a row as staged for whole numbers: each scale's padded to what the kernels take at once.
template <class Kind>
INLINE long staged_inputs(long k, const Format& f) {
    const long groups = scale_groups(k, f), size = padded_k(k, f) / groups;
    return (size + Kind::UNIT - 1) / Kind::UNIT * Kind::UNIT * groups;
}

// `rows` rows as the micro kernels read them, [k / UNIT][row of `height`][UNIT], with scales and sums
// [rows, groups of inputs]. The low and high halves of an int4 line meet inputs 0-3 and 4-7.
template <class Kind, class T>
static void stage_whole(long rows, long height, const T* from, long stride, uint8_t* to, long k, const Format& f,
                        float* scales, int32_t* sums) {
    const long groups = scale_groups(k, f), size = padded_k(k, f) / groups, staged = staged_inputs<Kind>(k, f) / groups;
    for (long r = 0; r < rows; r++)
        for (long i = 0; i < groups; i++) {
            const long first = i * size, given = k - first < size ? k - first : size, at = r * groups + i;
            scales[at] = to_bytes<Kind::UNIT>(from + r * stride + first, given, staged, f.store == Store::int8 ? 128 : 0,
                                              to + i * staged * height + r * Kind::UNIT, height * Kind::UNIT, sums + at);
        }
}

// MR rows x NP panels of int4 weights: 0..15 for -8..7. `groups` groups of `lines` lines, added to c.
template <int MR, int NP>
static void micro_int4(const uint8_t* x, const char* w, long width, long groups, long lines, long panel,
                       const float* scales, const int32_t* sums, long stride, bool resume, float* c, long ldc,
                       Ahead ahead) {
    const VI low = splat_int(0x0f0f0f0f);
    for (long g = 0; g < groups; g++) {
        VI acc[MR][NP * NV];
#pragma GCC unroll 8
        for (int r = 0; r < MR; r++)
#pragma GCC unroll 8
            for (int i = 0; i < NP * NV; i++) acc[r][i] = splat_int(-8 * sums[r * stride + g]);
        for (long l = 0; l < lines; l++, x += MR * 8, w += width * LINE) {
            ahead.step();
#pragma GCC unroll 2
            for (int half = 0; half < 2; half++) {
                VI b[NP * NV];
#pragma GCC unroll 8
                for (int i = 0; i < NP * NV; i++) {
                    VI both = load_as<VI>(w + panel * LINE + i * W * 4);
                    b[i] = (half ? (VI)((VU)both >> 4) : both) & low;
                }
#pragma GCC unroll 8
                for (int r = 0; r < MR; r++) {
                    VI a = splat_int(load_as<int32_t>(x + (half * MR + r) * 4));
#pragma GCC unroll 8
                    for (int i = 0; i < NP * NV; i++) acc[r][i] = dot4(acc[r][i], b[i], a);
                }
            }
        }
#pragma GCC unroll 8
        for (int i = 0; i < NP * NV; i++) {
            VF scale = from_half((const uint16_t*)(w + panel * INT4_SCALES) + i * W);
#pragma GCC unroll 8
            for (int r = 0; r < MR; r++) {
                VF value = to_float(acc[r][i]) * (scale * scales[r * stride + g]);
                float* sum = c + r * ldc + i * W;
                store(sum, resume || g ? load(sum) + value : value);
            }
        }
        w += width * INT4_SCALES;
    }
}

template <int MR = MAX_ROWS>
static void group_int4(long rows, const uint8_t* x, const char* w, long width, long groups, long lines,
                       const float* scales, const int32_t* sums, long stride, bool resume, float* c, long ldc,
                       Ahead ahead) {
    if (rows < MR) {
        if constexpr (MR > 1)
            group_int4<MR - 1>(rows, x, w, width, groups, lines, scales, sums, stride, resume, c, ldc, ahead);
        return;
    }
    constexpr int NP = panels_for(MR);
    long p = 0;
    for (; p + NP <= width; p += NP, ahead.lines = 0)
        micro_int4<MR, NP>(x, w, width, groups, lines, p, scales, sums, stride, resume, c + p * PANEL, ldc, ahead);
    for (; p < width; p++, ahead.lines = 0)
        micro_int4<MR, 1>(x, w, width, groups, lines, p, scales, sums, stride, resume, c + p * PANEL, ldc, ahead);
}

// As `multiply`, for an int4 slab of k inputs in groups of `size`.
static void multiply_int4(long rows, const uint8_t* x, const char* w, long width, long k, long size,
                          const float* scales, const int32_t* sums, float* c, long ldc) {
    const long all = k / size, lines = size / 8, bytes = width * (lines * LINE + INT4_SCALES);
    if (rows <= MAX_ROWS)
        return group_int4(rows, x, w, width, all, lines, scales, sums, all, false, c, ldc, {w + STREAM_AHEAD, width});
    const long turns = num_groups(rows), stretch = lines < STRETCH ? STRETCH / lines : 1;
    for (long first = 0; first < all; first += stretch) {
        const long some = all - first < stretch ? all - first : stretch;
        const char* at = w + first * bytes;
        const long fetched = width <= turns ? 1 : width / turns;
        for (long g = 0; g < turns; g++) {
            const long r = group_begin(rows, g), mine = group_begin(rows, g + 1) - r;
            const char* next = at + some * bytes + g * fetched * some * lines * LINE;
            group_int4(mine, x + r * k + first * size * mine, at, width, some, lines, scales + r * all + first,
                       sums + r * all + first, all, first > 0, c + r * ldc, ldc,
                       {next, g * fetched < width ? fetched : 0});
        }
    }
}

#if defined(TRUNKLINE_TILES)
// `some` groups of `lines` int4 lines, each followed by its scales, to int8 lines of inputs 0-3 and 4-7.
INLINE void unpack_int4(const char* w, long width, long some, long lines, char* to) {
    typedef int8_t VB __attribute__((vector_size(LINE)));
    for (long g = 0; g < some; g++, w += width * INT4_SCALES)
        for (long l = 0; l < lines; l++, w += width * LINE, to += 2 * width * LINE)
            for (long p = 0; p < width; p++) {
                const VI both = load_as<VI>(w + p * LINE);
                const VB halves[2] = {(VB)(both & 0x0f0f0f0f) - 8, (VB)((VU)both >> 4 & 0x0f0f0f0f) - 8};
                __builtin_memcpy(to + p * LINE, &halves[0], LINE);
                __builtin_memcpy(to + (width + p) * LINE, &halves[1], LINE);
            }
}

// The sums of G groups of inputs, 16 rows x `width` panels each, made numbers and added to c in order.
template <int G>
INLINE void add_groups(const int32_t (*whole)[SLAB][TILE_HEIGHT * PANEL], long rows, long width, const char* behind, long of_group,
                       const float* scales, long stride, bool resume, float* c, long ldc) {
    for (long p = 0; p < width; p++) {
        VF factors[G];
#pragma GCC unroll 4
        for (int g = 0; g < G; g++) factors[g] = from_half((const uint16_t*)(behind + g * of_group + p * INT4_SCALES));
        for (long r = 0; r < rows; r++) {
            float* at = c + r * ldc + p * PANEL;
            VF total = {};
#pragma GCC unroll 4
            for (int g = 0; g < G; g++) {
                const VF value = to_float(load_as<VI>(whole[g][p] + r * PANEL)) * (factors[g] * splat(scales[r * stride + g]));
                total = g ? total + value : resume ? load(at) + value : value;
            }
            store(at, total);
        }
    }
}

// As `multiply_int4`, on tiles: a stretch is unpacked to int8 in the first cache, then groups of rows take turns. A longer
// group of inputs is unpacked in pieces, for each of them. It ends within a tile: the activations are zeros from there on,
// whatever the weights are.
static void multiply_tiles_int4(long rows, TileInput x, const char* w, long width, long k, long size, const float* scales,
                                float* c, const char* fetch, const char* fetch_end) {
    constexpr long LINES = INT4_STRETCH, STEPS = 2 * LINES / TILE_LINES, MOST = LINES / 4;  // groups in a stretch
    const long all = k / size, lines = size / 8, steps = (size + 63) / 64, ldc = width * PANEL;
    const long stretch = lines < LINES ? LINES / lines : 1, of_group = width * (lines * LINE + INT4_SCALES);
    alignas(LINE) char room[(2 * LINES + TILE_LINES) * SLAB * LINE];
    alignas(LINE) int32_t whole[MOST][SLAB][TILE_HEIGHT * PANEL];
    const long calls = all * ((rows + 15) / 16) * steps * 4;
    Fetch ahead{fetch, fetch_end, ((fetch_end - fetch) / LINE + calls - 1) / calls, false};
    for (long first = 0; first < all; first += stretch, w += stretch * of_group) {
        const long some = all - first < stretch ? all - first : stretch;
        if (lines <= LINES) unpack_int4(w, width, some, lines, room);
        for (long r = 0; r < rows; r += TILE_HEIGHT) {
            for (long g = 0; g < some; g++) {
                const char* from = x.at + r / TILE_HEIGHT * x.group + (first + g) * steps * x.step;
                const char* weights = room + 2 * g * lines * width * LINE;
                tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
                for (long s = 0; s < steps; s++, from += x.step, weights += TILE_LINES * width * LINE) {
                    if (lines > LINES && s % STEPS == 0) {
                        const long done = s / STEPS * LINES, more = lines - done < LINES ? lines - done : LINES;
                        unpack_int4(w + done * width * LINE, width, 1, more, room), weights = room;
                    }
                    tile_load<4>(from, x.row);
                    ahead.step();
                    tile_load<6>(weights, width * LINE);
                    dot_levels<0, 6>();
                    ahead.step();
                    if (width > 1) tile_load<7>(weights + LINE, width * LINE), dot_levels<1, 7>();
                    ahead.step();
                    if (width > 2) tile_load<6>(weights + 2 * LINE, width * LINE), dot_levels<2, 6>();
                    ahead.step();
                    if (width > 3) tile_load<7>(weights + 3 * LINE, width * LINE), dot_levels<3, 7>();
                }
                tile_store<0>(whole[g][0], LINE), tile_store<1>(whole[g][1], LINE);
                tile_store<2>(whole[g][2], LINE), tile_store<3>(whole[g][3], LINE);
            }
            const long mine = rows - r < TILE_HEIGHT ? rows - r : TILE_HEIGHT;
            const float* scale = scales + r * all + first;
            const char* behind = w + lines * width * LINE;
            float* at = c + r * ldc;
            if (some == MOST) {
                add_groups<MOST>(whole, mine, width, behind, of_group, scale, all, first > 0, at, ldc);
            } else {
                for (long g = 0; g < some; g++)
                    add_groups<1>(whole + g, mine, width, behind + g * of_group, of_group, scale + g, all, first + g > 0, at, ldc);
            }
        }
    }
}
#endif

// Sums of int8 products, in place, to numbers: c [rows, width * 16], slab of `lines` lines.
INLINE void scale_sums(long rows, const char* w, long width, long lines, const float* scales, float* c) {
    const char* trailer = w + lines * width * LINE;
    for (long r = 0; r < rows; r++)
        for (long i = 0; i < width * NV; i++) {
            const char* at = trailer + i / NV * INT8_SCALES + i % NV * W * 4;
            float* sum = c + r * width * PANEL + i * W;
            VI whole = load_as<VI>(sum) - load_as<VI>(at + PANEL * 4);
            store(sum, to_float(whole) * (load_as<VF>(at) * scales[r]));
        }
}

template <class T>
INLINE bool quantize_int8(const QuantizeArgs& a) {
    const long padded = padded_k(a.k, a.format), step = a.width * LINE;
    char* lines = a.slab + a.panel * LINE;
    char* trailer = a.slab + padded / 4 * step + a.panel * INT8_SCALES;
    bool finite = true;
    for (long lane = 0; lane < PANEL; lane++) {
        const T* row = (const T*)a.rows[lane];
        int32_t sum = 0;
        float scale = to_bytes<4>(row, row ? a.k : 0, padded, 0, (uint8_t*)lines + lane * 4, step, &sum);
        finite = finite && scale == scale;
        sum *= 128;
        __builtin_memcpy(trailer + lane * 4, &scale, 4);
        __builtin_memcpy(trailer + (PANEL + lane) * 4, &sum, 4);
    }
    return finite;
}

// To nearest, ties to even.
INLINE uint16_t to_half(float value) {
    uint32_t bits;
    float magnitude = magnitude_of(value), scaled = magnitude * 0x1p-112f;
    __builtin_memcpy(&bits, &scaled, 4);
    uint32_t half = magnitude < 0x1p-14f ? uint32_t(__builtin_nearbyintf(magnitude * 0x1p24f))
                                         : (bits + 0xfff + (bits >> 13 & 1)) >> 13;
    return uint16_t(half | (value < 0 ? 0x8000 : 0));
}

// The number of the largest magnitude becomes -8, so that no level is wasted on its side.
template <class T>
INLINE bool quantize_int4(const QuantizeArgs& a) {
    const long groups = scale_groups(a.k, a.format), size = a.format.group, step = a.width * LINE;
    bool finite = true;
    char* at = a.slab;
    for (long g = 0; g < groups; g++, at += size / 8 * step + a.width * INT4_SCALES)
        for (long lane = 0; lane < PANEL; lane++) {
            const T* row = (const T*)a.rows[lane] + g * size;
            const long given = !a.rows[lane] ? 0 : a.k - g * size < size ? a.k - g * size : size;
            const float wanted = extreme(row, given) / -8.0f;
            finite = finite && magnitude_of(wanted) < 65504;
            uint16_t halves[W] = {to_half(wanted)};
            const float scale = from_half(halves)[0], factor = scale != 0 ? 1 / scale : 0;
            for (long k = 0; k < size; k++) {
                int level = k < given ? int(__builtin_nearbyintf(widen(row[k]) * factor)) + 8 : 8;
                level = level < 0 ? 0 : level > 15 ? 15 : level;
                char* byte = at + k / 8 * step + a.panel * LINE + lane * 4 + k % 4;
                *byte = char(k % 8 < 4 ? level : (*byte & 15) | level << 4);
            }
            __builtin_memcpy(at + size / 8 * step + a.panel * INT4_SCALES + lane * 2, halves, 2);
        }
    return finite;
}

static bool quantize(const QuantizeArgs& a) {
    if (a.format.store == Store::int8) return a.bf16 ? quantize_int8<uint16_t>(a) : quantize_int8<float>(a);
    return a.bf16 ? quantize_int4<uint16_t>(a) : quantize_int4<float>(a);
}

// Output `lane` of a slab's panel, as numbers.
template <class T>
INLINE void dequantize(const char* slab, long width, long panel, long lane, long k, const Format& f, T* out) {
    const long step = width * LINE, size = padded_k(k, f) / scale_groups(k, f), lines = size / depth(f);
    for (long i = 0; i < k; i++) {
        const char* at = slab + i / size * (lines * step + width * INT4_SCALES);
        const long j = i % size;
        float scale;
        int level;
        if (f.store == Store::int8) {
            __builtin_memcpy(&scale, at + lines * step + panel * INT8_SCALES + lane * 4, 4);
            level = (signed char)at[j / 4 * step + panel * LINE + lane * 4 + j % 4];
        } else {
            uint16_t halves[W] = {};
            __builtin_memcpy(halves, at + lines * step + panel * INT4_SCALES + lane * 2, 2);
            scale = from_half(halves)[0];
            level = ((unsigned char)at[j / 8 * step + panel * LINE + lane * 4 + j % 4] >> (j % 8 < 4 ? 0 : 4) & 15) - 8;
        }
        store_one(out + i, float(level) * scale);
    }
}

static void dequantize_rows(const DequantizeArgs& a) {
    const long bytes = panel_bytes(a.k, a.format), panels = num_panels(a.n, false);
    for (long i = 0; i < a.count; i++) {
        const long p = a.ids[i] / PANEL, first = p / SLAB * SLAB;
        const char* slab = (const char*)a.panels + first * bytes;
        if (a.out_bf16)
            dequantize(slab, slab_width(p, panels), p - first, a.ids[i] % PANEL, a.k, a.format, (uint16_t*)a.out + i * a.k);
        else
            dequantize(slab, slab_width(p, panels), p - first, a.ids[i] % PANEL, a.k, a.format, (float*)a.out + i * a.k);
    }
}

}  // namespace TRUNKLINE_ISA
}  // namespace trunkline
