/* What rests on the inverse, or on the eigenvectors, of the Gram matrix: Aligned-MTL, IMTL-G, ConFIG,
   GradOPS. Where a matrix is well conditioned Cholesky's factor does; else Jacobi's method. */

#include "tasks.h"

#include <string.h>

enum { MAX_TASKS = 64, SWEEPS = 30, MOST_ROTATED = 16 };

static const double WELL = 1e-4; /* pivots above: the inverse is good to 1e-12 and better */

/* a = V diag(values) Vᵀ by cyclic Jacobi rotations; a is lost, V has eigenvectors in rows. */
static void jacobi(double *a, double *v, double *values, long n)
{
    for (long i = 0; i < n; i++)
        for (long j = 0; j < n; j++) v[i * n + j] = i == j;
    for (int sweep = 0; sweep < SWEEPS; sweep++) {
        int turned = 0;
        for (long p = 0; p < n; p++)
            for (long q = p + 1; q < n; q++) {
                const double between = a[p * n + q];
                if (fabs(between) <= 1e-17 * sqrt(fabs(a[p * n + p] * a[q * n + q])) ||
                    between == 0)
                    continue;
                turned = 1;
                const double slope = (a[q * n + q] - a[p * n + p]) / (2 * between);
                const double t = (slope >= 0 ? 1 : -1) / (fabs(slope) + sqrt(slope * slope + 1));
                const double c = 1 / sqrt(t * t + 1), s = t * c;
                for (long k = 0; k < n; k++) {
                    const double x = a[k * n + p], y = a[k * n + q];
                    a[k * n + p] = c * x - s * y;
                    a[k * n + q] = s * x + c * y;
                }
                for (long k = 0; k < n; k++) {
                    const double x = a[p * n + k], y = a[q * n + k];
                    a[p * n + k] = c * x - s * y;
                    a[q * n + k] = s * x + c * y;
                }
                a[p * n + q] = a[q * n + p] = 0;
                for (long k = 0; k < n; k++) {
                    const double x = v[p * n + k], y = v[q * n + k];
                    v[p * n + k] = c * x - s * y;
                    v[q * n + k] = s * x + c * y;
                }
            }
        if (!turned) break;
    }
    for (long i = 0; i < n; i++) values[i] = a[i * n + i];
}

static double largest(const double *values, long n)
{
    double most = 0;
    for (long i = 0; i < n; i++) most = fmax(most, values[i]);
    return most;
}

/* Cholesky's factor; 0 where a pivot is small. */
static int factor_well(const double *a, double *l, long n)
{
    for (long i = 0; i < n; i++) {
        for (long j = 0; j < i; j++)
            l[i * n + j] = (a[i * n + j] - dot(l + i * n, l + j * n, j)) / l[j * n + j];
        const double pivot = a[i * n + i] - dot(l + i * n, l + i * n, i);
        if (!(pivot > WELL)) return 0;
        l[i * n + i] = sqrt(pivot);
    }
    return 1;
}

static void solve_factored(const double *l, double *x, long n)
{
    for (long i = 0; i < n; i++) x[i] = (x[i] - dot(l + i * n, x, i)) / l[i * n + i];
    for (long i = n - 1; i >= 0; i--) {
        x[i] /= l[i * n + i];
        for (long j = 0; j < i; j++) x[j] -= l[i * n + j] * x[i];
    }
}

struct scaled {
    long n, task[MAX_TASKS];
    double norm[MAX_TASKS], *c, *rest;
};

static struct scaled scale(struct task *task)
{
    struct scaled s = {0};
    const long count = task->count;
    for (long i = 0; i < count; i++) {
        const double square = task->gram[i * count + i];
        if (square > 0) s.task[s.n] = i, s.norm[s.n++] = sqrt(square);
    }
    s.c = task->scratch;
    for (long i = 0; i < s.n; i++)
        for (long j = 0; j < s.n; j++) {
            const double cosine =
                task->gram[s.task[i] * count + s.task[j]] / s.norm[i] / s.norm[j];
            s.c[i * s.n + j] = i == j ? 1 : fmin(fmax(cosine, -1), 1);
        }
    s.rest = s.c + s.n * s.n;
    return s;
}

/* y = C⁺ 1, and C y. Eigenvalues up to `tolerance` of the largest count as zero. */
static void equal_angles(const struct scaled *s, double tolerance, double *y, double *product)
{
    const long n = s->n;
    for (long i = 0; i < n; i++) y[i] = 1;
    if (factor_well(s->c, s->rest, n))
        solve_factored(s->rest, y, n);
    else {
        double *a = s->rest, *v = a + n * n, values[MAX_TASKS];
        memcpy(a, s->c, sizeof(double) * n * n);
        jacobi(a, v, values, n);
        const double least = tolerance * largest(values, n);
        for (long i = 0; i < n; i++) y[i] = 0;
        for (long k = 0; k < n; k++)
            if (values[k] > least) {
                const double share = sum_of(v + k * n, n) / values[k];
                for (long i = 0; i < n; i++) y[i] += share * v[k * n + i];
            }
    }
    for (long i = 0; i < n; i++) product[i] = dot(s->c + i * n, y, n);
}

