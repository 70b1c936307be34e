// Causal attention over paged keys and values, the same bits for a query however it is batched.
//
// Keys are taken in blocks of BLOCK positions that begin at multiples of BLOCK. For one query and one block there
// is one way to compute (largest score, sum of weights, weighted values): each score is one running sum over the
// dimensions, each weighted value one over the keys, see attention_block.h. Blocks are joined in order of position
// with the usual rescaling (online softmax). What differs between calls is only which queries share a reading of
// the keys, and who computes which block: results of single blocks may be kept and joined later, in the same order.
// A query reads no key outside [position - window + 1, position]: what others in its tile read does not reach it.
// A token of a draft tree has its own keys where the step's tokens begin: its ancestors, as if they were alone in a
// row. Blocks with such positions are computed for each token by itself; blocks before are shared as ever.
// Whole numbers are multiplied as they are; a key's scale enters with its scores, a value's with its weights.
#pragma once

#include "attention_block.h"

#include <omp.h>
#include <sched.h>

#include <utility>

namespace trunkline {
namespace TRUNKLINE_ISA {

constexpr long FEW_ROWS = 32;   // of such tiles, a thread takes several heads side by side, or some of the blocks
constexpr long NEAR_BYTES = 1 << 19;  // of keys and values that a thread has in use: they stay in the second cache
constexpr long SERIAL_PRODUCTS = 1 << 18;  // up to here threads cost more than they save
constexpr long EDGE = 2 * PANEL;  // keys that are copied at once

// Tokens of a request, one after another, whose rows are part of a tile.
struct Segment {
    int32_t request, first, tokens, position;  // `first`: index in q; position of that token
};

// What a thread takes at once: blocks [from, to) of heads [head, head + heads) for a tile.
struct Item {
    int32_t segment, segments;  // of the tile: several where it is of a stem
    int32_t tokens, head, heads, from, to;
    int32_t begin, end;   // blocks that the tile has
    int32_t after, stem;  // stems: what the tile goes on from, and what it is of; -1: none
    int32_t share;        // counts items of the same tile and heads
    long kept;            // where results of single blocks go, from the first of the tile on; -1: joined at once
};

// The keys of a block that a tile reads.
template <class T>
struct Keys {
    const T* at[BLOCK];  // a token's key of the first head, or null
    long start, first, last;  // position of the block; keys [first, last) of it
    long step[BLOCK / PANEL];  // of few rows: how far apart the keys of a panel are; 0: not evenly, or not all there
    struct Run {
        const T* from;
        long tokens;
    } runs[BLOCK];  // tokens that lie side by side
    long num_runs;
};

// Memory that a head's keys and values take, fetched few lines at a time while those before it are multiplied.
template <class T>
struct Coming {
    const Keys<T>* block = nullptr;
    long offsets[2], width;  // of the head's keys and values behind the first head's keys; of a token
    long side = 2, run = 0;
    const char *at = nullptr, *end = nullptr;

    void aim(const Keys<T>* keys, long keys_offset, long values_offset, long token_width) {
        *this = {keys, {keys_offset, values_offset}, token_width, 0, 0, nullptr, nullptr};
    }
    inline __attribute__((always_inline)) void operator()(long lines) {
        for (; lines > 0; lines--, at += LINE) {
            if (at >= end && !turn()) return;
            __builtin_prefetch(at, 0, 2);  // into the second cache
        }
    }
    bool turn() {
        while (side < 2 && run == block->num_runs) run = 0, side++;
        if (side == 2) return false;
        at = (const char*)(block->runs[run].from + offsets[side]);
        end = at + block->runs[run].tokens * width * long(sizeof(T));
        run++;
        return true;
    }
};

struct Geometry {
    long group, tile_tokens, rows, dim, heads, chunk;

    Geometry(const AttentionArgs& a, long element, long step) {
        group = a.heads / a.kv_heads;
        tile_tokens = group >= TILE_ROWS ? 1 : TILE_ROWS / group;
        dim = (a.dim + step - 1) / step * step;
        heads = NEAR_BYTES / (BLOCK * 2 * a.dim * element);
        heads = heads > a.kv_heads ? a.kv_heads : heads < 1 ? 1 : heads;
        rows = tile_tokens * group > heads * FEW_ROWS ? tile_tokens * group : heads * FEW_ROWS;
        rows = (rows + 15) / 16 * 16;
        chunk = 1L << 40;
    }
    // Of a block's kept result: [rows, dim], then largest scores and sums of [FEW_ROWS] rows.
    long part_floats() const { return FEW_ROWS * (dim + 2); }
};

INLINE bool is_tree(const AttentionArgs& a, long request) {
    const long tokens = a.requests.new_tokens(request);
    return a.tree && tokens > 1 && tokens <= a.tree_columns;
}

// Cuts the step into items, each behind those that it waits for. Counts, and writes what is not null. `work`: blocks,
// once for heads that few rows take side by side.
struct Cut {
    const AttentionArgs& a;
    const Geometry& g;
    Segment* segments = nullptr;
    Item* items = nullptr;
    int32_t* shares = nullptr;  // items to go, of each tile and heads
    int32_t* stems = nullptr;   // [stems, kv_heads]: tiles to go
    long num_segments = 0, num_items = 0, num_shares = 0, kept = 0, work = 0;

