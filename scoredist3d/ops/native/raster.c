/* Triangle rasterization on the CPU: visible triangles, silhouettes, and weighted sums of table rows with their
 * gradients. rasterization/torch_backend.py is the reference; the arithmetic (double, no contraction into FMA) and its
 * order are the same, so that all pixels agree.
 *
 * Results do not depend on the number of threads: each pixel and each row of a gradient is computed by one thread.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define EMPTY INT64_MAX
#define MAX_WALK 64

typedef struct {
    double x, y, z, w; /* x, y: pixels from the top left corner, times w; z, w: clip space */
} Vertex;

INLINE Vertex load_vertex(const float *clip, int64_t index, double half_width, double half_height) {
    const float *p = clip + 4 * index;
    const Vertex v = {((double)p[0] + (double)p[3]) * half_width, ((double)p[3] - (double)p[1]) * half_height,
                      (double)p[2], (double)p[3]};
    return v;
}

INLINE double least(double a, double b) { return a < b ? a : b; }
INLINE double most(double a, double b) { return a > b ? a : b; }

/* First and last (exclusive) pixel, within [0, size], whose centers are between two coordinates. */
INLINE void centers_between(double low, double high, int64_t size, int64_t *first, int64_t *last) {
    low = ceil(low - 0.5 - 1e-6);
    high = floor(high - 0.5 + 1e-6) + 1.0;
    *first = (int64_t)least(most(low, 0.0), (double)size);
    *last = (int64_t)least(most(high, 0.0), (double)size);
}

typedef struct {
    double a[3], b[3], c[3]; /* edge functions, positive inside */
    double depth[3];         /* z/w = depth . (x, y, 1) */
    int edge_included[3];    /* whether pixel centers on the edge belong to the triangle */
} Setup;

/* Homogeneous edge functions (Olano & Greer 1997); returns 0 if the triangle is seen edge-on or is not finite. */
INLINE int set_up(const Vertex *v, Setup *s) {
    for (int i = 0; i < 3; i++) {
        const Vertex *p = v + (i + 1) % 3, *q = v + (i + 2) % 3;
        s->a[i] = p->y * q->w - p->w * q->y;
        s->b[i] = p->w * q->x - p->x * q->w;
        s->c[i] = p->x * q->y - p->y * q->x;
    }
    const double determinant = (s->a[0] * v[0].x + s->b[0] * v[0].y) + s->c[0] * v[0].w;
    if (!(fabs(determinant) > 0.0) || isinf(determinant)) return 0;
    const double sign = determinant > 0.0 ? 1.0 : -1.0;
    for (int i = 0; i < 3; i++) {
        s->a[i] *= sign;
        s->b[i] *= sign;
        s->c[i] *= sign;
        s->edge_included[i] = s->a[i] > 0.0 || (s->a[i] == 0.0 && s->b[i] > 0.0);
    }
    const double area = fabs(determinant);
    s->depth[0] = ((s->a[0] * v[0].z + s->a[1] * v[1].z) + s->a[2] * v[2].z) / area;
    s->depth[1] = ((s->b[0] * v[0].z + s->b[1] * v[1].z) + s->b[2] * v[2].z) / area;
    s->depth[2] = ((s->c[0] * v[0].z + s->c[1] * v[1].z) + s->c[2] * v[2].z) / area;
    return 1;
}

INLINE int covers(double value, int edge_included) { return value > 0.0 || (value == 0.0 && edge_included); }

INLINE void draw_row(const Setup *s, double y, int64_t first, int64_t last, int64_t triangle, int64_t *keys) {
    const double r0 = s->b[0] * y + s->c[0], r1 = s->b[1] * y + s->c[1], r2 = s->b[2] * y + s->c[2];
    const double row_depth = s->depth[1] * y + s->depth[2];
    for (int64_t column = first; column < last; column++) {
        const double x = (double)column + 0.5;
        if (!covers(s->a[0] * x + r0, s->edge_included[0]) || !covers(s->a[1] * x + r1, s->edge_included[1]) ||
            !covers(s->a[2] * x + r2, s->edge_included[2]))
            continue;
        const double depth = s->depth[0] * x + row_depth;
        if (!(depth >= -1.0 && depth <= 1.0)) continue;
        int64_t quantized = (int64_t)((depth + 1.0) * 2147483648.0);
        quantized = quantized > 4294967295LL ? 4294967295LL : quantized;
        const int64_t key = (quantized << 31) + triangle; /* orders by depth, then by index */
        if (key < keys[column]) keys[column] = key;
    }
}

