/* Closest points and winding numbers of triangle meshes on the CPU. mesh/distance.py is the reference.
 *
 * The bounding volume hierarchy is a complete binary tree: node k has the children 2k + 1 and 2k + 2, which get half of
 * its triangles each, so that ranges of triangles need not be stored. All nodes of the last level are leaves.
 */
#include <float.h>
#include <math.h>
#include <stdint.h>

#define MD_STACK 64
#define MD_LEAF 8 /* triangles per leaf, at most; also stored in vectorizable blocks (9, MD_LEAF) */
#define MD_MOMENTS 16 /* center (3), sum of area normals (3), their first moment about the center (9), radius */

typedef struct {
    double area, center[3], normal[3], moment[9];
} md_sum;

typedef struct {
    int64_t node, first, end;
    float squared; /* squared distance to the box; unused for winding numbers */
} md_visit;

static inline double md_dot(const double *a, const double *b) { return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]; }

static inline void md_cross(const double *a, const double *b, double *out) {
    out[0] = a[1] * b[2] - a[2] * b[1];
    out[1] = a[2] * b[0] - a[0] * b[2];
    out[2] = a[0] * b[1] - a[1] * b[0];
}

/* Partially sorts triangles by centroid along an axis, so that the order is correct at `middle` (quickselect). */
static void md_select(int64_t *order, int64_t first, int64_t end, int64_t middle, const float *centroids, int axis) {
    while (end - first > 1) {
        const float pivot = centroids[3 * order[first + (end - first) / 2] + axis];
        int64_t i = first, j = end - 1;
        while (i <= j) {
            while (centroids[3 * order[i] + axis] < pivot) i++;
            while (centroids[3 * order[j] + axis] > pivot) j--;
            if (i <= j) {
                const int64_t swap = order[i];
                order[i++] = order[j];
                order[j--] = swap;
            }
        }
        if (middle <= j) end = j + 1;
        else if (middle >= i) first = i;
        else return;
    }
}

static int md_widest_axis(const int64_t *order, int64_t first, int64_t end, const float *centroids) {
    float low[3] = {FLT_MAX, FLT_MAX, FLT_MAX}, high[3] = {-FLT_MAX, -FLT_MAX, -FLT_MAX};
    for (int64_t t = first; t < end; t++)
        for (int a = 0; a < 3; a++) {
            const float value = centroids[3 * order[t] + a];
            if (value < low[a]) low[a] = value;
            if (value > high[a]) high[a] = value;
        }
    int axis = 0;
    for (int a = 1; a < 3; a++)
        if (high[a] - low[a] > high[axis] - low[axis]) axis = a;
    return axis;
}

/* Adds the moments of a part to `total`, whose center is already known. */
static void md_add(md_sum *total, const md_sum *part) {
    for (int i = 0; i < 3; i++) {
        total->normal[i] += part->normal[i];
        for (int j = 0; j < 3; j++)
            total->moment[3 * i + j] +=
                part->moment[3 * i + j] + (part->center[i] - total->center[i]) * part->normal[j];
    }
}

static void md_triangle_sum(const float *t, md_sum *sum) {
    double ab[3], ac[3], n[3];
    for (int i = 0; i < 3; i++) {
        ab[i] = (double)t[3 + i] - t[i];
        ac[i] = (double)t[6 + i] - t[i];
        sum->center[i] = ((double)t[i] + t[3 + i] + t[6 + i]) / 3.0;
    }
    md_cross(ab, ac, n);
    for (int i = 0; i < 3; i++) sum->normal[i] = 0.5 * n[i];
    for (int i = 0; i < 9; i++) sum->moment[i] = 0.0; /* first moment about the centroid */
    sum->area = sqrt(md_dot(sum->normal, sum->normal));
}

/* Merges parts: the center is the area-weighted mean of their centers, or the center of the box if the area is 0. */
static md_sum md_join(const md_sum *parts, int64_t count, const float *box) {
    md_sum total = {0};
    for (int64_t p = 0; p < count; p++) total.area += parts[p].area;
    for (int i = 0; i < 3; i++) {
        for (int64_t p = 0; p < count; p++) total.center[i] += parts[p].area * parts[p].center[i];
        total.center[i] = total.area > 0.0 ? total.center[i] / total.area : 0.5 * ((double)box[i] + box[3 + i]);
    }
    for (int64_t p = 0; p < count; p++) md_add(&total, &parts[p]);
    return total;
}

