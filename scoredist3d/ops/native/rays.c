/* Ray marching and compositing on the CPU. volume_rendering/ray_marching.py and compositing.py are the reference;
 * marching uses the same float operations in the same order (no contraction into FMA), so that both find exactly the
 * same intervals.
 */
#include <stdint.h>

#define BLOCK 32
#define INLINE static inline __attribute__((always_inline))

INLINE int32_t cell_of(float position, float radius, float cells_per_unit, int32_t last) {
    float cell = (position + radius) * cells_per_unit;
    cell = cell > 0.0f ? cell : 0.0f;
    cell = cell < (float)last ? cell : (float)last;
    return (int32_t)cell;
}

/* Marches one ray; stores the starts of its intervals if `starts` is not NULL. Returns the number of intervals. */
INLINE int64_t march_ray(const float *o, const float *d, float near, float far, float jitter, float step, float radius,
                         float cells_per_unit, const uint8_t *occupancy, int32_t resolution, int64_t max_intervals,
                         float *starts) {
    int64_t count = 0;
    const float half = 0.5f * step;
    for (int64_t first = 0; first < max_intervals; first += BLOCK) {
        float t[BLOCK];
        int32_t cell[BLOCK];
        for (int i = 0; i < BLOCK; i++) t[i] = near + ((float)(int32_t)(first + i) + jitter) * step;
        if (!(t[0] + half < far)) break;
        if (occupancy)
            for (int i = 0; i < BLOCK; i++) {
                const float middle = t[i] + half;
                const int32_t x = cell_of(o[0] + d[0] * middle, radius, cells_per_unit, resolution - 1);
                const int32_t y = cell_of(o[1] + d[1] * middle, radius, cells_per_unit, resolution - 1);
                const int32_t z = cell_of(o[2] + d[2] * middle, radius, cells_per_unit, resolution - 1);
                cell[i] = (x * resolution + y) * resolution + z;
            }
        for (int i = 0; i < BLOCK && first + i < max_intervals && t[i] + half < far; i++)
            if (!occupancy || occupancy[cell[i]]) {
                if (starts) starts[count] = t[i];
                count++;
            }
    }
    return count;
}

/* offsets (R + 1): cumulative number of intervals. */
void sd3d_march_count(const float *origins, const float *directions, const float *near, const float *far,
                      const float *jitter, float step, float radius, float cells_per_unit, const uint8_t *occupancy,
                      int64_t resolution, int64_t max_intervals, int64_t *offsets, int64_t num_rays, int64_t threads) {
    offsets[0] = 0;
#pragma omp parallel for schedule(dynamic, 256) num_threads((int)threads)
    for (int64_t r = 0; r < num_rays; r++)
        offsets[r + 1] = march_ray(origins + 3 * r, directions + 3 * r, near[r], far[r], jitter[r], step, radius,
                                   cells_per_unit, occupancy, (int32_t)resolution, max_intervals, 0);
    for (int64_t r = 0; r < num_rays; r++) offsets[r + 1] += offsets[r];
}

void sd3d_march_fill(const float *origins, const float *directions, const float *near, const float *far,
                     const float *jitter, float step, float radius, float cells_per_unit, const uint8_t *occupancy,
                     int64_t resolution, int64_t max_intervals, const int64_t *offsets, int64_t *ray_indices,
                     float *starts, float *ends, int64_t num_rays, int64_t threads) {
#pragma omp parallel for schedule(dynamic, 256) num_threads((int)threads)
    for (int64_t r = 0; r < num_rays; r++) {
        if (offsets[r + 1] == offsets[r]) continue;
        march_ray(origins + 3 * r, directions + 3 * r, near[r], far[r], jitter[r], step, radius, cells_per_unit,
                  occupancy, (int32_t)resolution, max_intervals, starts + offsets[r]);
        for (int64_t i = offsets[r]; i < offsets[r + 1]; i++) {
            ray_indices[i] = r;
            ends[i] = starts[i] + step;
        }
    }
}

/* exp(-x) = power (1 + rest) for 0 <= x <= 87, with a power of two and a rest accurate to 2 ulp. Written without
 * branches because the exp of the C library does not vectorize. After Cephes: x = n ln 2 - r, exp(r) by its polynomial
 * on [-ln 2 / 2, ln 2 / 2]. NaN stays NaN. */
INLINE float exp_parts(float x, float *rest) {
    const int32_t n = (int32_t)(x * 1.44269504088896341f + 0.5f);
    const float r = (float)n * 0.693359375f - x - (float)n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    *rest = p * r * r + r;
    const union { int32_t i; float f; } power = {(127 - n) << 23};
    return power.f;
}

