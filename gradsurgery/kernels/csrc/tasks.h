/* What the T×T steps share: one call for a batch of Gram matrices. Each step is a static function
   that solves one; SOLVER makes it the function that `gradsurgery/kernels/tasks.py` calls. */

#ifndef GRADSURGERY_TASKS_H
#define GRADSURGERY_TASKS_H

#include <math.h>
#include <stdint.h>
#include <stdlib.h>

struct task {
    const double *gram;    /* [count, count], finite, symmetric, a diagonal >= 0 */
    long count;            /* T <= 64 */
    void *const *extra;    /* further arrays, each at this matrix's part */
    const double *numbers; /* hyperparameters */
    double *weights;       /* [count], the result */
    double *scratch;       /* as many numbers as SOLVER was told */
};

enum { MAX_EXTRA = 4, SERIAL = 1 << 14 /* batch * T² below which one thread does it all */ };

static inline int all_finite(const double *values, long size)
{
    double sum = 0;
#pragma omp simd reduction(+ : sum)
    for (long i = 0; i < size; i++) sum += values[i] - values[i]; /* NaN unless finite */
    return sum == 0;
}

static inline double sum_of(const double *values, long count)
{
    double sum = 0;
#pragma omp simd reduction(+ : sum)
    for (long i = 0; i < count; i++) sum += values[i];
    return sum;
}

static inline double dot(const double *a, const double *b, long count)
{
    double sum = 0;
#pragma omp simd reduction(+ : sum)
    for (long i = 0; i < count; i++) sum += a[i] * b[i];
    return sum;
}

/* Σ x_k y_k, and Σ |x_k y_k|. */
static inline double dot_and_size(const double *x, const double *y, long n, double *size)
{
    double sum = 0, terms = 0;
#pragma omp simd reduction(+ : sum, terms)
    for (long k = 0; k < n; k++) sum += x[k] * y[k], terms += fabs(x[k] * y[k]);
    *size = terms;
    return sum;
}

/* int gradsurgery_step_NAME(gram, extra, strides in bytes, how many, numbers, weights, batch, count,
   threads): 0, or 1 where memory ran out. A matrix that is not finite gives NaN weights, and what
   `extra` holds for it stays as it is. */
#define SOLVER(NAME, SCRATCH)                                                                      \
    int gradsurgery_step_##NAME(const double *gram, void **extra, const long *strides, long extras,     \
                           const double *numbers, double *weights, long batch, long count,         \
                           int threads)                                                            \
    {                                                                                              \
        int failed = 0;                                                                            \
        _Pragma("omp parallel num_threads(threads) if (batch > 1 && batch * count * count > SERIAL)") \
        {                                                                                          \
            double *scratch = malloc(sizeof(double) * (SCRATCH + 1));                              \
            _Pragma("omp for schedule(static)")                                                    \
            for (long b = 0; b < batch; b++) {                                                     \
                if (scratch == NULL) {                                                             \
                    failed = 1;                                                                    \
                    continue;                                                                      \
                }                                                                                  \
                void *mine[MAX_EXTRA];                                                             \
                for (long e = 0; e < extras; e++) mine[e] = (char *)extra[e] + b * strides[e];     \
                struct task task = {gram + b * count * count, count, mine, numbers,                \
                                    weights + b * count, scratch};                                 \
                if (all_finite(task.gram, count * count))                                          \
                    NAME(&task);                                                                   \
                else                                                                               \
                    for (long i = 0; i < count; i++) task.weights[i] = NAN;                        \
            }                                                                                      \
            free(scratch);                                                                         \
        }                                                                                          \
        return failed;                                                                             \
    }

#endif
