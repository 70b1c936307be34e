// Which instruction set runs: the best of the build that this CPU has, unless `use` chose another.
#include "args.h"
#include "memory.h"

#include <atomic>
#include <cstring>

#if defined(TRUNKLINE_TILES)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace trunkline {

namespace {

std::atomic<const Operations*> chosen{nullptr};

#if defined(TRUNKLINE_TILES)
// Whether the processor has AMX with bfloat16 and int8, and the kernel keeps tiles for this process's threads: it
// must be asked once, before the first use.
bool may_use_tiles() {
    unsigned a, b, c, d, low, high;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    const unsigned wanted = 1u << 22 | 1u << 24 | 1u << 25;  // AMX-BF16, AMX-TILE, AMX-INT8
    if ((d & wanted) != wanted) return false;
    asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    const unsigned states = 1u << 17 | 1u << 18;  // the operating system saves both
    if ((low & states) != states) return false;
    constexpr long REQUEST = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM of arch_prctl(2)
    return syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
}
#endif

}  // namespace

long available(const Operations** to) {
    long count = 0;
#if defined(__x86_64__)
    __builtin_cpu_init();
    bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    bool avx512bf16 = avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
#if defined(TRUNKLINE_TILES)
    static const bool tiles = avx512bf16 && may_use_tiles();
    if (tiles) to[count++] = &amx::operations;
#endif
    if (avx512bf16) to[count++] = &avx512bf16::operations;
    if (avx512) to[count++] = &avx512::operations;
    if (avx2) to[count++] = &avx2::operations;
#endif
    to[count++] = &portable::operations;
    return count;
}

const Operations& in_use() {
    const Operations* operations = chosen.load(std::memory_order_acquire);
    if (operations == nullptr) {
        const Operations* all[MAX_ISAS];
        available(all);
        operations = all[0];
        chosen.store(operations, std::memory_order_release);
    }
    return *operations;
}

bool use(const char* name) {
    const Operations* all[MAX_ISAS];
    const long count = available(all);
    for (long i = 0; i < count; i++)
        if (std::strcmp(all[i]->name, name) == 0) {
            chosen.store(all[i], std::memory_order_release);
            return true;
        }
    return false;
}

}  // namespace trunkline
