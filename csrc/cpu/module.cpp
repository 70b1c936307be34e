// The Python module: checks arguments, releases the interpreter's lock, calls the operation.
#include "arguments.h"
#include "layers.h"
#include "plan.h"

#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <vector>

namespace trunkline {

namespace {

void pack_weights(nb::list weights, bool gated, int bits, long group, nb::handle panels_object, int threads) {
    Tensor panels("pack", "panels", panels_object);
    const Format format = format_of("pack", panels, bits, group);
    std::vector<PackPart> parts;
    long k = -1, n = 0;
    Type type = panels.type;
    for (nb::handle object : weights) {
        Tensor part("pack", "weight", object);
        if (parts.empty()) {
            k = part.dims == 2 ? part.size[1] : -1;
            if (bits) type = part.type;
        }
        part.floats();
        EXPECT(part, part.dims == 2 && part.size[1] == k && part.dense(1) && part.type == type,
                     "[*, " + number(k) + "] of one type, dense along the last dimension");
        parts.push_back({part.data, part.size[0], part.stride[0]});
        n += part.size[0];
    }
    if (parts.empty()) refuse("pack: there is no weight");
    if (gated) {
        if (parts.size() != 2 || parts[0].rows != parts[1].rows) refuse("pack: a gated weight has two equal parts");
        n = parts[0].rows;
    }
    if (bits && k > MAX_WHOLE_K) refuse("pack: " + number(k) + " inputs of int8; sums are exact up to " + number(MAX_WHOLE_K));
    expect_packed(panels, n, k, gated, format);
    PackArgs args{parts.data(), long(parts.size()), k, type == Type::bfloat16, format, gated, panels.data, team(threads)};
    bool finite;
    {
        nb::gil_scoped_release release;
        finite = pack(args);
    }
    if (!finite) refuse("pack: a weight is not finite, or too large for float16 scales");
}

void call_linear(nb::handle x_object, nb::handle panels_object, int bits, long group, long k, long n, int gate,
                 nb::handle bias_object, nb::handle residual_object, nb::handle out_object, int threads) {
    Tensor x("linear", "x", x_object), panels("linear", "panels", panels_object), out("linear", "out", out_object);
    x.floats();
    EXPECT(x, x.dims == 2 && x.size[1] == k && x.dense(1), "[*, " + number(k) + "], dense along the last dimension");
    LinearArgs args{};
    const bool gated = gate != 0;
    args.gate = gate_of("linear", gate);
    args.format = format_of("linear", panels, bits, group);
    expect_packed(panels, n, k, gated, args.format);
    out.floats();
    EXPECT(out, out.dims == 2 && out.size[0] == x.size[0] && out.size[1] == n && out.dense() &&
                    (out.type == x.type || out.type == Type::float32),
                "dense [" + number(x.size[0]) + ", " + number(n) + "] of x's type or float32");
    if (!bias_object.is_none()) {
        Tensor bias("linear", "bias", bias_object);
        long columns = num_panels(n, gated) * PANEL;
        EXPECT(bias, bias.type == Type::float32 && bias.dims == 1 && bias.dense() && bias.size[0] == columns,
                     "float32 [" + number(columns) + "] in the order of the panels");
        args.bias = reinterpret_cast<float*>(bias.data);
    }
    if (!residual_object.is_none()) {
        Tensor residual("linear", "residual", residual_object);
        EXPECT(residual, residual.type == out.type && residual.dims == 2 && residual.size[0] == x.size[0] &&
                             residual.size[1] == n && residual.dense(),
                         "like out, which is " + out.text());
        args.residual = residual.data;
    }
    args.x = x.data, args.x_stride = x.stride[0], args.x_bf16 = x.bf16();
    args.panels = panels.data;
    args.m = x.size[0], args.n = n, args.k = k;
    args.out = out.data, args.out_bf16 = out.bf16(), args.gated = gated;
    args.staging = scratch(linear_staging_bytes(args.m, args.k, args.format));
    args.threads = team(threads);
    nb::gil_scoped_release release;
    in_use().linear(args);
}

// x and out of a norm or rotation: [tokens, dim] or [tokens, heads, dim].
NormArgs rows_args(const Tensor& x, const Tensor& out, int threads) {
    x.floats();
    EXPECT(x, (x.dims == 2 || x.dims == 3) && x.dense(1), "[tokens, n] or [tokens, heads, n], dense but for tokens");
    bool same = out.dims == x.dims && out.type == x.type && out.dense(1);
    for (int i = 0; same && i < x.dims; i++) same = out.size[i] == x.size[i];
    EXPECT(out, same, "like x, which is " + x.text());
    NormArgs args{};
    args.x = x.data, args.x_stride = x.stride[0], args.bf16 = x.bf16();
    args.out = out.data, args.out_stride = out.stride[0];
    args.tokens = x.size[0], args.heads = x.dims == 3 ? x.size[1] : 1, args.dim = x.size[x.dims - 1];
    args.threads = team(threads);
    return args;
}

void set_gain(NormArgs& args, const Tensor& gain, const Tensor& x) {
    long heads = gain.dims == 2 ? gain.size[0] : 1;
    EXPECT(gain, (gain.dims == 1 || gain.dims == 2) && gain.type == x.type && gain.dense() &&
                     gain.size[gain.dims - 1] == args.dim && (heads == 1 || heads == args.heads),
                 "to broadcast against x, which is " + x.text());
    args.gain = gain.data, args.gain_heads = heads;
}

void call_rms_norm(nb::handle x_object, nb::handle gain, float eps, nb::handle out, int threads) {
    Tensor x("rms_norm", "x", x_object);
    NormArgs args = rows_args(x, Tensor("rms_norm", "out", out), threads);
    set_gain(args, Tensor("rms_norm", "weight", gain), x);
    args.eps = eps;
    nb::gil_scoped_release release;
    in_use().rms_norm(args);
}

void call_rotate(nb::handle x_object, nb::handle table_object, nb::handle gain, float eps, int threads) {
    Tensor x("rotate", "x", x_object), table("rotate", "table", table_object);
    NormArgs args = rows_args(x, x, threads);
    EXPECT(x, x.dims == 3 && args.dim % 2 == 0 && args.dim <= MAX_HEAD_DIM,
              "[tokens, heads, an even number up to " + number(MAX_HEAD_DIM) + "]");
    EXPECT(table, table.type == Type::float32 && table.dims == 3 && table.dense() && table.size[0] == args.tokens &&
                      table.size[1] == 2 && table.size[2] == args.dim,
                  "dense float32 [" + number(args.tokens) + ", 2, " + number(args.dim) + "]");
    if (!gain.is_none()) set_gain(args, Tensor("rotate", "gain", gain), x);
    args.table = reinterpret_cast<float*>(table.data), args.eps = eps;
    nb::gil_scoped_release release;
    in_use().rotate(args);
}

void call_embedding(nb::handle ids_object, nb::handle table_object, nb::handle out_object, int threads) {
    Tensor ids("embedding", "token_ids", ids_object), table("embedding", "table", table_object),
        out("embedding", "out", out_object);
    table.floats();
    EXPECT(table, table.dims == 2 && table.dense(), "a dense matrix");
    const int64_t* rows = indices(ids, table.size[0]);
    EXPECT(out, out.type == table.type && out.dims == 2 && out.dense() && out.size[0] == ids.size[0] &&
                    out.size[1] == table.size[1],
                "one row for each token, as the table's");
    team(threads);
    nb::gil_scoped_release release;
    gather_rows(table.data, table.size[1] * table.element(), rows, ids.size[0], out.data, threads);
}

void call_packed_embedding(nb::handle ids_object, nb::handle panels_object, int bits, long group, long k, long n,
                           nb::handle out_object, int threads) {
    Tensor ids("embedding", "token_ids", ids_object), panels("embedding", "panels", panels_object),
        out("embedding", "out", out_object);
    const Format format = format_of("embedding", panels, bits, group);
    expect_packed(panels, n, k, false, format);
    const int64_t* rows = indices(ids, n);
    out.floats();
    EXPECT(out, (bits || out.type == panels.type) && out.dims == 2 && out.dense() && out.size[0] == ids.size[0] &&
                    out.size[1] == k,
                "one row for each token, as the panels'");
    team(threads);
    nb::gil_scoped_release release;
    if (bits)
        in_use().dequantize({panels.data, format, n, k, rows, ids.size[0], out.data, out.bf16()});
    else
        unpack_rows(panels.data, format, n, k, rows, ids.size[0], out.data, threads);
}

// masks[at[i]] = row i of `words`, a bit for each of so many columns.
void set_masks(const char* operation, const uint32_t** masks, long rows, const std::vector<long>& at, nb::handle object,
               long columns) {
    if (at.empty()) return;
    Tensor words(operation, "words", object);
    const long length = (columns + 31) / 32, count = long(at.size());
    EXPECT(words, words.type == Type::int32 && words.dims == 2 && words.dense(1) && words.size[0] == count && words.size[1] >= length,
           "int32 [" + number(count) + ", " + number(length) + " or more]");
    for (long i = 0; i < count; i++) {
        if (at[i] < 0 || at[i] >= rows) refuse(std::string(operation) + ": a mask for row " + number(at[i]) + " of " + number(rows));
        masks[at[i]] = reinterpret_cast<uint32_t*>(words.data) + i * words.stride[0];
    }
}

void call_store_kv(nb::handle pool_object, nb::handle slots_object, nb::handle kv_object, int threads) {
    Tensor pool("store_kv", "pool", pool_object), slots("store_kv", "slots", slots_object),
        kv("store_kv", "kv", kv_object);
    kv.floats();
    EXPECT(kv, kv.dims == 4 && kv.dense(1) && kv.size[0] == slots.size[0] && kv.size[1] == 2,
           "[" + number(slots.size[0]) + ", 2, heads, dim], dense but for the first dimension");
    StoreArgs args{};
    args.store = pool_store(pool, kv.size[3]);
    EXPECT(pool, pool.dims == 5 && pool.dense() && pool.size[1] == 2 && pool.size[2] == kv.size[2] && pool.size[3] > 0 &&
                     pool.size[4] == head_width(args.store, kv.size[3]),
           "dense [pages, 2, " + number(kv.size[2]) + ", page size, " + number(head_width(args.store, kv.size[3])) + "]");
    args.rows = kv.data, args.stride = kv.stride[0], args.bf16 = kv.bf16();
    args.pool = pool.data, args.slots = indices(slots, pool.size[0] * pool.size[3]), args.page_size = pool.size[3];
    args.tokens = kv.size[0], args.heads = 2 * kv.size[2], args.dim = kv.size[3], args.threads = team(threads);
    nb::gil_scoped_release release;
    in_use().store(args);
}

void call_attention(nb::handle q_object, nb::handle pool_object, const AttentionPlan& plan, nb::handle out_object,
                    int threads) {
    Tensor q("attention", "q", q_object), pool("attention", "pool", pool_object), out("attention", "out", out_object);
    q.floats();
    const long dim = q.dims == 3 ? q.size[2] : 0;
    const Store store = pool_store(pool, dim);
    const long pages = plan.num_slots / plan.page_size();
    EXPECT(pool, pool.dims == 5 && pool.dense() && pool.size[0] >= pages && pool.size[1] == 2 && pool.size[3] == plan.page_size(),
           "dense [" + number(pages) + " or more, 2, heads, " + number(plan.page_size()) + ", dim]");
    EXPECT(q, q.dims == 3 && q.dense(1) && q.size[0] == plan.tokens && pool.size[2] > 0 &&
                  q.size[1] % pool.size[2] == 0 && head_width(store, dim) == pool.size[4],
              "[" + number(plan.tokens) + ", a multiple of " + number(pool.size[2]) + ", " +
                  number(pool.size[4] - head_width(store, 0)) + "]");
    bool same = out.dims == 3 && out.dense() && out.type == q.type;
    for (int i = 0; same && i < 3; i++) same = out.size[i] == q.size[i];
    EXPECT(out, same, "dense, like q, which is " + q.text());
    AttentionArgs args = plan.args();
    args.q = q.data, args.q_stride = q.stride[0], args.q_bf16 = q.bf16();
    args.pool = pool.data, args.store = store, args.out = out.data;
    args.heads = q.size[1], args.kv_heads = pool.size[2], args.dim = q.size[2];
    args.threads = team(threads), args.grow = scratch;
    nb::gil_scoped_release release;
    in_use().attention(args);
}

template <class T>
const T* column(const char* name, nb::handle object, Type type, long count) {
    Tensor tensor("choose", name, object);
    EXPECT(tensor, tensor.type == type && tensor.dims == 1 && tensor.dense() && (count < 0 || tensor.size[0] == count),
           count < 0 ? "a dense vector of the right type" : "[" + number(count) + "] of the right type");
    return reinterpret_cast<const T*>(tensor.data);
}

template <class T>
const T* ids(const char* name, nb::handle object, Type type, long columns, long& count) {
    const T* found = column<T>(name, object, type, -1);
    count = Tensor("choose", name, object).size[0];
    for (long i = 0; i < count; i++)
        if (found[i] < 0 || found[i] >= columns)
            refuse("choose: " + std::string(name) + " has " + number(found[i]) + "; there are " + number(columns) + " columns");
    return found;
}

Adjustment adjustment_of(nb::handle object, long columns) {
    Adjustment found{};
    found.history = ids<int32_t>("history", object.attr("history"), Type::int32, columns, found.length);
    found.prompt = nb::cast<long>(object.attr("prompt_len"));
    if (found.prompt < 0) refuse("choose: prompt_len is " + number(found.prompt));
    found.repetition = nb::cast<float>(object.attr("repetition"));
    found.frequency = nb::cast<float>(object.attr("frequency")), found.presence = nb::cast<float>(object.attr("presence"));
    found.bias_ids = ids<int64_t>("bias_ids", object.attr("bias_ids"), Type::int64, columns, found.biases);
    found.bias = column<float>("bias_values", object.attr("bias_values"), Type::float32, found.biases);
    found.banned = ids<int64_t>("banned", object.attr("banned"), Type::int64, columns, found.bans);
    return found;
}

// What the rows of a call ask for: `choices` of kernels/ops.py, or None: the largest. They live until the next call.
// `tokens` int64 and `usable` uint8 will be written; row `at[i]` only chooses among columns whose bit in `words[i]` is set.
std::vector<Choice>& read_choices(nb::handle choices, long rows, long columns, const std::vector<long>& at, nb::handle words,
                                  nb::handle tokens, nb::handle usable) {
    thread_local std::vector<Choice> list;
    thread_local std::vector<Adjustment> changes;
    thread_local std::vector<const uint32_t*> masks;
    auto* token = const_cast<int64_t*>(column<int64_t>("tokens", tokens, Type::int64, rows));
    auto* good = const_cast<uint8_t*>(column<uint8_t>("usable", usable, Type::uint8, rows));
    masks.assign(rows, nullptr);
    set_masks("choose", masks.data(), rows, at, words, columns);
    list.assign(rows, Choice{});
    for (long i = 0; i < rows; i++) list[i].mask = masks[i], list[i].token = token + i, list[i].usable = good + i;
    if (choices.is_none()) return list;
    auto* sharpness = column<float>("sharpness", choices.attr("sharpness"), Type::float32, rows);
    auto* top_k = column<int64_t>("top_k", choices.attr("top_k"), Type::int64, rows);
    auto* top_p = column<double>("top_p", choices.attr("top_p"), Type::float64, rows);
    auto* min_p = column<double>("min_p", choices.attr("min_p"), Type::float64, rows);
    auto* u = column<double>("u", choices.attr("u"), Type::float64, rows);
    for (long i = 0; i < rows; i++)
        list[i].sharpness = sharpness[i], list[i].top_k = long(top_k[i]), list[i].top_p = top_p[i], list[i].min_p = min_p[i], list[i].u = u[i];
    nb::object adjustments = choices.attr("adjustments");
    changes.clear();
    changes.reserve(nb::len(adjustments));
    for (nb::handle one : adjustments) {
        const long row = nb::cast<long>(one.attr("row"));
        if (row < 0 || row >= rows) refuse("choose: an adjustment of row " + number(row) + " of " + number(rows));
        changes.push_back(adjustment_of(one, columns));
        list[row].adjustment = &changes.back();
    }
    return list;
}

void call_choose(nb::handle logits_object, nb::handle choices, std::vector<long> at, nb::handle words, nb::handle tokens,
                 nb::handle usable, int threads) {
    Tensor logits("choose", "logits", logits_object);
    EXPECT(logits, logits.type == Type::float32 && logits.dims == 2 && logits.dense(1), "float32 [*, *], dense but for rows");
    const long rows = logits.size[0], columns = logits.size[1];
    if (columns < 1 || columns > MAX_CHOICES) refuse("choose: " + number(columns) + " columns; 1 to " + number(MAX_CHOICES));
    std::vector<Choice>& list = read_choices(choices, rows, columns, at, words, tokens, usable);
    for (long i = 0; i < rows; i++) list[i].logits = reinterpret_cast<float*>(logits.data) + i * logits.stride[0];
    ChooseArgs args{list.data(), rows, columns, team(threads), scratch};
    nb::gil_scoped_release release;
    in_use().choose(args);
}

// `choose` among the columns of a product that is not kept.
void call_linear_top(nb::handle x_object, nb::handle panels_object, int bits, long group, long k, long n, nb::handle choices,
                     std::vector<long> at, nb::handle words, nb::handle tokens, nb::handle usable, int threads) {
    Tensor x("linear_top", "x", x_object), panels("linear_top", "panels", panels_object);
    x.floats();
    EXPECT(x, x.dims == 2 && x.size[1] == k && x.dense(1), "[*, " + number(k) + "], dense along the last dimension");
    LinearArgs args{};
    args.format = format_of("linear_top", panels, bits, group);
    expect_packed(panels, n, k, false, args.format);
    args.x = x.data, args.x_stride = x.stride[0], args.x_bf16 = x.bf16(), args.panels = panels.data;
    args.m = x.size[0], args.n = n, args.k = k, args.threads = team(threads);
    const std::vector<Choice>& list = read_choices(choices, args.m, n, at, words, tokens, usable);
    args.choices = list.data(), args.most = 1;
    for (const Choice& how : list) {
        const long kept = most_kept(how);
        if (kept < 1 || kept > MOST_KEPT || how.adjustment)
            refuse("linear_top: a row keeps " + number(kept) + " columns (top_k), 1 to " + number(MOST_KEPT) + " are possible, and has " +
                   (how.adjustment ? "an adjustment, none is" : "no adjustment"));
        args.most = kept > args.most ? kept : args.most;
    }
    const long staging = (linear_staging_bytes(args.m, k, args.format) + LINE - 1) / LINE * LINE;
    char* room = scratch(staging + shortlist_bytes(args.threads * args.m, args.most));
    args.staging = room, args.lists = room + staging;
    nb::gil_scoped_release release;
    in_use().linear(args);
}

// Bytes read, or operations done on numbers of `bits` (32, 16, 8) where there is nothing to read.
double call_probe(nb::handle data_object, int bits, long repeats, int threads) {
    ProbeArgs args{};
    args.store = bits == 8 ? Store::int8 : bits == 16 ? Store::bfloat16 : Store::float32;
    args.repeats = repeats, args.threads = team(threads);
    if (!data_object.is_none()) {
        Tensor data("probe", "data", data_object);
        EXPECT(data, data.dims == 1 && data.dense(), "a dense vector");
        args.data = data.data, args.bytes = data.size[0] * data.element();
    }
    nb::gil_scoped_release release;
    return in_use().probe(args);
}

}  // namespace

}  // namespace trunkline

