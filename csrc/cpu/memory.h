// Operations that only move numbers, the same on every instruction set.
#pragma once

#include "args.h"

#include <cstdint>
#include <cstdlib>
#include <memory>

namespace trunkline {

// One of the weights that are joined along their outputs: [rows, k], rows `stride` apart.
struct PackPart {
    const void* data;
    long rows, stride;
};

struct PackArgs {
    const PackPart* parts;
    long num_parts;
    long k;
    bool bf16;  // the weights given
    Format format;
    bool gated;  // parts are (gate, up), whose panels alternate
    void* panels;
    int threads;
};
// The slabs of `linear`: for each 64 outputs lines of [panel][16 outputs][inputs of a line], zeros at the edges. A
// slab has SLAB panels of 16 outputs; the last one only as many as there are. float32 and bfloat16 are copied, for
// int8 and int4 see quantized.h. Returns whether all weights that had to be rounded were finite.
bool pack(const PackArgs& args);

// Rows `ids` of packed float32 or bfloat16 of n outputs and k inputs (not gated) into out [count, k].
void unpack_rows(const void* panels, const Format& format, long n, long k, const int64_t* ids, long count, void* out,
                 int threads);

// Rows of `row_bytes` each: out[i] = table[ids[i]].
void gather_rows(const void* table, long row_bytes, const int64_t* ids, long count, void* out, int threads);

// Ask for large pages: 500 times fewer page faults when memory is first written, and fewer address look-ups whenever
// it is read. A wish that may be refused.
void want_large_pages(void* data, long bytes);

// Memory of the largest size that was asked for so far.
class Room {
public:
    char* operator()(long bytes);  // what was there is lost where it grows

private:
    struct Free {
        void operator()(char* p) const { std::free(p); }
    };
    std::unique_ptr<char, Free> held;
    long size = 0;
};

// Instruction sets of the build that this machine runs, best first; and the one in use.
long available(const Operations** to);  // room for MAX_ISAS
const Operations& in_use();
bool use(const char* name);  // false: not available

}  // namespace trunkline
