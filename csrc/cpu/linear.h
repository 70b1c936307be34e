// x [m, k] times packed weights, with what is done to the sums while they are at hand.
//
// A row's bits do not depend on m, on where the row lies, or on the number of threads: see micro.h. Threads split
// slabs and rows, never k.
#pragma once

#include "quantized.h"
#include "shortlist.h"

#include <omp.h>

namespace trunkline {
namespace TRUNKLINE_ISA {

constexpr long ROW_BLOCK = 96;         // rows whose sums are kept at hand while a slab is read
constexpr long TILE_BLOCK = 64;        // the same for tiles: sums, a stretch and two groups of rows fit the first cache
constexpr long SERIAL_WORK = 1 << 15;  // weights x rows below which threads cost more than they save
constexpr long WHERE_GIVEN = 32;       // rows that tiles read where they are: a pair of groups
// Bytes between weights in use and those that tiles fetch meanwhile. Not a multiple of 4096: loads and fetches that meet
// in the same sets of a cache cost 32 to 64 rows a tenth.
constexpr long TILE_AHEAD = 18496;

INLINE VF activate(VF x, Gate gate) {
    return gate == Gate::silu ? silu(x) : gate == Gate::gelu ? gelu(x) : gelu_tanh(x);
}

// Sums c [rows, width * 16] of the panels from `first` on to what is written of rows `row` and following.
template <class T>
static void finish(const LinearArgs& args, long row, long rows, long first, long width, const float* c) {
    const bool gated = args.gated;
    const long n = args.n, unit = gated ? 2 : 1, from = first / unit * PANEL;
    const Gate gate = args.gate;
    const float* const bias = args.bias ? args.bias + first * PANEL : nullptr;
    const T* residual = args.residual ? (const T*)args.residual + row * n : nullptr;
    T* out = (T*)args.out + row * n;
    for (const float* end = c + rows * width * PANEL; c < end; out += n, residual += residual ? n : 0) {
        for (long p = 0, column = from; p < width; p += unit, column += PANEL, c += unit * PANEL) {
            float values[PANEL];
            const long columns = n - column < PANEL ? n - column : PANEL;
            for (int i = 0; i < NV; i++) {
                VF v = load(c + i * W);
                if (bias) v += load(bias + p * PANEL + i * W);
                if (gated) {
                    VF up = load(c + PANEL + i * W);
                    if (bias) up += load(bias + (p + 1) * PANEL + i * W);
                    v = activate(v, gate) * up;
                }
                if (columns == PANEL)
                    store(out + column + i * W, residual ? v + load(residual + column + i * W) : v);
                else
                    store(values + i * W, v);
            }
            if (columns < PANEL)
                for (long i = 0; i < columns; i++)
                    store_one(out + column + i, residual ? values[i] + widen(residual[column + i]) : values[i]);
        }
    }
}

// How rows are cut. Sums of up to AT_HAND rows are at hand while a slab is read. Kinds with tiles let larger blocks
// pass a slab, as many rows as stay in the second cache: their arithmetic would outrun memory.
template <class Kind>
struct Rows {
    static constexpr long AT_HAND = Kind::TILES ? TILE_BLOCK : ROW_BLOCK;
    static constexpr long NEAR = 3 << 19;  // bytes of activations in the second cache, beside two slabs
    long m, count, size;

    Rows(long rows, long k) : m(rows) {
        long most = AT_HAND;
        if (Kind::TILES) most = NEAR / (k * long(sizeof(typename Kind::X))) / AT_HAND * AT_HAND;
        if (most < AT_HAND) most = AT_HAND;
        count = (m + most - 1) / most;
        size = (m + count * 32 - 1) / (count * 32) * 32;  // of tiles: pairs of groups
    }
    long begin(long block) const {
        if (!Kind::TILES) return m * block / count;  // of nearly the same number of rows
        return block * size < m ? block * size : m;
    }
    // Groups that lie side by side when staged: how many `rows` rows of a block have, and where they begin.
    long groups(long rows) const { return Kind::TILES ? (rows + 15) / 16 : num_groups(rows); }
    long group_at(long rows, long g) const {
        if (!Kind::TILES) return group_begin(rows, g);
        return g * 16 < rows ? g * 16 : rows;
    }
    long height(long rows) const { return !Kind::TILES ? rows : m < 16 ? m : 16; }  // of a group of so many
};

// A thread's share of a product: x as it was staged, k inputs a row, or as it was given.
template <class Kind>
struct Share {
    const LinearArgs& args;
    const typename Kind::X* x;
    long k;
    bool in_place;
    const float* scales;  // of whole numbers, as `sums`
    const int32_t* sums;
    Shortlist* lists;  // [m] of this thread, if columns are chosen

