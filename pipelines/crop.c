/* Crop, resize and mirror in AVX2: the bits of torch's antialiased bilinear resize of uint8, in less time; see crop.py.
 *
 * Each axis is a weighted mean under a triangle of half width max(1, scale), in 16-bit fixed point and rounded to
 * uint8, columns before rows. Two taps are one multiply-add (pmaddwd); a mirrored view has its columns' weights
 * mirrored. Rows of the crop are resized when a row of the view asks for them and wait in a ring, which stays in the
 * nearest cache.
 *
 * Called by ctypes, so without the interpreter lock; nothing is kept between calls.
 */
#include <stdint.h>

#define VERSION 1 /* crop.py asks for its own: raise both whenever this file or its build changes what comes out */

enum { DONE, NO_MEMORY, OUTSIDE, UNSUPPORTED };

int crop_version(void) { return VERSION; }

#if defined(__x86_64__) && defined(__GNUC__)

#include <immintrin.h>
#include <stdlib.h>
#include <string.h>

#define AVX2 __attribute__((target("avx2")))
#define INLINE AVX2 __attribute__((always_inline)) static inline

int crop_supported(void) { return __builtin_cpu_supports("avx2"); }

/* The weights of one axis. Pixel i of the view takes 2 * pairs pixels of the crop from first[i] on. */
typedef struct {
    int pairs, precision; /* precision: bits behind the point */
    int32_t *first;
    int16_t *weights;
} Axis;

static int smaller(int a, int b) { return a < b ? a : b; }

/* Taps of a pixel: as many pixel centres as can lie within the triangle, its ends left out. */
static int taps_for(int length, int side) {
    const int taps = (int)((2 * (int64_t)length + side - 1) / side);
    return taps > 2 ? taps : 2;
}

/* Fills an axis as torch does: weights in double, then as many bits as leave the largest within int16. `exact` has room
 * for (taps_for + 1) * side doubles: all first taps, all second ones …, and their sums, so that pixels are done side by
 * side. Beyond `side`, up to `padded`, the weights are zero. */
AVX2 static void fill_axis(Axis *axis, int length, int side, int padded, int flip, double *exact) {
    const double scale = (double)length / side, reach = scale > 1 ? scale : 1, inverse = 1 / reach;
    const int taps = taps_for(length, side), row = taps + (taps & 1);
    double *sums = exact + (size_t)taps * (size_t)side, largest = 0;
    axis->pairs = row / 2;
    memset(axis->weights, 0, sizeof(int16_t) * (size_t)padded * (size_t)row);
    memset(axis->first, 0, sizeof(int32_t) * (size_t)padded);
    memset(sums, 0, sizeof(double) * (size_t)side);
    for (int i = 0; i < side; i++) {
        const int first = (int)(scale * (i + 0.5) - reach + 0.5);
        axis->first[i] = first > 0 ? first : 0;
    }
    for (int j = 0; j < taps; j++) {
        double *weights = exact + (size_t)j * (size_t)side;
        for (int i = 0; i < side; i++) {
            const int pixel = axis->first[i] + j;
            const double distance = (pixel - scale * (i + 0.5) + 0.5) * inverse;
            const double weight = 1 - (distance < 0 ? -distance : distance);
            weights[i] = weight > 0 && pixel < length ? weight : 0;
            sums[i] += weights[i];
        }
    }
    for (int j = 0; j < taps; j++) {
        double *weights = exact + (size_t)j * (size_t)side;
        for (int i = 0; i < side; i++) {
            weights[i] /= sums[i];
            largest = weights[i] > largest ? weights[i] : largest;
        }
    }
    axis->precision = 0;
    while (axis->precision < 22 && (int)(0.5 + largest * (1 << (axis->precision + 1))) < 1 << 15) axis->precision++;
    for (int j = 0; j < taps; j++)
        for (int i = 0; i < side; i++)
            axis->weights[(size_t)(flip ? side - 1 - i : i) * (size_t)row + (size_t)j] =
                (int16_t)(exact[(size_t)j * (size_t)side + (size_t)i] * (1 << axis->precision) + 0.5);
    for (int i = 0; flip && i < side / 2; i++) {
        const int32_t other = axis->first[side - 1 - i];
        axis->first[side - 1 - i] = axis->first[i];
        axis->first[i] = other;
    }
}