static void md_store(const md_sum *sum, const float *box, float *out) {
    double radius = 0.0;
    for (int i = 0; i < 3; i++) {
        const double reach = fmax(sum->center[i] - box[i], box[3 + i] - sum->center[i]);
        radius += reach * reach;
        out[i] = (float)sum->center[i];
        out[3 + i] = (float)sum->normal[i];
    }
    for (int i = 0; i < 9; i++) out[6 + i] = (float)sum->moment[i];
    out[15] = (float)sqrt(radius);
}

typedef struct {
    const float *triangles, *centroids;
    int64_t *order;
    int64_t first_leaf;
    float *boxes, *moments, *blocks;
} md_builder;

static md_sum md_build_leaf(const md_builder *b, int64_t first, int64_t end, float *box, float *block) {
    md_sum parts[MD_LEAF];
    for (int i = 0; i < 6; i++) box[i] = i < 3 ? FLT_MAX : -FLT_MAX;
    for (int64_t t = first; t < end; t++) {
        const float *triangle = b->triangles + 9 * b->order[t];
        md_triangle_sum(triangle, &parts[t - first]);
        for (int k = 0; k < 9; k++) {
            if (triangle[k] < box[k % 3]) box[k % 3] = triangle[k];
            if (triangle[k] > box[3 + k % 3]) box[3 + k % 3] = triangle[k];
            for (int64_t lane = t - first; lane < MD_LEAF; lane++) block[MD_LEAF * k + lane] = triangle[k];
        }
    }
    return md_join(parts, end - first, box);
}

static md_sum md_build_node(const md_builder *b, int64_t node, int64_t first, int64_t end) {
    float *box = b->boxes + 6 * node;
    md_sum sum;
    if (node >= b->first_leaf) {
        sum = md_build_leaf(b, first, end, box, b->blocks + 9 * MD_LEAF * (node - b->first_leaf));
    } else {
        const int64_t middle = (first + end) / 2;
        md_select(b->order, first, end, middle, b->centroids, md_widest_axis(b->order, first, end, b->centroids));
        const md_sum parts[2] = {md_build_node(b, 2 * node + 1, first, middle),
                                 md_build_node(b, 2 * node + 2, middle, end)};
        const float *left = b->boxes + 6 * (2 * node + 1), *right = left + 6;
        for (int i = 0; i < 3; i++) {
            box[i] = left[i] < right[i] ? left[i] : right[i];
            box[3 + i] = left[3 + i] > right[3 + i] ? left[3 + i] : right[3 + i];
        }
        sum = md_join(parts, 2, box);
    }
    md_store(&sum, box, b->moments + MD_MOMENTS * node);
    return sum;
}

/* triangles (F, 9), centroids (F, 3) -> order (F), boxes (nodes, 6: low, high), moments (nodes, 16), blocks (leaves, 9,
 * MD_LEAF). Leaves have from 1 to MD_LEAF triangles if 2^depth <= F <= MD_LEAF 2^depth. */
void sd3d_mesh_tree(const float *triangles, const float *centroids, int64_t num_triangles, int64_t depth,
                    int64_t *order, float *boxes, float *moments, float *blocks, int64_t threads) {
    (void)threads;
    const md_builder builder = {triangles, centroids, order, ((int64_t)1 << depth) - 1, boxes, moments, blocks};
    for (int64_t t = 0; t < num_triangles; t++) order[t] = t;
    md_build_node(&builder, 0, 0, num_triangles);
}

static inline float md_box_squared(const float *box, const float *p) {
    float squared = 0.0f;
    for (int i = 0; i < 3; i++) {
        const float below = box[i] - p[i], above = p[i] - box[3 + i];
        float out = below > above ? below : above;
        out = out > 0.0f ? out : 0.0f;
        squared += out * out;
    }
    return squared;
}