    // Sums of rows [row, row + rows) times one slab, while memory [fetch, fetch_end) is fetched if tiles are used.
    void multiply_slab(long row, long rows, const char* w, long width, float* c, const char* fetch, const char* fetch_end) const {
        const long lines = padded_k(args.k, args.format) / Kind::DEPTH, groups = scale_groups(args.k, args.format);
        (void)fetch, (void)fetch_end;
#if defined(TRUNKLINE_TILES)
        if constexpr (Kind::TILES) {
            const long of_row = (in_place ? args.x_stride : k) * long(sizeof(*x)), height = args.m < 16 ? args.m : 16;
            const TileInput from = in_place ? TileInput{(const char*)(x + row * args.x_stride), of_row, LINE, of_row * TILE_HEIGHT}
                                            : TileInput{(const char*)(x + row * k), LINE, height * LINE, of_row * TILE_HEIGHT};
            if (args.format.store == Store::int4)
                multiply_tiles_int4(rows, from, w, width, padded_k(args.k, args.format), args.format.group, scales + row * groups,
                                    c, fetch, fetch_end);
            else
                multiply_tiles<Kind>((rows + 15) / 16, from, w, width, lines, c, fetch, fetch_end);
        } else
#endif
        if (args.format.store == Store::int4)
            multiply_int4(rows, (const uint8_t*)(x + row * k), w, width, k, args.format.group, scales + row * groups,
                          sums + row * groups, c, width * PANEL);
        else
            multiply<Kind>(rows, x + row * k, w, width, lines, c, width * PANEL);
        if (args.format.store == Store::int8) scale_sums(rows, w, width, padded_k(args.k, args.format) / 4, scales + row, c);
    }

    void region(long row, long rows, long slab, const char* fetch, const char* fetch_end) const {
        alignas(LINE) float c[Rows<Kind>::AT_HAND * SLAB * PANEL];
        const long first = slab * SLAB, width = slab_width(first, num_panels(args.n, args.gated));
        multiply_slab(row, rows, (const char*)args.panels + first * panel_bytes(args.k, args.format), width, c, fetch, fetch_end);
        if (lists) {
            const long column = first * PANEL, columns = args.n - column < width * PANEL ? args.n - column : width * PANEL;
            for (long r = 0; r < rows; r++) see(lists[row + r], args.choices[row + r], c + r * width * PANEL, column, columns);
        } else if (args.out_bf16) {
            finish<uint16_t>(args, row, rows, first, width, c);
        } else {
            finish<float>(args, row, rows, first, width, c);
        }
    }

