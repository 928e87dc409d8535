/* A stand-in for libnvidia-ml.so.1: the functions of NVML that hasgpu asks, answered from a scenario file.
 *
 * FAKE_NVML names the file, read again for every call; its lines are "KEY NUMBER". Keys, GPU ones with "gpuN." before:
 *   init_error, count, handle_error, memory_error, mig, mig_pending, compute_mode, ecc, retired, retired_pending,
 *   row_pending, row_failure, vanished (unknown by UUID), lost (every call fails with GPU_IS_LOST), old (functions of
 *   newer drivers are not supported), xid (an event, told once when it changes; -1: no events), bare (a GPU that offers nothing beyond name, UUID and memory).
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define NOT_SUPPORTED 3
#define NOT_FOUND 6
#define LOST 15

static long number(const char *key, long fallback) {
    char name[128];
    long value, found = fallback;
    const char *path = getenv("FAKE_NVML");
    FILE *file = path ? fopen(path, "r") : 0;
    if (!file) return fallback;
    while (fscanf(file, "%127s %ld", name, &value) == 2)
        if (!strcmp(name, key)) found = value;
    fclose(file);
    return found;
}
static long of(void *device, const char *key, long fallback) {
    char name[128];
    snprintf(name, sizeof name, "gpu%ld.%s", (long)(size_t)device - 1, key);
    return number(name, fallback);
}
#define ALIVE(d) do { if (of(d, "lost", 0)) return LOST; } while (0)
#define OFFERED(d) do { ALIVE(d); if (of(d, "bare", 0)) return NOT_SUPPORTED; } while (0)
typedef void *Device;
static void uuid_of(long index, char *out, unsigned size) {
    snprintf(out, size, "GPU-0000000%ld-aaaa-bbbb-cccc-000000000000", index);
}

int nvmlInitWithFlags(unsigned flags) { (void)flags; return (int)number("init_error", 0); }
int nvmlShutdown(void) { return 0; }
const char *nvmlErrorString(int code) { (void)code; return "an error of the fake"; }
int nvmlSystemGetDriverVersion(char *out, unsigned size) { snprintf(out, size, "580.65.06"); return 0; }
int nvmlSystemGetCudaDriverVersion_v2(int *out) { *out = 13000; return 0; }
int nvmlDeviceGetCount_v2(unsigned *out) { *out = (unsigned)number("count", 1); return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, Device *out) {
    Device device = (Device)(size_t)(index + 1);
    int error = (int)of(device, "handle_error", 0);
    if (error) return error;
    ALIVE(device);
    *out = device;
    return 0;
}
int nvmlDeviceGetHandleByUUID(const char *uuid, Device *out) {
    char known[80];
    for (long i = 0; i < number("count", 1); i++) {
        uuid_of(i, known, sizeof known);
        *out = (Device)(size_t)(i + 1);
        if (!strcmp(known, uuid)) {
            ALIVE(*out);
            return of(*out, "vanished", 0) ? NOT_FOUND : 0;
        }
    }
    return NOT_FOUND;
}
int nvmlDeviceGetName(Device d, char *out, unsigned size) { ALIVE(d); snprintf(out, size, "NVIDIA H100 80GB HBM3"); return 0; }
int nvmlDeviceGetUUID(Device d, char *out, unsigned size) { ALIVE(d); uuid_of((long)(size_t)d - 1, out, size); return 0; }
int nvmlDeviceGetMemoryInfo(Device d, unsigned long long *out) {
    ALIVE(d);
    if (of(d, "memory_error", 0)) return (int)of(d, "memory_error", 0);
    out[0] = 85520809984ull; out[2] = 1073741824ull; out[1] = out[0] - out[2];
    return 0;
}
int nvmlDeviceGetMigMode(Device d, unsigned *now, unsigned *pending) {
    OFFERED(d);
    *now = (unsigned)of(d, "mig", 0); *pending = (unsigned)of(d, "mig_pending", *now);
    return 0;
}
int nvmlDeviceGetComputeMode(Device d, unsigned *out) { OFFERED(d); *out = (unsigned)of(d, "compute_mode", 0); return 0; }
int nvmlDeviceGetCudaComputeCapability(Device d, int *major, int *minor) {
    OFFERED(d);
    *major = (int)of(d, "major", 9); *minor = 0;
    return 0;
}
int nvmlDeviceGetNumGpuCores(Device d, unsigned *out) { OFFERED(d); *out = 16896; return 0; }
int nvmlDeviceGetUtilizationRates(Device d, unsigned *out) { OFFERED(d); out[0] = 37; out[1] = 12; return 0; }
int nvmlDeviceGetPowerUsage(Device d, unsigned *out) { OFFERED(d); *out = 123456; return 0; }
int nvmlDeviceGetEnforcedPowerLimit(Device d, unsigned *out) { OFFERED(d); *out = 700000; return 0; }
int nvmlDeviceGetTemperatureV(Device d, void *out) {
    OFFERED(d);
    if (of(d, "old", 0)) return NOT_SUPPORTED;
    ((int *)out)[2] = 41;
    return 0;
}
int nvmlDeviceGetTemperature(Device d, unsigned sensor, unsigned *out) { (void)sensor; OFFERED(d); *out = 40; return 0; }
int nvmlDeviceGetClockInfo(Device d, unsigned type, unsigned *out) { OFFERED(d); *out = type == 1 ? 1980 : 2619; return 0; }
int nvmlDeviceGetCurrentClocksEventReasons(Device d, unsigned long long *out) { OFFERED(d); *out = 4; return 0; }
int nvmlDeviceGetTotalEccErrors(Device d, unsigned type, unsigned counter, unsigned long long *out) {
    OFFERED(d);
    if (type != 1 || counter != 0) return 2;
    *out = (unsigned long long)of(d, "ecc", 0);
    return 0;
}
int nvmlDeviceGetRetiredPagesPendingStatus(Device d, unsigned *out) { OFFERED(d); *out = (unsigned)of(d, "retired_pending", 0); return 0; }
int nvmlDeviceGetRetiredPages(Device d, unsigned cause, unsigned *count, unsigned long long *pages) {
    OFFERED(d);
    unsigned have = cause == 1 ? (unsigned)of(d, "retired", 0) : 0;
    if (pages && *count < have) { *count = have; return 7; }
    for (unsigned i = 0; pages && i < have; i++) pages[i] = 0x1000ull * i;
    int error = !pages && have ? 7 : 0;
    *count = have;
    return error;
}
int nvmlEventSetCreate(void **set) { *set = (void *)1; return 0; }
int nvmlEventSetFree(void *set) { (void)set; return 0; }
static unsigned watched = 0;
int nvmlDeviceRegisterEvents(Device d, unsigned long long types, void *set) {
    (void)set; OFFERED(d);
    if (of(d, "xid", 0) < 0 || types != 8) return NOT_SUPPORTED;
    watched |= 1u << (size_t)d;
    return 0;
}
int nvmlEventSetWait_v2(void *set, void *out, unsigned timeout_ms) {
    static long told[32];
    (void)set; (void)timeout_ms;
    memset(out, 0, 32);
    for (size_t i = 1; i < 32; i++) {
        long xid = watched & (1u << i) ? of((Device)i, "xid", 0) : 0;
        if (xid != told[i]) {
            told[i] = xid;
            ((unsigned long long *)out)[0] = i; ((unsigned long long *)out)[1] = 8; ((unsigned long long *)out)[2] = (unsigned long long)xid;
            return 0;
        }
    }
    return 10;
}
int nvmlDeviceGetRemappedRows(Device d, unsigned *corrected, unsigned *uncorrected, unsigned *pending, unsigned *failure) {
    OFFERED(d);
    *corrected = *uncorrected = 0;
    *pending = (unsigned)of(d, "row_pending", 0); *failure = (unsigned)of(d, "row_failure", 0);
    return 0;
}