INLINE float exp_negative(float x) {
    float rest;
    const float power = exp_parts(x, &rest);
    return power + power * rest;
}

/* 1 - exp(-x); accurate also for small x, because 1 - power is exact. */
INLINE float opacity(float x) {
    float rest;
    const float power = exp_parts(x, &rest);
    return (1.0f - power) - power * rest;
}

INLINE float at_most(float x, float limit) { return x > limit ? limit : x; }

#define RAYS_PER_TASK 256

/* weights (M), and transmittance after each interval (M). Optical depths are clamped to max_depth <= 87. */
void sd3d_render_weights(const float *densities, const float *starts, const float *ends, const int64_t *offsets,
                         float max_depth, float *weights, float *after, int64_t num_rays, int64_t threads) {
#pragma omp parallel for schedule(dynamic, 1) num_threads((int)threads)
    for (int64_t first = 0; first < num_rays; first += RAYS_PER_TASK) {
        const int64_t last = first + RAYS_PER_TASK < num_rays ? first + RAYS_PER_TASK : num_rays;
        /* Optical depths before and after each interval, ray by ray; then all exponentials in one vectorized loop. */
        for (int64_t r = first; r < last; r++) {
            double total = 0.0;
            for (int64_t i = offsets[r]; i < offsets[r + 1]; i++) {
                weights[i] = (float)total;
                total += at_most(densities[i] * (ends[i] - starts[i]), max_depth);
                after[i] = (float)total;
            }
        }
        const int64_t end = offsets[last];
#pragma omp simd
        for (int64_t i = offsets[first]; i < end; i++) {
            const float depth = at_most(densities[i] * (ends[i] - starts[i]), max_depth);
            weights[i] = exp_negative(at_most(weights[i], max_depth)) * opacity(depth);
            after[i] = exp_negative(at_most(after[i], max_depth));
        }
    }
}

/* Gradient of the densities: dt_i (g_i T_{i+1} - sum_{j>i} g_j w_j). */
void sd3d_render_weights_gradient(const float *grad, const float *weights, const float *after, const float *densities,
                                  const float *starts, const float *ends, const int64_t *offsets, float max_depth,
                                  float *out, int64_t num_rays, int64_t threads) {
#pragma omp parallel for schedule(dynamic, 256) num_threads((int)threads)
    for (int64_t r = 0; r < num_rays; r++) {
        double behind = 0.0;
        for (int64_t i = offsets[r + 1] - 1; i >= offsets[r]; i--) {
            const float length = ends[i] - starts[i];
            const int cut = densities[i] * length > max_depth;
            out[i] = cut ? 0.0f : length * (float)(grad[i] * after[i] - behind);
            behind += (double)grad[i] * weights[i];
        }
    }
}

/* out (R, C): sums of weights * values (M, C) over each ray; values may be NULL (ones, C = 1). */
void sd3d_accumulate(const float *weights, const float *values, const int64_t *offsets, float *out, int64_t channels,
                     int64_t num_rays, int64_t threads) {
#pragma omp parallel for schedule(dynamic, 256) num_threads((int)threads)
    for (int64_t r = 0; r < num_rays; r++) {
        float *row = out + r * channels;
        for (int64_t c = 0; c < channels; c++) row[c] = 0.0f;
        for (int64_t i = offsets[r]; i < offsets[r + 1]; i++)
            for (int64_t c = 0; c < channels; c++) row[c] += weights[i] * (values ? values[i * channels + c] : 1.0f);
    }
}

/* grad_weights (M) and grad_values (M, C); either may be NULL. */
void sd3d_accumulate_gradient(const float *grad, const float *weights, const float *values, const int64_t *offsets,
                              float *grad_weights, float *grad_values, int64_t channels, int64_t num_rays,
                              int64_t threads) {
#pragma omp parallel for schedule(dynamic, 256) num_threads((int)threads)
    for (int64_t r = 0; r < num_rays; r++) {
        const float *row = grad + r * channels;
        for (int64_t i = offsets[r]; i < offsets[r + 1]; i++) {
            float sum = 0.0f;
            for (int64_t c = 0; c < channels; c++) {
                sum += row[c] * (values ? values[i * channels + c] : 1.0f);
                if (grad_values) grad_values[i * channels + c] = weights[i] * row[c];
            }
            if (grad_weights) grad_weights[i] = sum;
        }
    }
}