INLINE void draw_triangle(const float *clip, const int32_t *face, int64_t triangle, int64_t height, int64_t width,
                          int64_t top, int64_t bottom, int64_t *keys) {
    Vertex v[3];
    for (int i = 0; i < 3; i++) v[i] = load_vertex(clip, face[i], 0.5 * (double)width, 0.5 * (double)height);
    const double nearest = least(least(v[0].w, v[1].w), v[2].w);
    int64_t first_row = 0, last_row = height, first = 0, last = width;
    if (nearest > 0.0) { /* otherwise the triangle crosses the plane of the camera and may cover any pixel */
        const double y0 = v[0].y / v[0].w, y1 = v[1].y / v[1].w, y2 = v[2].y / v[2].w;
        centers_between(least(least(y0, y1), y2), most(most(y0, y1), y2), height, &first_row, &last_row);
        if (first_row >= bottom || last_row <= top || first_row >= last_row) return;
        const double x0 = v[0].x / v[0].w, x1 = v[1].x / v[1].w, x2 = v[2].x / v[2].w;
        centers_between(least(least(x0, x1), x2), most(most(x0, x1), x2), width, &first, &last);
        if (first >= last) return;
    } else if (most(most(v[0].w, v[1].w), v[2].w) <= 0.0) {
        return;
    }
    Setup s;
    if (!set_up(v, &s)) return;
    first_row = first_row > top ? first_row : top;
    last_row = last_row < bottom ? last_row : bottom;
    for (int64_t row = first_row; row < last_row; row++)
        draw_row(&s, (double)row + 0.5, first, last, triangle, keys + (row - top) * width);
}

/* out (B, H, W): visible triangle + 1 of each pixel, or 0. `keys` is working memory of the same shape. */
void sd3d_raster_visible(const float *clip, const int32_t *faces, int64_t *keys, int32_t *out, int64_t batch,
                         int64_t vertices, int64_t triangles, int64_t height, int64_t width, int64_t threads) {
    const int64_t bands = threads < height ? threads : height;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (int64_t task = 0; task < batch * bands; task++) {
        const int64_t image = task / bands, band = task % bands;
        const int64_t top = height * band / bands, bottom = height * (band + 1) / bands;
        int64_t *own = keys + (image * height + top) * width;
        int32_t *result = out + (image * height + top) * width;
        const int64_t pixels = (bottom - top) * width;
        for (int64_t i = 0; i < pixels; i++) own[i] = EMPTY;
        for (int64_t triangle = 0; triangle < triangles; triangle++)
            draw_triangle(clip + image * vertices * 4, faces + 3 * triangle, triangle, height, width, top, bottom, own);
        for (int64_t i = 0; i < pixels; i++)
            result[i] = own[i] == EMPTY ? 0 : (int32_t)(own[i] & 0x7fffffff) + 1;
    }
}

/* A vertex relative to a pixel center, times w: u along and v across the walk. */
typedef struct {
    double u, v, w;
    int32_t index;
} Point;

typedef struct {
    const float *clip;
    const int32_t *faces, *across;
    double half_width, half_height;
    double x, y;      /* center of the pixel where the walk starts */
    double direction; /* 1: right or down, -1: left or up */
    int vertical;
} Walk;

INLINE Point see(const Walk *walk, int32_t index) {
    const Vertex p = load_vertex(walk->clip, index, walk->half_width, walk->half_height);
    const double x = p.x - walk->x * p.w, y = p.y - walk->y * p.w;
    const Point point = {walk->direction * (walk->vertical ? y : x), walk->vertical ? x : y, p.w, index};
    return point;
}

INLINE int above(const Point *p) { return p->v > 0.0; }

/* Shifts the line of the walk by a millionth of the distance to the center of its first triangle, so that it passes
 * through the triangle even if the pixel center is outside due to rounding, and rarely along edges. */
INLINE void move_inside(Walk *walk, Point *p) {
    if (!(least(least(p[0].w, p[1].w), p[2].w) > 0.0)) return;
    const double shift = 1e-6 * (((p[0].v + p[1].v) + p[2].v) / ((p[0].w + p[1].w) + p[2].w));
    for (int k = 0; k < 3; k++) p[k].v -= shift * p[k].w;
    if (walk->vertical) walk->x += shift;
    else walk->y += shift;
}

/* Half-edge (3 face + opposite corner) through which the walk leaves the surface within one pixel, or -1. */
INLINE int64_t walk_to_silhouette(Walk *walk, int64_t face) {
    const int32_t *corners = walk->faces + 3 * face;
    Point p[3] = {see(walk, corners[0]), see(walk, corners[1]), see(walk, corners[2])};
    move_inside(walk, p);
    Point minus = {0}, plus = {0};
    int64_t edge = -1;
    double lu = 0.0, lv = 0.0, lw = 0.0; /* the line through minus and plus */
    for (int e = 0; e < 3 && edge < 0; e++) { /* the edge through which the walk leaves its first triangle */
        const Point *i = p + (e + 1) % 3, *j = p + (e + 2) % 3;
        if (above(i) == above(j)) continue;
        minus = above(i) ? *j : *i;
        plus = above(i) ? *i : *j;
        lu = minus.v * plus.w - plus.v * minus.w;
        lv = minus.w * plus.u - minus.u * plus.w;
        lw = minus.u * plus.v - minus.v * plus.u;
        if (lu < 0.0 && (lu * p[e].u + lv * p[e].v) + lw * p[e].w > 0.0) edge = 3 * face + e;
    }
    for (int step = 0; step < MAX_WALK && edge >= 0; step++) {
        if (!(lu < 0.0) || !(lw + lu <= 0.0)) return -1; /* behind the camera, or beyond the other pixel center */
        const int32_t next = walk->across[edge];
        Point q = {0};
        if (next >= 0) q = see(walk, walk->faces[next]);
        if (next < 0 || (lu * q.u + lv * q.v) + lw * q.w > 0.0) {
            const double slope = fabs(lu) - fabs(lv);
            return slope > 0.0 || (slope == 0.0 && !walk->vertical) ? edge : -1;
        }
        const int32_t dropped = above(&q) ? plus.index : minus.index;
        if (above(&q)) plus = q;
        else minus = q;
        const int64_t base = next / 3 * 3, second = base + (next + 1) % 3, third = base + (next + 2) % 3;
        edge = walk->faces[second] == dropped ? second : third;
        lu = minus.v * plus.w - plus.v * minus.w;
        lv = minus.w * plus.u - minus.u * plus.w;
        lw = minus.u * plus.v - minus.v * plus.u;
    }
    return -1;
}

