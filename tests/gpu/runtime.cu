/* A program of the CUDA runtime interface: runtime FOLDER [STEPS]; what it writes is as of tests/gpu/train.py. */
#include <cstdio>
#include <cstdlib>
#include <string>
#include <sys/stat.h>
#include <unistd.h>
#include <vector>

__global__ void step(unsigned *all, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) all[i] = all[i] * 1664525u + 1013904223u + i;
}

#define OK(call) do { cudaError_t e = (call); if (e) { fprintf(stderr, "%s: %s\n", #call, cudaGetErrorString(e)); return 1; } } while (0)

int main(int argc, char **argv) {
    if (argc < 2) return 2;
    const int n = 64 << 20;
    std::string folder = argv[1], steps = folder + "/steps", check = folder + "/check";
    long limit = argc > 2 ? atol(argv[2]) : -1;
    unsigned *all, sample;
    cudaStream_t stream;
    OK(cudaMalloc(&all, n * sizeof *all));
    OK(cudaMemset(all, 1, n * sizeof *all));
    OK(cudaStreamCreate(&stream));
    fclose(fopen(steps.c_str(), "w"));
    std::vector<unsigned> seen;
    struct stat s;
    while (stat(check.c_str(), &s) && (long)seen.size() != limit) {
        step<<<(n + 255) / 256, 256, 0, stream>>>(all, n);
        OK(cudaMemcpyAsync(&sample, all + seen.size() * 4099 % n, sizeof sample, cudaMemcpyDeviceToHost, stream));
        OK(cudaStreamSynchronize(stream));
        seen.push_back(sample);
        if (truncate(steps.c_str(), seen.size())) return 1;
    }
    FILE *out = fopen((folder + "/losses.new").c_str(), "w");
    for (size_t i = 0; i < seen.size(); i++) fprintf(out, i ? "\n%u" : "%u", seen[i]);
    fclose(out);
    return rename((folder + "/losses.new").c_str(), (folder + "/losses").c_str());
}
