/* A driver library without a driver: libcuda.so.1 and libnvidia-ml.so.1 in one, for tests of the checkpoint interface.
 *
 * What it has of the real one, as NVIDIA documents it: states and their order, one process that asks and another that is
 * worked on, a thread in the latter that must be able to run for lock, checkpoint, restore and unlock, and need not for
 * questions; device memory that is outside of the process (files in $FAKE_CUDA_DIR/vram) and is in its own memory between
 * checkpoint and restore; device files that are open, and mapped, but between the two.
 *
 * $FAKE_CUDA_DIR has
 *   gpus    one line a GPU: UUID NAME BYTES
 *   device  the path of a device file to open and map
 *   plan    what goes wrong: CALL ACTION NUMBER, see act()
 *   busy    while it is there, cuCtxSynchronize does not end
 *   log     one line a call of the checkpoint interface: CALL PID RESULT
 *   PID     where the state of a process lies in its memory
 * Built with -DOLD it is a driver that has no checkpoint interface.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum { OK, INVALID = 1, NO_MEMORY = 2, NOT_INITIALIZED = 3, NO_DEVICE = 100, INVALID_DEVICE = 101, ILLEGAL_STATE = 401,
       NOT_FOUND = 500, NOT_READY = 600, UNKNOWN = 999 };
enum { RUNNING, LOCKED, CHECKPOINTED, FAILED };
enum { LOCK = 1, CHECKPOINT, RESTORE, UNLOCK };
#define ALLOCS 16
#define PAIRS 8
#define BASE 0x70000000000ull

struct gpu { char uuid[64], name[64]; uint64_t bytes; };

struct alloc { uint64_t size, at; void *host; };

static struct box {
    uint32_t magic;
    int state, tid;
    volatile uint32_t turn, done;
    int what, result, number, leave;
    uint32_t timeout, pairs;
    uint8_t pair[PAIRS][2][16];
    char uuid[64];
    int dev;
    void *map;
    uint64_t used;
    struct alloc allocs[ALLOCS];
} box = { .dev = -1 };
static pthread_mutex_t api = PTHREAD_MUTEX_INITIALIZER;
static int started;

static void nap(long us) {
    struct timespec t = { us / 1000000, us % 1000000 * 1000 };
    while (nanosleep(&t, &t) && errno == EINTR) {}
}

static void path(char *to, const char *name) {
    const char *dir = getenv("FAKE_CUDA_DIR");
    snprintf(to, 512, "%s/%s", dir ? dir : "/nonexistent", name);
}

static FILE *config(const char *name) {
    char p[512];
    path(p, name);
    return fopen(p, "re");
}

static int gpus(struct gpu *to, int room) {
    FILE *f = config("gpus");
    int n = 0;
    if (!f) return 0;
    while (n < room && fscanf(f, "%63s %63s %lu", to[n].uuid, to[n].name, &to[n].bytes) == 3) n++;
    fclose(f);
    return n;
}

static void uuid_bytes(const char *text, uint8_t *to) {
    int n = 0;
    unsigned b;
    for (text += 4; n < 16 && *text; text++) {
        if (*text == '-') continue;
        if (sscanf(text, "%2x", &b) != 1) break;
        to[n++] = b, text++;
    }
}

static int is_uuid(const char *text, const uint8_t *bytes) {
    uint8_t own[16] = { 0 };
    uuid_bytes(text, own);
    return !memcmp(own, bytes, 16);
}

static void logged(const char *call, int pid, int result) {
    char p[512], line[128];
    path(p, "log");
    int fd = open(p, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
    int n = snprintf(line, sizeof line, "%s %d %d\n", call, pid, result);
    if (fd >= 0 && write(fd, line, n) < 0) {}
    if (fd >= 0) close(fd);
}

/* What is to go wrong with a call of one who asks; the number that it ends with, or -1: go on. */
static int act(const char *call, int pid, int after, int *leave, int *late) {
    char name[32], action[32];
    int number;
    FILE *f = config("plan");
    if (!f) return -1;
    while (fscanf(f, "%31s %31s %d", name, action, &number) == 3) {
        if (strcmp(name, call)) continue;
        int die = !strcmp(action, after ? "die-after" : "die-before");
        if (die) {
            char p[512];
            path(p, "plan");
            unlink(p);
            kill(getpid(), SIGKILL);
        }
        if (after) continue;
        if (!strcmp(action, "error")) { fclose(f); return number; }
        if (!strcmp(action, "delay")) nap(number * 1000l);
        if (!strcmp(action, "kill")) kill(pid, SIGKILL), nap(100000);
        if (!strcmp(action, "hang")) for (;;) kill(pid, SIGKILL), nap(1000000);
        if (!strcmp(action, "leave")) *leave = 1;
        if (!strcmp(action, "fail")) *leave = 2;
        /* who asks dies as soon as it has, and what it asked for is begun after so many milliseconds */
        if (!strcmp(action, "late")) {
            char p[512];
            path(p, "plan");
            unlink(p);
            *leave = 3, *late = number;
        }
    }
    fclose(f);
    return -1;
}

