/* Judge a folder of cases without Python: HDF5 by libhdf5, manifests by cJSON.

   check FOLDER          every case of FOLDER/index.json

   Recomputed from the stored arrays: S = sum of x xT over the kept rows (A and G before the division),
   M = U diag(values) UT, UT U = I, the mask as a share of the mass, W' = U_G (C o M) U_AT.
   Of a certified case (version 2) also, to thirty digits: that each number is the float64 nearest to what is proved, that S, the
   gradients of linear layers, the loss and the logits are what the rows prove, S U = n U diag(values), UT U = I, n sum of values = tr S, and W'.
   Exit status 0: valid and acceptable cases hold, invalid ones do not. 1: one is otherwise. 2: usage. */

#include <cjson/cJSON.h>
#include <float.h>
#include <hdf5.h>
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MOST 512
#define NAME 512

typedef struct { size_t n; hsize_t shape[4]; int rank; double *x; } array;
typedef struct { char names[MOST][NAME]; int count; const char *first, *last; } list;
typedef struct { double sums, basis, edits, mass; } budgets;
typedef struct { hid_t file; budgets budget; int done, failed; char worst[NAME * 2]; } judged;

static void die(const char *what, const char *where) {
    fprintf(stderr, "check: %s: %s\n", what, where);
    exit(1);
}

/* ------------------------------------------------------------------ reading */

static array at(hid_t file, char *path) {
    array a = {0};
    for (char *p = path + 1; (p = strchr(p, '/')); p++) { /* is every group on the way there? */
        *p = 0;
        htri_t there = H5Lexists(file, path, H5P_DEFAULT);
        *p = '/';
        if (there <= 0) return a;
    }
    if (H5Lexists(file, path, H5P_DEFAULT) <= 0) return a;
    hid_t set = H5Dopen2(file, path, H5P_DEFAULT);
    if (set < 0) die("no dataset", path);
    hid_t space = H5Dget_space(set);
    a.rank = H5Sget_simple_extent_ndims(space);
    if (a.rank > 4) die("too many axes", path);
    H5Sget_simple_extent_dims(space, a.shape, NULL);
    a.n = (size_t)H5Sget_simple_extent_npoints(space);
    a.x = malloc((a.n ? a.n : 1) * sizeof *a.x);
    if (!a.x || H5Dread(set, H5T_NATIVE_DOUBLE, H5S_ALL, H5S_ALL, H5P_DEFAULT, a.x) < 0)
        die("cannot read", path);
    H5Sclose(space);
    H5Dclose(set);
    return a;
}

static array get(hid_t file, const char *first, const char *layer, const char *last) {
    char path[NAME * 2];
    snprintf(path, sizeof path, "%s/%s/%s", first, layer, last);
    return at(file, path);
}

static herr_t visit(hid_t group, const char *name, const H5L_info_t *info, void *data) {
    list *found = data;
    size_t n = strlen(name), f = strlen(found->first), l = strlen(found->last);
    (void)group;
    (void)info;
    if (n > f + l && !strncmp(name, found->first, f) && !strcmp(name + n - l, found->last)) {
        if (found->count == MOST || n - f - l >= NAME) die("too many layers", name);
        memcpy(found->names[found->count], name + f, n - f - l);
        found->names[found->count++][n - f - l] = 0;
    }
    return 0;
}

static void layers_of(hid_t file, const char *first, const char *last, list *found) {
    found->count = 0;
    found->first = first;
    found->last = last;
    if (H5Lvisit(file, H5_INDEX_NAME, H5_ITER_NATIVE, visit, found) < 0) die("cannot list", first);
}

static cJSON *json(const char *folder, const char *name) {
    char path[NAME * 2];
    snprintf(path, sizeof path, "%s/%s.json", folder, name);
    FILE *file = fopen(path, "rb");
    if (!file) die("cannot open", path);
    fseek(file, 0, SEEK_END);
    long size = ftell(file);
    rewind(file);
    char *text = calloc((size_t)size + 1, 1);
    if (!text || fread(text, 1, (size_t)size, file) != (size_t)size) die("cannot read", path);
    fclose(file);
    cJSON *made = cJSON_Parse(text);
    if (!made) die("is not JSON", path);
    free(text);
    return made;
}