    void all() {
        num_segments = num_items = num_shares = kept = work = 0;
        for (long i = 0; a.prefixes && i < long(a.prefixes->stems.size()); i++) stem(i);
        for (long i = 0; i < a.requests.count; i++) leaf(i);
    }

private:
    // The first block that a token sees anything of.
    long lowest_block(const Segment& s) const {
        const long position = is_tree(a, s.request) ? a.requests.prefix(s.request) : s.position;
        return a.window && position >= a.window ? (position - a.window + 1) / BLOCK : 0;
    }

    Segment segment_of(long request, long from, long tokens) const {
        return {int32_t(request), int32_t(a.requests.q_start[request] + from), int32_t(tokens),
                int32_t(a.requests.prefix(request) + from)};
    }

    void stem(long index) {
        const Stem& s = a.prefixes->stems[index];
        for (long h = 0; stems && h < a.kv_heads; h++) stems[index * a.kv_heads + h] = 0;
        long count = 0, tokens = 0, begin = s.to;
        auto close = [&] {
            if (count) tile(count, tokens, begin, s.to, s.parent, int32_t(index), 0, a.kv_heads);
            count = tokens = 0, begin = s.to;
        };
        for (long i = s.first; i < s.last; i++) {
            const long request = a.prefixes->order[i], new_tokens = a.requests.new_tokens(request);
            for (long from = 0, some; from < new_tokens; from += some) {
                if (tokens == g.tile_tokens) close();
                some = new_tokens - from < g.tile_tokens - tokens ? new_tokens - from : g.tile_tokens - tokens;
                const Segment next = segment_of(request, from, some);
                if (segments) segments[num_segments + count] = next;
                const long lowest = lowest_block(next) > s.from ? lowest_block(next) : s.from;
                begin = lowest < begin ? lowest : begin;
                count++, tokens += some;
            }
        }
        close();
    }

    // What a request has for itself: late tiles first, which see the most keys, and all of a head before the next,
    // whose keys then stay in the second cache.
    void leaf(long request) {
        const long new_tokens = a.requests.new_tokens(request), after = a.prefixes ? a.prefixes->stem[request] : -1;
        const long tiles = (new_tokens + g.tile_tokens - 1) / g.tile_tokens;
        const long step = tiles == 1 ? a.kv_heads : 1;
        for (long head = 0; head < a.kv_heads; head += step)
            for (long t = tiles - 1; t >= 0; t--) {
                const long from = t * g.tile_tokens, left = new_tokens - from;
                const Segment only = segment_of(request, from, left < g.tile_tokens ? left : g.tile_tokens);
                if (segments) segments[num_segments] = only;
                const long lowest = lowest_block(only), shared = after < 0 ? 0 : a.prefixes->stems[after].to;
                tile(1, only.tokens, lowest > shared ? lowest : shared, (only.position + only.tokens - 1) / BLOCK + 1,
                     int32_t(after), -1, head, head + step);
            }
    }