/* -- device memory -- */

static void vram(char *to, const char *uuid, int pid) {
    char name[160];
    snprintf(name, sizeof name, "vram/%s/%d", uuid, pid);
    path(to, name);
}

static int open_vram(void) {
    char p[512], dir[512];
    path(dir, "vram");
    mkdir(dir, 0777);
    snprintf(p, sizeof p, "%.400s/%s", dir, box.uuid);
    mkdir(p, 0777);
    vram(p, box.uuid, getpid());
    return open(p, O_RDWR | O_CREAT | O_CLOEXEC, 0644);
}

/* bytes in use on a GPU; of one process, if pid is not 0 */
static uint64_t in_use(const char *uuid, int pid) {
    char p[512], name[160];
    uint64_t sum = 0;
    snprintf(name, sizeof name, "vram/%s", uuid);
    path(p, name);
    DIR *d = opendir(p);
    struct dirent *e;
    while (d && (e = readdir(d))) {
        int owner = atoi(e->d_name);
        struct stat s;
        if (owner > 0 && (!pid || pid == owner) && !kill(owner, 0) && !fstatat(dirfd(d), e->d_name, &s, 0)) sum += s.st_size;
    }
    if (d) closedir(d);
    return sum;
}

static void open_device(void) {
    char name[256] = "";
    FILE *f = config("device");
    if (!f) return;
    if (fscanf(f, "%255s", name) == 1 && (box.dev = open(name, O_RDWR | O_CLOEXEC)) >= 0)
        box.map = mmap(0, 1 << 16, PROT_READ | PROT_WRITE, MAP_PRIVATE, box.dev, 0);
    fclose(f);
}

static void close_device(void) {
    if (box.map && box.map != MAP_FAILED) munmap(box.map, 1 << 16);
    if (box.dev >= 0) close(box.dev);
    box.dev = -1, box.map = 0;
}

/* -- the thread that does what others ask for -- */

static int lock(void) {
    struct timespec t;
    if (box.state != RUNNING) return ILLEGAL_STATE;
    clock_gettime(CLOCK_REALTIME, &t);
    t.tv_sec += box.timeout / 1000, t.tv_nsec += box.timeout % 1000 * 1000000l;
    if (t.tv_nsec >= 1000000000) t.tv_sec++, t.tv_nsec -= 1000000000;
    if (box.timeout ? pthread_mutex_timedlock(&api, &t) : pthread_mutex_lock(&api)) return NOT_READY;
    box.state = LOCKED;
    return OK;
}

static int checkpoint(void) {
    char p[512];
    if (box.state != LOCKED) return ILLEGAL_STATE;
    int fd = open_vram();
    for (int i = 0; i < ALLOCS; i++) {
        struct alloc *a = box.allocs + i;
        if (!a->size) continue;
        a->host = malloc(a->size);
        if (pread(fd, a->host, a->size, a->at) != (ssize_t)a->size) return UNKNOWN;
    }
    close(fd);
    vram(p, box.uuid, getpid());
    unlink(p);
    if (box.leave != 1) close_device();
    box.state = CHECKPOINTED;
    return OK;
}