static double number(const cJSON *in, const char *key) {
    const cJSON *value = cJSON_GetObjectItemCaseSensitive(in, key);
    if (!cJSON_IsNumber(value)) die("the manifest lacks", key);
    return value->valuedouble;
}

/* ------------------------------------------------------------------ comparing */

/* error <= budget; NaN is not */
static void note(judged *j, const char *what, const char *layer, double error, double budget) {
    j->done++;
    if (error <= budget) return;
    if (!j->failed++)
        snprintf(j->worst, sizeof j->worst, "%s of %s: %.3g > %.3g", what, layer, error, budget);
}

static double apart(const double *x, const double *y, size_t n) {
    double sum = 0;
    for (size_t i = 0; i < n; i++) sum += (x[i] - y[i]) * (x[i] - y[i]);
    return sqrt(sum);
}

static double size_of(const double *x, size_t n) {
    double sum = 0;
    for (size_t i = 0; i < n; i++) sum += x[i] * x[i];
    return sqrt(sum);
}

/* S against the sum of x xT over the rows where keep is not 0 */
static void one_sum(judged *j, const char *group, const char *layer, const char *part,
                    const char *rows, array keep) {
    array S = get(j->file, group, layer, part), x = get(j->file, "rows", layer, rows);
    if (S.x && x.x) {
        size_t d = (size_t)x.shape[x.rank - 1];
        double *want = calloc(d * d, sizeof *want), trace = 0;
        if (S.n != d * d || x.n != keep.n * d) die("shapes differ", layer);
        for (size_t r = 0; r < keep.n; r++)
            for (size_t p = 0; keep.x[r] != 0 && p < d; p++)
                for (size_t q = 0; q < d; q++) want[p * d + q] += x.x[r * d + p] * x.x[r * d + q];
        for (size_t p = 0; p < d; p++) trace += want[p * d + p];
        double error = apart(S.x, want, d * d);
        note(j, part, layer, error ? error / (trace > 0 ? trace : 1e-308) : 0, j->budget.sums);
        free(want);
    }
    free(S.x);
    free(x.x);
}

static void sums(judged *j, const char *layer) {
    array keep = get(j->file, "rows", layer, "kept");
    double rows = 0;
    for (size_t r = 0; r < keep.n; r++) rows += keep.x[r] != 0;
    one_sum(j, "factors", layer, "sum_A", "a", keep);
    one_sum(j, "factors", layer, "sum_G", "g_sampled", keep);
    one_sum(j, "empirical", layer, "sum_G", "g", keep);
    const char *counts[] = {"n_A", "n_G"};
    for (int side = 0; side < 2; side++) {
        array n = get(j->file, "factors", layer, counts[side]);
        if (n.x) note(j, counts[side], layer, fabs(n.x[0] - rows), 0);
        free(n.x);
    }
    free(keep.x);
}

static void one_basis(judged *j, const char *layer, const char *U_name, const char *values,
                      const char *S_name, const char *n_name) {
    array U = get(j->file, "basis", layer, U_name), v = get(j->file, "basis", layer, values);
    array S = get(j->file, "factors", layer, S_name), n = get(j->file, "factors", layer, n_name);
    size_t d = v.n, r = U.rank == 2 ? (size_t)U.shape[1] : 0; /* r < d: the other values may be 0 */
    if (U.n != d * r || r > d) die("shapes differ", layer);
    double *made = calloc(d * d, sizeof *made), *square = calloc(d * d, sizeof *square);
    double *one = calloc(d * d, sizeof *one), rise = 0;
    for (size_t p = 0; p < d; p++)
        for (size_t q = 0; q < d; q++)
            for (size_t k = 0; k < r; k++) made[p * d + q] += U.x[p * r + k] * v.x[k] * U.x[q * r + k];
    for (size_t p = 0; p < r; p++) {
        one[p * r + p] = 1;
        for (size_t q = 0; q < r; q++)
            for (size_t k = 0; k < d; k++) square[p * r + q] += U.x[k * r + p] * U.x[k * r + q];
    }
    if (S.x && n.x && size_of(S.x, d * d) > 0) {
        for (size_t p = 0; p < d * d; p++) S.x[p] /= n.x[0];
        note(j, U_name, layer, apart(made, S.x, d * d) / size_of(S.x, d * d), j->budget.basis);
    }
    note(j, U_name, layer, apart(square, one, r * r) / sqrt((double)d), j->budget.basis);
    for (size_t k = 0; k < d; k++) {
        if (-v.x[k] > rise) rise = -v.x[k];
        if (k && v.x[k] - v.x[k - 1] > rise) rise = v.x[k] - v.x[k - 1];
    }
    note(j, values, layer, rise, 0);
    free(made), free(square), free(one), free(U.x), free(v.x), free(S.x), free(n.x);
}

