/* Nonnegative quadratic programs on the Gram matrix: UPGrad, DualProj, MGDA, CAGrad, ConicGrad.

   Everything is in scaled variables y = n∘w, n_i = sqrt(M_ii): the matrix has a diagonal of ones,
   however far apart the norms are. Tasks without gradient are left out. The first of a step's
   numbers is the ridge on that diagonal: a rounding error of M. */

#include "tasks.h"

#include <string.h>

enum { MAX_TASKS = 64, PATIENCE = 3, ROOT_STEPS = 100 };

/* How much of its terms a condition may miss: far below the promised 1e-6, above their rounding. */
static const double TOLERANCE = 1e-12;

/* min ½ zᵀAz + qᵀz, z >= 0: A [n, n] positive semidefinite. */
struct program {
    const double *a, *q;
    long n;
    double ridge;
    double *z, *dual; /* [n]: the result; Az + q */
    char passive[MAX_TASKS]; /* where z may be positive: where to begin, and in the end */
    long index[MAX_TASKS], count; /* the same as a list */
    double *factor, *forward; /* Cholesky factor of A over the list, and the right-hand side's part */
};

static double largest(const double *values, long n)
{
    double most = 0;
    for (long i = 0; i < n; i++) most = fmax(most, fabs(values[i]));
    return most;
}

/* One more row of the factor. */
static void append(struct program *p, long i)
{
    const long k = p->count, n = p->n;
    const double *row = p->a + i * n;
    double *mine = p->factor + k * n;
    for (long j = 0; j < k; j++) {
        const double *other = p->factor + j * n;
        mine[j] = (row[p->index[j]] - dot(mine, other, j)) * other[j];
    }
    const double pivot = row[i] + p->ridge - dot(mine, mine, k);
    mine[k] = 1 / sqrt(fmax(pivot, p->ridge)); /* diagonals as their inverses */
    p->forward[k] = (-p->q[i] - dot(mine, p->forward, k)) * mine[k];
    p->index[p->count++] = i;
    p->passive[i] = 1;
}

static void drop(struct program *p, long position)
{
    long later[MAX_TASKS];
    const long rest = p->count - position - 1;
    memcpy(later, p->index + position + 1, sizeof(long) * rest);
    p->passive[p->index[position]] = 0;
    p->count = position;
    for (long j = 0; j < rest; j++) append(p, later[j]);
}

/* z over the list, from the factor and `right`; 0 elsewhere. */
static void back(const struct program *p, const double *right, double *z)
{
    double x[MAX_TASKS];
    memcpy(x, right, sizeof(double) * p->count);
    for (long i = 0; i < p->n; i++) z[i] = 0;
    for (long i = p->count - 1; i >= 0; i--) {
        const double *row = p->factor + i * p->n;
        const double value = x[i] * row[i];
        for (long j = 0; j < i; j++) x[j] -= row[j] * value;
        z[p->index[i]] = value;
    }
}

static void find_dual(struct program *p)
{
    for (long i = 0; i < p->n; i++) p->dual[i] = p->q[i] + dot(p->a + i * p->n, p->z, p->n);
}

static int violated(const struct program *p, long i, double least)
{
    if (p->passive[i] || p->dual[i] >= -least) return 0;
    double terms = 0;
    for (long j = 0; j < p->n; j++) terms += fabs(p->a[i * p->n + j]) * p->z[j];
    return p->dual[i] < -least - TOLERANCE * terms;
}

static void factorise(struct program *p)
{
    p->count = 0;
    for (long i = 0; i < p->n; i++)
        if (p->passive[i]) append(p, i);
}

/* Exchange every variable that is on the wrong side, all at once: a few steps nearly always. */
static int by_blocks(struct program *p, double least)
{
    long best = p->n + 1;
    for (int left = PATIENCE; left > 0; left--) {
        long wrong = 0;
        char moves[MAX_TASKS];
        factorise(p);
        back(p, p->forward, p->z);
        find_dual(p);
        const double negative = -TOLERANCE * largest(p->z, p->n);
        for (long i = 0; i < p->n; i++) {
            moves[i] = p->passive[i] ? p->z[i] < negative : violated(p, i, least);
            wrong += moves[i];
        }
        if (!wrong) return 1;
        for (long i = 0; i < p->n; i++) p->passive[i] ^= moves[i];
        if (wrong < best) best = wrong, left = PATIENCE + 1;
    }
    return 0;
}