/* out (B, 2, H, W): silhouette between each pixel and its neighbor to the right (first plane) or below (second plane):
 * 1 + 2 * half_edge + (1 if the nearer surface is that of the neighbor), or 0. */
void sd3d_raster_silhouettes(const float *clip, const int32_t *faces, const int32_t *across, const int32_t *triangle,
                             const float *depth, int64_t *out, int64_t batch, int64_t vertices, int64_t height,
                             int64_t width, int64_t threads) {
#pragma omp parallel for num_threads(threads) schedule(dynamic, 16)
    for (int64_t line = 0; line < batch * height; line++) {
        const int64_t image = line / height, row = line % height;
        Walk walk = {.clip = clip + image * vertices * 4, .faces = faces, .across = across};
        walk.half_width = 0.5 * (double)width;
        walk.half_height = 0.5 * (double)height;
        for (int vertical = 0; vertical < 2; vertical++) {
            int64_t *result = out + ((image * 2 + vertical) * height + row) * width;
            const int64_t step = vertical ? width : 1, end = vertical ? width : width - 1;
            memset(result, 0, sizeof(int64_t) * (size_t)width);
            if (vertical && row + 1 == height) continue;
            walk.vertical = vertical;
            for (int64_t column = 0; column < end; column++) {
                const int64_t here = line * width + column, there = here + step;
                const int32_t a = triangle[here], b = triangle[there];
                if (a == b) continue;
                const int swapped = a == 0 || (b != 0 && depth[there] < depth[here]);
                walk.direction = swapped ? -1.0 : 1.0;
                walk.x = (double)(column + (swapped && !vertical)) + 0.5;
                walk.y = (double)(row + (swapped && vertical)) + 0.5;
                const int64_t edge = walk_to_silhouette(&walk, (swapped ? b : a) - 1);
                if (edge >= 0) result[column] = 1 + 2 * edge + swapped;
            }
        }
    }
}

/* out[n] = sum_k weights[n, k] table[index[n, k]] */
void sd3d_rows_blend(const float *table, const int64_t *index, const float *weights, float *out, int64_t count,
                     int64_t terms, int64_t channels, int64_t threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t n = 0; n < count; n++) {
        float *row = out + n * channels;
        for (int64_t c = 0; c < channels; c++) row[c] = 0.0f;
        for (int64_t k = n * terms; k < (n + 1) * terms; k++) {
            const float *source = table + index[k] * channels;
            for (int64_t c = 0; c < channels; c++) row[c] += weights[k] * source[c];
        }
    }
}

/* out[n, k] = grad[n] . table[index[n, k]] */
void sd3d_rows_weight_gradient(const float *table, const int64_t *index, const float *grad, float *out, int64_t count,
                               int64_t terms, int64_t channels, int64_t threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t n = 0; n < count; n++)
        for (int64_t k = n * terms; k < (n + 1) * terms; k++) {
            const float *source = table + index[k] * channels, *row = grad + n * channels;
            float sum = 0.0f;
            for (int64_t c = 0; c < channels; c++) sum += row[c] * source[c];
            out[k] = sum;
        }
}

/* out[index[n, k]] += weights[n, k] grad[n] (ones if weights is NULL); each row is summed by one thread. */
void sd3d_rows_scatter(const int64_t *index, const float *weights, const float *grad, float *out, int64_t rows,
                       int64_t count, int64_t terms, int64_t channels, int64_t threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t part = 0; part < threads; part++) {
        const int64_t first = rows * part / threads, last = rows * (part + 1) / threads;
        for (int64_t n = 0; n < count; n++)
            for (int64_t k = n * terms; k < (n + 1) * terms; k++) {
                if (index[k] < first || index[k] >= last) continue;
                const float weight = weights ? weights[k] : 1.0f;
                float *target = out + index[k] * channels;
                for (int64_t c = 0; c < channels; c++) target[c] += weight * grad[n * channels + c];
            }
    }
}
