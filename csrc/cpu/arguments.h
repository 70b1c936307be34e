// What checks of arguments share.
#pragma once

#include "args.h"
#include "memory.h"
#include "tensor.h"

#include <string>

namespace trunkline {

inline std::string number(long value) { return std::to_string(value); }

// Working memory of the calling thread: grows to what the largest call needed, and stays.
char* scratch(long bytes);

int team(int threads);

// Indices as int64 in scratch memory, after checking that all lie in [0, limit).
const int64_t* indices(const Tensor& given, long limit);

// How weights of `bits` (0: numbers as they are) and `group` inputs to a scale are stored in `panels`.
Format format_of(const char* operation, const Tensor& panels, int bits, long group);

// How a KV pool [..., heads, head_width] for heads of `dim` numbers stores them.
Store pool_store(const Tensor& pool, long dim);

// 0: no gate; else 1 + Gate.
Gate gate_of(const char* operation, int gate);

void expect_packed(const Tensor& panels, long n, long k, bool gated, const Format& format);

}  // namespace trunkline
