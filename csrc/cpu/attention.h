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
    float* q;        // [rows, D] of the head in turn, as are `total` and `running`
    float* scores;   // [rows, BLOCK]
    float* part;     // [rows, D]: the block's weighted values
    float* total;    // [rows, D]
    float* stats;    // [2, rows]: largest and sum of the block
    float* running;  // [2, rows]: of all blocks so far
    float* keys;    // [BLOCK, D]: a block widened, or padded where dim is odd
    float* values;
    const void** key_at;  // [BLOCK]
    const void** value_at;
    long* low;  // [rows]: keys of the block that a row sees
    long* high;
};

struct Geometry {
    long rows, group, tile_tokens, padded;
    long turns = 1;  // key/value heads that a task takes side by side, block by block

    explicit Geometry(const AttentionArgs& a) {
        group = a.heads / a.kv_heads;
        tile_tokens = group >= TILE_ROWS ? 1 : TILE_ROWS / group;
        rows = tile_tokens * group;
        padded = (a.dim + 15) / 16 * 16;
    }
    long room_bytes() const {
        long floats = rows * (padded + BLOCK + 2) + turns * rows * (2 * padded + 2) + 2 * BLOCK * padded;
        return floats * 4 + 2 * BLOCK * long(sizeof(void*)) + 2 * rows * long(sizeof(long)) + 256;
    }
    Room room(char* at) const {
        Room r;
        float* f = (float*)at;
        r.q = f, f += turns * rows * padded;
        r.total = f, f += turns * rows * padded;
        r.running = f, f += turns * rows * 2;
        r.part = f, f += rows * padded;
        r.keys = f, f += BLOCK * padded;
        r.values = f, f += BLOCK * padded;
        r.scores = f, f += rows * BLOCK;
        r.stats = f, f += rows * 2;
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
    const Room base;
    Room r;
    long rows = 0;

    Worker(const AttentionArgs& args, const Geometry& geometry, char* at)
        : a(args), g(geometry), base(geometry.room(at)), r(base) {}

    void take_turn(long turn) {
        r.q = base.q + turn * g.rows * g.padded;
        r.total = base.total + turn * g.rows * g.padded;
        r.running = base.running + turn * g.rows * 2;
    }

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
        for (long i = 0; i < rows; i++) r.running[i] = -__builtin_inff(), r.running[g.rows + i] = 0;
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
                merge(r.running + row, r.running + g.rows + row, r.total + row * g.padded, tops[row],
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
        float weight = r.running[g.rows + row];
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
    Geometry g(a);
    const long count = make_tiles(a, g, nullptr);
    if (count == 0) return;
    const long tile_bytes = (count * long(sizeof(Tile)) + 63) / 64 * 64;
    Tile* tiles = (Tile*)a.grow(tile_bytes);
    make_tiles(a, g, tiles);
    long most_tokens = 0, most_blocks = 0, work = 0;
    for (long i = 0; i < count; i++) {
        long blocks = tiles[i].blocks_to - tiles[i].blocks_from;
        most_tokens = tiles[i].tokens > most_tokens ? tiles[i].tokens : most_tokens;
        most_blocks = blocks > most_blocks ? blocks : most_blocks;
        work += blocks * tiles[i].tokens;
    }
    const int threads = work * a.heads * a.dim * BLOCK <= SERIAL_PRODUCTS ? 1 : a.threads;
    const bool few_rows = most_tokens * g.group <= SPLIT_ROWS;
    const bool split = threads > 1 && few_rows && most_blocks > 1 && count * a.kv_heads < 4 * threads;
    // A token's heads lie side by side: with few rows, memory is read best by taking all heads of a block.
    if (few_rows && !split)
        for (g.turns = a.kv_heads; g.turns > 1 && count * (a.kv_heads / g.turns) < 4 * threads;) g.turns /= 2;
    const long parts = split ? count * a.kv_heads * most_blocks : 0;  // results of single blocks
    const long room = (g.room_bytes() + 63) / 64 * 64;
    char* base = a.grow(tile_bytes + threads * room + parts * g.part_floats() * 4);
    tiles = (Tile*)base;
    make_tiles(a, g, tiles);
    float* kept = (float*)(base + tile_bytes + threads * room);
    const long shares = (a.kv_heads + g.turns - 1) / g.turns;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        Worker<T> worker(a, g, base + tile_bytes + omp_get_thread_num() * room);
#pragma omp for schedule(dynamic, 1)
        for (long part = 0; part < parts; part++) {
            const Tile& tile = tiles[part / most_blocks / a.kv_heads];
            long head = part / most_blocks % a.kv_heads, index = tile.blocks_from + part % most_blocks;
            if (index >= tile.blocks_to) continue;
            worker.begin(tile, head);
            worker.block(tile, head, index);
            worker.keep(kept + part * g.part_floats());
        }
#pragma omp for schedule(dynamic, 1)
        for (long task = 0; task < count * shares; task++) {
            const long number = count - 1 - task / shares;  // late tiles of a prompt see the most keys
            const Tile& tile = tiles[number];
            const long from = task % shares * g.turns;
            const long heads = a.kv_heads - from < g.turns ? a.kv_heads - from : g.turns;
            for (long turn = 0; turn < heads; turn++) {
                worker.take_turn(turn);
                worker.begin(tile, from + turn);
                worker.clear_total();
            }
            for (long index = tile.blocks_from; index < tile.blocks_to; index++)
                for (long turn = 0; turn < heads; turn++) {
                    worker.take_turn(turn);
                    if (split) {
                        long part = (number * a.kv_heads + from) * most_blocks + index - tile.blocks_from;
                        worker.merge_kept(kept + part * g.part_floats());
                    } else {
                        worker.block(tile, from + turn, index);
                        worker.merge_block(worker.r.part, worker.r.stats, worker.r.stats + g.rows);
                    }
                }
            for (long turn = 0; turn < heads; turn++) {
                worker.take_turn(turn);
                worker.write(tile, from + turn);
            }
        }
    }
}

static void attention(const AttentionArgs& a) { a.pool_bf16 ? attend<uint16_t>(a) : attend<float>(a); }

}  // namespace TRUNKLINE_ISA
}  // namespace trunkline
