// What each operation is told. Plain data, checked by module.cpp before it gets here.
// Strides count elements. A bfloat16 number is the upper half of a float32, held as uint16_t.
#pragma once

#include "prefixes.h"

#include <cstdint>

#define INLINE static inline __attribute__((always_inline))  // one copy for each instruction set

namespace trunkline {

constexpr long LINE = 64;   // bytes
constexpr long PANEL = 16;  // output columns that are packed side by side
constexpr long SLAB = 4;    // panels that share a stream of memory; the last ones of a weight may be fewer

// Weights as they are stored. int8: one scale for each output; int4: one for each output and group of inputs.
enum class Store { float32, bfloat16, int8, int4 };

struct Format {
    Store store;
    long group;  // inputs that share a scale, of int4: a multiple of 8
};

INLINE bool is_whole(const Format& f) { return f.store == Store::int8 || f.store == Store::int4; }
// Inputs that a line (of 16 outputs) holds.
INLINE long depth(const Format& f) {
    return f.store == Store::float32 ? 1 : f.store == Store::bfloat16 ? 2 : f.store == Store::int8 ? 4 : 8;
}
INLINE long padded_k(long k, const Format& f) {
    const long step = f.store == Store::int4 ? f.group : depth(f);
    return (k + step - 1) / step * step;
}
INLINE long scale_groups(long k, const Format& f) { return f.store == Store::int4 ? padded_k(k, f) / f.group : 1; }
// Of a panel: its lines, and its scales. int4: 16 of float16 after each group. int8: 16 of float32 at the end, and
// 16 sums of weights, times 128, as int32.
constexpr long MAX_WHOLE_K = 65536;  // 255 * 127 * k stays below 2^31
constexpr long INT4_SCALES = PANEL * 2, INT8_SCALES = PANEL * 8;
INLINE long panel_bytes(long k, const Format& f) {
    const long lines = padded_k(k, f) / depth(f) * LINE;
    return lines + (f.store == Store::int4   ? scale_groups(k, f) * INT4_SCALES
                    : f.store == Store::int8 ? INT8_SCALES
                                             : 0);
}

struct Choice;

enum class Gate { silu, gelu, gelu_tanh };

struct LinearArgs {
    const void* x;  // [m, k] with rows `x_stride` apart
    long x_stride;
    bool x_bf16;
    const void* panels;  // slabs of panels, see memory.h
    Format format;
    long m, n, k;          // n: columns of `out`
    const float* bias;     // in the order of the panels' columns, or null
    const void* residual;  // [m, n] as `out`, or null
    void* out;             // [m, n] dense
    bool out_bf16;
    bool gated;     // panels alternate between gate and up; out = activation(gate) * up
    Gate gate;      // the activation
    // [m], or null. Then nothing is written to `out`: a column is chosen in each row. `most_kept` of each is at most
    // `most`; `lists` has room for `shortlist_bytes(threads * m, most)`.
    const Choice* choices;
    long most;
    char* lists;
    void* staging;  // room for `linear_staging_bytes`
    int threads;
};

// Panels of a product with n output columns; a gated one has two of each.
INLINE long num_panels(long n, bool gated) { return (n + PANEL - 1) / PANEL * (gated ? 2 : 1); }
INLINE long packed_bytes(long n, long k, bool gated, const Format& f) { return num_panels(n, gated) * panel_bytes(k, f); }
// Activations as the kernels read them; with whole numbers a scale and a sum for each row and group.
INLINE long staged_bytes(long m, long k, const Format& f) {
    return (m + 15) / 16 * 16 * ((padded_k(k, f) + 63) / 64 * 64) * 4;  // tiles take 16 rows and 64 bytes at once
}
INLINE long linear_staging_bytes(long m, long k, const Format& f) {
    return staged_bytes(m, k, f) + 64 + (is_whole(f) ? m * scale_groups(k, f) * 8 : 0);
}
// Panels in the slab of panel p, of `panels`.
INLINE long slab_width(long p, long panels) { return panels - p / SLAB * SLAB < SLAB ? panels - p / SLAB * SLAB : SLAB; }

struct NormArgs {
    const void* x;  // [tokens, heads, dim], tokens `x_stride` apart
    long x_stride;
    bool bf16;
    const void* gain;  // [gain_heads, dim], gain_heads is 1 or `heads`; null: no norm (rotation only)
    long gain_heads;
    float eps;
    const float* table;  // rotation: [tokens, 2, dim], cosines and signed sines; unused by the norm alone
    void* out;           // as x, tokens `out_stride` apart
    long out_stride;
    long tokens, heads, dim;
    int threads;
};
constexpr long MAX_HEAD_DIM = 1024;  // of a rotation, whose heads are held on the stack

// A head of a token in the pool: `dim` numbers; of int8 followed by their scale, a bfloat16. A head's tokens of a page
// lie side by side: reading them is one stream.
constexpr long SCALE_BYTES = 2;
INLINE long head_width(Store pool, long dim) { return pool == Store::int8 ? dim + SCALE_BYTES : dim; }

// Rows of `heads` heads of `dim` numbers, one for each of `tokens`, to slots (page * page_size + offset) of a pool
// [pages, heads, page_size, head_width].
// int8: whole numbers up to 127 by the largest magnitude of their head; a head that is not finite has a NaN for scale.
struct StoreArgs {
    const void* rows;  // `stride` apart
    long stride;
    bool bf16;
    void* pool;
    Store store;  // float32, bfloat16 or int8
    const int64_t* slots;
    long tokens, heads, dim, page_size;
    int threads;
};

constexpr long TILE_ROWS = 256;  // query rows (tokens x heads of a group) that share a packing of the keys

struct AttentionArgs {
    const void* q;  // [tokens, heads, dim], tokens `q_stride` apart
    long q_stride;
    bool q_bf16;
    const void* pool;  // [pages, 2, kv_heads, page_size, head_width] dense
    Store store;       // float32, bfloat16 or int8
    void* out;               // [tokens, heads, dim] dense, of q's type
    Requests requests;
    const Prefixes* prefixes;  // of the requests; null: each reads its keys by itself
    long heads, kv_heads, dim;
    long window;  // keys that a query sees, its own included; 0: all
    float scale;     // of scores
    float soft_cap;  // scaled scores s become soft_cap * tanh(s / soft_cap); 0: they stay
    const uint8_t* tree;  // [tokens, tree_columns]: which tokens of its request's step a token sees; or null
    long tree_columns;    // a request with more tokens in the step than that is no tree
    int threads;
    char* (*grow)(long bytes);
};

// What changes a row of logits before the choice; see kernels/ops.py.
struct Adjustment {
    const int32_t* history;
    long length, prompt;
    float repetition, frequency, presence;
    const int64_t* bias_ids;
    const float* bias;
    long biases;
    const int64_t* banned;
    long bans;
};

constexpr long MAX_CHOICES = 1L << 18;  // columns: sums of weights up to 2^35 are exact in float64

struct Choice {
    const float* logits;
    const Adjustment* adjustment;  // or null
    const uint32_t* mask;          // a bit for each column that may be chosen; or null
    float sharpness;               // log2(e) / temperature; 0: the largest
    long top_k;
    double top_p, min_p, u;
    int64_t* token;
    uint8_t* usable;  // 0: not all are finite, or none may be chosen; 2: only exact sums of all weights can tell the token
};

// A column that may be chosen, with its logit and its weight.
struct Candidate {
    float value;
    int32_t column;
    float weight;
};

// What one thread has seen of a row: see shortlist.h.
struct Shortlist {
    double weight;  // of all columns, about, relative to `peak`
    float peak;
    float bound;  // no column up to it can be among the first
    int32_t count;
    bool finite;
    Candidate* at;
};
constexpr long MOST_KEPT = 128;  // candidates of a row that need no logits kept
INLINE long most_kept(const Choice& how) { return how.sharpness == 0 ? 1 : how.top_k; }
INLINE long shortlist_room(long most) { return 2 * most + SLAB * PANEL; }
INLINE long shortlist_bytes(long lists, long most) {
    return lists * (long(sizeof(Shortlist)) + shortlist_room(most) * long(sizeof(Candidate)));
}

struct ChooseArgs {
    const Choice* choices;
    long count, columns;
    int threads;
    char* (*grow)(long bytes);
};

// Weights to whole numbers: panel `panel` of a slab of `width`, from 16 rows (null: zeros) of k inputs.
struct QuantizeArgs {
    const void* const* rows;
    bool bf16;
    long k;
    Format format;
    char* slab;
    long panel, width;
};

// Rows `ids` of packed whole numbers of n outputs (not gated) and k inputs into out [count, k].
struct DequantizeArgs {
    const void* panels;
    Format format;
    long n, k;
    const int64_t* ids;
    long count;
    void* out;
    bool out_bf16;
};

// Reads `data` so often, or multiplies numbers of one kind that stay in the first cache.
struct ProbeArgs {
    const char* data;  // null: multiply
    long bytes;
    Store store;
    long repeats;
    int threads;
};

struct Operations {
    const char* name;
    bool (*quantize)(const QuantizeArgs&);  // false: a weight is not finite, or too large
    void (*dequantize)(const DequantizeArgs&);
    double (*probe)(const ProbeArgs&);  // returns bytes, or operations (two for a product and a sum)
    void (*linear)(const LinearArgs&);
    void (*rms_norm)(const NormArgs&);
    void (*rotate)(const NormArgs&);
    void (*store)(const StoreArgs&);
    void (*attention)(const AttentionArgs&);
    void (*choose)(const ChooseArgs&);
};

// One for each instruction set that the build has.
namespace portable { extern const Operations operations; }
namespace avx2 { extern const Operations operations; }
namespace avx512 { extern const Operations operations; }
namespace avx512bf16 { extern const Operations operations; }
namespace amx { extern const Operations operations; }
constexpr long MAX_ISAS = 5;

}  // namespace trunkline