/* the largest keys, enough of them, and not one more */
static void one_mask(judged *j, const char *layer, array mask, array lam, array mu, double rho) {
    double total = 0, mass = 0, least = INFINITY, most = 0;
    for (size_t i = 0; i < lam.n; i++)
        for (size_t k = 0; k < mu.n; k++) {
            double key = (lam.x[i] / lam.x[0]) * (mu.x[k] / mu.x[0]);
            total += key;
            if (mask.x[i * mu.n + k] != 0) {
                mass += key;
                if (key < least) least = key;
            } else if (key > most)
                most = key;
        }
    note(j, "mask, its order,", layer, most > least ? most - least : 0, j->budget.mass);
    note(j, "mask, its share,", layer, (rho * total - mass) / total, j->budget.mass);
    if (mass > 0) note(j, "mask, its last pair,", layer, (mass - least) / total - rho, j->budget.mass);
}

static void one_edit(judged *j, const char *layer, const char *share, double rho) {
    char group[64];
    snprintf(group, sizeof group, "edits/%s", share);
    array mask = get(j->file, group, layer, "mask"), got = get(j->file, group, layer, "weight");
    if (!mask.x || !got.x) return;
    array lam = get(j->file, "basis", layer, "lam"), mu = get(j->file, "basis", layer, "mu");
    array V = get(j->file, "basis", layer, "U_A"), U = get(j->file, "basis", layer, "U_G");
    array W = get(j->file, "weights/parameters", layer, "weight");
    if (!W.x) W = get(j->file, "weights/parameters", "embed", "weight"); /* a tied head */
    size_t O = lam.n, I = mu.n, R = (size_t)U.shape[1], Q = (size_t)V.shape[1];
    if (!W.x || U.n != O * R || V.n != I * Q || R > O || Q > I || W.n != O * I || mask.n != O * I || got.n != O * I) die("shapes differ", layer);
    one_mask(j, layer, mask, lam, mu, rho);
    double *want = calloc(O * I, sizeof *want);
    for (size_t i = 0; i < R; i++)
        for (size_t k = 0; k < Q; k++) {
            double C = 0;
            if (mask.x[i * I + k] == 0) continue;
            for (size_t o = 0; o < O; o++)
                for (size_t p = 0; p < I; p++) C += U.x[o * R + i] * W.x[o * I + p] * V.x[p * Q + k];
            for (size_t o = 0; o < O; o++)
                for (size_t p = 0; p < I; p++) want[o * I + p] += U.x[o * R + i] * C * V.x[p * Q + k];
        }
    note(j, "edited weight", layer, apart(got.x, want, O * I) / size_of(W.x, O * I), j->budget.edits);
    free(want), free(mask.x), free(got.x), free(lam.x), free(mu.x), free(V.x), free(U.x), free(W.x);
}

/* ------------------------------------------------------------------ certified cases

   A number lies within `radius` of x + low: relative |x|; where x is 0, absolute if low is not 0, or else 0.
   Sums are made of pairs of doubles. With u = 2^-53 a product errs by 4 u^2 of itself, a sum by 3.1 u^2
   (Joldes, Muller, Popescu 2017), so n products by (4 n + 8) u^2 of their magnitudes: the float budget. */

