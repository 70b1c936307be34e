// All layers of a dense decoder in one call: the operations that Python would call one by one, on the same
// arguments, without its time between them (about 2 us for each of ten calls a layer).
#include "layers.h"

#include "arguments.h"
#include "memory.h"
#include "plan.h"

#include <nanobind/stl/vector.h>

#include <vector>

namespace trunkline {

namespace {

// A `PackedLinear` of kernels/ops.py. The tensors live as long as the stack that holds their owner.
struct Packed {
    LinearArgs args{};

    Packed(nb::handle packed, long k, long n, bool gated) {
        Tensor panels("layers", "panels", packed.attr("data"));
        nb::object quantization = packed.attr("quantization"), bias = packed.attr("bias");
        int bits = quantization.is_none() ? 0 : nb::cast<int>(quantization.attr("bits"));
        long group = quantization.is_none() ? 0 : nb::cast<long>(quantization.attr("group"));
        args.format = format_of("layers", panels, bits, group);
        if (nb::cast<bool>(packed.attr("gated")) != gated) refuse("layers: a product that is gated, or is not, where it should be");
        expect_packed(panels, n, k, gated, args.format);
        args.panels = panels.data, args.n = n, args.k = k, args.gated = gated;
        if (gated) args.gate = gate_of("layers", nb::cast<int>(packed.attr("gate_number")));
        if (!bias.is_none()) {
            Tensor values("layers", "bias", bias);
            const long columns = num_panels(n, gated) * PANEL;
            EXPECT(values, values.type == Type::float32 && values.dims == 1 && values.dense() && values.size[0] == columns,
                   "float32 [" + number(columns) + "]");
            args.bias = reinterpret_cast<float*>(values.data);
        }
    }
};

const void* row_of(nb::handle object, const char* name, Type type, long size) {
    Tensor tensor("layers", name, object);
    EXPECT(tensor, tensor.type == type && tensor.dense() && tensor.size[tensor.dims - 1] == size,
           "dense [*, " + number(size) + "] of the activations' type");
    return tensor.data;
}

struct Layer {
    const void *input_norm, *mlp_norm, *gain = nullptr;
    Packed qkv, output, gate_up, down;

    Layer(nb::handle weights, Type type, long hidden, long heads, long kv_heads, long dim)
        : input_norm(row_of(weights.attr("input_norm"), "input_norm", type, hidden)),
          mlp_norm(row_of(weights.attr("mlp_norm"), "mlp_norm", type, hidden)),
          qkv(weights.attr("qkv"), hidden, (heads + 2 * kv_heads) * dim, false),
          output(weights.attr("output"), heads * dim, hidden, false),
          gate_up(weights.attr("gate_up"), hidden, nb::cast<long>(weights.attr("gate_up").attr("out_features")), true),
          down(weights.attr("down"), gate_up.args.n, hidden, false) {
        nb::object head_gain = weights.attr("head_gain");
        if (head_gain.is_none()) return;
        Tensor rows("layers", "head_gain", head_gain);
        EXPECT(rows, rows.dims == 2 && rows.size[0] == heads + kv_heads, "one row for each head");
        gain = row_of(head_gain, "head_gain", type, dim);
    }
};

class LayerStack {
public:
    LayerStack(nb::list weights, long hidden_, long heads_, long kv_heads_, long dim_, bool bf16_, float eps_)
        : owner(weights), hidden(hidden_), heads(heads_), kv_heads(kv_heads_), dim(dim_), bf16(bf16_), eps(eps_) {
        if (dim < 2 || dim % 2 || dim > MAX_HEAD_DIM || kv_heads < 1 || heads % kv_heads)
            refuse("layers: " + number(heads) + " heads of " + number(dim) + " on " + number(kv_heads));
        for (nb::handle layer : weights)
            layers.emplace_back(layer, bf16 ? Type::bfloat16 : Type::float32, hidden, heads, kv_heads, dim);
    }

