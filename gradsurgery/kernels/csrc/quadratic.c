/* Nonnegative quadratic programs on the Gram matrix: UPGrad, DualProj, MGDA, CAGrad, ConicGrad.

   Everything is in scaled variables y = n∘w, n_i = sqrt(M_ii): the matrix has a diagonal of ones,
   however far apart the norms are. Tasks without gradient are left out. */

#include "tasks.h"

#include <string.h>

enum { MAX_TASKS = 64, BLOCK_STEPS = 12 };

static const double DEPENDENT = 1e-13; /* a pivot below: the gradient is one of the others' */
static const double VIOLATED = 1e-11;  /* beside the terms of a condition, which are up to 1 */

/* min ½ zᵀAz + qᵀz, z >= 0: A [n, n] positive semidefinite, rows `stride` apart, q in its range. */
struct program {
    const double *a;
    long n, stride;
    const double *q;
    double *z;    /* [n], the result */
    double *dual; /* [n]: Az + q, >= 0 in the end */
    char *passive; /* [n]: where to begin; in the end where z may be positive */
    double *factor, *rhs; /* [n * n], [n] */
    long index[MAX_TASKS];
};

/* z over the passive set P: A_PP z_P = -q_P. Pivots that are noise are held at `DEPENDENT`. */
static void solve_passive(struct program *p)
{
    long k = 0;
    for (long i = 0; i < p->n; i++)
        if (p->passive[i]) p->index[k++] = i;
    double *l = p->factor, *x = p->rhs;
    for (long i = 0; i < k; i++) {
        const double *row = p->a + p->index[i] * p->stride;
        double *li = l + i * k;
        for (long j = 0; j < i; j++)
            li[j] = (row[p->index[j]] - dot(li, l + j * k, j)) / l[j * k + j];
        const double pivot = row[p->index[i]] - dot(li, li, i);
        li[i] = sqrt(pivot > DEPENDENT ? pivot : DEPENDENT);
        x[i] = (-p->q[p->index[i]] - dot(li, x, i)) / li[i];
    }
    for (long i = k - 1; i >= 0; i--) {
        x[i] /= l[i * k + i];
        const double value = x[i], *li = l + i * k;
        for (long j = 0; j < i; j++) x[j] -= li[j] * value;
    }
    for (long i = 0; i < p->n; i++) p->z[i] = 0;
    for (long i = 0; i < k; i++) p->z[p->index[i]] = x[i];
}

static void find_dual(struct program *p)
{
    for (long i = 0; i < p->n; i++) p->dual[i] = p->q[i] + dot(p->a + i * p->stride, p->z, p->n);
}

static double largest(const double *values, long n)
{
    double most = 0;
    for (long i = 0; i < n; i++) most = fmax(most, fabs(values[i]));
    return most;
}

/* Exchange every variable that is on the wrong side, all at once: a few steps nearly always. */
static int by_blocks(struct program *p, double tolerance)
{
    for (int step = 0; step < BLOCK_STEPS; step++) {
        solve_passive(p);
        find_dual(p);
        const double least = -1e-12 * largest(p->z, p->n);
        int wrong = 0;
        for (long i = 0; i < p->n; i++) {
            const int out = p->passive[i] && p->z[i] < least;
            const int in = !p->passive[i] && p->dual[i] < -tolerance;
            if (out || in) p->passive[i] ^= 1, wrong = 1;
        }
        if (!wrong) return 1;
    }
    return 0;
}

/* Lawson and Hanson's active set: the objective falls at every step, so it cannot go in circles. */
static void one_by_one(struct program *p, double tolerance)
{
    double now[MAX_TASKS] = {0};
    char blocked[MAX_TASKS] = {0};
    memset(p->passive, 0, p->n);
    memset(p->z, 0, sizeof(double) * p->n);
    for (long step = 0; step < 4 * p->n + 8; step++) {
        memcpy(p->z, now, sizeof(double) * p->n);
        find_dual(p);
        long enter = -1;
        for (long i = 0; i < p->n; i++)
            if (!p->passive[i] && !blocked[i] && p->dual[i] < -tolerance &&
                (enter < 0 || p->dual[i] < p->dual[enter]))
                enter = i;
        if (enter < 0) return;
        p->passive[enter] = 1;
        for (long inner = 0; inner <= p->n; inner++) {
            solve_passive(p);
            if (inner == 0 && p->z[enter] <= 0) {
                /* Rounding: what the gradient promises, the step does not keep. */
                p->passive[enter] = 0;
                blocked[enter] = 1;
                memcpy(p->z, now, sizeof(double) * p->n);
                break;
            }
            double share = 1;
            for (long i = 0; i < p->n; i++)
                if (p->passive[i] && p->z[i] <= 0)
                    share = now[i] > 0 ? fmin(share, now[i] / (now[i] - p->z[i])) : 0;
            if (share >= 1) {
                memcpy(now, p->z, sizeof(double) * p->n);
                memset(blocked, 0, p->n);
                break;
            }
            for (long i = 0; i < p->n; i++) {
                if (!p->passive[i]) continue;
                const int leaves = p->z[i] <= 0;
                now[i] += share * (p->z[i] - now[i]);
                if (leaves && now[i] <= 1e-14 * largest(p->z, p->n)) p->passive[i] = 0, now[i] = 0;
            }
        }
    }
    memcpy(p->z, now, sizeof(double) * p->n);
}