/* Two neighbouring weights in each 32-bit place. */
INLINE __m256i both(const int16_t *weights) {
    int32_t pair;
    memcpy(&pair, weights, sizeof pair);
    return _mm256_set1_epi32(pair);
}

INLINE __m256i add_product(__m256i sum, __m256i pixels, __m256i weights) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pixels, weights));
}

INLINE __m256i two_rows(__m128i a, __m128i b) { return _mm256_inserti128_si256(_mm256_castsi128_si256(a), b, 1); }

INLINE __m256i lanes(__m128i twice) { return _mm256_broadcastsi128_si256(twice); }

/* Columns: two rows of a crop → two rows of `padded` pixels, 4 bytes more written. Reads `row_reach` bytes of a row.
 * What lies `ahead` bytes further on is fetched into the cache, wherever that is: a sixth of the time. */
INLINE void columns(const uint8_t *const from[2], uint8_t *const to[2], size_t ahead, const Axis *axis, int padded,
                    int pairs) {
    /* Red, green, blue of pixels 0 and 1, and of 2 and 3, side by side as 16-bit numbers; and the way back. */
    const __m256i near = lanes(_mm_setr_epi8(0, -1, 3, -1, 1, -1, 4, -1, 2, -1, 5, -1, -1, -1, -1, -1));
    const __m256i far = lanes(_mm_setr_epi8(6, -1, 9, -1, 7, -1, 10, -1, 8, -1, 11, -1, -1, -1, -1, -1));
    const __m256i dense = lanes(_mm_setr_epi8(0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, -1, -1, -1, -1));
    const __m256i half = _mm256_set1_epi32(1 << (axis->precision - 1));
    const __m128i shift = _mm_cvtsi32_si128(axis->precision);
    const uint8_t *const upper = from[0], *const lower = from[1];
    uint8_t *const upper_to = to[0], *const lower_to = to[1];
    const int32_t *const first = axis->first;
    const int16_t *weights = axis->weights;
    for (int x = 0; x < padded; x += 4) {
        __m256i sums[4];
        const size_t later = 3 * (size_t)first[x] + ahead;
        _mm_prefetch((const char *)((uintptr_t)upper + later), _MM_HINT_T0);
        _mm_prefetch((const char *)((uintptr_t)lower + later), _MM_HINT_T0);
        for (int k = 0; k < 4; k++, weights += 2 * pairs) {
            const size_t start = 3 * (size_t)first[x + k];
            __m256i sum = half;
            int p = 0;
            for (; p + 2 <= pairs; p += 2) {
                const size_t at = start + 6 * (size_t)p;
                const __m256i pixels = two_rows(_mm_loadu_si128((const __m128i *)(upper + at)),
                                                _mm_loadu_si128((const __m128i *)(lower + at)));
                sum = add_product(sum, _mm256_shuffle_epi8(pixels, near), both(weights + 2 * p));
                sum = add_product(sum, _mm256_shuffle_epi8(pixels, far), both(weights + 2 * p + 2));
            }
            if (p < pairs) {
                const size_t at = start + 6 * (size_t)p;
                const __m256i pixels = two_rows(_mm_loadl_epi64((const __m128i *)(upper + at)),
                                                _mm_loadl_epi64((const __m128i *)(lower + at)));
                sum = add_product(sum, _mm256_shuffle_epi8(pixels, near), both(weights + 2 * p));
            }
            sums[k] = _mm256_sra_epi32(sum, shift);
        }
        const __m256i words01 = _mm256_packs_epi32(sums[0], sums[1]), words23 = _mm256_packs_epi32(sums[2], sums[3]);
        const __m256i pixels = _mm256_shuffle_epi8(_mm256_packus_epi16(words01, words23), dense);
        _mm_storeu_si128((__m128i *)(upper_to + 3 * (size_t)x), _mm256_castsi256_si128(pixels));
        _mm_storeu_si128((__m128i *)(lower_to + 3 * (size_t)x), _mm256_extracti128_si256(pixels, 1));
    }
}

/* Bytes of a row that `columns` may read. */
static size_t row_reach(const Axis *axis, int side) {
    int last = 0;
    for (int i = 0; i < side; i++) last = axis->first[i] > last ? axis->first[i] : last;
    return 3 * (size_t)last + 6 * (size_t)axis->pairs + 4;
}