    // Heads [head, last) of the tile of the next `count` segments.
    void tile(long count, long tokens, long begin, long end, int32_t after, int32_t stem, long head, long last) {
        const bool few = tokens * g.group <= FEW_ROWS;
        const long heads = few ? g.heads : 1, chunk = few ? g.chunk : 1L << 40;
        for (; head < last; head += heads, num_shares++) {
            const long some = last - head < heads ? last - head : heads;
            for (long h = head; stems && stem >= 0 && h < head + some; h++) stems[stem * a.kv_heads + h]++;
            const long before = num_items;
            long from = begin;
            do {
                if (items)
                    items[num_items] = {int32_t(num_segments), int32_t(count), int32_t(tokens), int32_t(head), int32_t(some),
                                        int32_t(from), int32_t(end - from < chunk ? end : from + chunk), int32_t(begin),
                                        int32_t(end), after, stem, int32_t(num_shares), end - begin > chunk ? kept : -1};
                num_items++, from += chunk;
            } while (from < end);
            if (shares) shares[num_shares] = int32_t(num_items - before);
            if (end - begin > chunk) kept += some * (end - begin);
            if (head % g.heads == 0) work += end - begin;
        }
        num_segments += count;
    }
};

// A count of things to go, which threads share.
INLINE bool last_of(int32_t* left) { return __atomic_sub_fetch(left, 1, __ATOMIC_ACQ_REL) == 0; }
INLINE void wait_for(const int32_t* left) {
    for (long turn = 0; __atomic_load_n(left, __ATOMIC_ACQUIRE) > 0; turn++)
        if (turn >= 1000) sched_yield();
}

INLINE char* carve(char*& at, long bytes) {
    char* begin = at;
    at += (bytes + 63) / 64 * 64;
    return begin;
}

// A thread's room, and what it does to its items. X: what products take; T: what the pool holds.
template <class X, class T>
struct Worker {
    const AttentionArgs& a;
    const Geometry& g;
    const Cut& cut;
    float* parts;    // of all threads: results of single blocks
    float* carried;  // [tokens in stems, heads, dim + 2]: what stems add up to, largest score, sum
    X* q;            // [heads, rows, dim] of the item
    float* total;    // [heads, rows, dim]
    float* running;  // [heads, 2, rows]: largest scores and sums so far
    float* scores;   // [rows, BLOCK], then the weights in the same rows
    float* stats;    // [2, rows]: of the block
    float* scales;   // [2, rows]
    int32_t* place;  // [rows]: position of a row's token
    int32_t* low;    // [rows]: keys of the block that a row sees
    int32_t* high;
    int32_t* path;   // [tree_columns]: of a token of a tree, which tokens of the step it sees, itself the last
    float* levels;   // [2, BLOCK]: scales of the block's keys and values of a head, where they are whole numbers
    char* keys;    // a slab
    char* values;  // slabs
    T* edge;       // [EDGE + 1, dim]: rows of keys that can't be used where they lie, and zeros
    char* columns;  // [heads, dim]: rows of q as a panel, where they are few
    Keys<T> *now, *next;  // the block's, and the next one's if `ready`
    bool ready = false;
    Coming<T> coming;  // what the next head reads
    long pace = 0;  // lines of that at each of its steps, where a block is packed
    long rows = 0, padded = 0;  // of the item, and that as a multiple of 16
    long active = 0, active_end = 0;  // rows that the block's keys are for
    long prefix = 0;  // the step's tokens begin at this position
    const uint8_t* tree = nullptr;  // of the item's first token, where it is of a tree
    const long width = sizeof(T) == 1 ? a.dim + SCALE_BYTES : a.dim;  // of a head in the pool
    const long head_step = a.requests.page_size * width;  // from one head of a token to the next
    long keys_of(long head) const { return head * head_step; }
    long values_of(long head) const { return (a.kv_heads + head) * head_step; }

    Worker(const Cut& whole, float* parts_, float* carried_, char* at)
        : a(whole.a), g(whole.g), cut(whole), parts(parts_), carried(carried_) {
        lay_out(at);
    }

    // Returns the bytes in use.
    long lay_out(char* const begin) {
        char* at = begin;
        q = (X*)carve(at, (g.rows + SPARE<X>) * g.dim * sizeof(X));
        total = (float*)carve(at, g.rows * g.dim * 4);
        running = (float*)carve(at, g.rows * 8);
        scores = (float*)carve(at, (g.rows + SPARE<X>) * BLOCK * 4);
        stats = (float*)carve(at, g.rows * 8);
        scales = (float*)carve(at, g.rows * 8);
        place = (int32_t*)carve(at, g.rows * 4);
        low = (int32_t*)carve(at, g.rows * 4);
        high = (int32_t*)carve(at, g.rows * 4);
        path = (int32_t*)carve(at, a.tree_columns * 4);
        levels = (float*)carve(at, 2 * BLOCK * 4);
        keys = carve(at, SPAN * g.dim * sizeof(X));
        values = carve(at, (g.dim + SPAN) / SPAN * SPAN * BLOCK * sizeof(X));
        edge = (T*)carve(at, (EDGE + 1) * g.dim * sizeof(T));
        columns = carve(at, on_tiles<X> ? g.heads * g.dim * PANEL * sizeof(X) : 0);
        now = (Keys<T>*)carve(at, sizeof(Keys<T>));
        next = (Keys<T>*)carve(at, sizeof(Keys<T>));
        return at - begin;
    }
    void clear_edge() {
        for (long i = 0; i < (EDGE + 1) * g.dim; i++) edge[i] = 0;
    }
    const T* zeros() const { return edge + EDGE * g.dim; }