/* Begins with the passive set that is there. */
static void solve_program(struct program *p)
{
    const double tolerance = VIOLATED * fmax(largest(p->q, p->n), 1e-300);
    if (!by_blocks(p, tolerance)) one_by_one(p, tolerance);
    for (long i = 0; i < p->n; i++)
        if (p->z[i] < 0) p->z[i] = 0;
}

/* What all of them begin with: the tasks that have a gradient, their norms, the scaled matrix. */
struct scaled {
    long n;
    long task[MAX_TASKS];
    double norm[MAX_TASKS];
    double *c; /* [n, n] */
    double *rest;
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

static struct program program_on(const double *a, long n, double *memory, char *passive)
{
    struct program p = {.a = a, .n = n, .stride = n, .passive = passive};
    p.z = memory;
    p.dual = memory + n;
    p.rhs = memory + 2 * n;
    p.factor = memory + 3 * n;
    return p;
}

#define SCRATCH (3 * count * count + 8 * count)

/* w = (1/T) Σ_i the coefficients of g_i's projection onto the dual cone. */
static void upgrad(struct task *task)
{
    const struct scaled s = scale(task);
    const long n = s.n;
    char passive[MAX_TASKS];
    struct program p = program_on(s.c, n, s.rest, passive);
    double sums[MAX_TASKS] = {0};
    for (long i = 0; i < n; i++) {
        /* v = e_i + z: row i of C serves as C e_i. */
        p.q = s.c + i * n;
        for (long j = 0; j < n; j++) passive[j] = p.q[j] < 0;
        solve_program(&p);
        p.z[i] += 1;
        for (long j = 0; j < n; j++) sums[j] += s.norm[i] * p.z[j];
    }
    for (long i = 0; i < task->count; i++) task->weights[i] = 1.0 / task->count;
    for (long j = 0; j < n; j++)
        task->weights[s.task[j]] = sums[j] / s.norm[j] / task->count;
}

SOLVER(upgrad, SCRATCH)

/* The mean's projection onto the dual cone. */
static void dualproj(struct task *task)
{
    const struct scaled s = scale(task);
    const long n = s.n;
    char passive[MAX_TASKS];
    double u[MAX_TASKS], q[MAX_TASKS];
    const double most = largest(s.norm, n);
    for (long i = 0; i < n; i++) u[i] = s.norm[i] / most;
    struct program p = program_on(s.c, n, s.rest, passive);
    for (long i = 0; i < n; i++) q[i] = dot(s.c + i * n, u, n), passive[i] = q[i] < 0;
    p.q = q;
    if (n) solve_program(&p);
    for (long i = 0; i < task->count; i++) task->weights[i] = 1.0 / task->count;
    for (long j = 0; j < n; j++)
        task->weights[s.task[j]] = (u[j] + p.z[j]) * most / s.norm[j] / task->count;
}

SOLVER(dualproj, SCRATCH)

/* The shortest vector in the convex hull of the gradients. min wᵀMw + κ²(1ᵀw - 1)² over w >= 0 has
   its direction for every κ, and always a solution; κ is the smallest norm. */
static void mgda(struct task *task)
{
    const struct scaled s = scale(task);
    const long n = s.n;
    double *w = task->weights;
    if (n < task->count) {
        /* A task without gradient: zero lies in the hull. */
        for (long i = 0; i < task->count; i++) w[i] = 1.0 / (task->count - n);
        for (long j = 0; j < n; j++) w[s.task[j]] = 0;
        return;
    }
    double least = INFINITY, a[MAX_TASKS], q[MAX_TASKS];
    char passive[MAX_TASKS];
    for (long i = 0; i < n; i++) least = fmin(least, s.norm[i]);
    for (long i = 0; i < n; i++) a[i] = least / s.norm[i];
    for (long i = 0; i < n; i++) {
        q[i] = -a[i];
        passive[i] = a[i] == 1;
        for (long j = 0; j < n; j++) s.c[i * n + j] += a[i] * a[j];
    }
    struct program p = program_on(s.c, n, s.rest, passive);
    p.q = q;
    solve_program(&p);
    double sum = 0;
    for (long i = 0; i < n; i++) sum += p.z[i] * a[i];
    for (long i = 0; i < n; i++) w[i] = p.z[i] * a[i] / sum;
}

SOLVER(mgda, SCRATCH)

/* max over ‖u‖ <= radius of min_i b_i + a_i·u, where A holds the products of the a_i: u = Σ z_i a_i.

   For a level s, z(s) >= 0 solves the program with q = b - s 1, and ‖u(s)‖ is the distance that the
   level asks for: convex and rising in s. Within a passive set z is linear in s, so each step
   solves a quadratic equation; a bracket guards it. All in scaled variables: b_i / n_i, 1 / n_i. */
static void best_worst(const double *a, const double *diagonal, const double *b, const double *one,
                       long n, double radius, double *z, double *memory)
{
    char passive[MAX_TASKS] = {0};
    double q[MAX_TASKS], slope[MAX_TASKS], low = INFINITY, high = INFINITY;
    struct program p = program_on(a, n, memory, passive);
    p.q = q;
    for (long i = 0; i < n; i++) {
        low = fmin(low, b[i] / one[i]);
        high = fmin(high, (b[i] + radius * sqrt(diagonal[i])) / one[i]);
    }
    for (long i = 0; i < n; i++) z[i] = 0;
    if (!(radius > 0) || !(high > low)) return;
    double s = high;
    for (int step = 0; step < 60; step++) {
        for (long i = 0; i < n; i++) q[i] = b[i] - s * one[i];
        solve_program(&p);
        double square = 0;
        for (long i = 0; i < n; i++) square += p.z[i] * dot(a + i * n, p.z, n);
        const double length = sqrt(fmax(square, 0));
        if (length <= radius * (1 + 1e-12)) memcpy(z, p.z, sizeof(double) * n);
        if (length <= radius)
            low = s;
        else
            high = s;
        if (fabs(length - radius) <= 1e-12 * radius) break;
        if (high - low <= 1e-15 * (fabs(high) + fabs(low))) break;
        /* d z_P / d s = A_PP⁻¹ 1_P: the same factor, another right-hand side. */
        struct program line = p;
        double negative[MAX_TASKS];
        for (long i = 0; i < n; i++) negative[i] = -one[i];
        line.q = negative;
        line.z = slope;
        solve_passive(&line);
        double cross = 0, own = 0;
        for (long i = 0; i < n; i++) {
            const double product = dot(a + i * n, slope, n);
            cross += p.z[i] * product;
            own += slope[i] * product;
        }
        /* own t² + 2 cross t + square = radius²: the root that rises. */
        const double gap = radius * radius - square;
        const double root = cross * cross + own * gap;
        double next = NAN;
        if (own > 0 && root >= 0) next = s + gap / (cross + sqrt(root));
        s = next > low && next < high ? next : low + (high - low) / 2;
    }
}

/* d = g_0 + Gᵀz with ‖Gᵀz‖ = c‖g_0‖: w = 1/T + z. */
static void cagrad(struct task *task)
{
    const struct scaled s = scale(task);
    const long n = s.n, count = task->count;
    double *w = task->weights;
    for (long i = 0; i < count; i++) w[i] = 1.0 / count;
    if (n == 0) return;
    double b[MAX_TASKS], one[MAX_TASKS], ones[MAX_TASKS], y[MAX_TASKS], z[MAX_TASKS];
    const double most = largest(s.norm, n);
    for (long i = 0; i < n; i++) y[i] = s.norm[i] / most / count, one[i] = most / s.norm[i];
    double square = 0;
    for (long i = 0; i < n; i++) {
        b[i] = dot(s.c + i * n, y, n), ones[i] = 1;
        square += y[i] * b[i];
    }
    /* In units of the largest norm; a condition is divided by its own task's. */
    best_worst(s.c, ones, b, one, n, task->numbers[0] * sqrt(fmax(square, 0)), z, s.rest);
    for (long j = 0; j < n; j++) w[s.task[j]] += z[j] * most / s.norm[j];
}

SOLVER(cagrad, SCRATCH)
