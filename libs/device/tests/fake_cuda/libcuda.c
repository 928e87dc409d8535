/* A small stand-in for libcuda.so.1: devices, splits, green contexts, faults. No kernel ever runs.
 *
 * Settings, by environment when loaded or by fake_cuda_set(name, value) later:
 *   devices, sms, group_sms, mps (attribute 133; -1: not known to the driver), fail_code with fail_call (a function's
 *   name; empty: every call from then on, as after a sticky error).
 * Compile with -DOLD_DRIVER for a driver without green contexts.
 */
#include <stdlib.h>
#include <string.h>

typedef int CUresult;
typedef struct { unsigned type; unsigned char internal[92];
                 union { struct { unsigned count, min, align; } sm; unsigned char pad[48]; } u; } Resource;
_Static_assert(sizeof(Resource) == 144, "CUdevResource has 144 bytes");
typedef struct { int split, first, count, sms; } Desc;

static int devices = 1, sms = 132, group_sms = 8, mps = 1, fail_code = 0, ready = 0;
static char fail_call[64] = "";
static int splits = 0, green = 0, streams = 0, uploads = 0;

static void set(const char *name, const char *value) {
    if (!strcmp(name, "devices")) devices = atoi(value);
    else if (!strcmp(name, "sms")) sms = atoi(value);
    else if (!strcmp(name, "group_sms")) group_sms = atoi(value);
    else if (!strcmp(name, "mps")) mps = atoi(value);
    else if (!strcmp(name, "fail_code")) fail_code = atoi(value);
    else if (!strcmp(name, "fail_call")) { strncpy(fail_call, value, sizeof fail_call - 1); }
}
void fake_cuda_set(const char *name, const char *value) { set(name, value); }
int fake_cuda_get(const char *name) {
    if (!strcmp(name, "green")) return green;
    if (!strcmp(name, "streams")) return streams;
    if (!strcmp(name, "uploads")) return uploads;
    return splits;
}
__attribute__((constructor)) static void begin(void) {
    const char *names[] = {"devices", "sms", "group_sms", "mps", "fail_code", "fail_call"};
    for (int i = 0; i < 6; i++) {
        char key[64] = "FAKE_CUDA_";
        strcat(key, names[i]);
        if (getenv(key)) set(names[i], getenv(key));
    }
}
#define ENTER do { if (fail_code && (!*fail_call || !strcmp(fail_call, __func__))) return fail_code; } while (0)
#define ENTER_READY do { ENTER; if (!ready) return 3; } while (0)

