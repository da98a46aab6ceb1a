/* What rests on the inverse, or on the square root of the inverse, of the Gram matrix: IMTL-G, ConFIG,
   GradOPS, Aligned-MTL. Where gradients depend on each other, Cholesky's method with pivots finds
   independent ones, C = F Fᵀ with F = W F_1, and `_spectral.py` says the same in torch ops. */

#include "tasks.h"

#include <string.h>

enum { MAX_TASKS = 64, SWEEPS = 40, MOST_ROTATED = 4, TAIL = 28, BLOCK = 16 };

static const double PI = 3.14159265358979323846;

struct basis {
    long n, rank;
    double least;          /* pivot: the squared sine of the angle to the span of those before */
    long task[MAX_TASKS];  /* those that have a gradient */
    long order[MAX_TASKS]; /* of these, the independent ones */
    double norm[MAX_TASKS];
    double *c;     /* [n, n], cosines */
    double *f;     /* [n, n], rows of F by task; `rank` columns */
    double *lower; /* [rank, n], F_1: row k is that of order[k] */
    double *rest;  /* 2 n² numbers more */
};

#define SCRATCH (5 * count * count)

static struct basis scale(struct task *task)
{
    struct basis b;
    const long count = task->count;
    b.n = b.rank = 0;
    for (long i = 0; i < count; i++) {
        const double square = task->gram[i * count + i];
        if (square > 0) b.task[b.n] = i, b.norm[b.n++] = sqrt(square);
    }
    b.c = task->scratch;
    for (long i = 0; i < b.n; i++)
        for (long j = 0; j < b.n; j++) {
            const double cosine =
                task->gram[b.task[i] * count + b.task[j]] / b.norm[i] / b.norm[j];
            b.c[i * b.n + j] = i == j ? 1 : fmin(fmax(cosine, -1), 1);
        }
    b.f = b.c + b.n * b.n, b.lower = b.f + b.n * b.n, b.rest = b.lower + b.n * b.n;
    return b;
}

/* Takes one gradient after the other, that with most left of weight_i. */
static void choose(struct basis *b, double tolerance, const double *weight)
{
    const long n = b->n;
    double left[MAX_TASKS];
    int taken[MAX_TASKS] = {0};
    for (long i = 0; i < n; i++) left[i] = 1;
    b->least = INFINITY;
    memset(b->f, 0, sizeof(double) * n * n);
    for (b->rank = 0; b->rank < n; b->rank++) {
        const long k = b->rank;
        long at = -1;
        double most = 0;
        for (long i = 0; i < n; i++)
            if (!taken[i] && left[i] > tolerance && left[i] * weight[i] > most)
                at = i, most = left[i] * weight[i];
        if (at < 0) break;
        const double *mine = b->f + at * n, pivot = sqrt(left[at]);
        taken[at] = 1, b->order[k] = at, b->least = fmin(b->least, left[at]);
        for (long i = 0; i < n; i++) {
            if (taken[i] && i != at) continue;
            double *row = b->f + i * n;
            row[k] = (b->c[i * n + at] - dot(row, mine, k)) / pivot;
            left[i] -= row[k] * row[k];
        }
        memcpy(b->lower + k * n, mine, sizeof(double) * n);
    }
}

/* x = lower⁻¹ x and x = lower⁻ᵀ x, [rank, rank] in rows of n. */
static void forth(const double *lower, double *x, long rank, long n)
{
    for (long i = 0; i < rank; i++)
        x[i] = (x[i] - dot(lower + i * n, x, i)) / lower[i * n + i];
}

static void back(const double *lower, double *x, long rank, long n)
{
    for (long i = rank - 1; i >= 0; i--) {
        x[i] /= lower[i * n + i];
        for (long j = 0; j < i; j++) x[j] -= lower[i * n + j] * x[i];
    }
}

/* W in place of F: each row w F_1 = f. */
static void spread(struct basis *b)
{
    const long n = b->n;
    for (long i = 0; i < n; i++) back(b->lower, b->f + i * n, b->rank, n);
}

/* y = C⁺ 1, and C y. Returns up to which share of its terms a sum of y is rounding: that of M, or what
   was counted as dependent, beside the least pivot. Where 1, along on the range of C, is no
   longer than that, y is zero.
   numbers: rank tolerance, rounding of a sum of T cosines. */
