#include "memory.h"

#include <cstring>
#include <new>

#include <sys/mman.h>

namespace trunkline {

namespace {

constexpr long SERIAL_BYTES = 1 << 16;

// One panel: units of 4 bytes along k, a float32 or a pair of bfloat16, those of the next k `step` units on.
void pack_panel(const void* const* rows, long k, long unit, uint32_t* out, long step) {
    bool complete = true;
    for (long lane = 0; lane < PANEL; lane++) complete = complete && rows[lane];
    const long plain = complete ? k / unit : 0;
    constexpr long LINE = 16;  // units of a row that share a cache line: read together
    long done = 0;
    for (; done + LINE <= plain; done += LINE)
        for (long lane = 0; lane < PANEL; lane++) {
            uint32_t line[LINE];
            std::memcpy(line, static_cast<const char*>(rows[lane]) + done * 4, sizeof line);
            for (long i = 0; i < LINE; i++) out[(done + i) * step + lane] = line[i];
        }
    for (long i = done; i * unit < k; i++)  // edges: absent rows and an odd last number are zeros
        for (long lane = 0; lane < PANEL; lane++) {
            uint32_t value = 0;
            const char* row = static_cast<const char*>(rows[lane]);
            if (row) std::memcpy(&value, row + i * 4, k - i * unit < unit ? 2 : 4);
            out[i * step + lane] = value;
        }
}

// Where output `index` of the joined parts is, or null beyond their end.
const char* row_of(const PackArgs& a, long part, long index, long size) {
    for (long end = a.gated ? part + 1 : a.num_parts; part < end; part++) {
        if (index < a.parts[part].rows)
            return static_cast<const char*>(a.parts[part].data) + index * a.parts[part].stride * size;
        index -= a.parts[part].rows;
    }
    return nullptr;
}

}  // namespace

void want_large_pages(void* data, long bytes) {
    const uintptr_t page = 4096, begin = (reinterpret_cast<uintptr_t>(data) + page - 1) / page * page;
    const long inside = long(reinterpret_cast<uintptr_t>(data) + bytes - begin) / long(page) * long(page);
    if (inside > 0) madvise(reinterpret_cast<void*>(begin), inside, MADV_HUGEPAGE);
}

char* Room::operator()(long bytes) {
    constexpr long PAGE = 4096, LARGE_PAGE = 1 << 21;
    if (bytes > size) {
        const long page = bytes < LARGE_PAGE ? PAGE : LARGE_PAGE;
        held.reset();
        size = 0;
        const long wanted = (bytes + page - 1) / page * page;
        held.reset(static_cast<char*>(std::aligned_alloc(page, wanted)));
        if (!held) throw std::bad_alloc();
        size = wanted;
        want_large_pages(held.get(), page == LARGE_PAGE ? size : 0);
    }
    return held.get();
}

bool pack(const PackArgs& a) {
    const long size = a.bf16 ? 2 : 4, unit = a.bf16 ? 2 : 1, bytes = panel_bytes(a.k, a.format);
    long n = 0;
    for (long i = 0; i < (a.gated ? 1 : a.num_parts); i++) n += a.parts[i].rows;
    const long panels = num_panels(n, a.gated);
    const Operations& operations = in_use();
    long failed = 0;
    want_large_pages(a.panels, panels * bytes);
#pragma omp parallel for schedule(static) num_threads(a.threads) if (a.threads > 1) reduction(+ : failed)
    for (long p = 0; p < panels; p++) {
        const void* rows[PANEL];
        for (long lane = 0; lane < PANEL; lane++)
            rows[lane] = a.gated ? row_of(a, p % 2, p / 2 * PANEL + lane, size) : row_of(a, 0, p * PANEL + lane, size);
        const long width = slab_width(p, panels), first = p / SLAB * SLAB;
        char* slab = static_cast<char*>(a.panels) + first * bytes;
        if (is_whole(a.format))
            failed += !operations.quantize({rows, a.bf16, a.k, a.format, slab, p - first, width});
        else
            pack_panel(rows, a.k, unit, reinterpret_cast<uint32_t*>(slab) + (p - first) * PANEL, width * PANEL);
    }
    return failed == 0;
}

void unpack_rows(const void* panels, const Format& format, long n, long k, const int64_t* ids, long count, void* out,
                 int threads) {
    const long size = 4 / depth(format), bytes = panel_bytes(k, format);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && count * bytes > SERIAL_BYTES)
    for (long i = 0; i < count; i++) {
        const long p = ids[i] / PANEL, first = p / SLAB * SLAB, width = slab_width(p, num_panels(n, false));
        const char* from = static_cast<const char*>(panels) + first * bytes + ((p - first) * PANEL + ids[i] % PANEL) * 4;
        char* to = static_cast<char*>(out) + i * k * size;
        for (long done = 0; done < k * size; done += 4, from += width * LINE)
            std::memcpy(to + done, from, k * size - done < 4 ? size_t(2) : size_t(4));
    }
}

void gather_rows(const void* table, long row_bytes, const int64_t* ids, long count, void* out, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && count * row_bytes > SERIAL_BYTES)
    for (long i = 0; i < count; i++)
        std::memcpy(static_cast<char*>(out) + i * row_bytes, static_cast<const char*>(table) + ids[i] * row_bytes,
                    row_bytes);
}

}  // namespace trunkline
