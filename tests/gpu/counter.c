/* A program of the CUDA driver interface that checks itself: a number in device memory that it counts up, and a buffer of
 * device memory with a pattern, in one or several processes.
 *
 *   counter FOLDER PROCESSES MEGABYTES
 *
 * Each process N makes FOLDER/count-N as long as it has counted, without having it open (a checkpoint would say how long it is). When FOLDER/check is there, it compares all of its device memory with
 * what must be there, writes FOLDER/result-N ("ok COUNT", or what is wrong) and ends.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

typedef unsigned long long ptr;

static const char *folder;
static int number;
static long count;

static void name(char *to, const char *what, int with_number) {
    if (with_number) snprintf(to, 4096, "%s/%s-%d", folder, what, number);
    else snprintf(to, 4096, "%s/%s", folder, what);
}

static void put(const char *what, const char *text) {
    char to[4096], half[4100];
    name(to, what, 1);
    snprintf(half, sizeof half, "%s.new", to);
    int fd = open(half, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
    if (fd < 0 || write(fd, text, strlen(text)) != (ssize_t)strlen(text)) exit(3);
    close(fd);
    rename(half, to);
}

static void result(const char *what, long value) {
    char text[256];
    snprintf(text, sizeof text, "%s %ld", what, value);
    put("result", text);
    exit(strcmp(what, "ok") ? 1 : 0);
}

static void *library;

static void *find(const char *symbol) {
    void *f = dlsym(library, symbol);
    if (!f) result(symbol, -1);
    return f;
}

#define CALL(symbol, types, ...) \
    do { \
        int r = ((int(*) types)find(symbol))(__VA_ARGS__); \
        if (r) result(symbol, r); \
    } while (0)

static uint32_t pattern(size_t i) { return (uint32_t)(i * 2654435761u) ^ (uint32_t)number; }

static int work(size_t bytes) {
    int device, own;
    void *context;
    ptr counter, buffer;
    char check[4096], shown[4096];
    library = dlopen("libcuda.so.1", RTLD_NOW);
    if (!library) result(dlerror(), -1);
    CALL("cuInit", (unsigned), 0);
    CALL("cuDeviceGet", (int *, int), &device, 0);
    CALL("cuDevicePrimaryCtxRetain", (void **, int), &context, device);
    CALL("cuCtxSetCurrent", (void *), context);
    CALL("cuMemAlloc_v2", (ptr *, size_t), &counter, sizeof own);
    CALL("cuMemAlloc_v2", (ptr *, size_t), &buffer, bytes);
    uint32_t *host = malloc(bytes);
    for (size_t i = 0; i < bytes / 4; i++) host[i] = pattern(i);
    CALL("cuMemcpyHtoD_v2", (ptr, const void *, size_t), buffer, host, bytes);
    memset(host, 0, bytes);
    own = 0;
    CALL("cuMemcpyHtoD_v2", (ptr, const void *, size_t), counter, &own, sizeof own);
    put("count", "");
    name(shown, "count", 1);
    name(check, "check", 0);
    struct stat s;
    while (stat(check, &s)) {
        CALL("cuMemcpyDtoH_v2", (void *, ptr, size_t), &own, counter, sizeof own);
        if (own != count) result("the number on the device is", own);
        count = ++own;
        CALL("cuMemcpyHtoD_v2", (ptr, const void *, size_t), counter, &own, sizeof own);
        CALL("cuCtxSynchronize", (void));
        if (truncate(shown, count)) result("truncate", count);
        struct timespec t = { 0, 2000000 };
        nanosleep(&t, 0);
    }
    CALL("cuMemcpyDtoH_v2", (void *, ptr, size_t), host, buffer, bytes);
    for (size_t i = 0; i < bytes / 4; i++)
        if (host[i] != pattern(i)) result("wrong at", (long)i);
    result("ok", count);
    return 0;
}

int main(int argc, char **argv) {
    if (argc < 4) return 2;
    folder = argv[1];
    int processes = atoi(argv[2]);
    setsid();
    for (number = 1; number < processes; number++)
        if (!fork()) return work((size_t)atol(argv[3]) << 20);
    number = 0;
    return work((size_t)atol(argv[3]) << 20);
}
