// The candidates of a row: columns in order of logit, then of index, and which of them a choice keeps.
//
// A row's results are seen a slab at a time, by several threads, and not kept. Each thread remembers those that may be
// among the first `most`, exactly, and about what all weigh: weights are relative to the largest, which is not known
// yet. A choice that such a sum can't tell is left to who has all logits.
#pragma once

#include "args.h"
#include "simd.h"

namespace trunkline {
namespace TRUNKLINE_ISA {

// 2^((logit - top) * sharpness) * 2^35 as whole numbers.
INLINE VF weights_of(VF logits, float top, float sharpness) {
    VF z = (logits - splat(top)) * splat(sharpness);
    z = z < splat(-60.0f) ? splat(-60.0f) : z;
    const VF magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    const VF shifted = z + magic, n = shifted - magic, r = z - n;
    VF p = splat(1.535336082e-4f);
    p = p * r + splat(1.339887484e-3f);
    p = p * r + splat(9.618437366e-3f);
    p = p * r + splat(5.550332470e-2f);
    p = p * r + splat(2.402264791e-1f);
    p = p * r + splat(6.931472029e-1f);
    p = p * r + splat(1.0f);
    p = p * (VF)((__builtin_convertvector(n, VI) + (127 + 35)) << 23);
    const VF whole = splat(8388608.0f);  // 2^23: from here on all float32 are whole
    return p < whole ? (p + whole) - whole : p;
}
constexpr float NO_WEIGHT = -37.0f;  // powers below round to zero

INLINE bool ahead(const Candidate& left, const Candidate& right) {
    return left.value > right.value || (left.value == right.value && left.column < right.column);
}
INLINE void swap(Candidate& left, Candidate& right) {
    const Candidate kept = left;
    left = right, right = kept;
}

// How many of `count` candidates the first two filters keep; `ranked` then begins with them. Each kept one has less
// than `most` of them and no more than `mass` of their weight ahead of it.
static long keep(Candidate* ranked, long count, long most, double mass) {
    long low = 0, high = count;
    double before = 0;
    while (low < high) {
        swap(ranked[(low + high) / 2], ranked[high - 1]);
        const Candidate pivot = ranked[high - 1];
        long end = low;
        double moved = 0;
        for (long i = low; i + 1 < high; i++) {
            if (!ahead(ranked[i], pivot)) continue;
            moved += ranked[i].weight;
            swap(ranked[i], ranked[end++]);
        }
        swap(ranked[high - 1], ranked[end]);
        if (end < most && before + moved <= mass) {
            before += moved + pivot.weight;
            low = end + 1;
        } else {
            high = end;
        }
    }
    return low;
}

// The one of `ranked` that comes last, of `count`.
INLINE Candidate last_of(const Candidate* ranked, long count) {
    Candidate last = ranked[0];
    for (long i = 1; i < count; i++)
        if (ahead(last, ranked[i])) last = ranked[i];
    return last;
}

// Of `count` candidates in order of column, those up to `last` that weigh at least `least`: the one in which the running
// sum passes u times the whole.
static long pick_up_to(const Candidate* listed, long count, const Candidate& last, double least, double u) {
    double sum = 0;
    for (long i = 0; i < count; i++)
        if (!ahead(last, listed[i]) && listed[i].weight >= least) sum += listed[i].weight;
    const double target = u * sum;
    double before = 0;
    for (long i = 0; i < count; i++) {
        if (ahead(last, listed[i]) || !(listed[i].weight >= least)) continue;
        before += listed[i].weight;
        if (before > target) return listed[i].column;
    }
    return last.column;
}

INLINE void begin_list(Shortlist& list, Candidate* at) {
    const float lowest = -__builtin_inff();
    list = {0, lowest, lowest, 0, true, at};
}

// Leave the first `most`.
static void cut_list(Shortlist& list, long most) {
    if (list.count < most) return;
    for (long i = 0; i < list.count; i++) list.at[i].weight = 0;
    list.count = int32_t(keep(list.at, list.count, most, 0));
    list.bound = last_of(list.at, list.count).value;
}

// 2^(x * sharpness), for sums that need not be exact.
INLINE double scale_by(float x, float sharpness) { return __builtin_exp2(double(x) * sharpness); }

INLINE void raise_peak(Shortlist& list, float peak, float sharpness) {
    if (!(peak > list.peak)) return;
    if (list.weight > 0) list.weight *= scale_by(list.peak - peak, sharpness);
    list.peak = peak;
}

// The columns from `column` on of a row's results, `count` of them: at most a slab.
INLINE void see(Shortlist& list, const Choice& how, const float* c, long column, long count) {
    const VF hidden = splat(-__builtin_inff());
    constexpr long PARTS = SLAB * PANEL / W;
    VF seen[PARTS], most = hidden, zeros = {};
#pragma GCC unroll 4
    for (long i = 0; i < PARTS; i++) {
        seen[i] = hidden;
        if (i * W >= count) continue;
        const VF v = load_some(c + i * W, count - i * W);
        zeros += v * 0.0f;  // NaN for what is not finite
        VI may = lanes() < int32_t(count - i * W);
        if (how.mask) {
            const uint32_t bits = how.mask[(column + i * W) / 32] >> (column + i * W) % 32;
            may &= (VI)((VU)splat_int(int32_t(bits)) >> (VU)lanes() & 1) != 0;
        }
        seen[i] = may ? v : hidden;
        most = larger(most, seen[i]);
    }
    list.finite = list.finite && sum(zeros) == 0;
    const float best = largest(most);
    if (how.sharpness != 0 && how.top_p < 1 && (best - list.peak) * how.sharpness >= NO_WEIGHT) {
        raise_peak(list, best, how.sharpness);
        VF total = {};
#pragma GCC unroll 4
        for (long i = 0; i < PARTS; i++) total += power_of_two((seen[i] - splat(list.peak)) * splat(how.sharpness));
        list.weight += sum(total);
    }
    if (!(best > list.bound)) return;
    const long kept = most_kept(how);
    if (list.count + count > shortlist_room(kept)) cut_list(list, kept);
    for (long i = 0; i < PARTS; i++)
        for (uint32_t above = bits_of(seen[i] > splat(list.bound)); above; above &= above - 1) {
            const int lane = __builtin_ctz(above);
            list.at[list.count++] = {seen[i][lane], int32_t(column + i * W + lane), 0};
        }
}

// What another thread has seen of the row. Equals may come in any order here.
static void join(Shortlist& list, Shortlist& other, const Choice& how) {
    const long kept = most_kept(how);
    cut_list(other, kept);
    if (list.count + other.count > shortlist_room(kept)) cut_list(list, kept);
    for (long i = 0; i < other.count; i++)
        if (other.at[i].value >= list.bound) list.at[list.count++] = other.at[i];
    list.finite = list.finite && other.finite;
    if (!(other.weight > 0)) return;
    raise_peak(list, other.peak, how.sharpness);
    list.weight += other.weight * scale_by(other.peak - list.peak, how.sharpness);
}

// How far a sum of powers may be from that of weights, of itself. Differences of logits and their product with the
// sharpness are rounded: a power z is off by 2^-23 |z|, and of 2^18 columns' sum no more than 13.5 of it is |z|, which
// makes 2^-19.7 on each side; polynomials and sums add less than 2^-20. Weights are whole, which moves 2^18 of them by 2^17.
constexpr double UNSURE = 0x1p-18, ROUNDED = 0x1p17;

static void choose_listed(Shortlist& list, const Choice& how) {
    const long kept = most_kept(how);
    cut_list(list, kept);
    const long count = list.count;
    Candidate* const at = list.at;
    *how.token = 0, *how.usable = list.finite && count > 0;
    if (!*how.usable) return;
    Candidate ranked[MOST_KEPT];
    float values[MOST_KEPT + W] = {}, top = at[0].value;
    for (long i = 0; i < count; i++) {  // in order of column
        const Candidate moved = at[i];
        top = moved.value > top ? moved.value : top;
        long j = i;
        for (; j > 0 && at[j - 1].column > moved.column; j--) at[j] = at[j - 1];
        at[j] = moved;
    }
    if (how.sharpness == 0) {
        *how.token = at[0].column;
        return;
    }
    for (long i = 0; i < count; i++) values[i] = at[i].value;
    for (long i = 0; i < count; i += W) store(values + i, weights_of(load(values + i), top, how.sharpness));
    for (long i = 0; i < count; i++) at[i].weight = values[i], ranked[i] = at[i];
    double least = __builtin_inf(), most = least;  // of the mass that may be ahead
    if (how.top_p < 1) {
        const double all = list.weight * scale_by(list.peak - top, how.sharpness) * 0x1p35, off = all * UNSURE + ROUNDED;
        least = how.top_p * (all - off), most = how.top_p * (all + off);
    }
    const long some = keep(ranked, count, kept, least);
    if (some != keep(ranked, count, kept, most)) {
        *how.usable = 2;
        return;
    }
    *how.token = pick_up_to(at, count, last_of(ranked, some), how.min_p * 0x1p35, how.u);
}

}  // namespace TRUNKLINE_ISA
}  // namespace trunkline
