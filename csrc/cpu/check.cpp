// Every operation on every instruction set of this machine, built with address and undefined-behavior
// sanitizers. Buffers have exactly the size that an operation may touch. `make check-native` runs it.
#include "args.h"
#include "memory.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

using namespace trunkline;

namespace {

std::mt19937 generator(1);
int failures = 0;

float random_float() { return std::normal_distribution<float>(0, 1)(generator); }

uint16_t to_bf16(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

float from_bf16(uint16_t value) {
    uint32_t bits = uint32_t(value) << 16;
    float result;
    std::memcpy(&result, &bits, 4);
    return result;
}

// Numbers of either type, in an allocation of exactly their size.
struct Numbers {
    bool bf16;
    size_t count;
    std::unique_ptr<char[]> data;

    Numbers(size_t n, bool narrow, bool poisoned = false) : bf16(narrow), count(n), data(new char[n * size() + !n]) {
        for (size_t i = 0; i < n; i++) set(i, poisoned ? NAN : random_float());
    }
    size_t size() const { return bf16 ? 2 : 4; }
    void set(size_t i, float value) {
        uint16_t half = std::isnan(value) ? 0x7fc0 : to_bf16(value);
        if (bf16)
            std::memcpy(data.get() + 2 * i, &half, 2);
        else
            std::memcpy(data.get() + 4 * i, &value, 4);
    }
    double operator[](size_t i) const {
        if (bf16) {
            uint16_t half;
            std::memcpy(&half, data.get() + 2 * i, 2);
            return from_bf16(half);
        }
        float value;
        std::memcpy(&value, data.get() + 4 * i, 4);
        return value;
    }
};

void expect(bool holds, const char* what, long a, long b, long c) {
    if (holds) return;
    std::printf("FAILED on %s: %s (%ld, %ld, %ld)\n", in_use().name, what, a, b, c);
    failures++;
}

// `typical`: the size of a result, since a single one may happen to be near zero.
bool close(const Numbers& found, const std::vector<double>& wanted, double typical = 1) {
    double error = 0, norm = 0.01 * typical * typical * double(wanted.size());
    for (size_t i = 0; i < wanted.size(); i++) {
        error += (found[i] - wanted[i]) * (found[i] - wanted[i]);
        norm += wanted[i] * wanted[i];
    }
    return std::sqrt(error / norm) < (found.bf16 ? 5e-3 : 1e-5);  // false for NaN
}

double activate(double x, Gate gate) {
    if (gate == Gate::silu) return x / (1 + std::exp(-x));
    if (gate == Gate::gelu) return x * 0.5 * std::erfc(-x / std::sqrt(2.0));
    return x * 0.5 * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
}

void check_linear(long m, long n, long k, bool x_bf16, bool w_bf16, bool gated, int threads, Gate gate = Gate::silu) {
    Numbers x(m * k, x_bf16), first(n * k, w_bf16), second(n * k, w_bf16), residual(m * n, x_bf16), out(m * n, x_bf16, true);
    long columns = num_panels(n, gated) * PANEL;
    const Format format{w_bf16 ? Store::bfloat16 : Store::float32, 0};
    Numbers panels(columns * padded_k(k, format), w_bf16, true), bias(columns, false);
    PackPart parts[2] = {{first.data.get(), n, k}, {second.data.get(), n, k}};
    pack({parts, gated ? 2 : 1, k, w_bf16, format, gated, panels.data.get(), threads});
    std::unique_ptr<char[]> staging(new char[linear_staging_bytes(m, k, format)]);
    LinearArgs a{};
    a.x = x.data.get(), a.x_stride = k, a.x_bf16 = x_bf16;
    a.panels = panels.data.get(), a.format = format;
    a.m = m, a.n = n, a.k = k;
    a.bias = reinterpret_cast<float*>(bias.data.get());
    a.residual = gated ? nullptr : residual.data.get();
    a.out = out.data.get(), a.out_bf16 = x_bf16, a.gated = gated, a.gate = gate;
    a.staging = staging.get(), a.threads = threads;
    in_use().linear(a);
    std::vector<double> wanted(m * n);
    for (long r = 0; r < m; r++)
        for (long c = 0; c < n; c++) {
            double left = 0, right = 0;
            for (long i = 0; i < k; i++) {
                left += x[r * k + i] * first[c * k + i];
                right += x[r * k + i] * second[c * k + i];
            }
            long panel = c / PANEL * (gated ? 2 : 1);
            left += bias[panel * PANEL + c % PANEL];
            if (gated) right += bias[(panel + 1) * PANEL + c % PANEL];
            wanted[r * n + c] = gated ? activate(left, gate) * right : left + residual[r * n + c];
        }
    expect(close(out, wanted, gated ? double(k) : std::sqrt(double(k))), gated ? "gated linear" : "linear", m, n, k);
}

char* scratch(long bytes) {
    static std::vector<char> held;
    held.assign(bytes, 0x7f);
    return held.data();
}

// Choices without keeping the product are those among its columns, or, if they can't be told, said to be none.
void check_top(LinearArgs a, const Numbers& out) {
    const long m = a.m, n = a.n;
    std::vector<uint32_t> mask((n + 31) / 32);
    for (long c = 0; c < n; c += 3) mask[c / 32] |= 1u << c % 32;
    std::vector<int64_t> tokens(m), wanted(m);
    std::vector<uint8_t> usable(m), good(m);
    std::vector<Choice> choices;
    for (long r = 0; r < m; r++)
        choices.push_back({reinterpret_cast<const float*>(out.data.get()) + r * n, nullptr, r % 2 ? mask.data() : nullptr,
                           r % 3 ? 1.4427f : 0.0f, 1 + r % 20, r % 5 == 2 ? 0.7 : 1.0, r % 7 == 3 ? 0.2 : 0.0, 0.5, &wanted[r], &good[r]});
    in_use().choose({choices.data(), m, n, a.threads, scratch});
    for (long r = 0; r < m; r++) choices[r].token = &tokens[r], choices[r].usable = &usable[r];
    a.out = nullptr, a.choices = choices.data(), a.most = 20;
    std::unique_ptr<char[]> lists(new char[shortlist_bytes(a.threads * m, a.most)]);
    a.lists = lists.get();
    in_use().linear(a);
    for (long r = 0; r < m; r++) expect(usable[r] == 2 || (usable[r] == good[r] && tokens[r] == wanted[r]), "top", r, tokens[r], wanted[r]);
}

// Whole numbers: close to the product of the weights as they are read back, and `top` its arg-max.
void check_whole(long m, long n, long k, Format format, bool bf16, int threads) {
    Numbers x(m * k, bf16), weight(n * k, bf16), out(m * n, false, true), rounded(n * k, false, true);
    std::unique_ptr<char[]> panels(new char[packed_bytes(n, k, false, format)]);
    std::unique_ptr<char[]> staging(new char[linear_staging_bytes(m, k, format)]);
    PackPart part{weight.data.get(), n, k};
    expect(pack({&part, 1, k, bf16, format, false, panels.get(), threads}), "pack", n, k, format.group);
    std::vector<int64_t> ids(n);
    for (long i = 0; i < n; i++) ids[i] = i;
    in_use().dequantize({panels.get(), format, n, k, ids.data(), n, rounded.data.get(), false});
    LinearArgs a{};
    a.x = x.data.get(), a.x_stride = k, a.x_bf16 = bf16, a.panels = panels.get(), a.format = format;
    a.m = m, a.n = n, a.k = k, a.out = out.data.get(), a.staging = staging.get(), a.threads = threads;
    in_use().linear(a);
    double error = 0, norm = 0;
    for (long r = 0; r < m; r++)
        for (long c = 0; c < n; c++) {
            double wanted = 0;
            for (long i = 0; i < k; i++) wanted += x[r * k + i] * rounded[c * k + i];
            error += (out[r * n + c] - wanted) * (out[r * n + c] - wanted);
            norm += wanted * wanted;
        }
    expect(std::sqrt(error / norm) < 0.03, "whole numbers", m, n, k);  // the activations are rounded too
    check_top(a, out);
}

void check_rows(long tokens, long heads, long dim, bool bf16, int threads) {
    Numbers x(tokens * heads * dim, bf16), gain(heads * dim, bf16), table(tokens * 2 * dim, false);
    Numbers normed(tokens * heads * dim, bf16, true), rotated(tokens * heads * dim, bf16, true);
    NormArgs a{};
    a.x = x.data.get(), a.x_stride = heads * dim, a.bf16 = bf16;
    a.gain = gain.data.get(), a.gain_heads = heads, a.eps = 1e-6f;
    a.table = reinterpret_cast<float*>(table.data.get());
    a.out = normed.data.get(), a.out_stride = heads * dim;
    a.tokens = tokens, a.heads = heads, a.dim = dim, a.threads = threads;
    in_use().rms_norm(a);
    std::vector<double> wanted(tokens * heads * dim), turned(wanted.size());
    for (long row = 0; row < tokens * heads; row++) {
        double squares = 0;
        for (long i = 0; i < dim; i++) squares += x[row * dim + i] * x[row * dim + i];
        for (long i = 0; i < dim; i++)
            wanted[row * dim + i] =
                x[row * dim + i] / std::sqrt(squares / dim + 1e-6) * gain[row % heads * dim + i];
        for (long i = 0; i < dim; i++) {
            long other = i < dim / 2 ? i + dim / 2 : i - dim / 2, at = row / heads * 2 * dim;
            turned[row * dim + i] =
                wanted[row * dim + i] * table[at + i] + wanted[row * dim + other] * table[at + dim + i];
        }
    }
    expect(close(normed, wanted), "rms_norm", tokens, heads, dim);
    if (dim % 2) return;
    a.out = rotated.data.get();
    in_use().rotate(a);
    expect(close(rotated, turned), "rotate", tokens, heads, dim);
}

// What is asked of attention beyond the usual.
struct Asked {
    Store store;
    float soft_cap;
    bool tree;  // tokens are children of the one two before them
};

// Heads of a pool in whole numbers, stored from `rows`, which become what they were rounded to.
std::unique_ptr<char[]> whole_pool(Numbers& rows, long count, long dim, int threads) {
    std::unique_ptr<char[]> pool(new char[count * (dim + SCALE_BYTES)]);
    std::vector<int64_t> ids(count);
    for (long i = 0; i < count; i++) ids[i] = i;
    in_use().store({rows.data.get(), dim, rows.bf16, pool.get(), Store::int8, ids.data(), count, 1, dim, 1, threads});
    Numbers exact(count * dim, false);
    for (long row = 0; row < count; row++) {
        const char* at = pool.get() + row * (dim + SCALE_BYTES);
        uint16_t scale;
        std::memcpy(&scale, at + dim, 2);
        for (long d = 0; d < dim; d++) {
            const float value = from_bf16(scale) * float(int8_t(at[d]));
            expect(std::fabs(value - rows[row * dim + d]) <= from_bf16(scale) * 0.8, "store", row, d, at[d]);
            exact.set(row * dim + d, value);
        }
    }
    rows = std::move(exact);
    return pool;
}

void check_attention(long q_len, long length, long heads, long kv_heads, long dim, long page, long window, bool bf16,
                     int threads, Asked asked = {Store::float32, 0, false}) {
    long pages = (length + page - 1) / page, slots = pages * page;
    Numbers q(q_len * heads * dim, bf16), pool(slots * 2 * kv_heads * dim, bf16), out(q_len * heads * dim, bf16, true);
    std::unique_ptr<char[]> whole;
    if (asked.store == Store::int8) whole = whole_pool(pool, slots * 2 * kv_heads, dim, threads);
    std::vector<uint8_t> tree(q_len * q_len);
    for (long t = 0; t < q_len; t++)
        for (long j = t; j >= 0; j -= 2) tree[t * q_len + j] = 1;
    std::vector<int32_t> table(pages), starts{0, int32_t(q_len)}, lens{int32_t(length)};
    for (long i = 0; i < pages; i++) table[i] = int32_t(pages - 1 - i);
    AttentionArgs a{};
    a.q = q.data.get(), a.q_stride = heads * dim, a.q_bf16 = bf16;
    a.pool = whole ? whole.get() : pool.data.get(), a.out = out.data.get();
    a.store = whole ? Store::int8 : bf16 ? Store::bfloat16 : Store::float32;
    a.soft_cap = asked.soft_cap;
    if (asked.tree) a.tree = tree.data(), a.tree_columns = q_len;
    a.requests = {starts.data(), lens.data(), table.data(), pages, 1, page};
    a.heads = heads, a.kv_heads = kv_heads, a.dim = dim, a.window = window;
    a.scale = 1 / std::sqrt(float(dim)), a.threads = threads, a.grow = scratch;
    in_use().attention(a);
    std::vector<double> wanted(q_len * heads * dim);
    for (long t = 0; t < q_len; t++)
        for (long h = 0; h < heads; h++) {
            const long prefix = length - q_len, position = asked.tree && q_len > 1 ? prefix + t / 2 : prefix + t;
            const long low = window && position >= window ? position - window + 1 : 0;
            auto at = [&](long j, long side) {
                if (asked.tree && q_len > 1 && j >= prefix) j = prefix + t % 2 + 2 * (j - prefix);
                return (((table[j / page] * 2 + side) * kv_heads + h / (heads / kv_heads)) * page + j % page) * dim;
            };
            std::vector<double> weights;
            double sum = 0;
            for (long j = low; j <= position; j++) {
                double score = 0;
                for (long d = 0; d < dim; d++) score += q[(t * heads + h) * dim + d] * pool[at(j, 0) + d];
                score /= std::sqrt(double(dim));
                if (asked.soft_cap != 0) score = asked.soft_cap * std::tanh(score / asked.soft_cap);
                weights.push_back(std::exp(score));
                sum += weights.back();
            }
            for (long d = 0; d < dim; d++)
                for (long j = low; j <= position; j++)
                    wanted[(t * heads + h) * dim + d] += weights[j - low] / sum * pool[at(j, 1) + d];
        }
    expect(close(out, wanted), "attention", q_len, length, dim);
}

// Requests that share their first pages have the bits that each has alone.
void check_shared(long q_len, long page, bool bf16, int threads) {
    const long count = 4, heads = 4, kv_heads = 2, dim = 20, longest = 450, columns = (longest + page - 1) / page;
    Numbers q(count * q_len * heads * dim, bf16), pool(count * columns * page * 2 * kv_heads * dim, bf16);
    Numbers out(count * q_len * heads * dim, bf16, true), alone(count * q_len * heads * dim, bf16, true);
    std::vector<int32_t> table(count * columns), starts, lens;
    for (long i = 0; i < count; i++) {
        starts.push_back(int32_t(i * q_len)), lens.push_back(int32_t(longest - 40 * i));
        for (long p = 0; p < columns; p++) table[i * columns + p] = int32_t((p * page < 400 - 100 * i ? 0 : i * columns) + p);
    }
    starts.push_back(int32_t(count * q_len));
    AttentionArgs a{};
    a.q = q.data.get(), a.q_stride = heads * dim, a.q_bf16 = bf16, a.pool = pool.data.get(), a.out = out.data.get();
    a.store = bf16 ? Store::bfloat16 : Store::float32;
    a.requests = {starts.data(), lens.data(), table.data(), columns, count, page};
    a.heads = heads, a.kv_heads = kv_heads, a.dim = dim, a.scale = 0.2f, a.threads = threads, a.grow = scratch;
    const Prefixes prefixes(a.requests, TILE_ROWS / 2);
    expect(prefixes.stems.size() == 2, "stems", long(prefixes.stems.size()), page, q_len);
    a.prefixes = &prefixes;
    in_use().attention(a);
    a.prefixes = nullptr, a.out = alone.data.get();
    in_use().attention(a);
    expect(!std::memcmp(out.data.get(), alone.data.get(), count * q_len * heads * dim * long(q.size())), "shared", q_len, page, bf16);
}

// Every kind of row; what is chosen must be a column that may be, and with u = 0 and nothing else the first that weighs.
void check_choose(long columns, int threads) {
    const long count = 24;
    Numbers logits(count * columns, false);
    auto* rows = reinterpret_cast<float*>(logits.data.get());
    std::vector<uint32_t> mask((columns + 31) / 32);
    for (long c = 0; c < columns; c += 3) mask[c / 32] |= 1u << c % 32;
    std::vector<int32_t> history{0, int32_t(columns - 1), 0};
    std::vector<int64_t> ids{columns - 1};
    const float bias = 0.5f;
    const Adjustment change{history.data(), 3, 1, 1.2f, 0.5f, 0.1f, ids.data(), &bias, 1, ids.data(), columns > 1};
    std::vector<Choice> choices;
    std::vector<int64_t> tokens(count, -1);
    std::vector<uint8_t> usable(count, 2);
    for (long i = 0; i < count; i++)
        choices.push_back({rows + i * columns, i % 2 ? &change : nullptr, i % 3 ? nullptr : mask.data(), i % 4 ? 1.4427f : 0.0f,
                           i % 5 == 1 ? 3 : 0, i % 5 == 2 ? 0.7 : 1.0, i % 5 == 3 ? 0.2 : 0.0, double(i) / count, &tokens[i], &usable[i]});
    rows[5 * columns] = NAN;
    in_use().choose({choices.data(), count, columns, threads, scratch});
    for (long i = 0; i < count; i++) {
        const bool may = tokens[i] >= 0 && tokens[i] < columns && (!choices[i].mask || mask[tokens[i] / 32] >> tokens[i] % 32 & 1);
        expect(usable[i] == (i != 5) && may, "choose", columns, i, tokens[i]);
        if (i != 4) continue;
        long best = 0;
        for (long c = 1; c < columns; c++)
            if (rows[i * columns + c] > rows[i * columns + best]) best = c;
        expect(tokens[i] == best, "choose the largest", columns, tokens[i], best);
    }
}

void check_memory(long rows, long k, bool bf16, int threads) {
    const Format format{bf16 ? Store::bfloat16 : Store::float32, 0};
    Numbers weight(rows * k, bf16), panels(num_panels(rows, false) * PANEL * padded_k(k, format), bf16, true),
        out(3 * k, bf16, true), plain(3 * k, bf16, true), pool(rows * k, bf16, true);
    PackPart part{weight.data.get(), rows, k};
    pack({&part, 1, k, bf16, format, false, panels.data.get(), threads});
    int64_t ids[3] = {rows - 1, 0, rows / 2};
    unpack_rows(panels.data.get(), format, rows, k, ids, 3, out.data.get(), threads);
    long bytes = k * long(weight.size());
    gather_rows(weight.data.get(), bytes, ids, 3, plain.data.get(), threads);
    expect(!std::memcmp(out.data.get(), plain.data.get(), 3 * bytes), "unpack_rows", rows, k, bf16);
    for (int i = 0; i < 3; i++)
        expect(!std::memcmp(out.data.get() + i * bytes, weight.data.get() + ids[i] * bytes, bytes), "gather", rows, k, i);
    const Store store = bf16 ? Store::bfloat16 : Store::float32;
    const long heads = k % 2 ? 1 : 2, head_bytes = bytes / heads;
    in_use().store({plain.data.get(), k, bf16, pool.data.get(), store, ids, 3, heads, k / heads, rows, threads});
    for (int i = 0; i < 3; i++)
        for (long head = 0; head < heads; head++)
            expect(!std::memcmp(pool.data.get() + (head * rows + ids[i]) * head_bytes,
                                weight.data.get() + ids[i] * bytes + head * head_bytes, head_bytes), "store", rows, k, i);
}

void check_all(int threads) {
    for (bool bf16 : {false, true}) {
        for (long m : {1, 2, 3, 5, 6, 7, 12, 97})
            for (long n : {1, 16, 33, 130})
                for (long k : {1, 2, 63, 700})
                    for (bool gated : {false, true}) {
                        if (m == 97 && k == 63) continue;
                        check_linear(m, n, k, bf16, bf16, gated, threads);
                        if (bf16) check_linear(m, n, k, false, true, gated, threads);
                        if (gated && n == 33) check_linear(m, n, k, bf16, bf16, true, threads, Gate::gelu);
                        if (gated && n == 33) check_linear(m, n, k, bf16, bf16, true, threads, Gate::gelu_tanh);
                    }
        if (bf16) check_linear(700, 17, 1500, bf16, bf16, false, threads);  // several blocks of rows for tiles
        for (long m : {1, 7, 97})
            for (long n : {5, 90})
                for (long k : {6, 300})
                    for (Format format : {Format{Store::int8, 0}, Format{Store::int4, 32}, Format{Store::int4, 128}})
                        check_whole(m, n, k, format, bf16, threads);
        for (long dim : {1, 2, 10, 64, 80, 129}) check_rows(5, 3, dim, bf16, threads);
        for (long dim : {1, 10, 64, 80})
            for (long window : {0, 1, 50, 200}) {
                check_attention(1, 1, 6, 2, dim, 4, window, bf16, threads);
                check_attention(1, 400, 6, 2, dim, 16, window, bf16, threads);
                check_attention(37, 290, 4, 1, dim, 3, window, bf16, threads);
                check_attention(20, 20, 3, 3, dim, 1, window, bf16, threads);
                for (const Asked& asked : {Asked{Store::int8, 0, false}, Asked{Store::float32, 2, false},
                                           Asked{Store::float32, 0, true}, Asked{Store::int8, 3, true}}) {
                    check_attention(1, 400, 6, 2, dim, 16, window, bf16, threads, asked);
                    check_attention(37, 290, 4, 1, dim, 3, window, bf16, threads, asked);
                    check_attention(9, 262, 6, 2, dim, 5, window, bf16, threads, asked);
                }
            }
        for (long q_len : {1, 3, 17})
            for (long page : {1, 16, 48}) check_shared(q_len, page, bf16, threads);
        for (long columns : {1, 31, 64, 65, 1000}) check_choose(columns, threads);
        check_memory(33, 17, bf16, threads);
        check_memory(40, 64, bf16, threads);
    }
}

}  // namespace

int main() {
    const Operations* all[MAX_ISAS];
    const long count = available(all);
    for (long i = 0; i < count; i++) {
        use(all[i]->name);
        for (int threads : {1, 3}) check_all(threads);
        std::printf("%s: checked\n", all[i]->name);
    }
    if (failures) std::printf("%d failures\n", failures);
    return failures ? 1 : 0;
}
