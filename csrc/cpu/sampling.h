// From a row of logits to a token: penalties, bias, bans and masks, then the choice, as `Choices` of kernels/ops.py
// defines it.
//
// Weights of columns are whole numbers below 2^36, found by operations that round once each (no fma) on every
// machine. Sums of so many as a vocabulary has are exact in float64, whatever their order: blocks of columns can be
// added up and left out, and a token never depends on the instruction set, on threads, or on who computed it.
#pragma once

#include "shortlist.h"

namespace trunkline {
namespace TRUNKLINE_ISA {

constexpr long GROUP = 64;  // columns that share a largest logit and a sum

typedef double VD __attribute__((vector_size(W * 4)));
INLINE VD widen_half(VF v, int half) {
    typedef float VS __attribute__((vector_size(W * 2)));
    VS part;
    __builtin_memcpy(&part, (const char*)&v + half * sizeof part, sizeof part);
    return __builtin_convertvector(part, VD);
}

// What a thread works with for one row, of `columns` columns.
struct Chooser {
    const ChooseArgs& a;
    const long columns = a.columns, groups = (columns + GROUP - 1) / GROUP;
    float* values;     // [groups * GROUP]: the row after penalties, bans and masks; -inf at the end
    float* largest_of; // [groups]
    float* order;      // [groups]: the same, to be put in order
    double* sums;      // [groups]
    int32_t* counts;   // [columns]: zeros between rows
    Candidate* listed; // [columns]: those that may be kept, in order of column
    Candidate* ranked; // the same, in order of rank as far as needed
    float* weights;    // [columns]: of the row, where they were asked for

    Chooser(const ChooseArgs& args, char* at) : a(args) { lay_out(at); }
    long lay_out(char* const begin) {
        char* at = begin;
        auto take = [&](long bytes) {
            char* from = at;
            at += (bytes + 63) / 64 * 64;
            return from;
        };
        sums = (double*)take(groups * 8);
        values = (float*)take(groups * GROUP * 4);
        largest_of = (float*)take(groups * 4);
        order = (float*)take(groups * 4);
        counts = (int32_t*)take(columns * 4);
        listed = (Candidate*)take(columns * long(sizeof(Candidate)));
        ranked = (Candidate*)take(columns * long(sizeof(Candidate)));
        weights = (float*)take(groups * GROUP * 4);
        return at - begin;
    }
    void clear_counts() {
        for (long i = 0; i < columns; i++) counts[i] = 0;
    }

    // Copies the row. Returns whether all of it is finite.
    bool read(const float* row) {
        VF excess = {};
        long i = 0;
        for (; i + W <= columns; i += W) {
            const VF v = load(row + i);
            excess += v - v;  // NaN where a number is not finite
            store(values + i, v);
        }
        float rest = sum(excess);
        for (; i < columns; i++) rest += row[i] - row[i], values[i] = row[i];
        for (; i < groups * GROUP; i++) values[i] = -__builtin_inff();
        return rest == 0;
    }

    void adjust(const Adjustment& how, bool masked) {
        if (how.repetition != 1)
            for (long i = 0; i < how.length; i++) {
                const int32_t id = how.history[i];
                if (counts[id]++ == 0) values[id] = values[id] > 0 ? values[id] / how.repetition : values[id] * how.repetition;
            }
        if (how.repetition != 1)
            for (long i = 0; i < how.length; i++) counts[how.history[i]] = 0;
        if (how.frequency != 0 || how.presence != 0) {
            for (long i = how.prompt; i < how.length; i++) counts[how.history[i]]++;
            for (long i = how.prompt; i < how.length; i++) {
                const int32_t id = how.history[i];
                if (counts[id] == 0) continue;
                values[id] -= float(counts[id]) * how.frequency + how.presence;
                counts[id] = 0;
            }
        }
        for (long i = 0; i < how.biases; i++) values[how.bias_ids[i]] += how.bias[i];
        if (!masked)
            for (long i = 0; i < how.bans; i++) values[how.banned[i]] = -__builtin_inff();
    }

    void apply(const uint32_t* mask) {
        for (long i = 0; i < columns; i += 32) {
            const uint32_t bits = mask[i / 32];
            const long end = columns - i < 32 ? columns - i : 32;
            if (bits == 0xffffffffu) continue;
            for (long j = 0; j < end; j++) values[i + j] = bits >> j & 1 ? values[i + j] : -__builtin_inff();
        }
    }

    // The largest of each group, and of all.
    float find_largest() {
        float top = -__builtin_inff();
        for (long g = 0; g < groups; g++) {
            VF most = load(values + g * GROUP);
            for (long i = W; i < GROUP; i += W) most = larger(load(values + g * GROUP + i), most);
            largest_of[g] = largest(most);
            top = largest_of[g] > top ? largest_of[g] : top;
        }
        return top;
    }
    long first_of(float top) const {
        for (long g = 0; g < groups; g++)
            if (largest_of[g] == top)
                for (long i = g * GROUP;; i++)
                    if (values[i] == top) return i;
        return 0;  // NaN
    }