/* Squared distance to a triangle, and the barycentric coordinates of the closest point. */
static double md_closest(const float *p, const float *t, double *barycentric) {
    double corner[3][3]; /* relative to the point */
    for (int k = 0; k < 3; k++)
        for (int i = 0; i < 3; i++) corner[k][i] = (double)t[3 * k + i] - p[i];
    double ab[3], ac[3], n[3], q[3];
    for (int i = 0; i < 3; i++) {
        ab[i] = corner[1][i] - corner[0][i];
        ac[i] = corner[2][i] - corner[0][i];
    }
    md_cross(ab, ac, n);
    const double nn = md_dot(n, n);
    if (nn > 0.0) {
        md_cross(ac, corner[0], q);
        const double b = md_dot(q, n) / nn;
        md_cross(corner[0], ab, q);
        const double c = md_dot(q, n) / nn;
        if (b >= 0.0 && c >= 0.0 && b + c <= 1.0) {
            const double height = md_dot(corner[0], n);
            barycentric[0] = 1.0 - b - c;
            barycentric[1] = b;
            barycentric[2] = c;
            return height * height / nn;
        }
    }
    double best = DBL_MAX;
    for (int k = 0; k < 3; k++) {
        const double *start = corner[k], *end = corner[(k + 1) % 3];
        double edge[3], offset[3];
        for (int i = 0; i < 3; i++) edge[i] = end[i] - start[i];
        const double length = md_dot(edge, edge);
        double s = length > 0.0 ? -md_dot(start, edge) / length : 0.0;
        s = s < 0.0 ? 0.0 : s > 1.0 ? 1.0 : s;
        for (int i = 0; i < 3; i++) offset[i] = start[i] + s * edge[i];
        const double squared = md_dot(offset, offset);
        if (squared < best) {
            best = squared;
            barycentric[k] = 1.0 - s;
            barycentric[(k + 1) % 3] = s;
            barycentric[(k + 2) % 3] = 0.0;
        }
    }
    return best;
}

/* Processes one side of the triangles of a block: updates the minimum `nearest` of squared distances to sides, and the
 * minimum `least` of signed areas, which is negative if the perpendicular projection is outside the triangle. */
static inline void md_block_side(float (*s)[MD_LEAF], float (*e)[MD_LEAF], float (*n)[MD_LEAF], float *nearest,
                                 float *least) {
    for (int l = 0; l < MD_LEAF; l++) {
        const float sx = s[0][l], sy = s[1][l], sz = s[2][l], ex = e[0][l], ey = e[1][l], ez = e[2][l];
        const float cx = sy * ez - sz * ey, cy = sz * ex - sx * ez, cz = sx * ey - sy * ex;
        const float side = cx * n[0][l] + cy * n[1][l] + cz * n[2][l];
        least[l] = side < least[l] ? side : least[l];
        const float x = ex - sx, y = ey - sy, z = ez - sz;
        float t = -(sx * x + sy * y + sz * z) / (x * x + y * y + z * z + FLT_MIN);
        t = t > 0.0f ? t : 0.0f;
        t = t < 1.0f ? t : 1.0f;
        const float ox = sx + t * x, oy = sy + t * y, oz = sz + t * z;
        const float d = ox * ox + oy * oy + oz * oz;
        nearest[l] = d < nearest[l] ? d : nearest[l];
    }
}

/* Squared distances to the triangles of a block in float, without branches, to find the candidates for md_closest. */
static void md_block_squared(const float *p, const float *block, float *squared) {
    float v[9][MD_LEAF], n[3][MD_LEAF], nearest[MD_LEAF], least[MD_LEAF];
    for (int k = 0; k < 9; k++)
        for (int l = 0; l < MD_LEAF; l++) v[k][l] = block[MD_LEAF * k + l] - p[k % 3];
    for (int l = 0; l < MD_LEAF; l++) {
        const float bx = v[3][l] - v[0][l], by = v[4][l] - v[1][l], bz = v[5][l] - v[2][l];
        const float cx = v[6][l] - v[0][l], cy = v[7][l] - v[1][l], cz = v[8][l] - v[2][l];
        n[0][l] = by * cz - bz * cy;
        n[1][l] = bz * cx - bx * cz;
        n[2][l] = bx * cy - by * cx;
        nearest[l] = FLT_MAX;
        least[l] = FLT_MAX;
    }
    for (int k = 0; k < 3; k++) md_block_side(v + 3 * k, v + 3 * ((k + 1) % 3), n, nearest, least);
    for (int l = 0; l < MD_LEAF; l++) {
        const float height = v[0][l] * n[0][l] + v[1][l] * n[1][l] + v[2][l] * n[2][l];
        const float plane = height * height / (n[0][l] * n[0][l] + n[1][l] * n[1][l] + n[2][l] * n[2][l] + FLT_MIN);
        const float inner = plane < nearest[l] ? plane : nearest[l];
        squared[l] = least[l] < 0.0f ? nearest[l] : inner;
    }
}

