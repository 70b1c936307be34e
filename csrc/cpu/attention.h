// Causal attention over paged keys and values, the same bits for a query however it is batched.
//
// Keys are taken in blocks of BLOCK positions that begin at multiples of BLOCK. For one query and one block
// there is one way to compute (largest score, sum of weights, weighted values), and blocks are merged in order
// of position with the usual rescaling (online softmax). A query reads no key outside
// [position - window + 1, position]: what others in its tile read does not reach it. When there are few
// queries and many keys, blocks are computed in parallel and merged after, in the same order.
#pragma once

#include "args.h"
#include "simd.h"

#include <omp.h>

namespace trunkline {
namespace TRUNKLINE_ISA {

constexpr long BLOCK = 128;
constexpr long TILE_ROWS = 32;   // query rows (tokens x heads of a group) that share a reading of the keys
constexpr long SPLIT_ROWS = 16;  // tiles of at most so many rows may be split over blocks
constexpr long COPY_ROWS = 9;    // from so many rows on, a block is widened once for all
constexpr long SERIAL_PRODUCTS = 1 << 18;  // up to here threads cost more than they save
constexpr int SCORE_ROWS = REGISTERS == 32 ? 4 : 2;
constexpr int VALUE_VECTORS = REGISTERS == 32 ? 4 : 2;  // per row, when several rows are held

struct Tile {
    int32_t request, first, tokens, position;  // `first`: index in q; position of that token
    int32_t blocks_from, blocks_to;
};

// One thread's room. D: dim rounded up to 16.
struct Room {
    float* q;       // [rows, D]
    float* scores;  // [rows, BLOCK]
    float* part;    // [rows, D]: the block's weighted values
    float* total;   // [rows, D]
    float* stats;   // [4, rows]: largest and sum, of the block and of all
    float* keys;    // [BLOCK, D]: a block widened, or padded where dim is odd
    float* values;
    const void** key_at;  // [BLOCK]
    const void** value_at;
    long* low;  // [rows]: keys of the block that a row sees
    long* high;
};

struct Geometry {
    long rows, group, tile_tokens, padded;