typedef struct { array x, low; double relative, absolute, settled, *radii; } ball; /* radii: of what is made here */
typedef struct { double high, low; } pair;

static pair quick(double a, double b) { /* |a| >= |b|, or a is 0 */
    double s = a + b;
    return (pair){s, b - (s - a)};
}

static pair both(double a, double b) {
    double s = a + b, t = s - a;
    return (pair){s, (a - (s - t)) + (b - t)};
}

static pair plus(pair a, pair b) {
    pair s = both(a.high, b.high), t = both(a.low, b.low), v = quick(s.high, s.low + t.high);
    return quick(v.high, t.low + v.low);
}

static pair times(pair a, pair b) {
    double high = a.high * b.high, rest = fma(a.high, b.high, -high);
    double cross = fma(a.low, b.high, fma(a.high, b.low, a.low * b.low));
    return quick(high, rest + cross);
}

static double attribute(hid_t file, const char *path, const char *name) {
    double value;
    hid_t own = H5Aopen_by_name(file, path, name, H5P_DEFAULT, H5P_DEFAULT);
    if (own < 0 || H5Aread(own, H5T_NATIVE_DOUBLE, &value) < 0) die("no attribute of", path);
    H5Aclose(own);
    return value;
}

static ball ball_at(hid_t file, char *path) {
    char low[NAME * 2 + 8];
    snprintf(low, sizeof low, "%s_low", path);
    ball b = {.x = at(file, path), .low = at(file, low)};
    if (!b.x.x || !b.low.x) return (ball){0};
    if (b.x.n != b.low.n) die("shapes differ", path);
    b.relative = attribute(file, path, "relative"), b.absolute = attribute(file, path, "absolute");
    b.settled = attribute(file, path, "settled");
    return b;
}

static ball get_ball(hid_t file, const char *first, const char *layer, const char *last) {
    char path[NAME * 2];
    snprintf(path, sizeof path, "%s/%s/%s", first, layer, last);
    return ball_at(file, path);
}

static void drop(ball b) { free(b.x.x), free(b.low.x), free(b.radii); }

static double radius(const ball *b, size_t i) {
    if (b->radii) return b->radii[i];
    double x = fabs(b->x.x[i]);
    return x == 0 ? (b->low.x[i] == 0 ? 0 : b->absolute) : b->relative * x;
}

static pair middle(const ball *b, size_t i) { return (pair){b->x.x[i], b->low.x[i]}; }

/* so many entries of one value, exactly */
static ball made(size_t n, double fill) {
    ball b = {.x = {.n = n, .x = calloc(n ? n : 1, sizeof(double))}, .radii = calloc(n ? n : 1, sizeof(double))};
    b.low = (array){.n = n, .x = calloc(n ? n : 1, sizeof(double))};
    for (size_t i = 0; i < n; i++) b.x.x[i] = fill;
    return b;
}

/* entry i of b becomes sign times entry k of another */
static void put(ball *b, size_t i, const ball *from, size_t k, double sign) {
    b->x.x[i] = sign * from->x.x[k], b->low.x[i] = sign * from->low.x[k], b->radii[i] = radius(from, k);
}

/* the sum over rows of one[r][p] other[r][q], and how far off it may be; rows where keep is 0 are left out */
static pair total(const ball *one, const ball *other, size_t P, size_t Q, size_t p, size_t q, const array *keep,
                  double *allowed) {
    size_t rows = one->x.n / P;
    double unit = 0x1p-106 * (4 * (double)rows + 8);
    pair sum = {0, 0};
    *allowed = 0;
    for (size_t r = 0; r < rows; r++) {
        if (keep && keep->x[r] == 0) continue;
        size_t a = r * P + p, b = r * Q + q;
        double x = fabs(one->x.x[a]), y = fabs(other->x.x[b]), e = radius(one, a), f = radius(other, b);
        sum = plus(sum, times(middle(one, a), middle(other, b)));
        *allowed += x * f + y * e + 2 * e * f + unit * x * y;
    }
    return sum;
}