static double equal_angles(struct basis *b, const double *numbers, double *y, double *along)
{
    double ones[MAX_TASKS], x[MAX_TASKS] = {0}, square = 0, *both = b->rest;
    for (long i = 0; i < b->n; i++) ones[i] = along[i] = 1;
    choose(b, numbers[0], ones);
    const long n = b->n, rank = b->rank;
    if (rank == n) {
        for (long k = 0; k < n; k++) x[k] = 1;
        forth(b->lower, x, n, n);
        back(b->lower, x, n, n);
        for (long k = 0; k < n; k++) y[b->order[k]] = x[k];
        return numbers[1] / b->least;
    }
    const double doubt = numbers[0] / b->least;
    /* W (WᵀW)⁻¹ (F_1 F_1ᵀ)⁻¹ (WᵀW)⁻¹ Wᵀ 1; WᵀW has eigenvalues of 1 and more. */
    spread(b);
    memset(both, 0, sizeof(double) * n * n);
    for (long i = 0; i < n; i++) {
        const double *row = b->f + i * n;
        for (long j = 0; j < rank; j++) {
            x[j] += row[j];
            if (row[j] == 0) continue;
            for (long k = 0; k <= j; k++) both[j * n + k] += row[j] * row[k];
        }
    }
    for (long i = 0; i < rank; i++) {
        double *row = both + i * n;
        for (long j = 0; j < i; j++)
            row[j] = (row[j] - dot(row, both + j * n, j)) / both[j * n + j];
        row[i] = sqrt(row[i] - dot(row, row, i));
    }
    forth(both, x, rank, n);
    square = dot(x, x, rank);
    back(both, x, rank, n);
    forth(b->lower, x, rank, n), back(b->lower, x, rank, n);
    forth(both, x, rank, n), back(both, x, rank, n);
    for (long i = 0; i < n; i++)
        y[i] = square > n * doubt * doubt ? dot(b->f + i * n, x, rank) : 0;
    for (long i = 0; i < n; i++) along[i] = dot(b->c + i * n, y, n);
    return doubt;
}

/* Equal projections on every unit gradient, weights that sum to 1. numbers: see `equal_angles`. */
static void imtl_g(struct task *task)
{
    struct basis b = scale(task);
    double y[MAX_TASKS], along[MAX_TASKS], sum = 0, size = 0;
    const double doubt = equal_angles(&b, task->numbers, y, along);
    for (long i = 0; i < task->count; i++) task->weights[i] = 0;
    for (long i = 0; i < b.n; i++) {
        y[i] /= b.norm[i];
        sum += y[i], size += fabs(y[i]);
    }
    if (!(fabs(sum) > doubt * size)) return;
    for (long i = 0; i < b.n; i++) task->weights[b.task[i]] = y[i] / sum;
}

SOLVER(imtl_g, SCRATCH)

/* Equal cosines with every gradient, as long as the projections on it together. */
static void config(struct task *task)
{
    struct basis b = scale(task);
    double y[MAX_TASKS], along[MAX_TASKS];
    equal_angles(&b, task->numbers, y, along);
    const double square = dot(y, along, b.n), length = dot(b.norm, along, b.n);
    /* ‖x‖², of which rounding of C leaves no more unsure than that. */
    const double factor = square > task->numbers[1] * dot(y, y, b.n) ? length / square : 0;
    for (long i = 0; i < task->count; i++) task->weights[i] = 0;
    for (long i = 0; i < b.n; i++) task->weights[b.task[i]] = factor * y[i] / b.norm[i];
}

SOLVER(config, SCRATCH)

/* Σ_i g_i, each that conflicts with any other without its part in the span of all others.
   numbers: rank tolerance, and the size of a negative cosine that is no conflict. */
static void gradops(struct task *task)
{
    struct basis b = scale(task);
    const long n = b.n;
    const double noise = task->numbers[1];
    double ones[MAX_TASKS], sums[MAX_TASKS] = {0}, x[MAX_TASKS];
    int conflicts[MAX_TASKS], any = 0, needed[MAX_TASKS] = {0}, chosen[MAX_TASKS] = {0};
    for (long i = 0; i < n; i++) {
        ones[i] = 1, conflicts[i] = 0;
        for (long j = 0; j < n; j++) conflicts[i] |= b.c[i * n + j] < -noise;
        if (!conflicts[i]) sums[i] = b.norm[i];
        any |= conflicts[i];
    }
    if (any) choose(&b, task->numbers[0], ones);
    for (long k = 0; k < b.rank; k++) chosen[b.order[k]] = 1;
    if (any && b.rank < n) {
        spread(&b);
        for (long i = 0; i < n; i++)
            for (long k = 0; k < b.rank && !chosen[i]; k++)
                needed[k] |= fabs(b.f[i * n + k]) > sqrt(noise);
    }
    for (long k = 0; k < b.rank; k++) {
        const long i = b.order[k];
        /* One that a dependent gradient is made of lies in the span of the others itself. */
        if (!conflicts[i] || needed[k]) continue;
        for (long j = 0; j < b.rank; j++) x[j] = j == k;
        forth(b.lower, x, b.rank, n), back(b.lower, x, b.rank, n);
        for (long j = 0; j < b.rank; j++) sums[b.order[j]] += b.norm[i] * x[j] / x[k];
    }
    for (long i = 0; i < task->count; i++) task->weights[i] = 1;
    for (long j = 0; j < n; j++) task->weights[b.task[j]] = sums[j] / b.norm[j];
}

