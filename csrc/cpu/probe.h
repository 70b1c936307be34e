// What this machine can do at most: for `trunkline bench kernels`.
#pragma once

#include "quantized.h"

#include <omp.h>

namespace trunkline {
namespace TRUNKLINE_ISA {

// Four vectors at a time from one stream for each thread, as the products read weights.
static void read_memory(const char* data, long bytes, int threads) {
#pragma omp parallel num_threads(threads)
    {
        constexpr long AHEAD = 2048;  // that reads most where nothing is multiplied
        const long me = omp_get_thread_num(), team = omp_get_num_threads(), step = 4 * W * 4;
        VI seen[4] = {};
        for (long at = bytes / step * me / team; at < bytes / step * (me + 1) / team; at++) {
            __builtin_prefetch(data + at * step + AHEAD, 0, 3);
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) seen[i] ^= load_as<VI>(data + at * step + i * W * 4);
        }
        VI all = seen[0] ^ seen[1] ^ seen[2] ^ seen[3];
        asm volatile("" : : "m"(all));
    }
}

// Numbers of either sign and of about one size, in any format: a processor multiplies zeros at a higher clock.
template <class X, long N>
static void fill(X (&numbers)[N]) {
    for (long i = 0; i < long(sizeof numbers); i += 2) {
        const uint16_t bits = uint16_t(0x3c00 + i * 37 % 128 + i * 19 % 64 / 32 * 0x8000);
        __builtin_memcpy((char*)numbers + i, &bits, 2);
    }
}

// The micro kernel of the most rows on a stretch of weights that stays in the first cache. Returns operations.
template <class Kind>
static double multiply_cached(long repeats, int threads) {
    constexpr int NP = panels_for(MAX_ROWS);
#pragma omp parallel num_threads(threads)
    {
        alignas(LINE) char weights[STRETCH * NP * LINE];
        alignas(LINE) typename Kind::X x[MAX_ROWS * STRETCH * Kind::DEPTH];
        alignas(LINE) float c[MAX_ROWS * NP * PANEL] = {};
        fill(weights), fill(x);
        for (long i = 0; i < repeats; i++) {
            micro<Kind, MAX_ROWS, NP>(x, weights, NP, STRETCH, false, c, NP * PANEL, {nullptr, 0});
            asm volatile("" : : "m"(c) : "memory");
        }
    }
    return 2.0 * MAX_ROWS * NP * PANEL * Kind::DEPTH * STRETCH * double(repeats) * threads;
}

#if defined(TRUNKLINE_TILES)
// The same, on tiles.
template <class Kind>
static double multiply_cached_tiles(long repeats, int threads) {
    constexpr long STEPS = 16;
#pragma omp parallel num_threads(threads)
    {
        const TileSetup setup(TILE_HEIGHT);
        alignas(LINE) char weights[STEPS * TILE_LINES * 2 * LINE], x[2 * TILE_HEIGHT * LINE];
        alignas(LINE) float c[2 * TILE_HEIGHT * 2 * PANEL] = {};
        fill(weights), fill(x);
        Fetch nothing{nullptr, nullptr, 0, false};
        for (long i = 0; i < repeats; i++)
            micro_tiles<Kind, 2, 2>({x, LINE, 0, TILE_HEIGHT * LINE}, weights, 2, STEPS, false, c, 2 * PANEL, nothing);
    }
    return 2.0 * 2 * TILE_HEIGHT * 2 * PANEL * Kind::DEPTH * TILE_LINES * STEPS * double(repeats) * threads;
}
#endif

static double probe(const ProbeArgs& a) {
    if (a.data) {
        for (long i = 0; i < a.repeats; i++) read_memory(a.data, a.bytes, a.threads);
        return double(a.bytes) * double(a.repeats);
    }
    switch (a.store) {
        case Store::float32: return multiply_cached<Float32>(a.repeats, a.threads);
#if defined(TRUNKLINE_TILES)
        case Store::bfloat16: return multiply_cached_tiles<TilePairs>(a.repeats, a.threads);
        default: return multiply_cached_tiles<TileBytes>(a.repeats, a.threads);
#else
        case Store::bfloat16: return multiply_cached<Pairs>(a.repeats, a.threads);
        default: return multiply_cached<Bytes>(a.repeats, a.threads);
#endif
    }
}

}  // namespace TRUNKLINE_ISA
}  // namespace trunkline