    // Keys of a block that active rows see, the first of which are those of tokens at `lowest`, the last of ones
    // at `highest`.
    void locate(Keys<T>& to, const Item& item, long index, long lowest, long highest) const {
        to.start = index * BLOCK, to.num_runs = 0;
        const long least = a.window && lowest >= a.window ? lowest - a.window + 1 : 0;
        const long end = highest + 1, page_size = a.requests.page_size;
        to.first = least > to.start ? least - to.start : 0;
        to.last = end - to.start < BLOCK ? end - to.start : BLOCK;
        const int32_t* pages = a.requests.pages + cut.segments[item.segment].request * a.requests.pages_stride;
        for (long j = to.first; j < to.last;) {
            const long position = to.start + j;
            const bool own = tree && position >= prefix;
            const long at = own ? prefix + path[position - prefix] : position;
            const long page = at / page_size, offset = at % page_size;
            const long limit = own ? j + 1 : tree && prefix < to.start + to.last ? prefix - to.start : to.last;
            const long some = page_size - offset < limit - j ? page_size - offset : limit - j;
            const T* const token = (const T*)a.pool + pages[page] * 2 * a.kv_heads * head_step + offset * width;
            to.runs[to.num_runs++] = {token, some};
            for (long i = 0; i < some; i++, j++) to.at[j] = token + i * width;
        }
        for (long p = 0; p < BLOCK / PANEL && few(); p++) {
            const T* const* row = to.at + p * PANEL;
            to.step[p] = 0;
            if (a.dim != g.dim || p * PANEL < to.first || (p + 1) * PANEL > to.last) continue;
            const long step = row[1] - row[0];
            bool even = true;
            for (long i = 2; i < PANEL; i++) even &= row[i] - row[i - 1] == step;
            if (even) to.step[p] = step;
        }
    }

    // Read all lines that a head needs, one after another: then memory delivers as fast as it can, and products find
    // them in the second cache.
    void fetch(long head) const {
        for (long offset : {keys_of(head), values_of(head)})
            for (long r = 0; r < now->num_runs; r++) {
                const char* from = (const char*)(now->runs[r].from + offset);
                const long bytes = now->runs[r].tokens * width * long(sizeof(T));
                for (long b = 0; b < bytes; b += LINE) asm volatile("" ::"r"(from[b]));
                if (sizeof(T) == 1) asm volatile("" ::"r"(from[bytes - 1]));  // heads do not begin at lines
            }
    }

    void see() {
        for (long row = active; row < active_end; row++) {
            const long position = place[row] - now->start;
            long from = a.window && position >= a.window ? position - a.window + 1 : 0;
            long to = position + 1 < BLOCK ? position + 1 : BLOCK;
            if (to < 0) to = 0;
            if (from > to) from = to;
            low[row] = int32_t(from), high[row] = int32_t(to);
        }
    }

    void begin(const Item& item) {
        rows = item.tokens * g.group, padded = (rows + 15) / 16 * 16;
        pace = 2 * BLOCK * width * long(sizeof(T)) / LINE / (BLOCK / PANEL + BLOCK / unit_of<X> + rows / 4) + 1;
        long row = 0;
        for (long i = 0; i < item.segments; i++) {
            const Segment& s = cut.segments[item.segment + i];
            prefix = a.requests.prefix(s.request);
            tree = is_tree(a, s.request) ? a.tree + s.first * a.tree_columns : nullptr;
            for (long token = 0; token < s.tokens; token++)
                for (long member = 0; member < g.group; member++, row++)
                    place[row] = member ? place[row - 1] : int32_t(tree ? prefix + follow(s, token) - 1 : s.position + token);
        }
        if (item.stem >= 0) tree = nullptr;  // no token of this step is among a stem's keys
        each_row(item, [&](long turn, long at, long token, long head, float*) {
            X* to = q + (turn * padded + at) * g.dim;
            if (a.q_bf16)
                copy((const uint16_t*)a.q + token * a.q_stride + head * a.dim, to);
            else
                copy((const float*)a.q + token * a.q_stride + head * a.dim, to);
        });
        if constexpr (IN_PLACE<X, T>)
            for (long turn = 0; turn < item.heads && few(); turn++) {
                const X* row[PANEL];
                for (long i = 0; i < PANEL; i++) row[i] = q + (turn * padded + i) * g.dim;
                pack_keys<X>(row, g.dim, columns + turn * g.dim * PANEL * long(sizeof(X)), LINE);
            }
    }

    // Whether keys and values are multiplied where they lie in the pool.
    bool few() const { return IN_PLACE<X, T> && rows <= PANEL; }

    // Calls f(turn, row, index in q, head, carried state or null).
    template <class F>
    inline __attribute__((always_inline)) void each_row(const Item& item, F f) const {
        for (long turn = 0; turn < item.heads; turn++) {
            long row = 0;
            for (long i = 0; i < item.segments; i++) {
                const Segment& s = cut.segments[item.segment + i];
                for (long token = s.first; token < s.first + s.tokens; token++)
                    for (long member = 0; member < g.group; member++, row++) {
                        const long head = (item.head + turn) * g.group + member;
                        float* state = nullptr;
                        if (item.stem >= 0 || item.after >= 0) {
                            const long at = a.prefixes->carried[s.request] + token - a.requests.q_start[s.request];
                            state = carried + (at * a.heads + head) * (g.dim + 2);
                        }
                        f(turn, row, token, head, state);
                    }
            }
        }
    }
    template <class Q>
    void copy(const Q* from, X* to) const {
        if constexpr (sizeof(Q) >= sizeof(X))  // bfloat16 products are for queries of that type
            for (long d = 0; d < a.dim; d++) to[d] = from[d];
        else
            for (long d = 0; d < a.dim; d++) to[d] = widen(from[d]);
        for (long d = a.dim; d < g.dim; d++) to[d] = 0;
    }

