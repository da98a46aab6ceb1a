/* Both kernels for float32 rows on the CPU, at the speed of memory where plain torch ops lose (few
   rows, many columns). Rows are read once, a segment at a time; M is summed in tiles that stay in
   the registers. Plain C with OpenMP, called through ctypes by `gradsurgery/kernels/native.py`. */

#include <stdlib.h>

enum {
    MAX_ROWS = 64,
    SEGMENT = 1024, /* columns at a time: 64 rows of them stay in the second-level cache */
    PARTS = 64,     /* fixed, so that the result does not depend on the number of threads */
    GRAIN = 65536,  /* elements below which waking other threads costs more than it saves */
};

struct matrix {
    const float *rows;
    long count, width, stride; /* T, D, elements from one row to the next */
};

/* Rows of whole tiles. Those beyond T repeat row 0, and what they give is not read. */
static long padded_count(long count) { return count <= 2 ? 2 : (count + 3) / 4 * 4; }

/* What tile `index` of `tiles` fetches while it computes: the next segment of up to four rows. The
   rows are too many streams, each too short, for the processor to foresee. */
static inline void ahead_of(const float *const *rows, long count, long index, long tiles,
                            const float **ahead)
{
    const long first = count * index / tiles, end = count * (index + 1) / tiles;
    for (long r = 0; r < 4; r++) ahead[r] = rows[first + r < end ? first + r : first] + SEGMENT;
}

#if defined(__x86_64__)
#define NAME(x) x##_avx512
#define TARGET __attribute__((target("avx512f,avx2,fma")))
#define WIDTH 64
#define ACROSS 4
#include "part.h"
#define NAME(x) x##_avx2
#define TARGET __attribute__((target("avx2,fma")))
#define WIDTH 32
#define ACROSS 2
#include "part.h"
#endif
#define NAME(x) x##_any
#define TARGET
#define WIDTH 16
#define ACROSS 2
#include "part.h"

typedef void gram_function(const struct matrix *, long, long, double *);
typedef void combine_function(const struct matrix *, const double *, float *, long, long);

/* `limit`: 0 lets this processor decide; 1 and 2 hold it down to the sets that older ones have. */
static void choose(int limit, gram_function **gram, combine_function **combine)
{
    *gram = gram_part_any, *combine = combine_part_any;
#if defined(__x86_64__)
    if (limit == 1 || !__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return;
    *gram = gram_part_avx2, *combine = combine_part_avx2;
    if (limit == 2 || !__builtin_cpu_supports("avx512f")) return;
    *gram = gram_part_avx512, *combine = combine_part_avx512;
#else
    (void)limit;
#endif
}

/* Where part `index` begins: a whole number of segments. */
static long part_start(long width, long index)
{
    const long segments = (width + SEGMENT - 1) / SEGMENT;
    const long start = segments * index / PARTS * SEGMENT;
    return start < width ? start : width;
}

/* out [count, count] = G Gᵀ, count <= 64. Returns 0, or 1 where memory ran out. */
int gradsurgery_gram(const float *rows, long count, long width, long stride, int threads,
                     int limit, double *out)
{
    const struct matrix g = {rows, count, width, stride};
    const long padded = padded_count(count), size = padded * padded;
    double *partial = calloc(PARTS * size, sizeof *partial);
    if (partial == NULL) return 1;
    gram_function *gram;
    combine_function *combine;
    choose(limit, &gram, &combine);
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (count * width > GRAIN)
    for (long part = 0; part < PARTS; part++)
        gram(&g, part_start(width, part), part_start(width, part + 1), partial + part * size);
    for (long i = 0; i < count; i++)
        for (long j = i; j < count; j++) {
            double sum = 0;
            for (long part = 0; part < PARTS; part++) sum += partial[part * size + i * padded + j];
            out[i * count + j] = out[j * count + i] = sum;
        }
    free(partial);
    return 0;
}

/* out [width] = Gᵀ w; `out` may be a row of G. */
void gradsurgery_combine(const float *rows, long count, long width, long stride, int threads,
                         int limit, const double *weights, float *out)
{
    const struct matrix g = {rows, count, width, stride};
    gram_function *gram;
    combine_function *combine;
    choose(limit, &gram, &combine);
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (count * width > GRAIN)
    for (long part = 0; part < PARTS; part++)
        combine(&g, weights, out, part_start(width, part), part_start(width, part + 1));
}

/* Many spans of columns, each with a matrix of its own. Long ones are shared out among the threads
   one after the other, short ones go to one thread each. */
static int is_long(long count, const long *span) { return count * (span[1] - span[0]) > 4 * GRAIN; }

/* out [spans, count, count]: of each span its own G Gᵀ; `bounds` holds their [start, stop). */
int gradsurgery_gram_spans(const float *rows, long count, long stride, int threads, int limit,
                           const long *bounds, long spans, double *out)
{
    const struct matrix g = {rows, count, 0, stride};
    const long padded = padded_count(count), square = count * count;
    gram_function *gram;
    combine_function *combine;
    choose(limit, &gram, &combine);
    for (long s = 0; s < spans; s++) {
        const long *span = bounds + 2 * s;
        if (is_long(count, span) && gradsurgery_gram(rows + span[0], count, span[1] - span[0],
                                                     stride, threads, limit, out + s * square))
            return 1;
    }
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (long s = 0; s < spans; s++) {
        const long *span = bounds + 2 * s;
        if (is_long(count, span)) continue;
        double sums[MAX_ROWS * MAX_ROWS] = {0};
        gram(&g, span[0], span[1], sums);
        double *mine = out + s * square;
        for (long i = 0; i < count; i++)
            for (long j = i; j < count; j++)
                mine[i * count + j] = mine[j * count + i] = sums[i * padded + j];
    }
    return 0;
}

/* out, over each span: Gᵀ w with its own weights, [spans, count]; `out` may be a row of G. */
void gradsurgery_combine_spans(const float *rows, long count, long stride, int threads, int limit,
                               const long *bounds, long spans, const double *weights, float *out)
{
    const struct matrix g = {rows, count, 0, stride};
    gram_function *gram;
    combine_function *combine;
    choose(limit, &gram, &combine);
    for (long s = 0; s < spans; s++) {
        const long *span = bounds + 2 * s;
        if (is_long(count, span))
            gradsurgery_combine(rows + span[0], count, span[1] - span[0], stride, threads, limit,
                                weights + s * count, out + span[0]);
    }
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (long s = 0; s < spans; s++) {
        const long *span = bounds + 2 * s;
        if (!is_long(count, span))
            combine(&g, weights + s * count, out, span[0], span[1]);
    }
}