/* Rows: 32 bytes of 2 * pairs rows → 32 bytes of one. */
INLINE __m256i block(const uint8_t *const *rows, size_t at, const int16_t *weights, int precision, int pairs) {
    const __m256i half = _mm256_set1_epi32(1 << (precision - 1)), zero = _mm256_setzero_si256();
    const __m128i shift = _mm_cvtsi32_si128(precision);
    __m256i a = half, b = half, c = half, d = half;
    for (int p = 0; p < pairs; p++) {
        const __m256i upper = _mm256_loadu_si256((const __m256i *)(rows[2 * p] + at));
        const __m256i lower = _mm256_loadu_si256((const __m256i *)(rows[2 * p + 1] + at));
        const __m256i low = _mm256_unpacklo_epi8(upper, lower), high = _mm256_unpackhi_epi8(upper, lower);
        const __m256i weight = both(weights + 2 * p);
        a = add_product(a, _mm256_unpacklo_epi8(low, zero), weight);
        b = add_product(b, _mm256_unpackhi_epi8(low, zero), weight);
        c = add_product(c, _mm256_unpacklo_epi8(high, zero), weight);
        d = add_product(d, _mm256_unpackhi_epi8(high, zero), weight);
    }
    return _mm256_packus_epi16(_mm256_packs_epi32(_mm256_sra_epi32(a, shift), _mm256_sra_epi32(b, shift)),
                               _mm256_packs_epi32(_mm256_sra_epi32(c, shift), _mm256_sra_epi32(d, shift)));
}

INLINE void mix_rows(const uint8_t *const *rows, const int16_t *weights, int precision, int pairs, uint8_t *out,
                     size_t bytes) {
    size_t at = 0;
    for (; at + 32 <= bytes; at += 32)
        _mm256_storeu_si256((__m256i *)(out + at), block(rows, at, weights, precision, pairs));
    if (at < bytes) {
        uint8_t rest[32];
        _mm256_storeu_si256((__m256i *)rest, block(rows, at, weights, precision, pairs));
        memcpy(out + at, rest, bytes - at);
    }
}

/* Memory for one view, used again for the next. */
typedef struct {
    Axis x, y;
    double *exact;
    const uint8_t **rows; /* the rows that one row of the view is made from */
    uint8_t *ring, *ends[2];
    size_t line; /* bytes from one row of the ring to the next */
} Scratch;

/* Rows that the ring holds: those of one row of the view, and one that came with the last of them. A power of two. */
static int slots_for(int rows) {
    int slots = 4;
    while (slots < rows + 1) slots *= 2;
    return slots;
}

/* Makes one view. `left` bytes of the image's memory begin at the crop's first pixel: a row from which `columns` would
 * read beyond them is copied first. */
AVX2 static void make_view(const uint8_t *crop, size_t row_stride, size_t left, int height, int side, int padded,
                           Scratch *scratch, uint8_t *out) {
    const Axis *x = &scratch->x, *y = &scratch->y;
    const size_t reach = row_reach(x, side), bytes = 3 * (size_t)side, ahead = 2 * row_stride; /* the next two rows */
    const int taps = 2 * y->pairs, mask = slots_for(taps) - 1;
    int made = 0; /* rows of the crop whose columns are done */
    for (int i = 0; i < side; i++) {
        const int first = y->first[i], until = smaller(first + taps, height);
        for (; made < until; made += 2) {
            const uint8_t *from[2];
            uint8_t *to[2];
            for (int k = 0; k < 2; k++) {
                const size_t at = (size_t)smaller(made + k, height - 1) * row_stride;
                from[k] = crop + at;
                if (left - at < reach) from[k] = memcpy(scratch->ends[k], crop + at, left - at);
                to[k] = scratch->ring + (size_t)((made + k) & mask) * scratch->line;
            }
            switch (x->pairs) { /* numbers that the compiler knows make short loops straight */
            case 1: columns(from, to, ahead, x, padded, 1); break;
            case 2: columns(from, to, ahead, x, padded, 2); break;
            case 3: columns(from, to, ahead, x, padded, 3); break;
            default: columns(from, to, ahead, x, padded, x->pairs);
            }
        }
        for (int j = 0; j < taps; j++)
            scratch->rows[j] = scratch->ring + (size_t)(smaller(first + j, until - 1) & mask) * scratch->line;
        const int16_t *weights = y->weights + (size_t)i * (size_t)taps;
        uint8_t *row = out + (size_t)i * bytes;
        switch (y->pairs) {
        case 1: mix_rows(scratch->rows, weights, y->precision, 1, row, bytes); break;
        case 2: mix_rows(scratch->rows, weights, y->precision, 2, row, bytes); break;
        case 3: mix_rows(scratch->rows, weights, y->precision, 3, row, bytes); break;
        default: mix_rows(scratch->rows, weights, y->precision, y->pairs, row, bytes);
        }
    }
}