/* Lawson and Hanson's active set: the objective falls at every step, so it cannot go in circles. */
static void one_by_one(struct program *p, double least)
{
    double now[MAX_TASKS] = {0};
    char blocked[MAX_TASKS] = {0};
    memset(p->passive, 0, sizeof p->passive);
    p->count = 0;
    for (long step = 0; step < 4 * p->n + 8; step++) {
        memcpy(p->z, now, sizeof(double) * p->n);
        find_dual(p);
        long enter = -1;
        for (long i = 0; i < p->n; i++)
            if (!blocked[i] && (enter < 0 || p->dual[i] < p->dual[enter]) && violated(p, i, least))
                enter = i;
        if (enter < 0) break;
        append(p, enter);
        int moved = 0;
        while (p->count) {
            back(p, p->forward, p->z);
            double share = 1;
            long first = -1;
            for (long j = 0; j < p->count; j++) {
                const double from = now[p->index[j]], to = p->z[p->index[j]];
                if (to > 0) continue;
                const double limit = from > 0 ? from / (from - to) : 0;
                if (first < 0 || limit < share) share = limit, first = j;
            }
            moved |= share > 0;
            for (long i = 0; i < p->n; i++) now[i] += share * (p->z[i] - now[i]);
            if (first < 0) break;
            now[p->index[first]] = 0;
            drop(p, first);
        }
        if (moved)
            memset(blocked, 0, sizeof blocked);
        else
            blocked[enter] = 1; /* rounding: the gradient promises what the step does not keep */
    }
    memcpy(p->z, now, sizeof(double) * p->n);
}

/* Begins with the passive set that is there. */
static void solve_program(struct program *p)
{
    const double least = TOLERANCE * largest(p->q, p->n);
    if (!by_blocks(p, least)) one_by_one(p, least);
    for (long i = 0; i < p->n; i++) p->z[i] = fmax(p->z[i], 0);
}

/* What all of them begin with: the tasks that have a gradient, their norms, the scaled matrix. */
struct scaled {
    long n, task[MAX_TASKS];
    double norm[MAX_TASKS], *c; /* [n, n] */
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
    for (long i = 0; i < count; i++) task->weights[i] = 1.0 / count;
    return s;
}

static struct program program_on(const double *a, const double *q, long n, double ridge, double *memory)
{
    struct program p = {.a = a, .q = q, .n = n, .ridge = ridge};
    p.z = memory;
    p.dual = memory + n;
    p.forward = memory + 2 * n;
    p.factor = memory + 3 * n;
    return p;
}

#define SCRATCH (3 * count * count + 3 * count)

/* w = (1/T) Σ_i the coefficients of g_i's projection onto the dual cone. */
static void upgrad(struct task *task)
{
    const struct scaled s = scale(task);
    const long n = s.n;
    double sums[MAX_TASKS] = {0};
    struct program p = program_on(s.c, NULL, n, task->numbers[0], s.rest);
    for (long i = 0; i < n; i++) {
        /* v = e_i + z: row i of C serves as C e_i. */
        p.q = s.c + i * n;
        for (long j = 0; j < n; j++) p.passive[j] = p.q[j] < 0;
        solve_program(&p);
        for (long j = 0; j < n; j++) sums[j] += s.norm[i] * p.z[j];
    }
    for (long j = 0; j < n; j++)
        task->weights[s.task[j]] = (1 + sums[j] / s.norm[j]) / task->count;
}

SOLVER(upgrad, SCRATCH)

/* q = C y of the mean, in units of the largest norm; y as well. */
static double of_mean(const struct scaled *s, double *y, double *q)
{
    const double most = largest(s->norm, s->n);
    for (long i = 0; i < s->n; i++) y[i] = s->norm[i] / most;
    for (long i = 0; i < s->n; i++) q[i] = dot(s->c + i * s->n, y, s->n);
    return most;
}

/* The mean's projection onto the dual cone. */
static void dualproj(struct task *task)
{
    const struct scaled s = scale(task);
    double y[MAX_TASKS], q[MAX_TASKS];
    const double most = of_mean(&s, y, q);
    struct program p = program_on(s.c, q, s.n, task->numbers[0], s.rest);
    for (long i = 0; i < s.n; i++) p.passive[i] = q[i] < 0;
    solve_program(&p);
    for (long j = 0; j < s.n; j++)
        task->weights[s.task[j]] = (1 + p.z[j] * most / s.norm[j]) / task->count;
}

