/* Compositing of 2D Gaussians on the CPU, tile by tile, and its gradient. splatting/torch_backend.py is the reference;
 * splatting/splat.py has the equations.
 *
 * Results do not depend on the number of threads: tiles are independent, and the gradient of a Gaussian is summed over
 * its tiles in a second pass, in the order of the rows. A tile is processed in strips of LANES pixels of one row;
 * strips that the ellipse of a Gaussian does not touch are skipped, and all loops over the lanes are vectorized.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

#define TILE 16
#define LANES 8
#define STRIPS (TILE / LANES)
#define PIXELS (TILE * TILE)
#define MAX_CHANNELS 64
#define MOMENTS 6 /* gradient columns: mean x, y, conic xx, xy, yy, opacity; the features follow */
#define INLINE static inline __attribute__((always_inline))
#define EACH_LANE for (int i = 0; i < LANES; i++)

typedef struct {
    const float *means, *conics, *features, *opacities;
    const float *reaches; /* per Gaussian: -power at which alpha falls to min_alpha, with some slack */
    const int64_t *gaussians, *offsets;
    int64_t channels, height, width, down, across; /* pixels; tiles */
    float max_alpha, min_alpha, min_transmittance;
} Inputs;

/* Parameters of one Gaussian. */
typedef struct {
    float x, y, xx, xy, yy, opacity, reach;
    const float *features;
} Gaussian;

/* Position of a tile in its image. */
typedef struct {
    int64_t image, first_row, first_column, rows, columns;
} Place;

INLINE Place place_of(const Inputs *s, int64_t tile) {
    Place p = {tile / (s->down * s->across), tile / s->across % s->down * TILE, tile % s->across * TILE, 0, 0};
    p.rows = s->height - p.first_row < TILE ? s->height - p.first_row : TILE;
    p.columns = s->width - p.first_column < TILE ? s->width - p.first_column : TILE;
    return p;
}

INLINE Gaussian load(const Inputs *s, int64_t entry) {
    const int64_t g = s->gaussians[entry];
    return (Gaussian){s->means[2 * g],       s->means[2 * g + 1],     s->conics[3 * g],
                      s->conics[3 * g + 1],  s->conics[3 * g + 2],    s->opacities[g],
                      s->reaches[g],         s->features + g * s->channels};
}

/* First and last (exclusive) strip of a row that the ellipse touches; within the row, -power is
 * 0.5 xx (dx - center)^2 + low. */
INLINE void strips_of(const Gaussian *g, const Place *p, float dy, int *first, int *last) {
    const float low = 0.5f * dy * dy * (g->yy - g->xy * g->xy / g->xx);
    const float room = 2.0f * (g->reach - low) / g->xx;
    *first = *last = 0;
    if (!(room > 0.0f)) return;
    const float center = g->x - g->xy / g->xx * dy - (float)p->first_column - 0.5f, half = sqrtf(room);
    const float from = center - half, to = center + half;
    if (to < 0.0f || from > (float)(TILE - 1)) return;
    *first = from > 0.0f ? (int)(from / LANES) : 0;
    *last = to < (float)(TILE - 1) ? (int)(to / LANES) + 1 : STRIPS;
}

/* exp(x) to 2 ulp, with x clamped to [-20, 20]. After Cephes: x = n ln 2 + r, exp(r) by its polynomial on
 * [-ln 2 / 2, ln 2 / 2]; written out because the exp of the C library does not vectorize. */
INLINE float exponential(float x) {
    x = x < -20.0f ? -20.0f : x > 20.0f ? 20.0f : x;
    const int32_t n = (int32_t)(x * 1.44269504088896341f + 32.5f) - 32;
    const float r = x - (float)n * 0.693359375f + (float)n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    const union { int32_t i; float f; } power = {(127 + n) << 23};
    return power.f + power.f * (p * r * r + r);
}

/* Offsets from the mean, and alpha before the clamp, for a strip. */
INLINE void spread(const Gaussian *g, float first_x, float dy, float *dx, float *alpha) {
    EACH_LANE {
        dx[i] = first_x + (float)i - g->x;
        const float power = -0.5f * (g->xx * dx[i] * dx[i] + g->yy * dy * dy) - g->xy * dx[i] * dy;
        alpha[i] = g->opacity * exponential(power);
    }
}