/* claimed (P, Q) against that sum */
static void proved(judged *j, const char *what, const char *layer, const ball *claimed, const ball *one,
                   const ball *other, size_t P, size_t Q, const array *keep) {
    size_t rows = P ? one->x.n / P : 0;
    double worst = 0;
    if (claimed->x.n != P * Q || other->x.n != rows * Q || (keep && keep->n != rows))
        die("shapes differ", layer);
    for (size_t p = 0; p < P; p++)
        for (size_t q = 0; q < Q; q++) {
            double allowed;
            pair sum = total(one, other, P, Q, p, q, keep, &allowed), own = middle(claimed, p * Q + q);
            pair far = plus(sum, (pair){-own.high, -own.low});
            double error = fabs(far.high + far.low);
            allowed = (allowed + radius(claimed, p * Q + q)) * (1 + 1e-9); /* more than these few sums of radii lose */
            if (error > allowed || error != error) worst = allowed > 0 ? fmax(worst, error / allowed) : INFINITY;
        }
    note(j, what, layer, worst, 0);
}

/* the transpose of (rows, columns) */
static ball turned(ball b, size_t rows, size_t columns) {
    ball t = made(b.x.n, 0);
    if (b.x.n != rows * columns) die("shapes differ", "transpose");
    for (size_t r = 0; r < rows; r++)
        for (size_t c = 0; c < columns; c++) put(&t, c * rows + r, &b, r * columns + c, 1);
    return t;
}

/* (P, Q), the sum over rows; one and other are dropped */
static ball product(ball one, ball other, size_t P, size_t Q) {
    ball b = made(P * Q, 0);
    if (P && other.x.n != one.x.n / P * Q) die("shapes differ", "product");
    for (size_t p = 0; p < P; p++)
        for (size_t q = 0; q < Q; q++) {
            double *allowed = b.radii + p * Q + q;
            pair sum = total(&one, &other, P, Q, p, q, NULL, allowed);
            b.x.x[p * Q + q] = sum.high, b.low.x[p * Q + q] = sum.low, *allowed *= 1 + 1e-9;
        }
    drop(one), drop(other);
    return b;
}

/* is each x the float64 nearest to its number, and are as many proved to be as the file says? */
static void one_settled(judged *j, char *path) {
    ball b = ball_at(j->file, path);
    double count = 0, odd = 0, wide = 0, most = 0;
    for (size_t i = 0; i < b.x.n; i++) most = fmax(most, fabs(b.x.x[i]));
    for (size_t i = 0; i < b.x.n; i++) {
        double e = radius(&b, i);
        wide += !(e >= 0 && e <= (most > 0 ? most * 1e-30 : DBL_MAX)); /* NaN is too wide */
    }
    note(j, "radius that leaves fewer than thirty digits", path, wide, 0);
    for (size_t i = 0; i < b.x.n; i++) {
        double x = fabs(b.x.x[i]), gap = x - nextafter(x, 0), low = fabs(b.low.x[i]), e = radius(&b, i);
        if (x != 0 && !(low <= nextafter(x, INFINITY) - x)) odd++;
        uint64_t bits;
        memcpy(&bits, &x, sizeof bits); /* of a number known exactly that lies half-way, the last bit is 0 */
        count += (low + e) * (1 + 1e-9) < gap / 2 || (e == 0 && low == gap / 2 && bits % 2 == 0);
    }
    note(j, "low part", path, odd, 0);
    note(j, "count of settled entries", path, fabs(count - b.settled), 0);
    drop(b);
}

