/* Nash-MTL and FairGrad: M w = w^(-1/α), w > 0, by Newton's method in scaled variables y = n∘w:
   C y = k y^(-p), p = 1/α, k_i = n_i^(p - 1). It is the minimum of a convex function whose Hessian
   is C + diag(p k y^(-p-1)). */

#include "tasks.h"

/* The hardest of the tests, norms 1e24 apart at α = 10, takes about 1600 steps. */
enum { MAX_TASKS = 64, MOST_STEPS = 4000, FOR_A_MOVE = 200 };

/* Of C y beside the terms of its sum: a few units in the last place. */
static const double ROUNDING = 4e-15;

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

/* One step of Newton's at y for exponent p, from `pull` = C y. It is kept so short that the Hessian
   stays about what it is. For log(C y) = log(k y^(-p)) where C y > 0, as a large p makes the other
   form steep. Returns the largest relative change that was wanted. */
static double improve(const double *c, const double *log_k, double p, double ridge, long n,
                      const double *pull, double *y, double *factor)
{
    double step[MAX_TASKS], slope[MAX_TASKS], most = 0;
    for (long i = 0; i < n; i++) {
        const double log_push = log_k[i] - p * log(y[i]), push = exp(log_push);
        const int mild = push < 10 * pull[i];
        step[i] = mild ? pull[i] * (log_push - log(pull[i])) : push - pull[i];
        slope[i] = p * (mild ? pull[i] : push) / y[i];
    }
    solve_shifted(c, slope, ridge, n, step, factor);
    for (long i = 0; i < n; i++) most = fmax(most, fabs(step[i]) / y[i]);
    const double share = most > 0.7 ? 0.7 / most : 1;
    for (long i = 0; i < n; i++) y[i] += share * step[i];
    return most;
}

/* numbers: p, ridge. */
static void balance(struct task *task)
{
    const long count = task->count;
    const double p = task->numbers[0], ridge = task->numbers[1], alpha = 1 / p;
    double norm[MAX_TASKS], logs[MAX_TASKS], log_k[MAX_TASKS] = {0}, y[MAX_TASKS], pull[MAX_TASKS];
    long index[MAX_TASKS], n = 0;
    for (long i = 0; i < count; i++) {
        const double square = task->gram[i * count + i];
        task->weights[i] = 0;
        if (square > 0) index[n] = i, norm[n++] = sqrt(square);
    }
    double *c = task->scratch, *factor = c + n * n, geometric = 0, spread = 0;
    for (long i = 0; i < n; i++) {
        for (long j = 0; j < n; j++)
            c[i * n + j] =
                i == j ? 1 : task->gram[index[i] * count + index[j]] / norm[i] / norm[j];
        geometric += log(norm[i]) / n;
    }
    double square = n * ridge;
    for (long i = 0; i < n; i++) {
        logs[i] = log(norm[i]) - geometric;
        spread = fmax(spread, fabs(logs[i]));
        square += sum_of(c + i * n, n);
    }
    /* Nash's bargain, p = 1, depends on no norm; the best multiple of ones, to begin with. */
    for (long i = 0; i < n; i++) y[i] = sqrt(n / fmax(square, ridge * n));
    /* From there to α = 1/p, move by move: the norms come in. */
    const long moves = p == 1 ? 0 : 1 + (long)(spread * fabs(alpha - 1) / 2 + 2 * log(fmax(p, 1)));
    double now = 1;
    for (long turn = 0, move = 0, since = 0; turn < MOST_STEPS && n > 0; turn++) {
        int exact = 1;
        for (long i = 0; i < n; i++) {
            double terms;
            pull[i] = dot_and_size(c + i * n, y, n, &terms) + ridge * y[i];
            exact &= fabs(pull[i] - exp(log_k[i] - now * log(y[i]))) <= ROUNDING * terms;
        }
        if (!exact) {
            const double most = fmax(now, 1) * improve(c, log_k, now, ridge, n, pull, y, factor);
            /* Quadratic from here: the last step has squared the error. */
            exact = most < (move < moves ? 0.3 : 1e-7) || ++since >= FOR_A_MOVE;
        }
        if (!exact) continue;
        if (move == moves) break;
        const double share = (double)++move / moves;
        now = 1 / (alpha < 1 ? pow(alpha, share) : 1 + (alpha - 1) * share);
        for (long i = 0; i < n; i++) log_k[i] = (now - 1) * logs[i];
        since = 0;
    }
    /* The geometric mean was taken out of k; y grows by its (1 + p)th root. */
    const double unit = exp((p - 1) * geometric / (1 + p));
    for (long i = 0; i < n; i++) task->weights[index[i]] = unit * y[i] / norm[i];
}

SOLVER(balance, 2 * count * count)