typedef struct {
    float transmittance[PIXELS];
    int32_t live[PIXELS]; /* -1 until compositing of the pixel stops, then 0 */
    int32_t last[PIXELS]; /* 1 + list position of the last Gaussian drawn */
    int32_t strip_live[PIXELS / LANES];
    float image[MAX_CHANNELS][PIXELS];
} Canvas;

INLINE void draw_strip(const Inputs *s, const Gaussian *g, Canvas *c, int at, float first_x, float dy, int32_t position,
                       const int64_t channels) {
    float dx[LANES], alpha[LANES], weight[LANES];
    float *transmittance = c->transmittance + at;
    int32_t *live = c->live + at, *last = c->last + at, any = 0;
    if (!c->strip_live[at / LANES]) return;
    spread(g, first_x, dy, dx, alpha);
    EACH_LANE {
        const float a = alpha[i] > s->max_alpha ? s->max_alpha : alpha[i];
        const float after = transmittance[i] * (1.0f - a);
        const int32_t seen = a >= s->min_alpha ? live[i] : 0;
        const int32_t drawn = after > s->min_transmittance ? seen : 0;
        live[i] &= ~(seen ^ drawn);
        weight[i] = drawn ? a * transmittance[i] : 0.0f;
        transmittance[i] = drawn ? after : transmittance[i];
        last[i] = drawn ? position : last[i];
    }
    EACH_LANE any |= live[i];
    c->strip_live[at / LANES] = any;
    for (int64_t k = 0; k < channels; k++) {
        const float feature = g->features[k];
        float *row = c->image[k] + at;
        EACH_LANE row[i] += weight[i] * feature;
    }
}

INLINE int any_live(const Canvas *c) {
    int32_t any = 0;
    for (int i = 0; i < PIXELS / LANES; i++) any |= c->strip_live[i];
    return any;
}

INLINE void draw_tile(const Inputs *s, const Place *p, int64_t tile, Canvas *c, const int64_t channels) {
    const int64_t first = s->offsets[tile], count = s->offsets[tile + 1] - first;
    for (int64_t n = 0; n < count; n++) {
        if (n % 16 == 15 && !any_live(c)) return;
        const Gaussian g = load(s, first + n);
        for (int row = 0; row < p->rows; row++) {
            const float dy = (float)(p->first_row + row) + 0.5f - g.y;
            int strip, end;
            strips_of(&g, p, dy, &strip, &end);
            for (; strip < end; strip++)
                draw_strip(s, &g, c, row * TILE + strip * LANES, (float)(p->first_column + strip * LANES) + 0.5f, dy,
                           (int32_t)n + 1, channels);
        }
    }
}

/* State of the backward pass over a tile. */
typedef struct {
    float transmittance[PIXELS]; /* behind the current Gaussian */
    float behind[PIXELS];        /* image composited behind it, dotted with the gradient of the pixel */
    int32_t last[PIXELS], strip_last[PIXELS / LANES];
    float of_image[MAX_CHANNELS][PIXELS], of_opacity[PIXELS];
} Upstream;

/* Sums over the pixels of a Gaussian, per lane: the gradient of its power times 1, dx, dy, dx^2, dx dy, dy^2, and the
 * weight times the gradient of the pixel. */
typedef struct {
    float moments[MOMENTS][LANES], features[MAX_CHANNELS][LANES];
} Sums;