static void certified_layer(judged *j, const char *layer) {
    array keep = get(j->file, "rows", layer, "kept");
    ball a = get_ball(j->file, "rows", layer, "a"), g = get_ball(j->file, "rows", layer, "g");
    ball drawn = get_ball(j->file, "rows", layer, "g_sampled"), S = get_ball(j->file, "factors", layer, "sum_A");
    if (!a.x.x || !g.x.x || !drawn.x.x || !S.x.x) die("a certified layer lacks rows or sums", layer);
    size_t I = a.x.shape[a.x.rank - 1], O = g.x.shape[g.x.rank - 1];
    proved(j, "certified sum_A", layer, &S, &a, &a, I, I, &keep), drop(S);
    S = get_ball(j->file, "factors", layer, "sum_G");
    proved(j, "certified sum_G", layer, &S, &drawn, &drawn, O, O, &keep), drop(S);
    S = get_ball(j->file, "empirical", layer, "sum_G");
    proved(j, "certified empirical sum_G", layer, &S, &g, &g, O, O, &keep), drop(S);
    ball ones = made(keep.n, 1), s = get_ball(j->file, "factors", layer, "sum_a");
    if (s.x.x) proved(j, "certified sum_a", layer, &s, &a, &ones, I, 1, &keep);
    drop(s), s = get_ball(j->file, "gradients", layer, "weight");
    if (s.x.x) proved(j, "certified gradient", layer, &s, &g, &a, O, I, NULL); /* a tied head has none */
    drop(s), s = get_ball(j->file, "gradients", layer, "bias");
    if (s.x.x) proved(j, "certified gradient of the bias", layer, &s, &g, &ones, O, 1, NULL);
    drop(s), drop(ones), drop(a), drop(g), drop(drawn), free(keep.x);
}

/* logits = W a + b at every position that the head reads; padding has zeros */
static void certified_logits(judged *j) {
    ball a = get_ball(j->file, "rows", "head", "a"), z = ball_at(j->file, (char[]){"logits"});
    array W = get(j->file, "weights/parameters", "head", "weight"), b = get(j->file, "weights/parameters", "head", "bias");
    if (!W.x) W = get(j->file, "weights/parameters", "embed", "weight");
    if (!a.x.x || !z.x.x || !W.x) die("no certified logits", "head");
    size_t D = a.x.shape[a.x.rank - 1], V = z.x.shape[z.x.rank - 1], rows = a.x.n / D;
    ball w = made((D + 1) * V, 0);
    for (size_t v = 0; v < V; v++) {
        for (size_t d = 0; d < D; d++) w.x.x[d * V + v] = W.x[v * D + d];
        w.x.x[D * V + v] = b.x ? b.x[v] : 0;
    }
    for (size_t r = 0; r < rows; r++) { /* one row at a time */
        ball read = made(D + 1, 1), own = made(V, 0);
        double any = 0;
        for (size_t d = 0; d < D; d++) put(&read, d, &a, r * D + d, 1), any += read.x.x[d] != 0;
        for (size_t v = 0; v < V; v++) put(&own, v, &z, r * V + v, 1);
        if (any) proved(j, "certified logits", "head", &own, &read, &w, 1, V, NULL);
        drop(read), drop(own);
    }
    drop(a), drop(z), drop(w), free(W.x), free(b.x);
}

/* n sum of values = tr S, S U = n U diag(values), UT U = I. As n values would be rounded, they are n terms. */
static void certified_basis(judged *j, const char *layer, const char *S_name, const char *n_name, const char *U_name,
                            const char *values) {
    ball S = get_ball(j->file, "factors", layer, S_name), U = get_ball(j->file, "basis", layer, U_name);
    ball v = get_ball(j->file, "basis", layer, values);
    array count = get(j->file, "factors", layer, n_name);
    if (!S.x.x || !U.x.x || !v.x.x || !count.x) die("a certified layer lacks its basis", layer);
    size_t d = v.x.n, n = (size_t)count.x[0], r = (size_t)U.x.shape[1], rows = n * d + d;
    if (S.x.n != d * d || U.x.n != d * r) die("shapes differ", layer);
    ball terms = made(rows, 0), signs = made(rows, 1), none = made(d, 0), eye = made(r * r, 0);
    for (size_t k = 0; k < rows; k++) put(&terms, k, k < n * d ? &v : &S, k < n * d ? k % d : (k - n * d) * (d + 1), 1);
    for (size_t k = n * d; k < rows; k++) signs.x.x[k] = -1;
    ball zero = made(1, 0);
    proved(j, "certified trace", layer, &zero, &terms, &signs, 1, 1, NULL);
    for (size_t k = 0; k < r; k++) eye.x.x[k * r + k] = 1;
    proved(j, "certified UT U", layer, &eye, &U, &U, r, r, NULL);
    ball one = made((d + n) * d, 0), other = made(d + n, 0);
    for (size_t k = 0; k < d * d; k++) put(&one, k, &S, k, 1);
    for (size_t k = 0; k < r; k++) {
        for (size_t i = 0; i < n * d; i++) put(&one, d * d + i, &U, i % d * r + k, 1);
        for (size_t i = 0; i < d + n; i++) put(&other, i, i < d ? &U : &v, i < d ? i * r + k : k, i < d ? 1 : -1);
        proved(j, "certified S U", layer, &none, &one, &other, d, 1, NULL);
    }
    drop(S), drop(U), drop(v), drop(terms), drop(signs), drop(none), drop(eye), drop(zero), drop(one), drop(other);
    free(count.x);
}

