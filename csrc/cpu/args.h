// What each operation is told. Plain data, checked by module.cpp before it gets here.
// Strides count elements. A bfloat16 number is the upper half of a float32, held as uint16_t.
#pragma once

#include <cstdint>

namespace trunkline {

constexpr long PANEL = 16;  // output columns that are packed side by side
constexpr long SLAB = 4;    // panels that share a stream of memory; the last ones of a weight may be fewer

struct LinearArgs {
    const void* x;  // [m, k] with rows `x_stride` apart
    long x_stride;
    bool x_bf16;
    const void* panels;  // slabs of panels, see memory.h
    bool panels_bf16;
    long m, n, k;          // n: columns of `out`
    const float* bias;     // in the order of the panels' columns, or null
    const void* residual;  // [m, n] as `out`, or null
    void* out;             // [m, n] dense
    bool out_bf16;
    bool gated;     // panels alternate between gate and up; out = silu(gate) * up
    void* staging;  // room for `linear_staging_bytes`
    int threads;
};

// Panels of a product with n output columns; a gated one has two of each.
inline long num_panels(long n, bool gated) { return (n + PANEL - 1) / PANEL * (gated ? 2 : 1); }
// bfloat16 weights are packed in pairs along k.
inline long padded_k(long k, bool bf16) { return bf16 ? k + k % 2 : k; }
inline long linear_staging_bytes(long m, long k) { return m * (k + 1) * 4 + 64; }
// Panels in the slab of panel p, of `panels`.
inline long slab_width(long p, long panels) { return panels - p / SLAB * SLAB < SLAB ? panels - p / SLAB * SLAB : SLAB; }

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

struct AttentionArgs {
    const void* q;  // [tokens, heads, dim], tokens `q_stride` apart
    long q_stride;
    bool q_bf16;
    const void* pool;  // [slots, 2, kv_heads, dim] dense
    bool pool_bf16;
    void* out;               // [tokens, heads, dim] dense, of q's type
    const int32_t* q_start;  // [requests + 1]
    const int32_t* seq_lens;
    const int32_t* pages;  // [requests, ...], rows `pages_stride` apart
    long pages_stride;
    long requests, heads, kv_heads, dim, page_size;
    long window;  // keys that a query sees, its own included; 0: all
    float scale;
    int threads;
    char* scratch;  // grown by `grow` when it is too small
    char* (*grow)(long bytes);
};

struct Operations {
    const char* name;
    void (*linear)(const LinearArgs&);
    void (*rms_norm)(const NormArgs&);
    void (*rotate)(const NormArgs&);
    void (*attention)(const AttentionArgs&);
};

// One for each instruction set that the build has.
namespace portable { extern const Operations operations; }
namespace avx2 { extern const Operations operations; }
namespace avx512 { extern const Operations operations; }
namespace avx512bf16 { extern const Operations operations; }

}  // namespace trunkline