    // x [tokens, hidden] is overwritten with what the last layer makes of it.
    void run(nb::handle x_object, nb::handle table_object, nb::handle slots_object, nb::handle pool_object,
             const AttentionPlan& plan, std::vector<long> windows, int threads) {
        Tensor x("layers", "x", x_object), table("layers", "table", table_object), slots("layers", "slots", slots_object),
            pool("layers", "pool", pool_object);
        const long tokens = x.size[0], count = long(layers.size());
        const Type type = bf16 ? Type::bfloat16 : Type::float32;
        EXPECT(x, x.type == type && x.dims == 2 && x.dense() && x.size[1] == hidden && tokens == plan.tokens,
               "dense [" + number(plan.tokens) + ", " + number(hidden) + "] of the weights' type");
        EXPECT(table, table.type == Type::float32 && table.dims == 3 && table.dense() && table.size[0] == tokens &&
                          table.size[1] == 2 && table.size[2] == dim,
               "dense float32 [" + number(tokens) + ", 2, " + number(dim) + "]");
        const Store store = pool_store(pool, dim);
        const long pages = plan.num_slots / plan.page_size();
        EXPECT(pool, pool.dims == 6 && pool.dense() && pool.size[0] == count && pool.size[1] >= pages && pool.size[2] == 2 &&
                         pool.size[3] == kv_heads && pool.size[4] == plan.page_size() && pool.size[5] == head_width(store, dim),
               "dense [" + number(count) + ", " + number(pages) + " or more, 2, " + number(kv_heads) + ", " +
                   number(plan.page_size()) + ", " + number(head_width(store, dim)) + "]");
        if (long(windows.size()) != count) refuse("layers: " + number(long(windows.size())) + " windows for " + number(count));
        const int64_t* checked = indices(slots, pool.size[1] * pool.size[4]);
        EXPECT(slots, slots.size[0] == tokens, "[" + number(tokens) + "]");
        std::vector<int64_t> rows(checked, checked + tokens);
        AttentionArgs attention = plan.args();
        attention.store = store;
        const long layer_bytes = pool.stride[0] * pool.element();
        nb::gil_scoped_release release;
        reserve(tokens);
        for (long i = 0; i < count; i++) {
            attention.pool = pool.data + i * layer_bytes, attention.window = windows[i];
            run_layer(layers[i], x.data, tokens, reinterpret_cast<float*>(table.data), rows.data(), attention, team(threads));
        }
    }

private:
    void run_layer(const Layer& layer, char* x, long tokens, const float* table, const int64_t* slots, AttentionArgs attention,
                   int threads) {
        const long width = (heads + 2 * kv_heads) * dim, size = bf16 ? 2 : 4;
        const Operations& operations = in_use();
        NormArgs norm{};
        norm.x = x, norm.x_stride = hidden, norm.bf16 = bf16, norm.gain = layer.input_norm, norm.gain_heads = 1, norm.eps = eps;
        norm.out = normed, norm.out_stride = hidden, norm.tokens = tokens, norm.heads = 1, norm.dim = hidden;
        norm.threads = threads;
        operations.rms_norm(norm);
        multiply(layer.qkv, normed, qkv, nullptr, tokens, threads);

        NormArgs turn{};
        turn.x = turn.out = qkv, turn.x_stride = turn.out_stride = width, turn.bf16 = bf16, turn.gain = layer.gain;
        turn.gain_heads = heads + kv_heads, turn.eps = eps, turn.table = table;
        turn.tokens = tokens, turn.heads = heads + kv_heads, turn.dim = dim, turn.threads = threads;
        operations.rotate(turn);
        operations.store({qkv + heads * dim * size, width, bf16, const_cast<void*>(attention.pool), attention.store, slots,
                          tokens, 2 * kv_heads, dim, attention.requests.page_size, threads});

        attention.q = qkv, attention.q_stride = width, attention.q_bf16 = bf16, attention.out = normed;
        attention.heads = heads, attention.kv_heads = kv_heads, attention.dim = dim;
        attention.threads = threads, attention.grow = scratch;
        operations.attention(attention);
        multiply(layer.output, normed, x, x, tokens, threads);

        norm.gain = layer.mlp_norm;
        operations.rms_norm(norm);
        multiply(layer.gate_up, normed, inner, nullptr, tokens, threads);
        multiply(layer.down, inner, x, x, tokens, threads);
    }

    // A residual may be the result: each number is read before it is written.
    void multiply(const Packed& packed, const void* x, void* out, const void* residual, long tokens, int threads) const {
        LinearArgs args = packed.args;
        args.x = x, args.x_stride = args.k, args.x_bf16 = args.out_bf16 = bf16, args.m = tokens, args.out = out;
        args.residual = residual, args.threads = threads;
        args.staging = scratch(linear_staging_bytes(tokens, args.k, args.format));
        in_use().linear(args);
    }

    // Activations of a step; grows to the largest, and stays.
    void reserve(long tokens) {
        long widest = 0;
        for (const Layer& layer : layers) widest = layer.gate_up.args.n > widest ? layer.gate_up.args.n : widest;
        const long size = bf16 ? 2 : 4, width = (heads + 2 * kv_heads) * dim;
        const long first = (tokens * (hidden > heads * dim ? hidden : heads * dim) * size + 63) / 64 * 64;
        const long second = (tokens * width * size + 63) / 64 * 64, bytes = first + second + (tokens * widest * size + 63) / 64 * 64;
        normed = room(bytes), qkv = normed + first, inner = qkv + second;
    }

    nb::list owner;
    long hidden, heads, kv_heads, dim;
    bool bf16;
    float eps;
    std::vector<Layer> layers;
    Room room;
    char *normed = nullptr, *qkv = nullptr, *inner = nullptr;  // parts of `room`
};

}  // namespace

void bind_layers(nb::module_& m) {
    nb::class_<LayerStack>(m, "LayerStack")
        .def(nb::init<nb::list, long, long, long, long, bool, float>())
        .def("run", &LayerStack::run, nb::arg("x"), nb::arg("rope"), nb::arg("slots"), nb::arg("pool"), nb::arg("plan"),
             nb::arg("windows"), nb::arg("threads"));
}

}  // namespace trunkline
