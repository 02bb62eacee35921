/* One step of the checkpoint interface, as NVIDIA's tool makes it: step lock|checkpoint|restore|unlock|state PID */
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int main(int argc, char **argv) {
    const char *names[][2] = { { "lock", "cuCheckpointProcessLock" }, { "checkpoint", "cuCheckpointProcessCheckpoint" },
                               { "restore", "cuCheckpointProcessRestore" }, { "unlock", "cuCheckpointProcessUnlock" },
                               { "state", "cuCheckpointProcessGetState" } };
    void *library = dlopen("libcuda.so.1", RTLD_NOW);
    if (argc < 3 || !library || ((int (*)(unsigned))dlsym(library, "cuInit"))(0)) return 2;
    for (int i = 0; i < 5; i++) {
        if (strcmp(argv[1], names[i][0])) continue;
        int state = -1, (*call)(int, void *) = (int (*)(int, void *))dlsym(library, names[i][1]);
        int r = call ? call(atoi(argv[2]), i == 4 ? &state : 0) : 2;
        printf("%d\n", i == 4 ? state : r);
        return r ? 1 : 0;
    }
    return 2;
}