static int restore(void) {
    struct gpu all[PAIRS];
    char uuid[64];
    int n = gpus(all, PAIRS), found = -1;
    if (box.state != CHECKPOINTED) return ILLEGAL_STATE;
    memcpy(uuid, box.uuid, sizeof uuid);
    if (box.pairs) {
        int mapped = 0;
        for (uint32_t i = 0; i < box.pairs; i++)
            for (int k = 0; k < n && is_uuid(box.uuid, box.pair[i][0]); k++)
                if (is_uuid(all[k].uuid, box.pair[i][1])) memcpy(uuid, all[k].uuid, sizeof uuid), mapped = 1;
        if (!mapped) return INVALID;
    }
    for (int k = 0; k < n; k++)
        if (!strcmp(all[k].uuid, uuid)) found = k;
    if (found < 0) return INVALID_DEVICE;
    if (in_use(uuid, 0) + box.used > all[found].bytes) return NO_MEMORY;
    memcpy(box.uuid, uuid, sizeof uuid);
    int fd = open_vram();
    if (ftruncate(fd, 0)) return UNKNOWN;
    for (int i = 0; i < ALLOCS; i++) {
        struct alloc *a = box.allocs + i;
        if (!a->size) continue;
        if (pwrite(fd, a->host, a->size, a->at) != (ssize_t)a->size) return UNKNOWN;
        free(a->host);
        a->host = 0;
    }
    close(fd);
    close_device();
    open_device();
    box.state = LOCKED;
    return OK;
}

static int unlock(void) {
    if (box.state != LOCKED) return ILLEGAL_STATE;
    box.state = RUNNING;
    pthread_mutex_unlock(&api);
    return OK;
}

static void *helper(void *unused) {
    box.tid = syscall(SYS_gettid);
    for (;;) {
        if (box.turn == box.done) {
            nap(300);
            continue;
        }
        __sync_synchronize();
        int what = box.what;
        if (box.leave == 3) nap(box.number * 1000l);
        switch (what) {
        case LOCK: box.result = lock(); break;
        case CHECKPOINT: box.result = checkpoint(); break;
        case RESTORE: box.result = restore(); break;
        case UNLOCK: box.result = unlock(); break;
        }
        if (box.leave == 2) box.state = FAILED, box.result = UNKNOWN;
        __sync_synchronize();
        box.done = box.turn;
    }
    return unused;
}