SOLVER(dualproj, SCRATCH)

/* a_i = smallest norm / n_i, and C + aaᵀ, in which even opposite gradients are none. */
static void lift(const struct scaled *s, double *a, double *lifted)
{
    double least = INFINITY;
    for (long i = 0; i < s->n; i++) least = fmin(least, s->norm[i]);
    for (long i = 0; i < s->n; i++) a[i] = least / s->norm[i];
    for (long i = 0; i < s->n; i++)
        for (long j = 0; j < s->n; j++) lifted[i * s->n + j] = s->c[i * s->n + j] + a[i] * a[j];
}

/* The shortest vector in the convex hull of the gradients. min wᵀMw + κ²(1ᵀw - 1)² over w >= 0 has
   its direction for every κ, and always a solution; κ is the smallest norm. */
static void mgda(struct task *task)
{
    const struct scaled s = scale(task);
    const long n = s.n;
    double *w = task->weights, a[MAX_TASKS], q[MAX_TASKS];
    if (n < task->count) {
        /* A task without gradient: zero lies in the hull. */
        for (long i = 0; i < task->count; i++) w[i] = 1.0 / (task->count - n);
        for (long j = 0; j < n; j++) w[s.task[j]] = 0;
        return;
    }
    lift(&s, a, s.c);
    for (long i = 0; i < n; i++) q[i] = -a[i];
    struct program p = program_on(s.c, q, n, task->numbers[0], s.rest);
    for (long i = 0; i < n; i++) p.passive[i] = a[i] == 1;
    solve_program(&p);
    const double sum = dot(p.z, a, n);
    for (long i = 0; i < n; i++) w[i] = p.z[i] * a[i] / sum;
}

SOLVER(mgda, SCRATCH)

/* The path d(s) = g_0 + Gᵀz(s), the nearest to g_0 with g_i·d >= s for all i: from the mean over its
   projection onto the dual cone, at s = 0, towards MGDA's direction. CAGrad stops where the distance
   to g_0 is a share of ‖g_0‖, ConicGrad where the cosine with g_0 has fallen to a limit. */
struct path {
    struct scaled s;
    double mean[MAX_TASKS], b[MAX_TASKS]; /* n / T and C n / T, in units of the largest norm */
    double most, square; /* that norm; ‖g_0‖² in units of it */
    double noise, limit; /* lengths of less than `noise` beside Σz are rounding; share or cosine */
    int cone;
    double along[3], apart[3]; /* g_0·Gᵀz and ‖Gᵀz‖² as quadratics in what is added to s */
};

/* How far z is beyond the stop, as such a quadratic: negative before it. */
static void beyond(const struct path *p, double *excess)
{
    const double share = p->limit * p->limit * p->square;
    for (int k = 0; k < 3; k++)
        excess[k] = p->cone ? share * (2 * p->along[k] + p->apart[k]) : p->apart[k];
    excess[0] += p->cone ? share * p->square : -share;
    if (!p->cone) return;
    const double along = p->square + p->along[0], slope = p->along[1];
    excess[0] -= along * fabs(along);
    excess[1] -= 2 * fabs(along) * slope;
    excess[2] -= along > 0 ? slope * slope : -slope * slope;
}

/* z(s); returns by how much s should change, NAN where no change within this passive set does. */
static double walk(struct path *path, struct program *p, double *q, const double *a, double s,
                   double *excess)
{
    const long n = p->n;
    double slope[MAX_TASKS], right[MAX_TASKS], z[MAX_TASKS], turned[MAX_TASKS], quadratic[3];
    /* The limit changes nothing: at levels below 0 no product moves by more than ‖g_0‖. */
    const double most = 4 * (sqrt(path->square) + largest(path->b, n));
    for (long i = 0; i < n; i++) q[i] = fmin(path->b[i] - s * a[i], most);
    solve_program(p);
    for (long k = 0; k < p->count; k++) {
        const double *row = p->factor + k * n;
        right[k] = (a[p->index[k]] - dot(row, right, k)) * row[k];
    }
    back(p, right, slope);
    memcpy(z, p->z, sizeof(double) * n);
    for (long i = 0; i < n; i++) turned[i] = dot(path->s.c + i * n, slope, n);
    path->along[0] = dot(path->b, z, n);
    path->along[1] = dot(path->b, slope, n);
    path->along[2] = 0;
    path->apart[1] = 2 * dot(turned, z, n);
    path->apart[2] = fmax(dot(turned, slope, n), 0);
    for (long i = 0; i < n; i++) turned[i] = dot(path->s.c + i * n, z, n);
    path->apart[0] = fmax(dot(turned, z, n), 0);
    beyond(path, quadratic);
    *excess = quadratic[0];
    const double root = quadratic[1] * quadratic[1] - 4 * quadratic[2] * quadratic[0];
    return root < 0 ? NAN : -2 * quadratic[0] / (quadratic[1] + sqrt(root));
}

