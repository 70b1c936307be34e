#include "arguments.h"

#include "memory.h"

namespace trunkline {

char* scratch(long bytes) {
    thread_local Room room;
    return room(bytes);
}

int team(int threads) {
    if (threads < 1 || threads > 4096) refuse("threads is " + number(threads) + "; 1 to 4096 is expected");
    return threads;
}

const int64_t* indices(const Tensor& given, long limit) {
    EXPECT(given, given.dims == 1 && given.dense() && (given.type == Type::int32 || given.type == Type::int64),
                  "a dense vector of int32 or int64");
    auto* to = reinterpret_cast<int64_t*>(scratch(given.size[0] * 8 + 8));
    for (long i = 0; i < given.size[0]; i++) {
        to[i] = given.type == Type::int32 ? reinterpret_cast<int32_t*>(given.data)[i]
                                          : reinterpret_cast<int64_t*>(given.data)[i];
        if (to[i] < 0 || to[i] >= limit)
            throw nb::index_error(("index " + number(to[i]) + " at " + number(i) + " is not in [0, " + number(limit) +
                                   ")").c_str());
    }
    return to;
}

Format format_of(const char* operation, const Tensor& panels, int bits, long group) {
    if (bits == 0) {
        panels.floats();
        return {panels.bf16() ? Store::bfloat16 : Store::float32, 0};
    }
    if (bits != 8 && bits != 4) refuse(std::string(operation) + ": weights of " + number(bits) + " bits; 4 or 8 is expected");
    if (bits == 4 && (group < 8 || group % 8))
        refuse(std::string(operation) + ": groups of " + number(group) + " inputs; a multiple of 8 is expected");
    EXPECT(panels, panels.type == Type::uint8, "uint8");
    return {bits == 8 ? Store::int8 : Store::int4, bits == 8 ? 0 : group};
}

Store pool_store(const Tensor& pool, long dim) {
    if (pool.type == Type::int8)
        EXPECT(pool, pool.dims >= 4 && pool.size[pool.dims - 1] == dim + SCALE_BYTES,
               "int8 [..., " + number(dim) + " numbers and " + number(SCALE_BYTES) + " bytes of scale]");
    else
        pool.floats();
    return pool.type == Type::int8 ? Store::int8 : pool.bf16() ? Store::bfloat16 : Store::float32;
}

Gate gate_of(const char* operation, int gate) {
    if (gate < 0 || gate > 3) refuse(std::string(operation) + ": gate is " + number(gate) + "; 0 to 3 is expected");
    return gate == 2 ? Gate::gelu : gate == 3 ? Gate::gelu_tanh : Gate::silu;
}

void expect_packed(const Tensor& panels, long n, long k, bool gated, const Format& format) {
    const long size = packed_bytes(n, k, gated, format) / panels.element();
    EXPECT(panels, panels.dims == 1 && panels.dense() && panels.size[0] == size, "[" + number(size) + "]");
}

}  // namespace trunkline
