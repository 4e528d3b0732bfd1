/* Multiresolution hash grid on the CPU: features, table gradient and point gradient, each also differentiated along a
 * direction (for second derivatives). hash_grid/torch_backend.py is the reference; the arithmetic and its order are the
 * same.
 *
 * Results do not depend on the number of threads: features and point gradients are computed independently per point,
 * and each table entry is summed by one thread in the order of the points.
 */
#include <stdint.h>
#include <string.h>

#define BLOCK 64 /* points per block; index arithmetic is vectorized over a block */
#define MAX_FEATURES 8
#define INLINE static inline __attribute__((always_inline))

typedef struct {
    const float *scales;         /* per level: number of cells along an axis */
    const int64_t *resolutions;  /* number of grid vertices along an axis */
    const int64_t *sizes;        /* number of table entries */
    const int64_t *offsets;      /* first table entry */
    const int64_t *hashed;       /* 1: hashed, 0: dense */
    int64_t num_levels, active_levels, features;
} Grid;

/* Positions of a block of points in one level. */
typedef struct {
    float fraction[3][BLOCK];
    float along[3][BLOCK]; /* direction in cells, only set if there is a direction */
    uint32_t corner[8][BLOCK];
    float weight[8][BLOCK];
} Cells;

INLINE int inside(float x) { return x >= 0.0f && x <= 1.0f; }

INLINE void locate(Cells *c, const Grid *g, int64_t level, const float *points, int64_t count) {
    const float scale = g->scales[level];
    const uint32_t resolution = (uint32_t)g->resolutions[level], size = (uint32_t)g->sizes[level];
    uint32_t low[3][BLOCK];
    for (int d = 0; d < 3; d++)
        for (int64_t i = 0; i < count; i++) {
            float x = points[3 * i + d];
            x = x < 0.0f ? 0.0f : x > 1.0f ? 1.0f : x; /* keeps NaN, which must propagate to the output */
            const float position = x * scale + 0.5f;
            const int32_t cell = position >= 0.0f ? (int32_t)position : 0; /* 0 for NaN */
            low[d][i] = (uint32_t)cell;
            c->fraction[d][i] = position - (float)cell;
        }
    const uint32_t stride_y = g->hashed[level] ? 2654435761u : resolution;
    const uint32_t stride_z = g->hashed[level] ? 805459861u : resolution * resolution;
    for (int corner = 0; corner < 8; corner++) {
        const uint32_t dx = corner & 1, dy = corner >> 1 & 1, dz = corner >> 2 & 1;
        uint32_t *out = c->corner[corner];
        if (g->hashed[level]) {
            for (int64_t i = 0; i < count; i++)
                out[i] = ((low[0][i] + dx) ^ (low[1][i] + dy) * stride_y ^ (low[2][i] + dz) * stride_z) & (size - 1);
        } else {
            /* Overflow occurs only at the far faces of the cube and is less than two sizes for resolution >= 2. */
            for (int64_t i = 0; i < count; i++) {
                const uint32_t index = low[0][i] + dx + (low[1][i] + dy) * stride_y + (low[2][i] + dz) * stride_z;
                out[i] = index >= size ? index - size : index;
            }
        }
    }
}

INLINE void load_direction(Cells *c, const Grid *g, int64_t level, const float *points, const float *direction,
                           int64_t count) {
    for (int d = 0; d < 3; d++)
        for (int64_t i = 0; i < count; i++)
            c->along[d][i] = inside(points[3 * i + d]) ? direction[3 * i + d] * g->scales[level] : 0.0f;
}

/* Trilinear weights, or their derivative along the direction. */
INLINE void weigh(Cells *c, int directed, int64_t count) {
    for (int corner = 0; corner < 8; corner++) {
        const int dx = corner & 1, dy = corner >> 1 & 1, dz = corner >> 2 & 1;
        for (int64_t i = 0; i < count; i++) {
            const float x = dx ? c->fraction[0][i] : 1.0f - c->fraction[0][i];
            const float y = dy ? c->fraction[1][i] : 1.0f - c->fraction[1][i];
            const float z = dz ? c->fraction[2][i] : 1.0f - c->fraction[2][i];
            if (directed)
                c->weight[corner][i] = (dx ? y * z : -(y * z)) * c->along[0][i] +
                                       (dy ? x * z : -(x * z)) * c->along[1][i] +
                                       (dz ? x * y : -(x * y)) * c->along[2][i];
            else
                c->weight[corner][i] = x * y * z;
        }
    }
}