    double weigh_group(long g, float top, float sharpness) {
        VD low = {}, high = {};
        for (long i = g * GROUP; i < (g + 1) * GROUP; i += W) {
            const VF w = weights_of(load(values + i), top, sharpness);
            store(weights + i, w);
            low += widen_half(w, 0), high += widen_half(w, 1);
        }
        low += high;
        double total = 0;
        for (int i = 0; i < W / 2; i++) total += low[i];
        return total;
    }
    double weigh_all(float top, float sharpness) {
        double total = 0;
        for (long g = 0; g < groups; g++) {
            const bool none = (largest_of[g] - top) * sharpness < NO_WEIGHT;
            sums[g] = none ? 0 : weigh_group(g, top, sharpness);
            total += sums[g];
        }
        return total;
    }

    // The column in which the running sum of weights passes `target`.
    long pick(double target) const {
        double before = 0;
        for (long g = 0; g < groups; g++) {
            if (!(before + sums[g] > target)) {
                before += sums[g];
                continue;
            }
            for (long i = g * GROUP; i < (g + 1) * GROUP; i++) {
                before += weights[i];
                if (before > target) return i;
            }
        }
        return 0;
    }

    // The n-th largest of `order`.
    float nth_largest(long n) {
        for (long g = 0; g < groups; g++) order[g] = largest_of[g];
        long low = 0, high = groups;
        while (high - low > 1) {
            const float pivot = order[(low + high) / 2];
            long more = low, at = low, less = high;  // [low, more) > pivot, [more, at) = pivot, [less, high) < pivot
            while (at < less) {
                const float value = order[at];
                if (value > pivot)
                    order[at++] = order[more], order[more++] = value;
                else if (value < pivot)
                    order[at] = order[--less], order[less] = value;
                else
                    at++;
            }
            if (n < more)
                high = more;
            else if (n < less)
                return pivot;
            else
                low = less;
        }
        return order[low];
    }

    // Columns of at least `bound`, with their weights; returns how many, and their sum in `total`.
    long collect(float bound, float top, float sharpness, bool weighed, double& total) {
        long count = 0;
        total = 0;
        for (long g = 0; g < groups; g++) {
            if (!(largest_of[g] >= bound)) continue;
            const bool stale = (largest_of[g] - top) * sharpness < NO_WEIGHT;  // left out by `weigh_all`
            if (!weighed || stale) weigh_group(g, top, sharpness);
            for (long i = g * GROUP; i < (g + 1) * GROUP && i < columns; i++)
                if (values[i] >= bound && values[i] != -__builtin_inff()) {
                    listed[count++] = {values[i], int32_t(i), weights[i]};
                    total += weights[i];
                }
        }
        return count;
    }

    long choose_filtered(const Choice& how, float top) {
        const bool by_mass = how.top_p < 1;
        const double total = by_mass ? weigh_all(top, how.sharpness) : 0;
        const double mass = by_mass ? how.top_p * total : __builtin_inf();
        const long most = how.top_k > 0 && how.top_k < columns ? how.top_k : columns;
        const double least = how.min_p * 0x1p35;
        // Below this logit no weight is `least`; 0.01 is more than rounding can hide.
        float bound = -__builtin_inff();
        if (how.min_p > 0) bound = float(top + (__builtin_log2(how.min_p) - 0.01) / how.sharpness);
        long count = 0;
        for (long rank = most < columns ? most : 32;; rank *= 8) {
            float enough = rank <= groups ? nth_largest(rank - 1) : -__builtin_inff();
            const bool all = enough <= bound;
            enough = all ? bound : enough;
            double found;
            count = collect(enough, top, how.sharpness, by_mass, found);
            if (all || count >= most || found > mass) break;
        }
        for (long i = 0; i < count; i++) ranked[i] = listed[i];
        const long kept = keep(ranked, count, most, mass);
        return kept == 0 ? 0 : pick_up_to(listed, count, last_of(ranked, kept), least, how.u);
    }

    void choose(const Choice& how) {
        bool usable = read(how.logits);
        if (how.adjustment) adjust(*how.adjustment, how.mask != nullptr);
        if (how.mask) apply(how.mask);
        const float top = find_largest();
        usable = usable && top - top == 0;
        *how.usable = usable;
        long token = 0;
        if (usable && how.sharpness == 0)
            token = first_of(top);
        else if (usable && how.top_k <= 0 && how.top_p >= 1 && how.min_p <= 0)
            token = pick(how.u * weigh_all(top, how.sharpness));
        else if (usable)
            token = choose_filtered(how, top);
        *how.token = token;
    }
};

static long choose_room(const ChooseArgs& a) { return Chooser(a, nullptr).lay_out(nullptr); }

static void choose(const ChooseArgs& a) {
    const int threads = a.threads < a.count ? a.threads : int(a.count);
    const long room = choose_room(a);
    char* base = a.grow(room * threads);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        Chooser chooser(a, base + omp_get_thread_num() * room);
        chooser.clear_counts();
#pragma omp for schedule(dynamic, 1)
        for (long i = 0; i < a.count; i++) chooser.choose(a.choices[i]);
    }
}

}  // namespace TRUNKLINE_ISA
}  // namespace trunkline
