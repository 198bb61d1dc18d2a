// Which of the compiled instruction sets this processor runs. Compiled for the baseline, so that it runs everywhere.

extern "C" __attribute__((visibility("default"))) const char *san_instruction_set(void) {
#if defined(__x86_64__)
    // Each level by the members that compilers since GCC 5 can ask for; GCC 11 has no names for the levels themselves.
    __builtin_cpu_init();
    const bool v2 = __builtin_cpu_supports("sse4.2") && __builtin_cpu_supports("popcnt");
    const bool v3 = v2 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
    const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                    __builtin_cpu_supports("avx512vl");
    return v4 ? "v4" : v3 ? "v3" : v2 ? "v2" : "none";
#else
    return "plain";
#endif
}
