// What attention is told of a step, made once for all layers with the same window.
#pragma once

#include "arguments.h"

#include <optional>

namespace trunkline {

// Checked, so that attention reads only pages that exist. Keeps its tensors.
class AttentionPlan {
public:
    AttentionPlan(nb::object q_start, nb::object seq_lens, nb::object page_table, nb::object tree_mask, long window,
                  long group, long page_size, long num_slots, float scale, float soft_cap);
    AttentionPlan(const AttentionPlan&) = delete;
    AttentionPlan& operator=(const AttentionPlan&) = delete;

    // All but the heads and what they are of.
    AttentionArgs args() const;

    long page_size() const { return requests.page_size; }

    // Which requests share which blocks of keys: ([requests], from, to).
    nb::list stems() const;

    const long window, num_slots;
    long tokens = 0;

private:
    Requests requests{};
    std::optional<Prefixes> prefixes;
    const uint8_t* tree = nullptr;
    long tree_columns = 0;
    const float scale, soft_cap;
    nb::object owners[4];

    void check_lengths(long most_pages) const;
    void set_tree(nb::handle mask);
};

void bind_plan(nb::module_& m);

}  // namespace trunkline
