/* fake_cuda's driver, plus what the SM recorder needs: a "kernel" that notes the SMs of its stream's green context.
 *
 * FAKE_PROBE_missing=1: kernels can't be loaded. FAKE_PROBE_spread=1: green contexts hold nobody back, every kernel runs
 * on all SMs. FAKE_PROBE_crash=FUNCTION, FAKE_PROBE_hang=FUNCTION: that function of the two below never returns.
 */
#define cuGreenCtxStreamCreate base_cuGreenCtxStreamCreate
#include "../fake_cuda/libcuda.c"
#undef cuGreenCtxStreamCreate
#include <signal.h>
#include <stdio.h>
#include <unistd.h>

#define MAX_STREAMS 1024
static Desc *of_stream[MAX_STREAMS];

static int is_set(const char *name, const char *value) {
    char key[64];
    snprintf(key, sizeof key, "FAKE_PROBE_%s", name);
    const char *set = getenv(key);
    return set && !strcmp(set, value);
}
static void trap(const char *function) {
    if (is_set("crash", function)) raise(SIGSEGV);
    while (is_set("hang", function)) pause();
}

CUresult cuGreenCtxStreamCreate(void **s, void *g, unsigned flags, int priority) {
    CUresult code = base_cuGreenCtxStreamCreate(s, g, flags, priority);
    if (!code) of_stream[((size_t)*s - 0x5000) % MAX_STREAMS] = g;
    return code;
}
CUresult cuLibraryLoadData(void **lib, const char *code, void *a, void *b, unsigned n, void *c, void *d, unsigned m) {
    (void)a; (void)b; (void)n; (void)c; (void)d; (void)m;
    trap("cuLibraryLoadData");
    if (is_set("missing", "1")) return 209;            /* CUDA_ERROR_NO_BINARY_FOR_GPU */
    if (!strstr(code, ".entry hasgpu_smid")) return 218; /* CUDA_ERROR_INVALID_PTX */
    *lib = (void *)0x7000;
    return 0;
}
CUresult cuLibraryGetKernel(void **k, void *lib, const char *name) {
    if (lib != (void *)0x7000 || strcmp(name, "hasgpu_smid")) return 500;
    *k = (void *)0x7001;
    return 0;
}
CUresult cuLibraryUnload(void *lib) { return lib == (void *)0x7000 ? 0 : 400; }
CUresult cuMemAlloc_v2(unsigned long long *p, size_t n) { *p = (unsigned long long)(size_t)malloc(n); return 0; }
CUresult cuMemFree_v2(unsigned long long p) { free((void *)(size_t)p); return 0; }
CUresult cuMemsetD32_v2(unsigned long long p, unsigned v, size_t n) {
    for (size_t i = 0; i < n; i++) ((unsigned *)(size_t)p)[i] = v;
    return 0;
}
CUresult cuMemcpyDtoH_v2(void *out, unsigned long long p, size_t n) { memcpy(out, (void *)(size_t)p, n); return 0; }
CUresult cuLaunchKernel(void *k, unsigned x, unsigned y, unsigned z, unsigned tx, unsigned ty, unsigned tz, unsigned shared,
                        void *stream, void **arguments, void **extra) {
    (void)shared; (void)extra;
    trap("cuLaunchKernel");
    if (k != (void *)0x7001 || y != 1 || z != 1 || tx != 32 || ty != 1 || tz != 1) return 1;
    Desc *desc = of_stream[((size_t)stream - 0x5000) % MAX_STREAMS];
    if (!desc) return 400;
    unsigned *counts = (unsigned *)(size_t)*(unsigned long long *)arguments[0];
    int first = is_set("spread", "1") ? 0 : desc->first * group_sms, count = is_set("spread", "1") ? sms : desc->sms;
    for (unsigned block = 0; block < x; block++) counts[first + (int)block % count]++;
    return 0;
}