/* Cuts the next part of a block of memory, or counts its bytes where the block is none yet. */
static void *part(uint8_t *memory, size_t *used, size_t bytes) {
    void *start = memory ? memory + *used : 0;
    *used += (bytes + 31) / 32 * 32;
    return start;
}

static size_t lay_out(Scratch *scratch, uint8_t *memory, int taps, int width, int padded) {
    size_t used = 0, wide = (size_t)padded, stride = (size_t)taps + 1;
    Axis *axes[2] = {&scratch->x, &scratch->y};
    for (int k = 0; k < 2; k++) {
        axes[k]->first = part(memory, &used, sizeof(int32_t) * wide);
        axes[k]->weights = part(memory, &used, sizeof(int16_t) * wide * stride);
        scratch->ends[k] = part(memory, &used, 3 * ((size_t)width + stride) + 4);
    }
    scratch->line = (3 * wide + 4 + 31) / 32 * 32;
    scratch->exact = part(memory, &used, sizeof(double) * wide * stride);
    scratch->rows = part(memory, &used, sizeof(uint8_t *) * stride);
    scratch->ring = part(memory, &used, scratch->line * (size_t)slots_for(taps + 1));
    return used;
}

/* Writes the views of one image of height × width pixels, rows `row_stride` bytes apart. `boxes` holds `views` numbers
 * each of top, left, height, width and whether to mirror. `out` is [views, side, side, 3]. Returns one of the names
 * above. */
int crop_views(const uint8_t *image, size_t row_stride, int height, int width, int views, const int32_t *boxes,
               int side, uint8_t *out) {
    const int32_t *tops = boxes, *lefts = tops + views, *heights = lefts + views, *widths = heights + views;
    const int32_t *flips = widths + views;
    const int padded = (side + 3) / 4 * 4; /* `columns` makes four pixels at a time */
    int taps = 0, widest = 0;
    for (int v = 0; v < views; v++) {
        if (tops[v] < 0 || lefts[v] < 0 || heights[v] < 1 || widths[v] < 1) return OUTSIDE;
        if (heights[v] > height - tops[v] || widths[v] > width - lefts[v]) return OUTSIDE;
        const int most = taps_for(heights[v] > widths[v] ? heights[v] : widths[v], side);
        taps = most > taps ? most : taps;
        widest = widths[v] > widest ? widths[v] : widest;
    }
    if (!views) return DONE;
    const size_t size = ((size_t)height - 1) * row_stride + 3 * (size_t)width;
    Scratch scratch;
    uint8_t *memory = malloc(lay_out(&scratch, 0, taps, widest, padded));
    if (!memory) return NO_MEMORY;
    lay_out(&scratch, memory, taps, widest, padded);
    for (int v = 0; v < views; v++) {
        const size_t at = (size_t)tops[v] * row_stride + 3 * (size_t)lefts[v];
        fill_axis(&scratch.x, widths[v], side, padded, flips[v], scratch.exact);
        fill_axis(&scratch.y, heights[v], side, padded, 0, scratch.exact);
        make_view(image + at, row_stride, size - at, heights[v], side, padded, &scratch,
                  out + (size_t)v * (size_t)side * (size_t)side * 3);
    }
    free(memory);
    return DONE;
}

#else

int crop_supported(void) { return 0; }

int crop_views(const uint8_t *image, size_t row_stride, int height, int width, int views, const int32_t *boxes,
               int side, uint8_t *out) {
    (void)image, (void)row_stride, (void)height, (void)width, (void)views, (void)boxes, (void)side, (void)out;
    return UNSUPPORTED;
}

#endif
