/* The walk over pairs of tasks (PCGrad, AGS, GradVac), and the rescale to the sum's length. */

#include "tasks.h"

static double square_norm(const double *gram, const double *w, long count)
{
    double sum = 0;
    for (long i = 0; i < count; i++) sum += w[i] * dot(gram + i * count, w, count);
    return sum;
}

/* w *= sqrt(1ᵀM1 / wᵀMw), by at most `limit`; w stays where only noise is left of it. */
static void rescale_to_sum(const double *gram, double *w, long count, double limit, double noise)
{
    const double before = sum_of(gram, count * count);
    const double after = square_norm(gram, w, count);
    double size = 0;
    for (long i = 0; i < count; i++) size += fabs(w[i]) * sqrt(fmax(gram[i * count + i], 0));
    if (!(after > noise * size * size)) return;
    const double scale = fmin(sqrt(fmax(before, 0) / after), limit);
    for (long i = 0; i < count; i++) w[i] *= scale;
}

/* weights = Σ_i c_i: row i starts at e_i and loses what opposes an original gradient. */
static void project(struct task *task)
{
    const long count = task->count;
    const double *gram = task->gram;
    const int64_t *orders = task->extra[0];
    double *mine = task->scratch, *w = task->weights;
    for (long k = 0; k < count; k++) w[k] = 0;
    for (long i = 0; i < count; i++) {
        for (long k = 0; k < count; k++) mine[k] = k == i;
        for (long step = 0; step < count; step++) {
            const long j = orders[i * count + step];
            const double square = gram[j * count + j];
            if (j == i || square == 0) continue;
            const double product = dot(mine, gram + j * count, count);
            if (product < 0) mine[j] -= product / square;
        }
        for (long k = 0; k < count; k++) w[k] += mine[k];
    }
}

SOLVER(project, count)

static void ags(struct task *task)
{
    project(task);
    rescale_to_sum(task->gram, task->weights, task->count, task->numbers[0], task->numbers[1]);
}

SOLVER(ags, count)

/* extra: the weights to rescale. */
static void rescale(struct task *task)
{
    const double *given = task->extra[0];
    for (long i = 0; i < task->count; i++) task->weights[i] = given[i];
    rescale_to_sum(task->gram, task->weights, task->count, task->numbers[0], task->numbers[1]);
}

SOLVER(rescale, 0)

/* extra: orders, targets (moved in place). ‖ĝ_i‖ comes from scratch at every step: an update of the
   last one would gather rounding. */
static void vaccinate(struct task *task)
{
    const long count = task->count;
    const double *gram = task->gram, beta = task->numbers[0], most = task->numbers[1];
    const int64_t *orders = task->extra[0];
    double *targets = task->extra[1];
    double *mine = task->scratch, *w = task->weights;
    for (long k = 0; k < count; k++) w[k] = 0;
    for (long i = 0; i < count; i++) {
        double *target = targets + i * count;
        for (long k = 0; k < count; k++) mine[k] = k == i;
        for (long step = 0; step < count; step++) {
            const long j = orders[i * count + step];
            const double norm = sqrt(fmax(gram[j * count + j], 0));
            const double length = sqrt(fmax(square_norm(gram, mine, count), 0));
            if (j == i || !(norm > 0) || !(length > 0)) continue;
            double cosine = dot(mine, gram + j * count, count) / (length * norm);
            cosine = fmin(fmax(cosine, -1), 1);
            const double wanted = target[j], limited = fmin(fmax(wanted, -most), most);
            if (cosine < wanted) {
                const double sine = sqrt(1 - limited * limited);
                const double pull = limited * sqrt(1 - cosine * cosine) - cosine * sine;
                mine[j] += length * pull / (norm * sine);
            }
            target[j] = wanted + beta * (cosine - wanted);
        }
        for (long k = 0; k < count; k++) w[k] += mine[k];
    }
}

SOLVER(vaccinate, count)