/* Fills z, [n]. */
static void follow(struct path *path, double ridge, double *z)
{
    const long n = path->s.n;
    double a[MAX_TASKS], q[MAX_TASKS], excess;
    double *lifted = path->s.rest;
    const double size = largest(path->b, n) + sqrt(path->square);
    struct program p = program_on(path->s.c, q, n, ridge, lifted + n * n);
    lift(&path->s, a, lifted);
    for (long i = 0; i < n; i++) p.passive[i] = path->b[i] < 0;
    walk(path, &p, q, a, 0, &excess);
    memcpy(z, p.z, sizeof(double) * n);
    /* Below level 0 every program has a solution. Above it none may; one on C + aaᵀ always has, and
       it solves the plain one at the level s - Σ az. `distance` from the start is found. */
    const int above = excess < 0;
    const double start = above ? dot(a, z, n) : 0;
    double near = 1e-16 * size, far = 1e10 * size;
    for (long i = 0; i < n; i++) far = fmax(far, -2 * path->b[i] / a[i]);
    if (above) p.a = lifted;
    double distance = above ? far : near;
    for (int step = 0; step < ROOT_STEPS; step++) {
        const double s = above ? start + distance : -distance;
        const double change = walk(path, &p, q, a, s, &excess);
        if ((excess > 0) == above)
            far = distance;
        else
            near = distance;
        if (fabs(change) <= 1e-14 * distance || far - near <= 1e-15 * far) break;
        const double found = above ? distance + change : distance - change;
        distance = found > near && found < far ? found
                   : far > 4 * near            ? sqrt(near) * sqrt(far)
                                               : near + (far - near) / 2;
    }
    /* Where Gᵀz is what rounding leaves of terms that cancel, some gradients oppose each other, and
       no direction serves all: level 0 is the best, and the nearest d that reaches it stands. */
    const double square = path->apart[0] + (path->cone ? path->square + 2 * path->along[0] : 0);
    if (above && sum_of(p.z, n) * path->noise > sqrt(fmax(square, 0))) return;
    memcpy(z, p.z, sizeof(double) * n);
}

static void stop_on_path(struct task *task, int cone)
{
    struct path path = {.s = scale(task), .cone = cone};
    const long n = path.s.n;
    path.noise = task->numbers[1], path.limit = task->numbers[2];
    path.most = of_mean(&path.s, path.mean, path.b);
    for (long i = 0; i < n; i++) path.mean[i] /= task->count, path.b[i] /= task->count;
    path.square = dot(path.mean, path.b, n);
    double z[MAX_TASKS];
    /* The mean itself: no length to measure by, a ball or a cone of nothing else, one task. */
    if (!(path.square > 0) || path.limit == cone || task->count == 1) return;
    follow(&path, task->numbers[0], z);
    for (long i = 0; i < n; i++)
        task->weights[path.s.task[i]] += z[i] * path.most / path.s.norm[i];
    if (!cone) return;
    double y[MAX_TASKS], square = 0;
    for (long i = 0; i < n; i++) y[i] = path.mean[i] + z[i];
    for (long i = 0; i < n; i++) square += y[i] * dot(path.s.c + i * n, y, n);
    const double length = sqrt(fmax(square, 0));
    if (!(length > path.noise * sum_of(y, n))) return;
    for (long i = 0; i < task->count; i++) task->weights[i] *= sqrt(path.square) / length;
}

static void cagrad(struct task *task)
{
    stop_on_path(task, 0);
}

SOLVER(cagrad, SCRATCH)

static void conicgrad(struct task *task)
{
    stop_on_path(task, 1);
}

SOLVER(conicgrad, SCRATCH)