SOLVER(gradops, SCRATCH)

/* Rows of a become orthogonal, by rotations of two at a time; their squared lengths. Where rows go
   from large to small, small ones keep their relative accuracy (Demmel and Veselić, SIAM J. Matrix
   Anal. Appl. 13, 1992). A product is small beside the shorter row's square: the longer row's task
   hears of the shorter one by it alone. */
static void orthogonalise(double *a, double *square, long rank, long n)
{
    for (int sweep = 0; sweep < SWEEPS; sweep++) {
        int turned = 0;
        for (long p = 0; p < rank; p++) square[p] = dot(a + p * n, a + p * n, n);
        for (long p = 0; p < rank; p++)
            for (long q = p + 1; q < rank; q++) {
                double *x = a + p * n, *y = a + q * n;
                double terms;
                const double between = dot_and_size(x, y, n, &terms);
                if (!(fabs(between) > 1e-15 * fmax(terms, fmin(square[p], square[q])))) continue;
                turned = 1;
                const double slope = (square[q] - square[p]) / (2 * between);
                const double t = (slope >= 0 ? 1 : -1) / (fabs(slope) + hypot(slope, 1));
                const double c = 1 / sqrt(t * t + 1), s = t * c;
                for (long k = 0; k < n; k++) {
                    const double before = x[k];
                    x[k] = c * before - s * y[k];
                    y[k] = s * before + c * y[k];
                }
                square[p] -= t * between, square[q] += t * between;
            }
        if (!turned) break;
    }
    for (long p = 0; p < rank; p++) square[p] = dot(a + p * n, a + p * n, n);
}

/* a = Q T Qᵀ with T tridiagonal, by Householder's reflections; their vectors stay in the columns'
   place, in rows of v. x = Qᵀ x. */
static void tridiagonalise(double *a, double *v, double *diagonal, double *beside, double *x, long n)
{
    double w[MAX_TASKS];
    for (long k = 0; k < n; k++) {
        const long from = k + 1, size = n - from;
        double *mine = v + k * n + from, *row = a + k * n + from;
        diagonal[k] = a[k * n + k], beside[k] = size ? row[0] : 0;
        for (long i = 0; i < size; i++) mine[i] = 0;
        const double length = sqrt(dot(row, row, size));
        if (size < 2 || length == 0) continue;
        beside[k] = row[0] > 0 ? -length : length;
        memcpy(mine, row, sizeof(double) * size);
        mine[0] -= beside[k];
        const double unit = sqrt(2 / dot(mine, mine, size));
        for (long i = 0; i < size; i++) mine[i] *= unit;
        for (long i = 0; i < size; i++) w[i] = dot(a + (from + i) * n + from, mine, size);
        const double half = dot(w, mine, size) / 2, along = dot(x + from, mine, size);
        for (long i = 0; i < size; i++) w[i] -= half * mine[i], x[from + i] -= along * mine[i];
        for (long i = 0; i < size; i++) {
            double *under = a + (from + i) * n + from;
            const double vi = mine[i], wi = w[i];
#pragma omp simd
            for (long j = 0; j < size; j++) under[j] -= vi * w[j] + wi * mine[j];
        }
    }
}

/* The smallest eigenvalue of T, by halving: below it no pivot of T - shift is negative. */
static double smallest(const double *diagonal, const double *beside, long n)
{
    double low = 0, high = diagonal[0];
    for (long i = 1; i < n; i++) high = fmin(high, diagonal[i]);
    for (int turn = 0; turn < 60; turn++) {
        const double shift = (low + high) / 2;
        double pivot = diagonal[0] - shift;
        long i = 1;
        for (; i < n && pivot > 0; i++)
            pivot = diagonal[i] - shift - beside[i - 1] * beside[i - 1] / pivot;
        if (pivot > 0)
            low = shift;
        else
            high = shift;
    }
    return low;
}

