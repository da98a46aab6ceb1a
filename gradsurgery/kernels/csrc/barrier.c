/* Nash-MTL and FairGrad: M w = w^(-1/α), w > 0, by Newton's method in scaled variables y = n∘w:
   C y = k y^(-p), p = 1/α, k_i = n_i^(p - 1). It is the minimum of a convex function whose Hessian
   is C + diag(p k y^(-p-1)). */

#include "tasks.h"

enum { MAX_TASKS = 64, STEPS = 300 };

/* Solves (A + diag(d)) x = b, A with a diagonal that is `ridge` larger; x may be b. */
static void solve_shifted(const double *a, const double *d, double ridge, long n, double *x,
                          double *factor)
{
    for (long i = 0; i < n; i++) {
        double *li = factor + i * n;
        for (long j = 0; j < i; j++)
            li[j] = (a[i * n + j] - dot(li, factor + j * n, j)) / factor[j * n + j];
        const double pivot = a[i * n + i] + ridge + d[i] - dot(li, li, i);
        li[i] = sqrt(fmax(pivot, 1e-300));
        x[i] = (x[i] - dot(li, x, i)) / li[i];
    }
    for (long i = n - 1; i >= 0; i--) {
        const double *li = factor + i * n;
        x[i] /= li[i];
        for (long j = 0; j < i; j++) x[j] -= li[j] * x[i];
    }
}

/* Newton from where y is. Steps are kept so short that the Hessian stays about what it is. For
   log(C y) = log(k y^(-p)) where C y > 0, as a large p makes the other form steep. */
static void follow(const double *c, const double *log_k, double p, double ridge, long n, double *y,
                   double *factor)
{
    double step[MAX_TASKS], slope[MAX_TASKS];
    for (int turn = 0; turn < STEPS; turn++) {
        for (long i = 0; i < n; i++) {
            const double pull = dot(c + i * n, y, n) + ridge * y[i];
            const double log_push = log_k[i] - p * log(y[i]), push = exp(log_push);
            const int mild = push < 10 * pull;
            step[i] = mild ? pull * (log_push - log(pull)) : push - pull;
            slope[i] = p * (mild ? pull : push) / y[i];
        }
        solve_shifted(c, slope, ridge, n, step, factor);
        double most = 0;
        for (long i = 0; i < n; i++) most = fmax(most, fabs(step[i]) / y[i]);
        const double share = most > 0.7 ? 0.7 / most : 1;
        for (long i = 0; i < n; i++) y[i] += share * step[i];
        /* Quadratic from here: this step has squared the error. */
        if (most < 1e-7) return;
    }
}

/* numbers: p, ridge. */
static void balance(struct task *task)
{
    const long count = task->count;
    const double p = task->numbers[0], ridge = task->numbers[1];
    double norm[MAX_TASKS], log_k[MAX_TASKS] = {0}, y[MAX_TASKS];
    long index[MAX_TASKS], n = 0;
    for (long i = 0; i < count; i++) {
        const double square = task->gram[i * count + i];
        task->weights[i] = 0;
        if (square > 0) index[n] = i, norm[n++] = sqrt(square);
    }
    double *c = task->scratch, *factor = c + n * n, geometric = 0;
    for (long i = 0; i < n; i++) {
        for (long j = 0; j < n; j++)
            c[i * n + j] =
                i == j ? 1 : task->gram[index[i] * count + index[j]] / norm[i] / norm[j];
        geometric += log(norm[i]) / n;
    }
    double square = n * ridge;
    for (long i = 0; i < n; i++) square += sum_of(c + i * n, n);
    /* Nash's bargain, p = 1, depends on no norm; the best multiple of ones, to begin with. */
    for (long i = 0; i < n; i++) y[i] = sqrt(n / fmax(square, ridge * n));
    follow(c, log_k, 1, ridge, n, y, factor);
    /* From there to 1/p, step by step: the norms come in. */
    double spread = 0;
    for (long i = 0; i < n; i++) spread = fmax(spread, fabs(log(norm[i]) - geometric));
    const int needed = p == 1 ? 0 : 2 + (int)(2 * spread * fabs(1 / p - 1));
    const int moves = needed < STEPS ? needed : STEPS;
    for (int move = 1; move <= moves; move++) {
        const double now = 1 / (1 + (1 / p - 1) * move / moves);
        for (long i = 0; i < n; i++) log_k[i] = (now - 1) * (log(norm[i]) - geometric);
        follow(c, log_k, now, ridge, n, y, factor);
    }
    /* The geometric mean was taken out of k; y grows by its (1 + p)th root. */
    const double unit = exp((p - 1) * geometric / (1 + p));
    for (long i = 0; i < n; i++) task->weights[index[i]] = unit * y[i] / norm[i];
}

SOLVER(balance, 2 * count * count)