    // Rows [row, row + rows) times slabs [from, to), which are fetched ahead: by one group of rows a few steps, by
    // more a part of the next slab each.
    void slabs(long row, long rows, long from, long to) const {
        constexpr long AT_HAND = Rows<Kind>::AT_HAND;
        const long bytes = SLAB * panel_bytes(args.k, args.format), parts = (rows + AT_HAND - 1) / AT_HAND;
        const char* end = (const char*)args.panels + packed_bytes(args.n, args.k, args.gated, args.format);
        if ((const char*)args.panels + to * bytes < end) end = (const char*)args.panels + to * bytes;
        for (long slab = from; slab < to; slab++) {
            const char* w = (const char*)args.panels + slab * bytes + (parts == 1 ? TILE_AHEAD : bytes);
            for (long part = 0; part < parts; part++) {
                const long first = part * AT_HAND, some = rows - first < AT_HAND ? rows - first : AT_HAND;
                const char* begin = w + bytes / LINE * part / parts * LINE;
                const char* stop = w + bytes / LINE * (part + 1) / parts * LINE;
                region(row + first, some, slab, begin < end ? begin : end, stop < end ? stop : end);
            }
        }
    }
};

template <class Kind, class Given>
static void product(const LinearArgs& args) {
    typedef typename Kind::X X;
    const bool whole = is_whole(args.format);
    const long m = args.m, k = staged_inputs<Kind>(args.k, args.format);
    const bool in_place = m <= (Kind::TILES ? WHERE_GIVEN : 1) && !whole && sizeof(X) == sizeof(Given) && k == args.k;
    const bool stage_alone = !in_place && m * k < SERIAL_WORK;
    const Given* given = (const Given*)args.x;
    X* staged = (X*)args.staging;
    float* scales = (float*)((char*)args.staging + staged_bytes(m, args.k, args.format));
    int32_t* sums = (int32_t*)(scales + m * scale_groups(args.k, args.format));
    const Rows<Kind> cut(m, k);
    auto stage_share = [&](long part, long parts) {
        for (long block = 0; block < cut.count; block++) {
            const long row = cut.begin(block), rows = cut.begin(block + 1) - row, groups = cut.groups(rows);
            for (long g = groups * part / parts; g < groups * (part + 1) / parts; g++) {
                const long first = row + cut.group_at(rows, g), some = row + cut.group_at(rows, g + 1) - first;
                const long at = first * scale_groups(args.k, args.format);
                const Given* from = given + first * args.x_stride;
                if constexpr (sizeof(X) == 1)
                    stage_whole<Kind>(some, cut.height(some), from, args.x_stride, staged + first * k, args.k, args.format,
                                      scales + at, sums + at);
                else
                    stage<Kind>(some, cut.height(some), from, args.x_stride, staged + first * k, args.k, k);
            }
        }
    };
    const long slabs = (num_panels(args.n, args.gated) + SLAB - 1) / SLAB, total = cut.count * slabs;
    const int threads = m * args.n * k < SERIAL_WORK ? 1 : args.threads;
    if (stage_alone) stage_share(0, 1);
    Shortlist* const lists = (Shortlist*)args.lists;  // [threads, m]
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        const long team = omp_get_num_threads(), me = omp_get_thread_num();
        if (args.choices)
            for (long i = me * m; i < (me + 1) * m; i++)
                begin_list(lists[i], (Candidate*)(lists + args.threads * m) + i * shortlist_room(args.most));
        if (!in_place && !stage_alone) {
            stage_share(me, team);
#pragma omp barrier
        }
        const long height = m < 16 ? m : 16;
        const long lines = args.format.store == Store::int4 && args.format.group < 64 ? args.format.group / 4 : 16;
        const typename Kind::Setup setup(height, in_place && m > height ? m - height : height, lines);
        const Share<Kind> share{args, in_place ? (const X*)args.x : staged, k, in_place, scales, sums,
                                args.choices ? lists + me * m : nullptr};
        for (long u = total * me / team, end = total * (me + 1) / team; u < end;) {
            const long block = u / slabs, from = u % slabs, to = from + end - u < slabs ? from + end - u : slabs;
            share.slabs(cut.begin(block), cut.begin(block + 1) - cut.begin(block), from, to);
            u += to - from;
        }
        if (args.choices) {
#pragma omp barrier
            for (long r = m * me / team; r < m * (me + 1) / team; r++) {
                for (long t = 1; t < team; t++) join(lists[r], lists[t * m + r], args.choices[r]);
                choose_listed(lists[r], args.choices[r]);
            }
        }
    }
}

#if defined(TRUNKLINE_TILES)
static void product_pairs(const LinearArgs& args) { product<TilePairs, uint16_t>(args); }
template <class Given>
static void product_whole(const LinearArgs& args) {
    const bool int4 = args.format.store == Store::int4, few = args.m <= (int4 ? 8 : 4);  // vectors read them faster
    few || (int4 && args.format.group % 32) ? product<Bytes, Given>(args) : product<TileBytes, Given>(args);
}
#else
static void product_pairs(const LinearArgs& args) { product<Pairs, uint16_t>(args); }
template <class Given>
static void product_whole(const LinearArgs& args) {
    product<Bytes, Given>(args);
}
#endif

static void linear(const LinearArgs& args) {
    if (args.m == 0) return;
    if (is_whole(args.format))
        args.x_bf16 ? product_whole<uint16_t>(args) : product_whole<float>(args);
    else if (args.format.store == Store::float32)
        args.x_bf16 ? product<Float32, uint16_t>(args) : product<Float32, float>(args);
    else if (!args.x_bf16)
        product<Widened, float>(args);
    else
        product_pairs(args);
}

}  // namespace TRUNKLINE_ISA
}  // namespace trunkline