    // The path of a token of a tree. Returns its length.
    long follow(const Segment& s, long token) {
        long length = 0;
        for (long i = 0; i < a.requests.new_tokens(s.request); i++)
            if (tree[token * a.tree_columns + i]) path[length++] = int32_t(i);
        return length;
    }

    // Rows go on from what a stem made of them, or begin with nothing.
    void start(const Item& item) {
        for (long i = 0; i < item.heads * padded * g.dim; i++) total[i] = 0;
        for (long turn = 0; turn < item.heads; turn++)
            for (long i = 0; i < padded; i++) {
                running[2 * turn * padded + i] = -__builtin_inff();
                running[(2 * turn + 1) * padded + i] = 0;
            }
        if (item.after < 0) return;
        for (long head = item.head; head < item.head + item.heads; head++)
            wait_for(cut.stems + item.after * a.kv_heads + head);
        each_row(item, [&](long turn, long row, long, long, const float* state) {
            __builtin_memcpy(total + (turn * padded + row) * g.dim, state, g.dim * 4);
            running[2 * turn * padded + row] = state[g.dim];
            running[(2 * turn + 1) * padded + row] = state[g.dim + 1];
        });
    }

    // What rows came to is their result, or where others go on.
    void finish(const Item& item) const {
        each_row(item, [&](long turn, long row, long token, long head, float* state) {
            const float top = running[2 * turn * padded + row], weight = running[(2 * turn + 1) * padded + row];
            const float* from = total + (turn * padded + row) * g.dim;
            if (item.stem >= 0) {
                __builtin_memcpy(state, from, g.dim * 4);
                state[g.dim] = top, state[g.dim + 1] = weight;
            } else if (a.q_bf16) {
                write_row(from, weight, (uint16_t*)a.out + (token * a.heads + head) * a.dim);
            } else {
                write_row(from, weight, (float*)a.out + (token * a.heads + head) * a.dim);
            }
        });
        for (long head = item.head; item.stem >= 0 && head < item.head + item.heads; head++)
            last_of(cut.stems + item.stem * a.kv_heads + head);
    }

    // The key or value of a token as a row of `dim` numbers; `room`: which row of `edge` it may use.
    const T* row_of(long j, long offset, long room) const {
        if (j < now->first || j >= now->last) return zeros();
        if (a.dim == g.dim) return now->at[j] + offset;
        __builtin_memcpy(edge + room * g.dim, now->at[j] + offset, a.dim * sizeof(T));
        return edge + room * g.dim;
    }

    void pack_block_keys(long head, long slab, long from, long to) {
        for (long p = from; p < to; p++) {
            coming(pace);
            const T* row[PANEL];
            for (long i = 0; i < PANEL; i++) row[i] = row_of(slab * SPAN + p * PANEL + i, keys_of(head), i);
            pack_keys<X>(row, g.dim, keys + p * LINE, SLAB * LINE);
        }
    }

    // Values of keys [from, to), multiples of 16; those outside [low, high) as zeros.
    void pack_block_values(long head, long from, long to, long low, long high) {
        const long offset = values_of(head);
        for (long j = from; j < to; j += unit_of<X>) {
            coming(pace);
            const T* row[2];
            for (long i = 0; i < unit_of<X>; i++)
                row[i] = j + i >= low && j + i < high ? row_of(j + i, offset, i) : zeros();
            pack_values<X>(row, j / unit_of<X>, g.dim, values);
        }
    }

    // Keys [first, last) as panels, whole steps of a product with values.
    static void panels_of(long first, long last, long& from, long& to) {
        constexpr long STEP = PANEL * KEY_STEP<X>;
        from = first / STEP * KEY_STEP<X>, to = (last + STEP - 1) / STEP * KEY_STEP<X>;
    }

    // Keys that any of rows [row, row + some) sees, as panels; false: none.
    bool seen(long row, long some, long& from, long& to) const {
        from = BLOCK, to = 0;
        for (long r = row; r < row + some; r++) {
            if (low[r] >= high[r]) continue;
            from = low[r] < from ? low[r] : from;
            to = high[r] > to ? high[r] : to;
        }
        if (from >= to) return false;
        panels_of(from, to, from, to);
        return true;
    }