NB_MODULE(native, m) {
    using namespace trunkline;
    nb::set_leak_warnings(false);
    m.def("isas", [] {
        const Operations* all[MAX_ISAS];
        std::vector<std::string> names;
        for (long i = 0, count = available(all); i < count; i++) names.push_back(all[i]->name);
        return names;
    });
    m.def("isa", [] { return std::string(in_use().name); });
    m.def("select_isa", [](const std::string& name) {
        if (!use(name.c_str())) refuse("the instruction set " + name + " is not available here");
    });
    m.def("packed_bytes", [](long n, long k, int bytes, int bits, long group, bool gated) {
        const Store store = bits == 8 ? Store::int8 : bits == 4 ? Store::int4 : bytes == 2 ? Store::bfloat16 : Store::float32;
        return packed_bytes(n, k, gated, {store, group});
    });
    m.def("pack", pack_weights);
    m.def("linear", call_linear, nb::arg("x"), nb::arg("panels"), nb::arg("bits"), nb::arg("group"), nb::arg("k"), nb::arg("n"), nb::arg("gate"),
          nb::arg("bias").none(), nb::arg("residual").none(), nb::arg("out"), nb::arg("threads"));
    m.def("linear_top", call_linear_top, nb::arg("x"), nb::arg("panels"), nb::arg("bits"), nb::arg("group"), nb::arg("k"),
          nb::arg("n"), nb::arg("choices").none(), nb::arg("at"), nb::arg("words").none(), nb::arg("tokens"), nb::arg("usable"), nb::arg("threads"));
    m.def("probe", call_probe, nb::arg("data").none(), nb::arg("bits"), nb::arg("repeats"), nb::arg("threads"));
    m.def("rms_norm", call_rms_norm);
    m.def("rotate", call_rotate, nb::arg("x"), nb::arg("table"), nb::arg("gain").none(), nb::arg("eps"),
          nb::arg("threads"));
    m.def("embedding", call_embedding);
    m.def("packed_embedding", call_packed_embedding);
    m.def("store_kv", call_store_kv);
    bind_plan(m);
    bind_layers(m);
    m.def("choose", call_choose, nb::arg("logits"), nb::arg("choices"), nb::arg("at"), nb::arg("words").none(),
          nb::arg("tokens"), nb::arg("usable"), nb::arg("threads"));
    m.def("attention", call_attention, nb::arg("q"), nb::arg("pool"), nb::arg("plan"), nb::arg("out"), nb::arg("threads"));
}
