#include "plan.h"

namespace trunkline {

namespace {

const int32_t* numbers(const Tensor& tensor) { return reinterpret_cast<const int32_t*>(tensor.data); }

}  // namespace

AttentionPlan::AttentionPlan(nb::object q_start, nb::object seq_lens, nb::object page_table, nb::object tree_mask,
                             long window_, long group, long page_size, long num_slots_, float scale_, float soft_cap_)
    : window(window_), num_slots(num_slots_), scale(scale_), soft_cap(soft_cap_),
      owners{q_start, seq_lens, page_table, tree_mask} {
    const char* operation = "plan_attention";
    Tensor starts(operation, "q_start", q_start), lens(operation, "seq_lens", seq_lens),
        pages(operation, "page_table", page_table);
    if (page_size < 1) refuse("plan_attention: page_size is " + number(page_size) + "; at least 1 is expected");
    if (group < 1) refuse("plan_attention: " + number(group) + " heads on one of keys; at least 1 is expected");
    EXPECT(lens, lens.type == Type::int32 && lens.dims == 1 && lens.dense(), "a dense vector of int32");
    const long count = lens.size[0];
    EXPECT(starts, starts.type == Type::int32 && starts.dims == 1 && starts.dense() && starts.size[0] == count + 1,
           "dense int32 [" + number(count + 1) + "]");
    EXPECT(pages, pages.type == Type::int32 && pages.dims == 2 && pages.dense(1) && pages.size[0] == count,
           "int32 [" + number(count) + ", *], dense along the last dimension");
    requests = {numbers(starts), numbers(lens), numbers(pages), pages.stride[0], count, page_size};
    check_lengths(pages.size[1]);
    tokens = requests.q_start[count];
    if (!tree_mask.is_none()) set_tree(tree_mask);
    prefixes.emplace(requests, group < TILE_ROWS ? TILE_ROWS / group : 1);
}

void AttentionPlan::check_lengths(long most_pages) const {
    const long page_size = requests.page_size;
    if (requests.q_start[0] != 0)
        refuse("plan_attention: q_start begins with " + number(requests.q_start[0]) + "; 0 is expected");
    for (long i = 0; i < requests.count; i++) {
        const long length = requests.seq_lens[i], used = (length + page_size - 1) / page_size;
        const std::string where = "plan_attention: request " + number(i) + " has ";
        if (requests.new_tokens(i) < 0 || requests.prefix(i) < 0)
            refuse(where + number(requests.new_tokens(i)) + " tokens in this step and a length of " + number(length));
        if (used > most_pages)
            refuse(where + "a length of " + number(length) + ": more than " + number(most_pages) + " pages of " +
                   number(page_size));
        const int32_t* row = requests.pages + i * requests.pages_stride;
        for (long p = 0; p < used; p++)
            if (row[p] < 0 || (row[p] + 1L) * page_size > num_slots)
                refuse(where + "page " + number(row[p]) + "; the pool has " + number(num_slots / page_size));
    }
}

// A token of a tree sees itself, and none after it.
void AttentionPlan::set_tree(nb::handle mask) {
    Tensor given("plan_attention", "tree_mask", mask);
    EXPECT(given, given.type == Type::boolean && given.dims == 2 && given.dense() && given.size[0] == tokens,
           "dense bool [" + number(tokens) + ", *]");
    tree = reinterpret_cast<const uint8_t*>(given.data), tree_columns = given.size[1];
    for (long i = 0; i < requests.count; i++) {
        const long count = requests.new_tokens(i);
        for (long t = 0; t < count && count <= tree_columns; t++)
            for (long j = t; j < count; j++)
                if (bool(tree[(requests.q_start[i] + t) * tree_columns + j]) != (j == t))
                    refuse("plan_attention: tree_mask of request " + number(i) + ": token " + number(t) +
                           (j == t ? " does not see itself" : " sees token " + number(j) + ", which comes after it"));
    }
}

AttentionArgs AttentionPlan::args() const {
    AttentionArgs args{};
    args.requests = requests, args.prefixes = &*prefixes, args.window = window;
    args.scale = scale, args.soft_cap = soft_cap, args.tree = tree, args.tree_columns = tree_columns;
    return args;
}

nb::list AttentionPlan::stems() const {
    nb::list found;
    for (const Stem& stem : prefixes->stems) {
        nb::list members;
        for (int i = stem.first; i < stem.last; i++) members.append(prefixes->order[i]);
        found.append(nb::make_tuple(members, stem.from, stem.to));
    }
    return found;
}

void bind_plan(nb::module_& m) {
    nb::class_<AttentionPlan>(m, "AttentionPlan")
        .def(nb::init<nb::object, nb::object, nb::object, nb::object, long, long, long, long, float, float>(),
             nb::arg("q_start"), nb::arg("seq_lens"), nb::arg("page_table"), nb::arg("tree_mask").none(), nb::arg("window"),
             nb::arg("group"), nb::arg("page_size"), nb::arg("num_slots"), nb::arg("scale"), nb::arg("soft_cap"))
        .def_ro("window", &AttentionPlan::window)
        .def("stems", &AttentionPlan::stems);
}

}  // namespace trunkline