    // How this head's scores become weights.
    Scoring scoring(long head) {
        Scoring how{factor(), a.scale / a.soft_cap, a.soft_cap, nullptr, nullptr};
        if constexpr (sizeof(T) == 1) {
            for (long j = 0; j < BLOCK; j++)
                for (long side = 0; side < 2; side++) {
                    uint16_t bits = 0;
                    if (j >= now->first && j < now->last)
                        __builtin_memcpy(&bits, now->at[j] + keys_of(side * a.kv_heads + head) + a.dim, SCALE_BYTES);
                    levels[side * BLOCK + j] = widen(bits);
                }
            how.key_scales = levels, how.value_scales = levels + BLOCK;
        }
        return how;
    }
    float factor() const { return (a.soft_cap != 0 ? 1 : a.scale) * 1.44269504f; }

    // The keys or values of panels p and p + 1 in place; those outside [low, high) as zeros.
    InPlace<T> in_place(long p, long offset, long low, long high) const {
        const long from = p * PANEL, to = from + EDGE;
        if (now->step[p] && now->step[p] == now->step[p + 1] && low <= from && high >= to)
            return {now->at[from] + offset, now->at[from + PANEL] + offset, now->step[p]};
        low = low > now->first ? low : now->first, high = high < now->last ? high : now->last;
        for (long j = from; j < to; j++) {
            const T* row = j >= low && j < high ? now->at[j] + offset : zeros();
            __builtin_memcpy(edge + (j - from) * g.dim, row, a.dim * sizeof(T));
        }
        return {edge, edge + PANEL * g.dim, g.dim};
    }

    void score(long head, long turn, const Scoring& how) {
        if constexpr (IN_PLACE<X, T>)
            if (few()) {
                long from, to;
                if (!seen(active, active_end - active, from, to)) from = to = 0;
                for (long p = from; p < to; p += 2)
                    score_in_place(in_place(p, keys_of(head), 0, BLOCK), columns + turn * g.dim * PANEL * long(sizeof(X)),
                                   g.dim, active, active_end, scores + p * PANEL, coming);
                return weigh_rows(active, active_end, from * PANEL, to * PANEL, how);
            }
        long panel_from, panel_to;
        panels_of(now->first, now->last, panel_from, panel_to);
        const long last_slab = (panel_to - 1) / SLAB, count = active_end - active, turns = num_turns<X>(count);
        for (long slab = panel_from / SLAB; slab <= last_slab; slab++) {
            auto here = [&](long p) { return p < slab * SLAB ? 0 : p > slab * SLAB + SLAB ? SLAB : p - slab * SLAB; };
            pack_block_keys(head, slab, here(panel_from), here(panel_to));
            for (long n = 0; n < turns; n++) {
                const long row = active + turn_begin<X>(count, n), some = active + turn_begin<X>(count, n + 1) - row;
                long from, to;
                if (!seen(row, some, from, to)) from = to = 0;
                if (here(from) < here(to))
                    multiply_turn(some, q + (turn * padded + row) * g.dim, g.dim, keys + here(from) * LINE, SLAB,
                                  here(to) - here(from), g.dim / unit_of<X>,
                                  scores + row * BLOCK + slab * SPAN + here(from) * PANEL, BLOCK);
                if (slab != last_slab) continue;
                weigh_rows(row, row + some, from * PANEL, to * PANEL, how);
            }
        }
    }

    void weigh_rows(long row, long end, long from, long to, const Scoring& how) {
        auto sees = [&](long r) { return low[r] < high[r]; };
        if (how.key_scales || how.outer != 0)
            for (long r = row; r < end; r++) finish_scores(scores + r * BLOCK, from, to, how);
        while (row < end) {
            if (!few()) coming(pace);
            float* const at = scores + row * BLOCK;
            if (row + 4 <= end && sees(row) && sees(row + 1) && sees(row + 2) && sees(row + 3)) {
                weigh<X, 4>(at, from, to, low + row, high + row, how, stats + row, stats + padded + row);
                row += 4;
                continue;
            }
            if (sees(row))
                weigh<X, 1>(at, from, to, low + row, high + row, how, stats + row, stats + padded + row);
            else
                weigh_nothing<X>(at, from, to, stats + row, stats + padded + row);
            row++;
        }
    }