static void announce(void) {
    char p[512], name[32], text[64];
    snprintf(name, sizeof name, "%d", getpid());
    path(p, name);
    int fd = open(p, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
    int n = snprintf(text, sizeof text, "%lx\n", (unsigned long)&box);
    if (fd >= 0 && write(fd, text, n) < 0) {}
    if (fd >= 0) close(fd);
}

__attribute__((destructor)) static void leave(void) {
    char p[512], name[32];
    if (!started) return;
    snprintf(name, sizeof name, "%d", getpid());
    path(p, name);
    unlink(p);
    if (!box.uuid[0]) return;
    vram(p, box.uuid, getpid());
    unlink(p);
}

/* -- what programs call -- */

int cuInit(unsigned flags) {
    struct gpu one[1];
    pthread_t t;
    sigset_t all, old;
    (void)flags;
    if (started) return OK;
    if (!gpus(one, 1)) return NO_DEVICE;
    started = 1;
    /* on purpose: no signal is blocked in the helper, which is the harder case */
    sigemptyset(&all);
    pthread_sigmask(SIG_SETMASK, 0, &old);
    box.magic = 0xc0da;
    open_device();
    pthread_create(&t, 0, helper, 0);
    while (!box.tid) nap(100);
    announce();
    return OK;
}

int cuDriverGetVersion(int *version) {
    FILE *f = config("version");
    *version = 13000;
#ifdef OLD
    *version = 12040;
#endif
    if (f) {
        if (fscanf(f, "%d", version) != 1) *version = 0;
        fclose(f);
    }
    return OK;
}

int cuGetErrorName(int code, const char **text) {
    static char buffer[32];
    snprintf(buffer, sizeof buffer, "CUDA_ERROR_FAKE_%d", code);
    *text = buffer;
    return OK;
}

int cuDeviceGetCount(int *n) {
    struct gpu all[PAIRS];
    *n = gpus(all, PAIRS);
    return started ? OK : NOT_INITIALIZED;
}

int cuDeviceGet(int *device, int n) {
    struct gpu all[PAIRS];
    if (n < 0 || n >= gpus(all, PAIRS)) return INVALID_DEVICE;
    *device = n;
    return OK;
}

int cuDeviceGetUuid_v2(uint8_t *to, int n) {
    struct gpu all[PAIRS];
    if (n >= gpus(all, PAIRS)) return INVALID_DEVICE;
    uuid_bytes(all[n].uuid, to);
    return OK;
}

int cuDeviceGetName(char *to, int room, int n) {
    struct gpu all[PAIRS];
    if (n >= gpus(all, PAIRS)) return INVALID_DEVICE;
    snprintf(to, room, "%s", all[n].name);
    return OK;
}

int cuDeviceTotalMem_v2(size_t *bytes, int n) {
    struct gpu all[PAIRS];
    if (n >= gpus(all, PAIRS)) return INVALID_DEVICE;
    *bytes = all[n].bytes;
    return OK;
}

int cuDevicePrimaryCtxRetain(void **context, int n) {
    struct gpu all[PAIRS];
    if (n >= gpus(all, PAIRS)) return INVALID_DEVICE;
    memcpy(box.uuid, all[n].uuid, sizeof box.uuid);
    *context = &box;
    return OK;
}

int cuCtxSetCurrent(void *context) { return context == &box ? OK : INVALID; }

static int locked(int result) {
    pthread_mutex_unlock(&api);
    return result;
}

int cuMemAlloc_v2(uint64_t *to, size_t size) {
    struct gpu all[PAIRS];
    pthread_mutex_lock(&api);
    int n = gpus(all, PAIRS), i = 0, k = 0;
    while (i < ALLOCS && box.allocs[i].size) i++;
    while (k < n && strcmp(all[k].uuid, box.uuid)) k++;
    if (i == ALLOCS || k == n || in_use(box.uuid, 0) + size > all[k].bytes) return locked(NO_MEMORY);
    box.allocs[i] = (struct alloc){ size, box.used, 0 };
    *to = BASE + box.used;
    box.used += size;
    int fd = open_vram();
    int r = ftruncate(fd, box.used) ? UNKNOWN : OK;
    close(fd);
    return locked(r);
}

int cuMemcpyHtoD_v2(uint64_t to, const void *from, size_t n) {
    pthread_mutex_lock(&api);
    int fd = open_vram();
    int r = pwrite(fd, from, n, to - BASE) == (ssize_t)n ? OK : INVALID;
    close(fd);
    return locked(r);
}

int cuMemcpyDtoH_v2(void *to, uint64_t from, size_t n) {
    pthread_mutex_lock(&api);
    int fd = open_vram();
    int r = pread(fd, to, n, from - BASE) == (ssize_t)n ? OK : INVALID;
    close(fd);
    return locked(r);
}

int cuCtxSynchronize(void) {
    FILE *f;
    pthread_mutex_lock(&api);
    while ((f = config("busy"))) fclose(f), nap(1000);
    return locked(OK);
}

#ifndef OLD
/* -- what another process asks for -- */

static long address_of(int pid) {
    char name[32];
    long at = 0;
    snprintf(name, sizeof name, "%d", pid);
    FILE *f = config(name);
    if (!f) return 0;
    if (fscanf(f, "%lx", &at) != 1) at = 0;
    fclose(f);
    return at;
}

static int transfer(int pid, long at, void *own, size_t n, int writes) {
    struct iovec mine = { own, n }, theirs = { (void *)at, n };
    ssize_t r = writes ? process_vm_writev(pid, &mine, 1, &theirs, 1, 0) : process_vm_readv(pid, &mine, 1, &theirs, 1, 0);
    return r == (ssize_t)n;
}

static int look(int pid, struct box *to, long *at) {
    if (!started) return NOT_INITIALIZED;
    *at = address_of(pid);
    return *at && transfer(pid, *at, to, sizeof *to, 0) && to->magic == 0xc0da ? OK : INVALID;
}

static int ask(const char *call, int what, int pid, uint32_t timeout, uint32_t pairs, const void *pair) {
    struct box theirs;
    long at;
    int leave = 0, late = 0, planned = act(call, pid, 0, &leave, &late);
    int r = planned >= 0 ? planned : look(pid, &theirs, &at);
    if (r == OK) {
        if (pairs > PAIRS) return INVALID;
        theirs.what = what, theirs.timeout = timeout, theirs.pairs = pairs, theirs.leave = leave, theirs.number = late;
        if (pairs) memcpy(theirs.pair, pair, pairs * 32);
        uint32_t turn = theirs.turn + 1;
        /* only what is a question, then that there is one */
        size_t from = offsetof(struct box, what), to = offsetof(struct box, uuid);
        r = transfer(pid, at + from, (char *)&theirs + from, to - from, 1) &&
            transfer(pid, at + offsetof(struct box, turn), &turn, sizeof turn, 1) ? OK : INVALID;
        if (leave == 3) kill(getpid(), SIGKILL);
        /* who is frozen answers nobody; 4 s behind the time that the call may take */
        for (long waited = 0; r == OK; waited++) {
            if (!transfer(pid, at, &theirs, sizeof theirs, 0) || waited > 4 * 2000 + timeout * 2l) r = UNKNOWN;
            else if (theirs.done == turn) { r = theirs.result; break; }
            else nap(500);
        }
    }
    act(call, pid, 1, &leave, &late);
    logged(call, pid, r);
    return r;
}

int cuCheckpointProcessGetState(int pid, int *state) {
    struct box theirs;
    long at;
    int r = look(pid, &theirs, &at);
    if (r == OK) *state = theirs.state;
    return r;
}

int cuCheckpointProcessGetRestoreThreadId(int pid, int *tid) {
    struct box theirs;
    long at;
    int r = look(pid, &theirs, &at);
    if (r == OK) *tid = theirs.tid;
    return r;
}

struct restore_args { const void *pairs; uint32_t count; };

int cuCheckpointProcessLock(int pid, uint32_t *args) { return ask("lock", LOCK, pid, args ? args[0] : 0, 0, 0); }
int cuCheckpointProcessCheckpoint(int pid, void *args) { (void)args; return ask("checkpoint", CHECKPOINT, pid, 0, 0, 0); }
int cuCheckpointProcessRestore(int pid, struct restore_args *args) {
    return ask("restore", RESTORE, pid, 0, args ? args->count : 0, args ? args->pairs : 0);
}
int cuCheckpointProcessUnlock(int pid, void *args) { (void)args; return ask("unlock", UNLOCK, pid, 0, 0, 0); }
#endif

/* -- the management library -- */

struct memory { unsigned long long total, free, used; };
struct process { unsigned pid; unsigned long long used; unsigned gpu, compute; };

int nvmlInit_v2(void) { return 0; }
int nvmlShutdown(void) { return 0; }

int nvmlSystemGetDriverVersion(char *to, unsigned room) {
#ifdef OLD
    snprintf(to, room, "550.54.15");
#else
    snprintf(to, room, "580.65.06");
#endif
    return 0;
}

int nvmlDeviceGetCount_v2(unsigned *n) {
    struct gpu all[PAIRS];
    *n = gpus(all, PAIRS);
    return 0;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned n, void **device) {
    *device = (void *)(uintptr_t)(n + 1);
    return 0;
}

static int of_handle(void *device, struct gpu *to) {
    struct gpu all[PAIRS];
    int n = (int)(uintptr_t)device - 1;
    if (n < 0 || n >= gpus(all, PAIRS)) return 2;
    *to = all[n];
    return 0;
}

int nvmlDeviceGetUUID(void *device, char *to, unsigned room) {
    struct gpu g;
    int r = of_handle(device, &g);
    if (!r) snprintf(to, room, "%s", g.uuid);
    return r;
}

int nvmlDeviceGetName(void *device, char *to, unsigned room) {
    struct gpu g;
    int r = of_handle(device, &g);
    if (!r) snprintf(to, room, "%s", g.name);
    return r;
}

int nvmlDeviceGetMemoryInfo(void *device, struct memory *to) {
    struct gpu g;
    int r = of_handle(device, &g);
    if (r) return r;
    to->total = g.bytes, to->used = in_use(g.uuid, 0), to->free = g.bytes - to->used;
    return 0;
}

int nvmlDeviceGetComputeRunningProcesses_v3(void *device, unsigned *count, struct process *to) {
    struct gpu g;
    char p[512], name[160];
    unsigned n = 0;
    int r = of_handle(device, &g);
    if (r) return r;
    snprintf(name, sizeof name, "vram/%s", g.uuid);
    path(p, name);
    DIR *d = opendir(p);
    struct dirent *e;
    while (d && (e = readdir(d))) {
        int owner = atoi(e->d_name);
        if (owner <= 0 || kill(owner, 0)) continue;
        if (n < *count) to[n] = (struct process){ owner, in_use(g.uuid, owner), ~0u, ~0u };
        n++;
    }
    if (d) closedir(d);
    r = n > *count ? 7 : 0;
    *count = n;
    return r;
}