#define SCRATCH (3 * count * count)

/* Equal projections on every unit gradient, weights that sum to 1. numbers: rank tolerance. */
static void imtl_g(struct task *task)
{
    const struct scaled s = scale(task);
    double y[MAX_TASKS], product[MAX_TASKS], sum = 0, size = 0;
    equal_angles(&s, task->numbers[0], y, product);
    for (long i = 0; i < task->count; i++) task->weights[i] = 0;
    for (long i = 0; i < s.n; i++) {
        y[i] /= s.norm[i];
        sum += y[i], size += fabs(y[i]);
    }
    if (!(fabs(sum) > 1e-12 * size)) return;
    for (long i = 0; i < s.n; i++) task->weights[s.task[i]] = y[i] / sum;
}

SOLVER(imtl_g, SCRATCH)

/* Equal cosines with every gradient, as long as the projections on it together. */
static void config(struct task *task)
{
    const struct scaled s = scale(task);
    double y[MAX_TASKS], product[MAX_TASKS], square = 0, length = 0, size = 0;
    equal_angles(&s, task->numbers[0], y, product);
    for (long i = 0; i < s.n; i++) {
        square += y[i] * product[i];
        length += s.norm[i] * product[i];
        size += fabs(y[i]);
    }
    const double factor = square > 1e-24 * size * size ? length / square : 0;
    for (long i = 0; i < task->count; i++) task->weights[i] = 0;
    for (long i = 0; i < s.n; i++) task->weights[s.task[i]] = factor * y[i] / s.norm[i];
}

SOLVER(config, SCRATCH)

/* Σ_i g_i, each that conflicts with any other without its part in the span of all others.
   numbers: rank tolerance, and the size of a negative cosine that is no conflict. */
static void gradops(struct task *task)
{
    const struct scaled s = scale(task);
    const long n = s.n;
    double *inverse = s.rest, sums[MAX_TASKS] = {0}, range[MAX_TASKS];
    const double noise = task->numbers[1];
    double *l = inverse + n * n;
    for (long i = 0; i < n; i++) range[i] = 1;
    if (factor_well(s.c, l, n))
        for (long i = 0; i < n; i++) {
            double *row = inverse + i * n;
            for (long j = 0; j < n; j++) row[j] = i == j;
            solve_factored(l, row, n);
        }
    else {
        double values[MAX_TASKS];
        double *a = inverse;
        memcpy(a, s.c, sizeof(double) * n * n);
        jacobi(a, l, values, n);
        const double least = task->numbers[0] * largest(values, n);
        for (long i = 0; i < n * n; i++) inverse[i] = 0;
        for (long i = 0; i < n; i++) range[i] = 0;
        for (long k = 0; k < n; k++)
            if (values[k] > least)
                for (long i = 0; i < n; i++) {
                    range[i] += l[k * n + i] * l[k * n + i];
                    for (long j = 0; j < n; j++)
                        inverse[i * n + j] += l[k * n + i] * l[k * n + j] / values[k];
                }
    }
    for (long i = 0; i < n; i++) {
        int conflicts = 0;
        for (long j = 0; j < n; j++) conflicts |= s.c[i * n + j] < -noise;
        if (!conflicts)
            sums[i] += s.norm[i];
        else if (range[i] > 1 - 1e-8)
            /* Else it lies in the span of the others, and nothing is left of it. */
            for (long j = 0; j < n; j++)
                sums[j] += s.norm[i] * inverse[i * n + j] / inverse[i * n + i];
    }
    for (long i = 0; i < task->count; i++) task->weights[i] = 1;
    for (long j = 0; j < n; j++) task->weights[s.task[j]] = sums[j] / s.norm[j];
}

SOLVER(gradops, SCRATCH)

/* Principal components of M itself, all brought to the smallest singular value that is not zero.
   numbers: rank tolerance. For up to MOST_ROTATED tasks; LAPACK is faster beyond. */
static void aligned_mtl(struct task *task)
{
    const long n = task->count;
    double *a = task->scratch, *v = a + n * n, values[MAX_TASKS], most = 0;
    for (long i = 0; i < n; i++) most = fmax(most, task->gram[i * n + i]);
    for (long i = 0; i < n; i++) task->weights[i] = 0;
    if (!(most > 0)) return;
    for (long i = 0; i < n * n; i++) a[i] = task->gram[i] / most;
    jacobi(a, v, values, n);
    const double zero = task->numbers[0] * largest(values, n);
    double least = INFINITY;
    for (long k = 0; k < n; k++)
        if (values[k] > zero) least = fmin(least, values[k]);
    for (long k = 0; k < n; k++) {
        if (!(values[k] > zero)) continue;
        const double share = sqrt(least / values[k]) * sum_of(v + k * n, n) / n;
        for (long i = 0; i < n; i++) task->weights[i] += share * v[k * n + i];
    }
}

SOLVER_UP_TO(MOST_ROTATED, aligned_mtl, 2 * count * count)