static void md_closest_of_tree(const float *p, const float *triangles, const float *blocks, const float *boxes,
                               int64_t num_triangles, int64_t first_leaf, int64_t *place, float *barycentric) {
    md_visit stack[MD_STACK];
    int size = 0;
    double best = DBL_MAX;
    stack[size++] = (md_visit){0, 0, num_triangles, 0.0f};
    while (size > 0) {
        const md_visit visit = stack[--size];
        if ((double)visit.squared > best) continue;
        if (visit.node >= first_leaf) {
            float rough[MD_LEAF];
            md_block_squared(p, blocks + 9 * MD_LEAF * (visit.node - first_leaf), rough);
            for (int64_t t = visit.first; t < visit.end; t++) {
                if (rough[t - visit.first] * 0.9999f > best) continue;
                double found[3];
                const double squared = md_closest(p, triangles + 9 * t, found);
                if (squared < best) {
                    best = squared;
                    *place = t;
                    for (int k = 0; k < 3; k++) barycentric[k] = (float)found[k];
                }
            }
            continue;
        }
        const int64_t left = 2 * visit.node + 1, middle = (visit.first + visit.end) / 2;
        const md_visit a = {left, visit.first, middle, md_box_squared(boxes + 6 * left, p)};
        const md_visit b = {left + 1, middle, visit.end, md_box_squared(boxes + 6 * (left + 1), p)};
        const int a_first = a.squared <= b.squared;
        stack[size++] = a_first ? b : a;
        stack[size++] = a_first ? a : b;
    }
}

/* points (N, 3), sorted triangles (F, 9) -> positions of the closest triangles (N), barycentric coordinates (N, 3). */
void sd3d_mesh_closest(const float *points, int64_t num_points, const float *triangles, const float *blocks,
                       const float *boxes, int64_t num_triangles, int64_t depth, int64_t *places, float *barycentric,
                       int64_t threads) {
    const int64_t first_leaf = ((int64_t)1 << depth) - 1;
#pragma omp parallel for schedule(dynamic, 256) num_threads((int)threads)
    for (int64_t i = 0; i < num_points; i++)
        md_closest_of_tree(points + 3 * i, triangles, blocks, boxes, num_triangles, first_leaf, places + i,
                           barycentric + 3 * i);
}

/* Signed solid angle divided by 4 pi (Van Oosterom and Strackee 1983). */
static double md_solid_angle(const float *p, const float *t) {
    double v[3][3], length[3], q[3];
    for (int k = 0; k < 3; k++) {
        for (int i = 0; i < 3; i++) v[k][i] = (double)t[3 * k + i] - p[i];
        length[k] = sqrt(md_dot(v[k], v[k]));
    }
    md_cross(v[1], v[2], q);
    const double below = length[0] * length[1] * length[2] + md_dot(v[0], v[1]) * length[2] +
                         md_dot(v[1], v[2]) * length[0] + md_dot(v[2], v[0]) * length[1];
    return (double)atan2f((float)md_dot(v[0], q), (float)below) * 0.15915494309189535;
}

/* First-order expansion of the winding number of a node about its center. */
static double md_far_field(const double *r, double squared, const float *m) {
    double dipole = 0.0, trace = 0.0, twice = 0.0;
    for (int i = 0; i < 3; i++) {
        dipole += r[i] * m[3 + i];
        trace += m[6 + 4 * i];
        for (int j = 0; j < 3; j++) twice += r[i] * m[6 + 3 * i + j] * r[j];
    }
    const double cubed = squared * sqrt(squared);
    return (dipole + trace - 3.0 * twice / squared) / cubed * 0.07957747154594767;
}