/* x = T^(-1/2) x = 2/π ∫ t (T + t²)⁻¹ x d(log t), by the trapezoidal rule, BLOCK points at once: see
   `_inverse_root` in aligned_mtl.py. */
static void inverse_root(const double *diagonal, const double *beside, double least, double most,
                         double *x, long n)
{
    const double start = log(least) / 2 - TAIL, end = log(most) / 2 + TAIL;
    const long points = (long)ceil((end - start) * TAIL / (PI * PI)) + 1;
    const double distance = (end - start) / (points - 1);
    double pivot[MAX_TASKS][BLOCK], y[MAX_TASKS][BLOCK], sum[MAX_TASKS] = {0};
    for (long first = 0; first < points; first += BLOCK) {
        double t[BLOCK], square[BLOCK];
        for (long s = 0; s < BLOCK; s++) {
            t[s] = exp(start + distance * (first + s)), square[s] = t[s] * t[s];
            pivot[0][s] = diagonal[0] + square[s], y[0][s] = x[0];
            if (first + s >= points) t[s] = 0;
        }
        for (long i = 1; i < n; i++)
#pragma omp simd
            for (long s = 0; s < BLOCK; s++) {
                const double m = beside[i - 1] / pivot[i - 1][s];
                pivot[i][s] = diagonal[i] + square[s] - m * beside[i - 1];
                y[i][s] = x[i] - m * y[i - 1][s];
            }
        double last[BLOCK] = {0};
        for (long i = n - 1; i >= 0; i--) {
            double total = 0;
#pragma omp simd reduction(+ : total)
            for (long s = 0; s < BLOCK; s++) {
                last[s] = (y[i][s] - beside[i] * last[s]) / pivot[i][s];
                total += t[s] * last[s];
            }
            sum[i] += total;
        }
    }
    for (long i = 0; i < n; i++) x[i] = sum[i] * distance * 2 / PI;
}

/* M^(-1/2) 1 σ_min, where M is well conditioned; else 0. */
static int align_well(const struct task *task, double most, double *a, double *v)
{
    const long n = task->count;
    double diagonal[MAX_TASKS], beside[MAX_TASKS], *x = task->weights, sum = 0;
    for (long i = 0; i < n * n; i++) a[i] = task->gram[i] / most;
    for (long i = 0; i < n; i++) x[i] = 1;
    tridiagonalise(a, v, diagonal, beside, x, n);
    for (long i = 0; i < n; i++) sum += diagonal[i];
    const double least = smallest(diagonal, beside, n);
    /* A matrix that is no M, with a negative diagonal, may have any sum. */
    if (!(sum > 0 && least > 1e-6 * sum)) return 0;
    inverse_root(diagonal, beside, least, sum, x, n);
    for (long k = n - 2; k >= 0; k--) {
        const double *mine = v + k * n + k + 1, along = dot(x + k + 1, mine, n - k - 1);
        for (long i = k + 1; i < n; i++) x[i] -= along * mine[i - k - 1];
    }
    for (long i = 0; i < n; i++) x[i] *= sqrt(least) / n;
    return 1;
}

/* The mean of all gradients brought to the smallest singular value: the columns of M's factor,
   made orthogonal, are u_k σ_k. numbers: rank tolerance. */
static void aligned_mtl(struct task *task)
{
    double most = 0, least = INFINITY, size[MAX_TASKS] = {0}, square[MAX_TASKS] = {0};
    for (long i = 0; i < task->count; i++) most = fmax(most, task->gram[i * (task->count + 1)]);
    if (task->count > MOST_ROTATED && most > 0 &&
        align_well(task, most, task->scratch, task->scratch + task->count * task->count))
        return;
    for (long i = 0; i < task->count; i++) task->weights[i] = 0;
    struct basis b = scale(task);
    const long n = b.n;
    for (long i = 0; i < n; i++) size[i] = b.norm[i] / sqrt(most);
    for (long i = 0; i < n; i++) square[i] = size[i] * size[i];
    choose(&b, task->numbers[0], square);
    double *columns = b.rest;
    for (long k = 0; k < b.rank; k++)
        for (long i = 0; i < n; i++) columns[k * n + i] = size[i] * b.f[i * n + k];
    orthogonalise(columns, square, b.rank, n);
    for (long k = 0; k < b.rank; k++) least = fmin(least, square[k]);
    for (long k = 0; k < b.rank; k++) {
        const double share = sqrt(least / square[k]) * sum_of(columns + k * n, n) / square[k];
        for (long i = 0; i < n; i++)
            task->weights[b.task[i]] += share * columns[k * n + i] / task->count;
    }
}

SOLVER(aligned_mtl, SCRATCH)