/* Gradient of the trilinear interpolation of eight corner values (in c->weight) with respect to the position in the
 * cell, or of its derivative along the direction, in which only mixed second derivatives occur. */
INLINE void slope(Cells *c, int directed, int64_t count, float out[3][BLOCK]) {
    for (int64_t i = 0; i < count; i++) {
        const float x1 = c->fraction[0][i], y1 = c->fraction[1][i], z1 = c->fraction[2][i];
        const float x0 = 1.0f - x1, y0 = 1.0f - y1, z0 = 1.0f - z1;
        const float v0 = c->weight[0][i], v1 = c->weight[1][i], v2 = c->weight[2][i], v3 = c->weight[3][i];
        const float v4 = c->weight[4][i], v5 = c->weight[5][i], v6 = c->weight[6][i], v7 = c->weight[7][i];
        if (directed) {
            const float xy = (v3 - v2 - v1 + v0) * z0 + (v7 - v6 - v5 + v4) * z1;
            const float xz = (v5 - v4 - v1 + v0) * y0 + (v7 - v6 - v3 + v2) * y1;
            const float yz = (v6 - v4 - v2 + v0) * x0 + (v7 - v5 - v3 + v1) * x1;
            out[0][i] = c->along[1][i] * xy + c->along[2][i] * xz;
            out[1][i] = c->along[0][i] * xy + c->along[2][i] * yz;
            out[2][i] = c->along[0][i] * xz + c->along[1][i] * yz;
        } else {
            out[0][i] = ((v1 - v0) * y0 + (v3 - v2) * y1) * z0 + ((v5 - v4) * y0 + (v7 - v6) * y1) * z1;
            out[1][i] = ((v2 - v0) * x0 + (v3 - v1) * x1) * z0 + ((v6 - v4) * x0 + (v7 - v5) * x1) * z1;
            out[2][i] = ((v4 - v0) * x0 + (v5 - v1) * x1) * y0 + ((v6 - v2) * x0 + (v7 - v3) * x1) * y1;
        }
    }
}

INLINE void encode_block(const Grid *g, const float *points, const float *direction, const float *table, float *out,
                         int64_t count, const int64_t features) {
    Cells c;
    for (int64_t level = 0; level < g->active_levels; level++) {
        const float *entries = table + g->offsets[level] * features;
        locate(&c, g, level, points, count);
        if (direction) load_direction(&c, g, level, points, direction, count);
        if (direction) weigh(&c, 1, count);
        else weigh(&c, 0, count);
        for (int64_t i = 0; i < count; i++) {
            float sum[MAX_FEATURES] = {0};
            for (int corner = 0; corner < 8; corner++) {
                const float *entry = entries + (int64_t)c.corner[corner][i] * features;
                for (int64_t f = 0; f < features; f++) sum[f] += c.weight[corner][i] * entry[f];
            }
            float *row = out + (i * g->num_levels + level) * features;
            for (int64_t f = 0; f < features; f++) row[f] = sum[f];
        }
    }
    const int64_t width = g->num_levels * features, active = g->active_levels * features;
    for (int64_t i = 0; i < count && active < width; i++)
        memset(out + i * width + active, 0, sizeof(float) * (size_t)(width - active));
}

/* Adds the gradient of a block to the entries from `first` to `last` (exclusive) of one level. */
INLINE void scatter_block(const Grid *g, int64_t level, const float *points, const float *direction, const float *grad,
                          float *out, int64_t count, int64_t first, int64_t last, const int64_t features) {
    Cells c;
    float *entries = out + g->offsets[level] * features;
    const int whole = first == 0 && last == g->sizes[level];
    locate(&c, g, level, points, count);
    if (direction) load_direction(&c, g, level, points, direction, count);
    if (direction) weigh(&c, 1, count);
    else weigh(&c, 0, count);
    for (int64_t i = 0; i < count; i++) {
        const float *row = grad + (i * g->num_levels + level) * features;
        for (int corner = 0; corner < 8; corner++) {
            const int64_t index = c.corner[corner][i];
            if (!whole && (index < first || index >= last)) continue;
            for (int64_t f = 0; f < features; f++) entries[index * features + f] += c.weight[corner][i] * row[f];
        }
    }
}

