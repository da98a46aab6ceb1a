/* The work on one part of the columns, for one instruction set. `native.c` includes it once for
   each: `NAME` adds the set's suffix, `TARGET` is its function attribute, `WIDTH` the bytes of a
   vector, and 4 × `ACROSS` the tile of the Gram matrix whose sums fit into the registers. */

typedef float NAME(vector) __attribute__((vector_size(WIDTH), aligned(4)));

/* out[r][c] += a[r]·b[c] over n columns: float32 within a lane, double across lanes. */
TARGET static inline __attribute__((always_inline)) void NAME(tile)(
    const int down, const int across, const float *const *a, const float *const *b,
    const float *const *ahead, long n, double *out, long stride)
{
    enum { LANES = WIDTH / sizeof(float) };
    NAME(vector) sums[4][4] = {{{0}}};
    long k = 0;
    for (; k + LANES <= n; k += LANES) {
        for (int r = 0; r < down; r++) __builtin_prefetch(ahead[r] + k, 0, 2);
        NAME(vector) x[4];
        for (int r = 0; r < down; r++) x[r] = *(const NAME(vector) *)(a[r] + k);
        for (int c = 0; c < across; c++) {
            const NAME(vector) y = *(const NAME(vector) *)(b[c] + k);
            for (int r = 0; r < down; r++) sums[r][c] += x[r] * y;
        }
    }
    for (int r = 0; r < down; r++)
        for (int c = 0; c < across; c++) {
            double sum = 0;
            for (int lane = 0; lane < LANES; lane++) sum += sums[r][c][lane];
            for (long rest = k; rest < n; rest++) sum += (double)a[r][rest] * b[c][rest];
            out[r * stride + c] += sum;
        }
}

/* out [padded, padded] += G Gᵀ over columns start to stop; tiles below the diagonal stay out. */
TARGET static void NAME(gram_part)(const struct matrix *g, long start, long stop, double *out)
{
    const long padded = padded_count(g->count);
    const long tiles = padded / 4 * (padded / ACROSS + 4 / ACROSS) / 2;
    for (long k = start; k < stop; k += SEGMENT) {
        const long n = stop - k < SEGMENT ? stop - k : SEGMENT;
        const float *rows[MAX_ROWS], *ahead[4];
        for (long t = 0; t < padded; t++) rows[t] = g->rows + (t < g->count ? t : 0) * g->stride + k;
        if (padded == 2) {
            ahead_of(rows, 2, 0, 1, ahead);
            NAME(tile)(2, 2, rows, rows, ahead, n, out, padded);
            continue;
        }
        long done = 0;
        for (long i = 0; i < padded; i += 4)
            for (long j = i; j < padded; j += ACROSS) {
                ahead_of(rows, g->count, done++, tiles, ahead);
                NAME(tile)(4, ACROSS, rows + i, rows + j, ahead, n, out + i * padded + j, padded);
            }
    }
}

/* sums[i] = (first ? 0 : sums[i]) + Σ_r weight[r] row[r][i]. */
TARGET static inline __attribute__((always_inline)) void NAME(add_rows)(
    const int rows, const int first, const float *row, long stride, const double *weight,
    double *sums, long n)
{
    for (long i = 0; i < n; i++) {
        double sum = first ? weight[0] * row[i] : sums[i] + weight[0] * row[i];
        for (int r = 1; r < rows; r++) sum += weight[r] * row[r * stride + i];
        sums[i] = sum;
    }
}

/* out[start:stop] = Gᵀ w, summed in double, four rows at a time; `out` may be a row of G. */
TARGET static void NAME(combine_part)(const struct matrix *g, const double *weights, float *out,
                                      long start, long stop)
{
    double sums[SEGMENT];
    for (long k = start; k < stop; k += SEGMENT) {
        const long n = stop - k < SEGMENT ? stop - k : SEGMENT;
        for (long t = 0; t < g->count; t += 4) {
            const float *row = g->rows + t * g->stride + k;
            const long rows = g->count - t < 4 ? g->count - t : 4;
#define ADD(count) NAME(add_rows)(count, t == 0, row, g->stride, weights + t, sums, n)
            if (rows == 4) ADD(4);
            else if (rows == 3) ADD(3);
            else if (rows == 2) ADD(2);
            else ADD(1);
#undef ADD
        }
        for (long i = 0; i < n; i++) out[k + i] = (float)sums[i];
    }
}

#undef NAME
#undef TARGET
#undef WIDTH
#undef ACROSS