/* each row keeps its first pairs, as many as the manifest says; and W' = U_G (C o M) U_AT */
static void certified_edit(judged *j, const char *layer, const char *share, const cJSON *certificate) {
    char group[64], name[NAME * 2];
    snprintf(group, sizeof group, "edits/%s", share), snprintf(name, sizeof name, "edits.%s.%s.mask", share, layer);
    for (char *p = name; (p = strchr(p, '/'));) *p = '.';
    array mask = get(j->file, group, layer, "mask"), w = get(j->file, "weights/parameters", layer, "weight");
    if (!mask.x) return;
    const cJSON *own = cJSON_GetObjectItemCaseSensitive(cJSON_GetObjectItemCaseSensitive(certificate, "arrays"), name);
    const cJSON *kept = cJSON_GetObjectItemCaseSensitive(own, "kept");
    size_t O = (size_t)mask.shape[0], I = (size_t)mask.shape[1];
    if (cJSON_GetArraySize(kept) != (int)O) die("the manifest lacks the counts of", name);
    double odd = 0;
    for (size_t i = 0; i < O; i++)
        for (size_t k = 0; k < I; k++)
            odd += (mask.x[i * I + k] == 1) != ((double)k < cJSON_GetArrayItem(kept, (int)i)->valuedouble);
    note(j, "mask, its counts,", layer, odd, 0);
    ball claimed = get_ball(j->file, group, layer, "weight");
    ball U = get_ball(j->file, "basis", layer, "U_G"), V = get_ball(j->file, "basis", layer, "U_A");
    if (!w.x) w = get(j->file, "weights/parameters", "embed", "weight"); /* a tied head */
    if (claimed.x.x && U.x.x && V.x.x && w.n == O * I) {
        size_t R = (size_t)U.x.shape[1], Q = (size_t)V.x.shape[1];
        ball W = made(O * I, 0), UT = turned(U, O, R), VT = turned(V, I, Q);
        memcpy(W.x.x, w.x, O * I * sizeof *w.x);
        ball C = product(U, W, R, I), CT = turned(C, R, I), M = product(CT, V, R, Q);
        for (size_t i = 0; i < R * Q; i++)
            if (mask.x[i / Q * I + i % Q] == 0) M.x.x[i] = M.low.x[i] = M.radii[i] = 0;
        ball P = product(UT, M, O, Q), PT = turned(P, O, Q);
        proved(j, "certified edited weight", layer, &claimed, &PT, &VT, O, I, NULL);
        drop(C), drop(P), drop(PT), drop(VT);
    } else
        die("no certified edit of", layer);
    drop(claimed), free(mask.x), free(w.x);
}