INLINE void strip_gradient(const Inputs *s, const Gaussian *g, Upstream *u, Sums *sums, int at, float first_x, float dy,
                       int32_t position, const int64_t channels) {
    float dx[LANES], alpha[LANES], weight[LANES], value[LANES], slope[LANES];
    if (position > u->strip_last[at / LANES]) return;
    spread(g, first_x, dy, dx, alpha);
    EACH_LANE value[i] = u->of_opacity[at + i];
    for (int64_t k = 0; k < channels; k++) {
        const float feature = g->features[k];
        const float *row = u->of_image[k] + at;
        EACH_LANE value[i] += feature * row[i];
    }
    EACH_LANE {
        const float a = alpha[i] > s->max_alpha ? s->max_alpha : alpha[i];
        const int32_t drawn = position <= u->last[at + i] ? a >= s->min_alpha : 0;
        const float after = u->transmittance[at + i], behind = u->behind[at + i];
        const float before = drawn ? after / (1.0f - a) : after;
        weight[i] = drawn ? a * before : 0.0f;
        slope[i] = drawn && alpha[i] <= s->max_alpha ? before * (value[i] - behind) * alpha[i] : 0.0f;
        u->transmittance[at + i] = before;
        u->behind[at + i] = drawn ? a * value[i] + (1.0f - a) * behind : behind;
    }
    EACH_LANE {
        sums->moments[0][i] += slope[i];
        sums->moments[1][i] += slope[i] * dx[i];
        sums->moments[2][i] += slope[i] * dy;
        sums->moments[3][i] += slope[i] * dx[i] * dx[i];
        sums->moments[4][i] += slope[i] * dx[i] * dy;
        sums->moments[5][i] += slope[i] * dy * dy;
    }
    for (int64_t k = 0; k < channels; k++) {
        const float *row = u->of_image[k] + at;
        EACH_LANE sums->features[k][i] += weight[i] * row[i];
    }
}

INLINE float total(const float *lanes) {
    float sum = 0.0f;
    EACH_LANE sum += lanes[i];
    return sum;
}

/* power = -(xx dx^2 + yy dy^2) / 2 - xy dx dy, dx = pixel - mean; alpha = opacity exp(power). */
INLINE void store_row(const Gaussian *g, const Sums *sums, float *row, const int64_t channels) {
    const float one = total(sums->moments[0]), x = total(sums->moments[1]), y = total(sums->moments[2]);
    row[0] = g->xx * x + g->xy * y;
    row[1] = g->xy * x + g->yy * y;
    row[2] = -0.5f * total(sums->moments[3]);
    row[3] = -total(sums->moments[4]);
    row[4] = -0.5f * total(sums->moments[5]);
    row[5] = one / g->opacity;
    for (int64_t k = 0; k < channels; k++) row[MOMENTS + k] = total(sums->features[k]);
}

INLINE void tile_gradient(const Inputs *s, const Place *p, int64_t tile, Upstream *u, const int64_t *rows, float *out,
                      const int64_t channels) {
    const int64_t first = s->offsets[tile], width = MOMENTS + channels;
    int32_t count = 0;
    for (int i = 0; i < PIXELS; i++) {
        int32_t *strip_last = u->strip_last + i / LANES;
        if (u->last[i] > *strip_last) *strip_last = u->last[i];
        if (u->last[i] > count) count = u->last[i];
    }
    for (int64_t n = s->offsets[tile + 1] - first - 1; n >= count; n--)
        memset(out + rows[first + n] * width, 0, sizeof(float) * (size_t)width);
    for (int64_t n = (int64_t)count - 1; n >= 0; n--) {
        const Gaussian g = load(s, first + n);
        Sums sums;
        memset(sums.moments, 0, sizeof sums.moments);
        memset(sums.features, 0, sizeof(float) * LANES * (size_t)channels);
        for (int row = 0; row < p->rows; row++) {
            const float dy = (float)(p->first_row + row) + 0.5f - g.y;
            int strip, end;
            strips_of(&g, p, dy, &strip, &end);
            for (; strip < end; strip++)
                strip_gradient(s, &g, u, &sums, row * TILE + strip * LANES,
                           (float)(p->first_column + strip * LANES) + 0.5f, dy, (int32_t)n + 1, channels);
        }
        store_row(&g, &sums, out + rows[first + n] * width, channels);
    }
}

/* Runs CALL with a compile-time number of channels if there are 4 (RGB and depth), otherwise with a variable. */
#define WITH_CHANNELS(channels, CALL) \
    if (channels == 4) { CALL(4); }   \
    else { CALL(channels); }

#define INPUT_PARAMETERS                                                                                          \
    const float *means, const float *conics, const float *features, const float *opacities, const float *reaches, \
        const int64_t *gaussians, const int64_t *offsets, int64_t channels, int64_t height, int64_t width,         \
        int64_t batch, float max_alpha, float min_alpha, float min_transmittance