/* The same for each triangle of a block about its centroid, where the first moment vanishes. `is_far` is set where
 * the distance exceeds accuracy * radius, so that the expansion is sufficiently accurate. */
static void md_block_far_field(const float *p, const float *block, float accuracy, float *share, int32_t *is_far) {
    float v[9][MD_LEAF];
    for (int k = 0; k < 9; k++)
        for (int l = 0; l < MD_LEAF; l++) v[k][l] = block[MD_LEAF * k + l] - p[k % 3];
    for (int l = 0; l < MD_LEAF; l++) {
        const float bx = v[3][l] - v[0][l], by = v[4][l] - v[1][l], bz = v[5][l] - v[2][l];
        const float cx = v[6][l] - v[0][l], cy = v[7][l] - v[1][l], cz = v[8][l] - v[2][l];
        const float x = v[0][l] + (bx + cx) / 3.0f, y = v[1][l] + (by + cy) / 3.0f, z = v[2][l] + (bz + cz) / 3.0f;
        const float flux = x * (by * cz - bz * cy) + y * (bz * cx - bx * cz) + z * (bx * cy - by * cx);
        const float squared = x * x + y * y + z * z;
        /* The distance from corner to centroid is 2/3 of a median, and medians are shorter than the longest side. */
        const float b = bx * bx + by * by + bz * bz, c = cx * cx + cy * cy + cz * cz;
        const float dx = bx - cx, dy = by - cy, dz = bz - cz;
        const float d = dx * dx + dy * dy + dz * dz;
        float longest = b > c ? b : c;
        longest = d > longest ? d : longest;
        is_far[l] = squared > accuracy * accuracy * (4.0f / 9.0f) * longest;
        share[l] = flux / (squared * sqrtf(squared) + FLT_MIN) * 0.03978873577297383f;
    }
}

static double md_winding_of_leaf(const float *p, const float *triangles, const float *block, int64_t count,
                                 float accuracy) {
    float share[MD_LEAF];
    int32_t is_far[MD_LEAF];
    double winding = 0.0;
    md_block_far_field(p, block, accuracy, share, is_far);
    for (int64_t l = 0; l < count; l++) winding += is_far[l] ? (double)share[l] : md_solid_angle(p, triangles + 9 * l);
    return winding;
}

static double md_winding_of_tree(const float *p, const float *triangles, const float *blocks, const float *moments,
                                 int64_t num_triangles, int64_t first_leaf, float accuracy) {
    md_visit stack[MD_STACK];
    int size = 0;
    double winding = 0.0;
    stack[size++] = (md_visit){0, 0, num_triangles, 0.0f};
    while (size > 0) {
        const md_visit visit = stack[--size];
        const float *m = moments + MD_MOMENTS * visit.node;
        const double r[3] = {(double)m[0] - p[0], (double)m[1] - p[1], (double)m[2] - p[2]};
        const double squared = md_dot(r, r), reach = (double)accuracy * m[15];
        if (squared > reach * reach) {
            winding += md_far_field(r, squared, m);
        } else if (visit.node >= first_leaf) {
            const float *block = blocks + 9 * MD_LEAF * (visit.node - first_leaf);
            winding += md_winding_of_leaf(p, triangles + 9 * visit.first, block, visit.end - visit.first, accuracy);
        } else {
            const int64_t left = 2 * visit.node + 1, middle = (visit.first + visit.end) / 2;
            stack[size++] = (md_visit){left + 1, middle, visit.end, 0.0f};
            stack[size++] = (md_visit){left, visit.first, middle, 0.0f};
        }
    }
    return winding;
}

/* points (N, 3), sorted triangles (F, 9) -> winding numbers (N); nodes beyond accuracy * radius use the expansion. */
void sd3d_mesh_winding(const float *points, int64_t num_points, const float *triangles, const float *blocks,
                       const float *moments, int64_t num_triangles, int64_t depth, float accuracy, float *winding,
                       int64_t threads) {
    const int64_t first_leaf = ((int64_t)1 << depth) - 1;
#pragma omp parallel for schedule(dynamic, 256) num_threads((int)threads)
    for (int64_t i = 0; i < num_points; i++)
        winding[i] = (float)md_winding_of_tree(points + 3 * i, triangles, blocks, moments, num_triangles, first_leaf,
                                               accuracy);
}
