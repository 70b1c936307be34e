#include "prefixes.h"

#include <algorithm>

namespace trunkline {

namespace {

struct Pages {
    const Requests& requests;

    long blocks(long request) const { return requests.prefix(request) / BLOCK; }
    long count(long request) const { return (blocks(request) * BLOCK + requests.page_size - 1) / requests.page_size; }
    const int32_t* of(long request) const { return requests.pages + request * requests.pages_stride; }

    long equal(long one, long other) const {
        const long most = std::min(count(one), count(other));
        return std::mismatch(of(one), of(one) + most, of(other)).first - of(one);
    }
    bool before(long one, long other) const {
        const long same = equal(one, other);
        if (same < count(one) && same < count(other)) return of(one)[same] < of(other)[same];
        return count(one) != count(other) ? count(one) < count(other) : one < other;
    }
    int32_t common_blocks(long one, long other) const {
        return int32_t(std::min({equal(one, other) * requests.page_size / BLOCK, blocks(one), blocks(other)}));
    }
};

}  // namespace

Prefixes::Prefixes(const Requests& requests, long most_tokens)
    : stem(requests.count, -1), carried(requests.count, 0) {
    const Pages pages{requests};
    for (long i = 0; i < requests.count; i++)
        if (requests.new_tokens(i) > 0 && requests.new_tokens(i) <= most_tokens && pages.blocks(i) > 0)
            order.push_back(int32_t(i));
    if (order.size() < 2) return;
    std::sort(order.begin(), order.end(), [&](int32_t one, int32_t other) { return pages.before(one, other); });
    std::vector<int32_t> common(order.size());  // blocks, with the one before
    for (size_t i = 1; i < order.size(); i++) common[i] = pages.common_blocks(order[i - 1], order[i]);
    branch(common, 0, long(order.size()), 0, -1);
    for (long i = 0; i < requests.count; i++)
        if (stem[i] >= 0) carried[i] = int32_t(tokens), tokens += requests.new_tokens(i);
}

void Prefixes::branch(const std::vector<int32_t>& common, long first, long last, long from, long parent) {
    if (last - first == 1) {
        stem[order[first]] = int32_t(parent);
        return;
    }
    const int32_t to = *std::min_element(common.begin() + first + 1, common.begin() + last);
    if (to > from) {
        stems.push_back({int32_t(first), int32_t(last), int32_t(from), to, int32_t(parent)});
        parent = long(stems.size()) - 1;
    }
    for (long next = first + 1; next <= last; next++) {
        if (next < last && common[next] != to) continue;
        branch(common, first, next, to, parent);
        first = next;
    }
}

}  // namespace trunkline