    // Weights of rows [row, row + some) times values of panels [from, to), for up to SPAN columns of the head from d on.
    // In place, those of keys outside [low_key, high_key) are zeros; packed ones are so already.
    void multiply_values(long head, long row, long some, long from, long to, long d, long low_key, long high_key, float* part) {
        const X* weights = (const X*)(scores + row * BLOCK) + from * PANEL;
        const long columns = g.dim - d < SPAN ? g.dim - d : SPAN;
        if constexpr (IN_PLACE<X, T>)
            if (few()) {
                auto of = [&](long p) { return in_place(p, values_of(head), low_key, high_key).from(d); };
                return columns == SPAN ? weigh_in_place<4>(weights, from, to, of, part, coming)
                                       : weigh_in_place<2>(weights, from, to, of, part, coming);
            }
        const long line = from * PANEL / unit_of<X>, lines = (to - from) * PANEL / unit_of<X>;
        const char* slab = values + d * BLOCK * long(sizeof(X)) + line * columns * 4;
        multiply_turn(some, weights, BLOCK * unit_of<X>, slab, columns / PANEL, columns / PANEL, lines, part, SPAN);
    }

    // Weights of rows [row, row + some) times values. The result is kept, or added to the total.
    void add_rows(long head, long turn, long row, long some, long low_key, long high_key, float* kept) {
        long from, to;
        if (!seen(row, some, from, to)) return;
        alignas(LINE) float part[AT_ONCE<X> * SPAN];
        for (long d = 0; d < g.dim; d += SPAN) {
            const long columns = g.dim - d < SPAN ? g.dim - d : SPAN;
            multiply_values(head, row, some, from, to, d, low_key, high_key, part);
            for (long r = 0; r < some; r++)
                if (kept)
                    __builtin_memcpy(kept + (row + r) * g.dim + d, part + r * SPAN, columns * 4);
                else if (low[row + r] < high[row + r])
                    add_part(total + (turn * padded + row + r) * g.dim + d, part + r * SPAN, scales[row + r],
                             scales[padded + row + r], columns);
        }
    }

    // Whether a value that only some of the rows see is not finite: its product with a weight of zero is not zero.
    bool spoiled(long head) const {
        long from = 0, to = BLOCK;
        for (long r = active; r < active_end; r++) from = low[r] > from ? low[r] : from, to = high[r] < to ? high[r] : to;
        if (from <= now->first && to >= now->last) return false;
        for (long j = now->first; j < now->last; j++)
            if ((j < from || j >= to) && !finite(now->at[j] + values_of(head), a.dim)) return true;
        return false;
    }

    void add_values(long head, long turn, float* kept) {
        long from, to;
        panels_of(now->first, now->last, from, to);
        from *= PANEL, to *= PANEL;
        if (!spoiled(head)) {
            if (!few()) pack_block_values(head, from, to, 0, BLOCK);
            const long count = active_end - active;
            for (long n = 0, turns = num_turns<X>(count); n < turns; n++)
                add_rows(head, turn, active + turn_begin<X>(count, n),
                         turn_begin<X>(count, n + 1) - turn_begin<X>(count, n), 0, BLOCK, kept);
            return;
        }
        for (long r = active; r < active_end; r++) {
            if (!few()) pack_block_values(head, from, to, low[r], high[r]);
            add_rows(head, turn, r, 1, low[r], high[r], kept);
        }
    }

    void block(const Item& item, long index) {
        if (!tree || (index + 1) * BLOCK <= prefix) {
            long lowest = place[0], highest = place[0];
            for (long row = g.group; row < rows; row += g.group) {
                lowest = place[row] < lowest ? place[row] : lowest;
                highest = place[row] > highest ? place[row] : highest;
            }
            active = 0, active_end = rows;
            share_of_block(item, index, lowest, highest, index + 1 < item.to && (!tree || (index + 2) * BLOCK <= prefix));
            return;
        }
        nothing_seen(0, padded);
        for (long token = 0; token < item.tokens; token++) {
            follow(cut.segments[item.segment], token);
            active = token * g.group, active_end = active + g.group;
            share_of_block(item, index, place[active], place[active], false);
            nothing_seen(active, active_end);
        }
    }
    void nothing_seen(long from, long to) {
        for (long i = from; i < to; i++) stats[i] = -__builtin_inff(), stats[padded + i] = 0;
    }

    // What a block adds to the active rows, whose tokens stand at positions [lowest, highest]. `more`: they see the
    // next one too.
    void share_of_block(const Item& item, long index, long lowest, long highest, bool more) {
        if (ready)
            std::swap(now, next);
        else
            locate(*now, item, index, lowest, highest);
        see();
        if (!ready) fetch(item.head);
        ready = more;
        if (ready) locate(*next, item, index + 1, lowest, highest);
        for (long turn = 0; turn < item.heads; turn++) {
            const long head = item.head + turn, after = turn + 1 < item.heads ? head + 1 : item.head;
            if (turn + 1 < item.heads || ready)
                coming.aim(after > head ? now : next, keys_of(after), values_of(after), width);
            else
                coming = {};
            float* kept = item.kept < 0 ? nullptr : part_of(item, index, turn);
            if (now->first < now->last)
                score(head, turn, scoring(head));
            else
                nothing_seen(active, active_end);
            if (kept) {
                const long count = active_end - active;
                __builtin_memcpy(kept + FEW_ROWS * g.dim + active, stats + active, count * 4);
                __builtin_memcpy(kept + FEW_ROWS * (g.dim + 1) + active, stats + padded + active, count * 4);
            } else {
                join(padded, running + 2 * turn * padded, running + (2 * turn + 1) * padded, stats, stats + padded,
                     factor(), scales);
            }
            add_values(head, turn, kept);
        }
    }