    explicit Geometry(const AttentionArgs& a) {
        group = a.heads / a.kv_heads;
        tile_tokens = group >= TILE_ROWS ? 1 : TILE_ROWS / group;
        rows = tile_tokens * group;
        padded = (a.dim + 15) / 16 * 16;
    }
    long room_bytes() const {
        long floats = rows * (3 * padded + BLOCK + 4) + 2 * BLOCK * padded;
        return floats * 4 + 2 * BLOCK * long(sizeof(void*)) + 2 * rows * long(sizeof(long)) + 256;
    }
    Room room(char* at) const {
        Room r;
        float* f = (float*)at;
        r.q = f, f += rows * padded;
        r.part = f, f += rows * padded;
        r.total = f, f += rows * padded;
        r.keys = f, f += BLOCK * padded;
        r.values = f, f += BLOCK * padded;
        r.scores = f, f += rows * BLOCK;
        r.stats = f, f += rows * 4;
        at = (char*)(((uintptr_t)f + 63) / 64 * 64);
        r.key_at = (const void**)at, at += BLOCK * sizeof(void*);
        r.value_at = (const void**)at, at += BLOCK * sizeof(void*);
        r.low = (long*)at, at += rows * sizeof(long);
        r.high = (long*)at;
        return r;
    }
    // A block's result in the split form: [rows, D], then largest and sum of each row.
    long part_floats() const { return rows * (padded + 2); }
};

template <class T>
INLINE void widen_row(const T* from, float* to, long dim, long padded) {
    long i = 0;
    for (; i + W <= dim; i += W) store(to + i, load(from + i));
    for (; i < dim; i++) to[i] = widen(from[i]);
    for (; i < padded; i++) to[i] = 0;
}

// Scores of MR rows for keys [from, to), four keys at a time; the last four may repeat a key.
template <int MR, class T>
static void score(const float* q, long padded, const void* const* keys, long from, long to, float scale,
                  float* scores) {
    for (long j = from; j < to; j += 4) {
        const T* k[4];
        for (int i = 0; i < 4; i++) k[i] = (const T*)keys[j + i < to ? j + i : to - 1];
        VF acc[MR][4] = {};
        for (long d = 0; d < padded; d += W) {
            VF key[4] = {load(k[0] + d), load(k[1] + d), load(k[2] + d), load(k[3] + d)};
#pragma GCC unroll 4
            for (int r = 0; r < MR; r++) {
                VF query = load(q + r * padded + d);
#pragma GCC unroll 4
                for (int i = 0; i < 4; i++) acc[r][i] = fma(query, key[i], acc[r][i]);
            }
        }
#pragma GCC unroll 4
        for (int r = 0; r < MR; r++) {
            F4 four = sums(acc[r][0], acc[r][1], acc[r][2], acc[r][3]) * scale;
            for (int i = 0; i < 4 && j + i < to; i++) scores[r * BLOCK + j + i] = four[i];
        }
    }
}

// part[row] += sum over keys [from, to) of weight * value, in order, for MR rows.
template <int MR, int N, class T>
static void add_columns(const float* weights, const void* const* values, long from, long to, long d, float* part,
                        long padded) {
    VF acc[MR][N];
#pragma GCC unroll 8
    for (int r = 0; r < MR; r++)
#pragma GCC unroll 8
        for (int i = 0; i < N; i++) acc[r][i] = load(part + r * padded + d + i * W);
    for (long j = from; j < to; j++) {
        const T* value = (const T*)values[j] + d;
        VF v[N];
#pragma GCC unroll 8
        for (int i = 0; i < N; i++) v[i] = load(value + i * W);
#pragma GCC unroll 8
        for (int r = 0; r < MR; r++) {
            VF weight = splat(weights[r * BLOCK + j]);
#pragma GCC unroll 8
            for (int i = 0; i < N; i++) acc[r][i] = fma(weight, v[i], acc[r][i]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < MR; r++)
#pragma GCC unroll 8
        for (int i = 0; i < N; i++) store(part + r * padded + d + i * W, acc[r][i]);
}

template <int MR, class T>
static void add_values(const float* weights, const void* const* values, long from, long to, float* part,
                       long padded) {
    constexpr int N = MR == 1 ? 8 : MR == 2 ? 4 : VALUE_VECTORS;
    long d = 0;
    for (; d + N * W <= padded; d += N * W) add_columns<MR, N, T>(weights, values, from, to, d, part, padded);
    for (; d < padded; d += W) add_columns<MR, 1, T>(weights, values, from, to, d, part, padded);
}

// Rows [row, row + MR): what all of them see together, the rest one by one; each row's order stays.
template <int MR, class T>
static void add_rows(const Room& r, long row, long padded) {
    long from = r.low[row], to = r.high[row];
    for (int i = 1; i < MR; i++) {
        if (r.low[row + i] != from) from = to = 0;  // windows begin apart
        if (r.high[row + i] < to) to = r.high[row + i];
    }
    if (from < to)
        add_values<MR, T>(r.scores + row * BLOCK, r.value_at, from, to, r.part + row * padded, padded);
    for (int i = 0; i < MR; i++) {
        long begin = from < to ? to : r.low[row + i];
        if (begin < r.high[row + i])
            add_values<1, T>(r.scores + (row + i) * BLOCK, r.value_at, begin, r.high[row + i],
                             r.part + (row + i) * padded, padded);
    }
}

// Scores of one row to weights, in place; writes the row's largest score and the sum of weights.
INLINE void weigh(float* scores, long low, long high, float* largest_out, float* sum_out) {
    VF most = splat(-__builtin_inff());
    long begin = low / W * W, end = (high + W - 1) / W * W;
    for (long j = begin; j < low; j++) scores[j] = -__builtin_inff();
    for (long j = high; j < end; j++) scores[j] = -__builtin_inff();
    for (long j = begin; j < end; j += W) most = larger(most, load(scores + j));
    float top = largest(most);
    VF total = {};
    for (long j = begin; j < end; j += W) {
        VF weight = exp(load(scores + j) - top);
        store(scores + j, weight);
        total += weight;
    }
    *largest_out = top;
    *sum_out = sum(total);
}

// (largest, sum, values) of all keys so far, joined with those of the next block.
INLINE void merge(float* top, float* weight, float* total, float block_top, float block_weight, const float* part,
                  long padded) {
    float both = block_top > *top ? block_top : *top;
    float old_scale = exp_one(*top - both), new_scale = exp_one(block_top - both);
    *weight = *weight * old_scale + block_weight * new_scale;
    *top = both;
    for (long d = 0; d < padded; d += W)
        store(total + d, fma(load(total + d), splat(old_scale), load(part + d) * new_scale));
}

template <class T>
struct Worker {
    const AttentionArgs& a;
    const Geometry& g;
    Room r;
    long rows = 0;

    Worker(const AttentionArgs& args, const Geometry& geometry, char* at)
        : a(args), g(geometry), r(geometry.room(at)) {}

    void begin(const Tile& tile, long kv_head) {
        rows = tile.tokens * g.group;
        for (long t = 0; t < tile.tokens; t++) {
            long at = (tile.first + t) * a.q_stride + kv_head * g.group * a.dim;
            for (long h = 0; h < g.group; h++, at += a.dim) {
                float* to = r.q + (t * g.group + h) * g.padded;
                if (a.q_bf16)
                    widen_row((const uint16_t*)a.q + at, to, a.dim, g.padded);
                else
                    widen_row((const float*)a.q + at, to, a.dim, g.padded);
            }
        }
    }

    void clear_total() {
        for (long i = 0; i < rows * g.padded; i++) r.total[i] = 0;
        for (long i = 0; i < rows; i++) r.stats[2 * g.rows + i] = -__builtin_inff(), r.stats[3 * g.rows + i] = 0;
    }

    // The block's result for every row: `part`, and its stats.
    void block(const Tile& tile, long kv_head, long index) {
        long start = index * BLOCK, first = BLOCK, last = 0;
        for (long row = 0; row < rows; row++) {
            long position = tile.position + row / g.group;
            long low = a.window && position - a.window + 1 > start ? position - a.window + 1 - start : 0;
            long high = position + 1 - start < BLOCK ? position + 1 - start : BLOCK;
            if (high < 0) high = 0;
            if (low > high) low = high;
            r.low[row] = low, r.high[row] = high;
            if (low < high && low < first) first = low;
            if (low < high && high > last) last = high;
        }
        bool copy = rows >= COPY_ROWS ? sizeof(T) == 2 : false;
        if (a.dim != g.padded) copy = true;
        locate(tile.request, kv_head, start, first, last, copy);
        if (copy)
            compute<float>(first, last);
        else
            compute<T>(first, last);
    }

    void locate(long request, long kv_head, long start, long first, long last, bool copy) {
        const int32_t* pages = a.pages + request * a.pages_stride;
        const long token = 2 * a.kv_heads * a.dim;
        for (long j = first; j < last; j++) {
            long position = start + j;
            long slot = pages[position / a.page_size] * a.page_size + position % a.page_size;
            const T* key = (const T*)a.pool + slot * token + kv_head * a.dim;
            const T* value = key + a.kv_heads * a.dim;
            if (copy) {
                widen_row(key, r.keys + j * g.padded, a.dim, g.padded);
                widen_row(value, r.values + j * g.padded, a.dim, g.padded);
                r.key_at[j] = r.keys + j * g.padded;
                r.value_at[j] = r.values + j * g.padded;
            } else {
                r.key_at[j] = key;
                r.value_at[j] = value;
                for (long byte = 0; byte < a.dim * long(sizeof(T)); byte += 64) {
                    __builtin_prefetch((const char*)key + byte, 0, 3);
                    __builtin_prefetch((const char*)value + byte, 0, 2);
                }
            }
        }
    }

    template <class U>
    void compute(long first, long last) {
        for (long j = first; j < last; j += 4) {
            long to = j + 4 < last ? j + 4 : last, row = 0;
            for (; row + SCORE_ROWS <= rows; row += SCORE_ROWS)
                score<SCORE_ROWS, U>(r.q + row * g.padded, g.padded, r.key_at, j, to, a.scale, r.scores + row * BLOCK);
            for (; row < rows; row++)
                score<1, U>(r.q + row * g.padded, g.padded, r.key_at, j, to, a.scale, r.scores + row * BLOCK);
        }
        for (long i = 0; i < rows * g.padded; i++) r.part[i] = 0;
        for (long row = 0; row < rows; row++) {
            if (r.low[row] < r.high[row])
                weigh(r.scores + row * BLOCK, r.low[row], r.high[row], r.stats + row, r.stats + g.rows + row);
            else
                r.stats[row] = -__builtin_inff(), r.stats[g.rows + row] = 0;
        }
        long row = 0;
        for (; row + 4 <= rows; row += 4) add_rows<4, U>(r, row, g.padded);
        for (; row + 2 <= rows; row += 2) add_rows<2, U>(r, row, g.padded);
        for (; row < rows; row++) add_rows<1, U>(r, row, g.padded);
    }

    void merge_block(const float* part, const float* tops, const float* weights) {
        for (long row = 0; row < rows; row++)
            if (tops[row] != -__builtin_inff() || weights[row] != 0)  // a row that saw no key of the block
                merge(r.stats + 2 * g.rows + row, r.stats + 3 * g.rows + row, r.total + row * g.padded, tops[row],
                      weights[row], part + row * g.padded, g.padded);
    }

    void keep(float* to) const {
        __builtin_memcpy(to, r.part, rows * g.padded * 4);
        __builtin_memcpy(to + g.rows * g.padded, r.stats, rows * 4);
        __builtin_memcpy(to + g.rows * (g.padded + 1), r.stats + g.rows, rows * 4);
    }

    void merge_kept(const float* kept) {
        merge_block(kept, kept + g.rows * g.padded, kept + g.rows * (g.padded + 1));
    }

    void write(const Tile& tile, long kv_head) {
        for (long row = 0; row < rows; row++) {
            long token = tile.first + row / g.group, head = kv_head * g.group + row % g.group;
            if (a.q_bf16)
                write_row((uint16_t*)a.out + (token * a.heads + head) * a.dim, row);
            else
                write_row((float*)a.out + (token * a.heads + head) * a.dim, row);
        }
    }

    template <class O>
    void write_row(O* out, long row) {
        const float* total = r.total + row * g.padded;
        float weight = r.stats[3 * g.rows + row];
        long d = 0;
        for (; d + W <= a.dim; d += W) store(out + d, load(total + d) / weight);
        for (; d < a.dim; d++) store_one(out + d, total[d] / weight);
    }
};

// Cut each request's tokens into tiles. Returns how many; writes them if `tiles` is not null.
INLINE long make_tiles(const AttentionArgs& a, const Geometry& g, Tile* tiles) {
    long count = 0;
    for (long i = 0; i < a.requests; i++) {
        long end = a.q_start[i + 1], before = a.seq_lens[i] - (end - a.q_start[i]);
        for (long first = a.q_start[i]; first < end; first += g.tile_tokens, count++) {
            if (!tiles) continue;
            long tokens = end - first < g.tile_tokens ? end - first : g.tile_tokens;
            long position = before + first - a.q_start[i];
            long low = a.window && position >= a.window ? position - a.window + 1 : 0;
            tiles[count] = {int32_t(i),        int32_t(first),       int32_t(tokens),
                            int32_t(position), int32_t(low / BLOCK), int32_t((position + tokens - 1) / BLOCK + 1)};
        }
    }
    return count;
}

template <class T>
static void attend(const AttentionArgs& a) {
    const Geometry g(a);
    const long count = make_tiles(a, g, nullptr);
    if (count == 0) return;
    const long tile_bytes = (count * long(sizeof(Tile)) + 63) / 64 * 64;
    const long room = (g.room_bytes() + 63) / 64 * 64;
    char* base = a.grow(tile_bytes + a.threads * room);
    Tile* tiles = (Tile*)base;
    make_tiles(a, g, tiles);
    long most_tokens = 0, most_blocks = 0, work = 0;
    for (long i = 0; i < count; i++) {
        long blocks = tiles[i].blocks_to - tiles[i].blocks_from;
        most_tokens = tiles[i].tokens > most_tokens ? tiles[i].tokens : most_tokens;
        most_blocks = blocks > most_blocks ? blocks : most_blocks;
        work += blocks * tiles[i].tokens;
    }
    const long tasks = count * a.kv_heads;
    const int threads = work * a.heads * a.dim * BLOCK <= SERIAL_PRODUCTS ? 1 : a.threads;
    const bool split = threads > 1 && tasks < 4 * threads && most_blocks > 1 && most_tokens * g.group <= SPLIT_ROWS;
    float* kept = nullptr;
    if (split) {
        base = a.grow(tile_bytes + a.threads * room + tasks * most_blocks * g.part_floats() * 4);
        tiles = (Tile*)base;
        make_tiles(a, g, tiles);
        kept = (float*)(base + tile_bytes + a.threads * room);
    }
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        Worker<T> worker(a, g, base + tile_bytes + omp_get_thread_num() * room);
        if (split) {
#pragma omp for schedule(dynamic, 1)
            for (long task = 0; task < tasks * most_blocks; task++) {
                const Tile& tile = tiles[task / most_blocks / a.kv_heads];
                long head = task / most_blocks % a.kv_heads, index = tile.blocks_from + task % most_blocks;
                if (index >= tile.blocks_to) continue;
                worker.begin(tile, head);
                worker.block(tile, head, index);
                worker.keep(kept + task * g.part_floats());
            }
        }
#pragma omp for schedule(dynamic, 1)
        for (long task = 0; task < tasks; task++) {
            // Late tiles of a prompt see the most keys: take them first.
            const Tile& tile = tiles[count - 1 - task / a.kv_heads];
            long head = task % a.kv_heads;
            if (!split) worker.begin(tile, head);
            worker.rows = tile.tokens * g.group;
            worker.clear_total();
            for (long index = tile.blocks_from; index < tile.blocks_to; index++) {
                if (split) {
                    long at = ((count - 1 - task / a.kv_heads) * a.kv_heads + head) * most_blocks;
                    worker.merge_kept(kept + (at + index - tile.blocks_from) * g.part_floats());
                } else {
                    worker.block(tile, head, index);
                    worker.merge_block(worker.r.part, worker.r.stats, worker.r.stats + g.rows);
                }
            }
            worker.write(tile, head);
        }
    }
}

static void attention(const AttentionArgs& a) { a.pool_bf16 ? attend<uint16_t>(a) : attend<float>(a); }

}  // namespace TRUNKLINE_ISA
}  // namespace trunkline
