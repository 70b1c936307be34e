// Prefixes that requests of a step have in common, as their pages say: attention reads those keys once for all.
#pragma once

#include <cstdint>
#include <vector>

namespace trunkline {

constexpr long BLOCK = 128;  // keys that attention takes at once; blocks begin at multiples of it

// A step's requests, as in kernels/ops.py.
struct Requests {
    const int32_t* q_start;   // [count + 1]
    const int32_t* seq_lens;  // [count]
    const int32_t* pages;     // [count, ...], rows `pages_stride` apart
    long pages_stride, count, page_size;

    long new_tokens(long request) const { return q_start[request + 1] - long(q_start[request]); }
    long prefix(long request) const { return seq_lens[request] - new_tokens(request); }
};

// Blocks [from, to) of keys that requests order[first] to order[last - 1] have in common, behind those of `parent`.
struct Stem {
    int32_t first, last, from, to;
    int32_t parent;  // a stem, or -1
};

// Requests with the same pages share a stem, and stems branch where the pages do: a radix tree of the step. Only
// whole blocks before a request's tokens of this step count, and only requests with up to `most_tokens` of those:
// more of them fill a tile alone.
struct Prefixes {
    std::vector<int32_t> order;   // requests, neighbours in the tree beside each other
    std::vector<Stem> stems;      // parents before children
    std::vector<int32_t> stem;    // [requests]: the last that a request is in, or -1
    std::vector<int32_t> carried; // [requests]: tokens of this step that requests in stems have before it
    long tokens = 0;              // of those requests

    Prefixes(const Requests& requests, long most_tokens);

private:
    void branch(const std::vector<int32_t>& common, long first, long last, long from, long parent);
};

}  // namespace trunkline