CUresult cuInit(unsigned flags) { ENTER; (void)flags; if (!devices) return 100; ready = 1; return 0; }
CUresult cuGetErrorName(CUresult code, const char **out) {
    *out = code == 0 ? "CUDA_SUCCESS" : code == 2 ? "CUDA_ERROR_OUT_OF_MEMORY" : code == 3 ? "CUDA_ERROR_NOT_INITIALIZED"
         : code == 719 ? "CUDA_ERROR_LAUNCH_FAILED" : code == 915 ? "CUDA_ERROR_INVALID_RESOURCE_CONFIGURATION" : 0;
    return *out ? 0 : 1;
}
CUresult cuGetErrorString(CUresult code, const char **out) { *out = code == 719 ? "unspecified launch failure" : 0; return *out ? 0 : 1; }
CUresult cuDriverGetVersion(int *v) { ENTER; *v = 13000; return 0; }
CUresult cuDeviceGetCount(int *n) { ENTER_READY; *n = devices; return 0; }
CUresult cuDeviceGet(int *d, int i) { ENTER_READY; if (i < 0 || i >= devices) return 101; *d = i; return 0; }
CUresult cuDeviceGetName(char *b, int n, int d) { ENTER_READY; (void)d; strncpy(b, "Fake H100", n); return 0; }
CUresult cuDeviceGetUuid_v2(unsigned char *b, int d) { ENTER_READY; memset(b, 0, 16); b[15] = (unsigned char)(d + 1); return 0; }
CUresult cuDeviceGetAttribute(int *v, int a, int d) {
    ENTER_READY; (void)d;
    if (a == 16) *v = sms; else if (a == 75) *v = 9; else if (a == 76) *v = 0;
    else if (a == 133 && mps >= 0) *v = mps; else return 1;
    return 0;
}
CUresult cuDeviceTotalMem_v2(size_t *n, int d) { ENTER_READY; (void)d; *n = (size_t)80 << 30; return 0; }
CUresult cuDevicePrimaryCtxRetain(void **c, int d) { ENTER_READY; *c = (void *)(size_t)(0x1000 + d); return 0; }
CUresult cuDevicePrimaryCtxRelease_v2(int d) { ENTER_READY; (void)d; return 0; }
CUresult cuCtxSetCurrent(void *c) { ENTER_READY; (void)c; return 0; }
CUresult cuCtxSynchronize(void) { ENTER_READY; return 0; }
CUresult cuStreamDestroy_v2(void *s) { ENTER_READY; (void)s; streams--; return 0; }
CUresult cuStreamSynchronize(void *s) { ENTER_READY; (void)s; return 0; }
CUresult cuStreamQuery(void *s) { ENTER_READY; (void)s; return 0; }
#ifndef OLD_DRIVER
static void fill(Resource *r, int count, int split, int index) {
    memset(r, 0, sizeof *r);
    r->type = 1; r->u.sm.count = (unsigned)count; r->u.sm.min = (unsigned)group_sms; r->u.sm.align = (unsigned)group_sms;
    memcpy(r->internal, &split, 4); memcpy(r->internal + 4, &index, 4);
}
CUresult cuDeviceGetDevResource(int d, Resource *r, int type) { ENTER_READY; (void)d; if (type != 1) return 914; fill(r, sms, -1, 0); return 0; }
CUresult cuDevSmResourceSplitByCount(Resource *out, unsigned *n, const Resource *in, Resource *rest, unsigned flags, unsigned min) {
    ENTER_READY; (void)flags;
    int split; memcpy(&split, in->internal, 4);
    if (split != -1) return 915;                       /* an output can't be split again */
    int size = ((int)min + group_sms - 1) / group_sms * group_sms, can = (int)in->u.sm.count / size;
    if (!out) { *n = (unsigned)can; return 0; }
    if ((int)*n > can) *n = (unsigned)can;
    for (int i = 0; i < (int)*n; i++) fill(&out[i], size, splits, i);
    if (rest) fill(rest, (int)in->u.sm.count - (int)*n * size, splits, (int)*n);
    splits++;
    return 0;
}
CUresult cuDevResourceGenerateDesc(void **d, Resource *r, unsigned n) {
    ENTER_READY;
    if (!n) return 1;
    int split, first, index, count = 0;
    memcpy(&split, r->internal, 4); memcpy(&first, r->internal + 4, 4);
    for (unsigned i = 0; i < n; i++) {
        int other; memcpy(&other, r[i].internal, 4); memcpy(&index, r[i].internal + 4, 4);
        if (other != split || !r[i].u.sm.count || index != first + (int)i) return 915;
        count += (int)r[i].u.sm.count;
    }
    Desc *desc = malloc(sizeof *desc);
    *desc = (Desc){split, first, (int)n, count};
    *d = desc;
    return 0;
}
CUresult cuGreenCtxCreate(void **g, Desc *desc, int dev, unsigned flags) { ENTER_READY; (void)dev; if (flags != 1 || !desc) return 1; *g = desc; green++; return 0; }
CUresult cuGreenCtxDestroy(void *g) { ENTER_READY; free(g); green--; return 0; }
CUresult cuGreenCtxStreamCreate(void **s, void *g, unsigned flags, int priority) { ENTER_READY; (void)priority; if (flags != 1 || !g) return 1; *s = (void *)(size_t)(0x5000 + ++streams); return 0; }
CUresult cuGraphUpload(void *e, void *s) { ENTER_READY; (void)e; (void)s; uploads++; return 0; }
/* For tests: which groups and SMs a green context has. */
int fake_cuda_green(Desc *g, const char *what) { return !strcmp(what, "first") ? g->first : !strcmp(what, "count") ? g->count : g->sms; }
#endif