    float* part_of(const Item& item, long index, long turn) const {
        return parts + (item.kept + (index - item.begin) * item.heads + turn) * g.part_floats();
    }

    void join_kept(const Item& item) {
        for (long i = 0; i < 2 * padded; i++) stats[i] = 0;
        for (long index = item.begin; index < item.end; index++)
            for (long turn = 0; turn < item.heads; turn++) {
                const float* kept = part_of(item, index, turn);
                __builtin_memcpy(stats, kept + FEW_ROWS * g.dim, rows * 4);
                __builtin_memcpy(stats + padded, kept + FEW_ROWS * (g.dim + 1), rows * 4);
                join(padded, running + 2 * turn * padded, running + (2 * turn + 1) * padded, stats, stats + padded,
                     factor(), scales);
                for (long r = 0; r < rows; r++)
                    if (stats[r] != -__builtin_inff() || stats[padded + r] != 0)
                        add_part(total + (turn * padded + r) * g.dim, kept + r * g.dim, scales[r], scales[padded + r],
                                 g.dim);
            }
    }

    template <class O>
    void write_row(const float* from, float weight, O* out) const {
        long d = 0;
        const float share = 1 / weight;
        for (; d + W <= a.dim; d += W) store(out + d, load(from + d) * splat(share));
        for (; d < a.dim; d++) store_one(out + d, from[d] * share);
    }

    // Take items, one after another, until there are none.
    void run(long* counter) {
        while (true) {
            long mine;
#pragma omp atomic capture
            mine = (*counter)++;
            if (mine >= cut.num_items) return;
            const Item& item = cut.items[mine];
            begin(item);
            ready = false;
            if (item.kept < 0) start(item);
            for (long index = item.from; index < item.to; index++) block(item, index);
            if (item.kept >= 0) {
                if (!last_of(cut.shares + item.share)) continue;
                start(item);
                join_kept(item);
            }
            finish(item);
        }
    }
};

template <class X, class T>
static void attend(const AttentionArgs& a) {
    Geometry g(a, sizeof(T), DIM_STEP<T>);
    Cut cut{a, g};
    cut.all();
    if (cut.num_items == 0) return;
    const int threads = cut.work * g.heads * g.group * a.dim * BLOCK <= SERIAL_PRODUCTS ? 1 : a.threads;
    if (threads > 1) {
        g.chunk = cut.work / (8 * threads) > 1 ? cut.work / (8 * threads) : 1;
        cut.all();
    }
    const long stems = a.prefixes ? long(a.prefixes->stems.size()) : 0, tokens = a.prefixes ? a.prefixes->tokens : 0;
    const long room = Worker<X, T>(cut, nullptr, nullptr, nullptr).lay_out(nullptr);
    auto divide = [&](char* const begin, float*& parts, float*& carried, char*& rooms) {
        char* at = begin;
        cut.items = (Item*)carve(at, cut.num_items * long(sizeof(Item)));
        cut.segments = (Segment*)carve(at, cut.num_segments * long(sizeof(Segment)));
        cut.shares = (int32_t*)carve(at, cut.num_shares * 4);
        cut.stems = (int32_t*)carve(at, stems * a.kv_heads * 4);
        parts = (float*)carve(at, cut.kept * g.part_floats() * 4);
        carried = (float*)carve(at, tokens * a.heads * (g.dim + 2) * 4);
        rooms = carve(at, threads * room);
        return at - begin;
    };
    float *parts, *carried;
    char* rooms;
    divide(a.grow(divide(nullptr, parts, carried, rooms)), parts, carried, rooms);
    cut.all();
    long counter = 0;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        const typename SetupIf<on_tiles<X>>::Type setup(16);
        Worker<X, T> worker(cut, parts, carried, rooms + omp_get_thread_num() * room);
        worker.clear_edge();
        worker.run(&counter);
    }
}

static void attention(const AttentionArgs& a) {
#if defined(__AVX512BF16__)
    if (a.store == Store::bfloat16 && a.q_bf16) return attend<uint16_t, uint16_t>(a);
    if (a.store == Store::int8 && a.q_bf16) return attend<uint16_t, int8_t>(a);
#endif
    if (a.store == Store::int8) return attend<float, int8_t>(a);
    a.store == Store::bfloat16 ? attend<float, uint16_t>(a) : attend<float, float>(a);
}

}  // namespace TRUNKLINE_ISA
}  // namespace trunkline
