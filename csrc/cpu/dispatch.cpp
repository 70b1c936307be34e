// Which instruction set runs: the best of the build that this CPU has, unless `use` chose another.
#include "args.h"
#include "memory.h"

#include <atomic>
#include <cstring>

namespace trunkline {

namespace {

std::atomic<const Operations*> chosen{nullptr};

}  // namespace

long available(const Operations** to) {
    long count = 0;
#if defined(__x86_64__)
    __builtin_cpu_init();
    bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni")) to[count++] = &avx512bf16::operations;
    if (avx512) to[count++] = &avx512::operations;
    if (avx2) to[count++] = &avx2::operations;
#endif
    to[count++] = &portable::operations;
    return count;
}

const Operations& in_use() {
    const Operations* operations = chosen.load(std::memory_order_acquire);
    if (operations == nullptr) {
        const Operations* all[4];
        available(all);
        operations = all[0];
        chosen.store(operations, std::memory_order_release);
    }
    return *operations;
}

bool use(const char* name) {
    const Operations* all[4];
    const long count = available(all);
    for (long i = 0; i < count; i++)
        if (std::strcmp(all[i]->name, name) == 0) {
            chosen.store(all[i], std::memory_order_release);
            return true;
        }
    return false;
}

}  // namespace trunkline
