/* Times ggml's attention on the shapes of `roofline --filter cache-` and `--filter MLA`.

       python -m venv env && . env/bin/activate && pip install llama-cpp-python
       site=$(python -c "import site; print(site.getsitepackages()[0])")
       gcc -O2 ggml_cpu.c -I $site/include -L $site/llama_cpp/lib -Wl,-rpath,$site/llama_cpp/lib \
           -lggml -lggml-base -lggml-cpu -lm -o ggml_cpu
       ./ggml_cpu [THREADS]
*/
#include "ggml-cpu.h"
#include "ggml.h"
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { RUNS = 101 };

struct shape {
    const char *name;
    int q_heads, kv_heads, keys, dim, value_dim;
    enum ggml_type type;
};

static const struct shape SHAPES[] = {
    {"cache-f32-16k", 32, 8, 16384, 128, 128, GGML_TYPE_F32},
    {"cache-f16-16k", 32, 8, 16384, 128, 128, GGML_TYPE_F16},
    {"cache-q8_0-16k", 32, 8, 16384, 128, 128, GGML_TYPE_Q8_0},
    {"cache-q4_0-16k", 32, 8, 16384, 128, 128, GGML_TYPE_Q4_0},
    {"MLA-absorbed-128h-8k, bf16", 128, 1, 8192, 576, 512, GGML_TYPE_BF16},
    {"MLA-absorbed-128h-8k, f16", 128, 1, 8192, 576, 512, GGML_TYPE_F16},
    {"MLA-absorbed-16h-8k, bf16", 16, 1, 8192, 576, 512, GGML_TYPE_BF16},
    {"MLA-absorbed-16h-8k, f16", 16, 1, 8192, 576, 512, GGML_TYPE_F16},
};

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return 1e3 * t.tv_sec + 1e-6 * t.tv_nsec;
}

static int ascending(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static void fill(struct ggml_tensor *tensor) {
    int64_t count = ggml_nelements(tensor), columns = tensor->ne[0];
    float *numbers = malloc(count * sizeof *numbers);
    for (int64_t i = 0; i < count; i++) numbers[i] = 3.4f * (rand() / (float)RAND_MAX - 0.5f);
    if (tensor->type == GGML_TYPE_F32)
        memcpy(tensor->data, numbers, count * sizeof *numbers);
    else
        ggml_quantize_chunk(tensor->type, numbers, tensor->data, 0, count / columns, columns, NULL);
    free(numbers);
}

int main(int argc, char **argv) {
    int threads = argc > 1 ? atoi(argv[1]) : 2;
    ggml_cpu_init();
    for (size_t i = 0; i < sizeof SHAPES / sizeof *SHAPES; i++) {
        const struct shape *s = &SHAPES[i];
        struct ggml_init_params room = {(size_t)1 << 30, NULL, 0};
        struct ggml_context *context = ggml_init(room);
        struct ggml_tensor *q = ggml_new_tensor_4d(context, GGML_TYPE_F32, s->dim, 1, s->q_heads, 1);
        struct ggml_tensor *k = ggml_new_tensor_4d(context, s->type, s->dim, s->keys, s->kv_heads, 1);
        struct ggml_tensor *v;
        fill(q);
        fill(k);
        if (s->value_dim < s->dim) { /* latents: values are the first columns of keys */
            v = ggml_view_4d(context, k, s->value_dim, s->keys, s->kv_heads, 1, k->nb[1], k->nb[2], k->nb[3], 0);
        } else {
            v = ggml_new_tensor_4d(context, s->type, s->value_dim, s->keys, s->kv_heads, 1);
            fill(v);
        }
        struct ggml_tensor *out = ggml_flash_attn_ext(context, q, k, v, NULL, 1 / sqrtf(s->dim), 0, 0);
        struct ggml_cgraph *graph = ggml_new_graph(context);
        ggml_build_forward_expand(graph, out);
        struct ggml_cplan plan = ggml_graph_plan(graph, threads, NULL);
        plan.work_data = malloc(plan.work_size + 64);
        ggml_graph_compute(graph, &plan);
        double times[RUNS];
        for (int run = 0; run < RUNS; run++) {
            double start = now();
            ggml_graph_compute(graph, &plan);
            times[run] = now() - start;
        }
        qsort(times, RUNS, sizeof *times, ascending);
        printf("%-28s %8.3f ms, %d threads\n", s->name, times[RUNS / 2], threads);
        free(plan.work_data);
        ggml_free(context);
    }
    return 0;
}