#define INPUT                                                                                                  \
    {means, conics, features, opacities, reaches, gaussians, offsets, channels, height, width,                 \
     (height + TILE - 1) / TILE, (width + TILE - 1) / TILE, max_alpha, min_alpha, min_transmittance}

/* image (B, H, W, K); remaining transmittance (B, H, W); last (B, H, W): 1 + list position of the last Gaussian
 * drawn. */
void sd3d_splat(INPUT_PARAMETERS, float *image, float *transmittance, int32_t *last, int64_t threads) {
    const Inputs s = INPUT;
#pragma omp parallel for schedule(dynamic, 1) num_threads((int)threads)
    for (int64_t tile = 0; tile < batch * s.down * s.across; tile++) {
        const Place p = place_of(&s, tile);
        Canvas c;
        for (int i = 0; i < PIXELS; i++) c.transmittance[i] = 1.0f;
        for (int i = 0; i < PIXELS; i++) c.live[i] = i % TILE < p.columns && i / TILE < p.rows ? -1 : 0;
        for (int i = 0; i < PIXELS / LANES; i++) c.strip_live[i] = c.live[i * LANES];
        memset(c.last, 0, sizeof c.last);
        memset(c.image, 0, sizeof c.image[0] * (size_t)channels);
#define CALL(K) draw_tile(&s, &p, tile, &c, K)
        WITH_CHANNELS(channels, CALL)
#undef CALL
        for (int64_t row = 0; row < p.rows; row++)
            for (int64_t column = 0; column < p.columns; column++) {
                const int64_t i = row * TILE + column;
                const int64_t to = (p.image * height + p.first_row + row) * width + p.first_column + column;
                transmittance[to] = c.transmittance[i];
                last[to] = c.last[i];
                for (int64_t k = 0; k < channels; k++) image[to * channels + k] = c.image[k][i];
            }
    }
}

/* out (P, 6 + K): gradient of each entry, in its row. */
void sd3d_splat_entry_gradient(INPUT_PARAMETERS, const int64_t *rows, const float *transmittance, const int32_t *last,
                               const float *of_image, const float *of_opacity, float *out, int64_t threads) {
    const Inputs s = INPUT;
#pragma omp parallel for schedule(dynamic, 1) num_threads((int)threads)
    for (int64_t tile = 0; tile < batch * s.down * s.across; tile++) {
        const Place p = place_of(&s, tile);
        Upstream u;
        for (int i = 0; i < PIXELS; i++) u.transmittance[i] = 1.0f;
        memset(u.behind, 0, sizeof u.behind);
        memset(u.last, 0, sizeof u.last);
        memset(u.strip_last, 0, sizeof u.strip_last);
        memset(u.of_opacity, 0, sizeof u.of_opacity);
        memset(u.of_image, 0, sizeof u.of_image[0] * (size_t)channels);
        for (int64_t row = 0; row < p.rows; row++)
            for (int64_t column = 0; column < p.columns; column++) {
                const int64_t i = row * TILE + column;
                const int64_t from = (p.image * height + p.first_row + row) * width + p.first_column + column;
                u.transmittance[i] = transmittance[from];
                u.last[i] = last[from];
                u.of_opacity[i] = of_opacity[from];
                for (int64_t k = 0; k < channels; k++) u.of_image[k][i] = of_image[from * channels + k];
            }
#define CALL(K) tile_gradient(&s, &p, tile, &u, rows, out, K)
        WITH_CHANNELS(channels, CALL)
#undef CALL
    }
}

/* out (M, width): row j is the sum of the rows from row_offsets[j] to row_offsets[j + 1] (exclusive). */
void sd3d_sum_rows(const float *rows, const int64_t *row_offsets, float *out, int64_t count, int64_t width,
                   int64_t threads) {
#pragma omp parallel for schedule(static) num_threads((int)threads)
    for (int64_t j = 0; j < count; j++) {
        float *sum = out + j * width;
        memset(sum, 0, sizeof(float) * (size_t)width);
        for (int64_t row = row_offsets[j]; row < row_offsets[j + 1]; row++)
            for (int64_t k = 0; k < width; k++) sum[k] += rows[row * width + k];
    }
}
