/* The processor's library: its operators' names, and what they are compiled for. */
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "registration.h"

const int lime_edge_real = ORT_FLOAT;
const char *const lime_edge_provider = NULL;
const char *const lime_edge_unsupported = "lime_edge: these operators need a processor with AVX2, FMA and F16C";

const Entry lime_edge_entries[] = {
    {"ExpertRowsBranch", 5, 1, lime_edge_create_branch, lime_edge_compute_branch, 0},
    {"GappedExpertRowsBranch", 6, 1, lime_edge_create_branch, lime_edge_compute_branch, 0},
    {"ExpertRowsBranchNorm", 7, 2, lime_edge_create_branch_norm, lime_edge_compute_branch_norm, 1},
    {"RoutedBranch", 9, 1, lime_edge_create_routed, lime_edge_compute_routed, 0},
    {"SwiGLU", 1, 1, lime_edge_create_gate, lime_edge_compute_gate, NOT_SHARED},
};
const size_t lime_edge_entry_count = sizeof lime_edge_entries / sizeof *lime_edge_entries;

/* The instruction is asked itself: __builtin_cpu_supports lacks "f16c" in clang 17 and needs a symbol that not every C
 * library has. Both halves of the registers must be saved by the system too. */
__attribute__((visibility("default"))) int lime_edge_supported(void) {
#if defined(__x86_64__)
    const unsigned needed = bit_FMA | bit_F16C | bit_AVX | bit_OSXSAVE, saved = 6;
    unsigned a, b, c, d, low, high;
    if (!__get_cpuid(1, &a, &b, &c, &d) || (c & needed) != needed) return 0;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (low & saved) == saved && __get_cpuid_count(7, 0, &a, &b, &c, &d) && (b & bit_AVX2) != 0;
#else
    return 1;
#endif
}