INLINE void point_block(const Grid *g, const float *points, const float *direction, const float *table,
                        const float *grad, float *out, int64_t count, const int64_t features) {
    Cells c;
    float sum[3][BLOCK] = {{0}}, part[3][BLOCK];
    for (int64_t level = 0; level < g->active_levels; level++) {
        const float *entries = table + g->offsets[level] * features;
        locate(&c, g, level, points, count);
        if (direction) load_direction(&c, g, level, points, direction, count);
        for (int corner = 0; corner < 8; corner++)
            for (int64_t i = 0; i < count; i++) {
                const float *row = grad + (i * g->num_levels + level) * features;
                const float *entry = entries + (int64_t)c.corner[corner][i] * features;
                float product = 0.0f;
                for (int64_t f = 0; f < features; f++) product += entry[f] * row[f];
                c.weight[corner][i] = product;
            }
        if (direction) slope(&c, 1, count, part);
        else slope(&c, 0, count, part);
        for (int d = 0; d < 3; d++)
            for (int64_t i = 0; i < count; i++) sum[d][i] += part[d][i] * g->scales[level];
    }
    for (int64_t i = 0; i < count; i++)
        for (int d = 0; d < 3; d++) out[3 * i + d] = inside(points[3 * i + d]) ? sum[d][i] : 0.0f;
}

/* Calls a block function with a compile-time number of features; the Python code accepts only these numbers. */
#define WITH_FEATURES(features, CALL)          \
    switch (features) {                        \
    case 1: { CALL(1); break; }                \
    case 2: { CALL(2); break; }                \
    case 4: { CALL(4); break; }                \
    default: { CALL(8); break; }               \
    }

#define GRID_PARAMETERS                                                                                       \
    const float *scales, const int64_t *resolutions, const int64_t *sizes, const int64_t *offsets,            \
        const int64_t *hashed, int64_t num_levels, int64_t active_levels, int64_t features
#define GRID {scales, resolutions, sizes, offsets, hashed, num_levels, active_levels, features}

/* out (N, L * F); direction may be NULL. */
void sd3d_hash_encode(GRID_PARAMETERS, const float *points, const float *direction, const float *table, float *out,
                      int64_t num_points, int64_t threads) {
    const Grid g = GRID;
    const int64_t blocks = (num_points + BLOCK - 1) / BLOCK, width = num_levels * features;
#pragma omp parallel for schedule(static) num_threads((int)threads)
    for (int64_t b = 0; b < blocks; b++) {
        const int64_t i = b * BLOCK, count = num_points - i < BLOCK ? num_points - i : BLOCK;
        const float *along = direction ? direction + 3 * i : 0;
#define CALL(F) encode_block(&g, points + 3 * i, along, table, out + i * width, count, F)
        WITH_FEATURES(features, CALL)
#undef CALL
    }
}

/* out (num_entries, F), zeroed by the caller. */
void sd3d_hash_table_gradient(GRID_PARAMETERS, const float *points, const float *direction, const float *grad,
                              float *out, int64_t num_points, int64_t threads) {
    const Grid g = GRID;
    const int64_t width = num_levels * features;
    if (active_levels == 0) return;
    /* A task owns a level or, if there are more threads than levels, one of several equal parts of its table. */
    const int64_t parts = threads > active_levels ? (threads + active_levels - 1) / active_levels : 1;
#pragma omp parallel for schedule(dynamic, 1) num_threads((int)threads)
    for (int64_t task = 0; task < active_levels * parts; task++) {
        const int64_t level = active_levels - 1 - task / parts, part = task % parts; /* finest, slowest level first */
        const int64_t first = sizes[level] * part / parts, last = sizes[level] * (part + 1) / parts;
        for (int64_t i = 0; i < num_points; i += BLOCK) {
            const int64_t count = num_points - i < BLOCK ? num_points - i : BLOCK;
            const float *along = direction ? direction + 3 * i : 0;
#define CALL(F) scatter_block(&g, level, points + 3 * i, along, grad + i * width, out, count, first, last, F)
            WITH_FEATURES(features, CALL)
#undef CALL
        }
    }
}

/* out (N, 3). */
void sd3d_hash_point_gradient(GRID_PARAMETERS, const float *points, const float *direction, const float *table,
                              const float *grad, float *out, int64_t num_points, int64_t threads) {
    const Grid g = GRID;
    const int64_t blocks = (num_points + BLOCK - 1) / BLOCK, width = num_levels * features;
#pragma omp parallel for schedule(static) num_threads((int)threads)
    for (int64_t b = 0; b < blocks; b++) {
        const int64_t i = b * BLOCK, count = num_points - i < BLOCK ? num_points - i : BLOCK;
        const float *along = direction ? direction + 3 * i : 0;
#define CALL(F) point_block(&g, points + 3 * i, along, table, grad + i * width, out + 3 * i, count, F)
        WITH_FEATURES(features, CALL)
#undef CALL
    }
}