static void certified(judged *j, const cJSON *certificate) {
    static list found;
    layers_of(j->file, "", "_low", &found);
    if (!found.count) die("no certified number", "manifest");
    int told = 0; /* a mask has counts, and no digits */
    const cJSON *one, *arrays = cJSON_GetObjectItemCaseSensitive(certificate, "arrays");
    cJSON_ArrayForEach(one, arrays) told += !cJSON_GetObjectItemCaseSensitive(one, "kept");
    note(j, "certified arrays", "the manifest", abs(found.count - told), 0);
    for (int k = 0; k < found.count; k++) one_settled(j, found.names[k]);
    layers_of(j->file, "rows/", "/kept", &found);
    for (int k = 0; k < found.count; k++) {
        certified_layer(j, found.names[k]);
        certified_basis(j, found.names[k], "sum_A", "n_A", "U_A", "mu");
        certified_basis(j, found.names[k], "sum_G", "n_G", "U_G", "lam");
        certified_edit(j, found.names[k], "rho50", certificate);
        certified_edit(j, found.names[k], "rho90", certificate);
    }
    ball nats = ball_at(j->file, (char[]){"nats"}), loss = ball_at(j->file, (char[]){"loss"});
    if (!nats.x.x || !loss.x.x) die("no certified loss", "manifest");
    ball ones = made(nats.x.n, 1);
    proved(j, "certified loss", "nats", &loss, &nats, &ones, 1, 1, NULL);
    drop(nats), drop(loss), drop(ones);
    if (cJSON_IsTrue(cJSON_GetObjectItemCaseSensitive(certificate, "logits are W a + b"))) certified_logits(j);
}

/* ------------------------------------------------------------------ cases */

static judged judge(const char *folder, const char *id, const cJSON *manifest) {
    char path[NAME * 2];
    judged j = {0};
    static list found;
    snprintf(path, sizeof path, "%s/%s.h5", folder, id);
    j.file = H5Fopen(path, H5F_ACC_RDONLY, H5P_DEFAULT);
    if (j.file < 0) die("cannot open", path);
    const cJSON *own = cJSON_GetObjectItemCaseSensitive(manifest, "budgets");
    j.budget.sums = number(own, "sums"), j.budget.basis = number(own, "basis");
    j.budget.edits = number(own, "edits"), j.budget.mass = number(own, "mass");
    layers_of(j.file, "rows/", "/kept", &found);
    for (int k = 0; k < found.count; k++) sums(&j, found.names[k]);
    const cJSON *certificate = cJSON_GetObjectItemCaseSensitive(manifest, "certificate");
    if (cJSON_IsObject(certificate)) certified(&j, certificate);
    layers_of(j.file, "basis/", "/lam", &found);
    for (int k = 0; k < found.count; k++) {
        one_basis(&j, found.names[k], "U_A", "mu", "sum_A", "n_A");
        one_basis(&j, found.names[k], "U_G", "lam", "sum_G", "n_G");
        one_edit(&j, found.names[k], "rho50", 0.5);
        one_edit(&j, found.names[k], "rho90", 0.9);
    }
    H5Fclose(j.file);
    return j;
}

static int only_forward(const cJSON *manifest) {
    const cJSON *need, *needs = cJSON_GetObjectItemCaseSensitive(manifest, "needs");
    cJSON_ArrayForEach(need, needs) if (strcmp(need->valuestring, "forward")) return 0;
    return 1;
}

int main(int count, char **arguments) {
    if (count != 2) return fprintf(stderr, "usage: check FOLDER\n"), 2;
    H5Eset_auto2(H5E_DEFAULT, NULL, NULL);
    cJSON *index = json(arguments[1], "index"), *entry;
    int right = 0, wrong = 0, left = 0;
    cJSON_ArrayForEach(entry, cJSON_GetObjectItemCaseSensitive(index, "cases")) {
        const char *id = cJSON_GetStringValue(cJSON_GetObjectItemCaseSensitive(entry, "caseId"));
        if (!id) die("an entry without caseId", "index.json");
        cJSON *manifest = json(arguments[1], id);
        const char *result = cJSON_GetStringValue(cJSON_GetObjectItemCaseSensitive(manifest, "result"));
        if (!result) die("a manifest without result", id);
        if (only_forward(manifest)) {
            left++;
        } else {
            judged j = judge(arguments[1], id, manifest);
            int invalid = !strcmp(result, "invalid"), good = j.done && (j.failed > 0) == invalid;
            if (!good) printf("%s is %s, but %s\n", id, result, j.failed ? j.worst : "nothing shows it");
            good ? right++ : wrong++;
        }
        cJSON_Delete(manifest);
    }
    cJSON_Delete(index);
    printf("C: %d cases as they should be, %d not; %d need a forward pass\n", right, wrong, left);
    return wrong || !right;
}
