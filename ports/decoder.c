/* The whole decoder in C99, written from docs/bitstream.md and docs/porting.md.
 *
 *     cc -O3 -o decoder ports/decoder.c -lm
 *     python -m lic export codec.npz
 *     ./decoder codec.npz photo.lic photo.ppm
 *
 * Read it from the end: `main` is the page from top to bottom. Latents and pictures are channels
 * first; all arithmetic is in double, in which the sums of an integer h_s are exact. Every length
 * and every shape is checked before it is used: a damaged file or archive ends in a sentence.
 * Plain loops: some 10 seconds and 350 MB a megapixel.
 */
#include <float.h>
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef unsigned char byte;

/* lengths of 32 bits add up without overflow in a size_t of 64; products are not rounded twice */
typedef char needs_64_bits[sizeof(size_t) >= 8 && FLT_EVAL_METHOD == 0 ? 1 : -1];

/* Errors, memory, files -------------------------------------------------------------------- */

static void fail(const char *what, const char *name) {
    fprintf(stderr, "error: %s%s\n", what, name);
    exit(1);
}

static void *memory(size_t count, size_t size) {
    void *block = calloc(count ? count : 1, size);
    if (!block) fail("not enough memory", "");
    return block;
}

static byte *read_file(const char *path, size_t *length) {
    FILE *file = fopen(path, "rb");
    if (!file) fail("cannot read ", path);
    size_t capacity = 1 << 16, used = 0, got;
    byte *data = memory(capacity, 1);
    while ((got = fread(data + used, 1, capacity - used, file)) > 0) {
        used += got;
        if (used < capacity) continue;
        capacity *= 2;
        data = realloc(data, capacity);
        if (!data) fail("not enough memory", "");
    }
    if (ferror(file)) fail("cannot read ", path);
    fclose(file);
    *length = used;
    return data;
}

static uint64_t little(const byte *p, int bytes) {  /* an unsigned integer, little-endian */
    uint64_t value = 0;
    while (bytes--) value = value << 8 | p[bytes];
    return value;
}

static uint32_t crc32(uint32_t crc, const byte *p, size_t length) {  /* zlib's; begin with 0 */
    for (crc = ~crc; length--; p++) {
        crc ^= *p;
        for (int k = 0; k < 8; k++) crc = crc >> 1 ^ (crc & 1 ? 0xEDB88320u : 0);
    }
    return ~crc;
}

/* The archive: a zip file, its entries stored, each in NumPy's format ------------------------ */

static byte *archive;
static size_t archive_length;

typedef struct {
    char type[8];      /* "<f4", "|i1", ... */
    int axes;
    size_t shape[4], count;
    const byte *data;
} Array;

/* Where the entry `name` begins, and its length; NULL if there is none. The central directory has
 * all sizes; those of the local headers may be left to a zip64 field, as NumPy does. */
static const byte *entry(const char *name, size_t *length) {
    const byte *a = archive;
    if (archive_length < 22) fail("the archive is cut off", "");
    size_t end = archive_length - 22;  /* the last record, if it has no comment */
    if (little(a + end, 4) != 0x06054b50) fail("this is no archive of lic export", "");
    size_t at = little(a + end + 16, 4), entries = little(a + end + 10, 2);
    for (; entries > 0; entries--) {
        if (at + 46 > end || little(a + at, 4) != 0x02014b50) fail("the archive is damaged", "");
        size_t size = little(a + at + 20, 4), name_length = little(a + at + 28, 2);
        size_t local = little(a + at + 42, 4), method = little(a + at + 10, 2);
        if (at + 46 + name_length > end) fail("the archive is damaged", "");
        if (name_length == strlen(name) && !memcmp(a + at + 46, name, name_length)) {
            if (method != 0) fail("the archive is compressed; lic export stores: ", name);
            if (local + 30 > end) fail("the archive is damaged", "");
            local += 30 + little(a + local + 26, 2) + little(a + local + 28, 2);
            if (local > end || size > end - local) fail("the archive is damaged", "");
            *length = size;
            return a + local;
        }
        at += 46 + name_length + little(a + at + 30, 2) + little(a + at + 32, 2);
    }
    return NULL;
}

/* The array `name`: a header in the syntax of Python, then the numbers. */
static Array find(const char *name) {
    char file_name[64], header[512] = "";
    snprintf(file_name, sizeof file_name, "%s.npy", name);
    size_t length = 0;
    const byte *p = entry(file_name, &length);
    if (!p) fail("the archive lacks ", name);
    if (length < 10 || memcmp(p, "\x93NUMPY\x01", 7)) fail("no array of NumPy's format 1: ", name);
    size_t header_length = little(p + 8, 2);
    if (header_length >= sizeof header || length < 10 + header_length) fail("damaged: ", name);
    memcpy(header, p + 10, header_length);

    Array array = {.data = p + 10 + header_length, .count = 1};
    const char *type = strstr(header, "'descr': '"), *shape = strstr(header, "'shape': (");
    if (!type || !shape || !strstr(header, "'fortran_order': False")) fail("damaged: ", name);
    sscanf(type + 10, "%7[^']", array.type);
    for (shape += 10; *shape && *shape != ')'; shape += strspn(shape, ", ")) {
        char *after;
        unsigned long long size = strtoull(shape, &after, 10);
        if (after == shape || array.axes == 4 || size > 1 << 24) fail("damaged: ", name);
        array.shape[array.axes++] = size;
        array.count *= size;
        if (array.count > length) fail("damaged: ", name);
        shape = after;
    }
    int wide = strlen(array.type) > 2 ? atoi(array.type + 2) : 0;  /* for 'U', in letters */
    size_t item = array.type[1] == 'U' ? 4 * (size_t)wide : (size_t)wide;
    if (wide < 1 || wide > 1 << 20 || array.count * item != length - 10 - header_length)
        fail("damaged: ", name);
    return array;
}

static double number(const Array *array, size_t k, const char *name) {
    const byte *p = array->data;
    if (!strcmp(array->type, "|i1")) return (int8_t)p[k];
    if (!strcmp(array->type, "<i4")) return (int32_t)little(p + 4 * k, 4);
    if (!strcmp(array->type, "<i8")) return (double)(int64_t)little(p + 8 * k, 8);
    if (!strcmp(array->type, "<f4")) {
        uint32_t bits = little(p + 4 * k, 4);
        float value;
        memcpy(&value, &bits, 4);
        return value;
    }
    if (!strcmp(array->type, "<f8")) {
        uint64_t bits = little(p + 8 * k, 8);
        double value;
        memcpy(&value, &bits, 8);
        return value;
    }
    fail("another type of number is expected in ", name);
    return 0;
}

/* The numbers, `count` of them, of the array layer.field, or of `layer` where there is no field. */
static double *numbers(const char *layer, const char *field, size_t count) {
    char name[64];
    snprintf(name, sizeof name, field ? "%s.%s" : "%s", layer, field);
    Array array = find(name);
    if (array.count != count) fail("another shape is expected of ", name);
    double *values = memory(count, sizeof *values);
    for (size_t k = 0; k < count; k++) {
        values[k] = number(&array, k, name);
        if (!isfinite(values[k])) fail("there is no number in ", name);
    }
    return values;
}

/* The networks -------------------------------------------------------------------------------- */

typedef struct {
    size_t channels, height, width;
    double *data;  /* channel, row, column */
} Tensor;

static Tensor tensor(size_t channels, size_t height, size_t width) {
    return (Tensor){channels, height, width, memory(channels * height * width, sizeof(double))};
}

/* Some rows and columns of a convolution: out[y0 + s i, x0 + s j] += sum over taps of
 * w in[i + dy, j + dx], all channels. w[o][c][k]: of tap k; zero outside the input. */
static void correlate(Tensor out, size_t y0, size_t x0, size_t s, Tensor in, const double *w,
                      int taps, const int *dy, const int *dx) {
    double *row = memory(in.width, sizeof *row);
    for (size_t o = 0; o < out.channels; o++)
        for (size_t i = 0; i < in.height; i++) {
            memset(row, 0, in.width * sizeof *row);
            for (size_t c = 0; c < in.channels; c++)
                for (int k = 0; k < taps; k++) {
                    ptrdiff_t from = (ptrdiff_t)i + dy[k];
                    if (from < 0 || from >= (ptrdiff_t)in.height) continue;
                    double weight = w[(o * in.channels + c) * taps + k];
                    const double *x = in.data + (c * in.height + from) * in.width;
                    ptrdiff_t first = dx[k] < 0 ? -dx[k] : 0;
                    ptrdiff_t last = (ptrdiff_t)in.width - (dx[k] > 0 ? dx[k] : 0);
                    for (ptrdiff_t j = first; j < last; j++) row[j] += weight * x[j + dx[k]];
                }
            double *y = out.data + (o * out.height + y0 + s * i) * out.width + x0;
            for (size_t j = 0; j < in.width; j++) y[s * j] += row[j];
        }
    free(row);
}

static void add_bias(Tensor x, const double *bias) {
    size_t plane = x.height * x.width;
    for (size_t k = 0; k < x.channels * plane; k++) x.data[k] += bias[k / plane];
}

/* 3x3, stride 1, padding 1. weight[o][c][3][3] */
static Tensor conv(Tensor in, const double *weight, size_t channels) {
    static const int dy[] = {-1, -1, -1, 0, 0, 0, 1, 1, 1}, dx[] = {-1, 0, 1, -1, 0, 1, -1, 0, 1};
    Tensor out = tensor(channels, in.height, in.width);
    correlate(out, 0, 0, 1, in, weight, 9, dy, dx);
    return out;
}

/* Transposed 5x5, stride 2: input (i, j) adds weight[c][o][a][b] to output (2i + a - 2, 2j + b - 2).
 * So the outputs of even and of odd rows and columns are four convolutions of the input. */
static Tensor deconv(Tensor in, const double *weight, size_t channels) {
    Tensor out = tensor(channels, 2 * in.height, 2 * in.width);
    double *w = memory(channels * in.channels * 9, sizeof *w);
    for (int odd_row = 0; odd_row < 2; odd_row++)
        for (int odd_column = 0; odd_column < 2; odd_column++) {
            int taps = 0, at[9], dy[9], dx[9];
            for (int a = odd_row; a < 5; a += 2)
                for (int b = odd_column; b < 5; b += 2) {
                    at[taps] = 5 * a + b;
                    dy[taps] = (odd_row + 2 - a) / 2;
                    dx[taps++] = (odd_column + 2 - b) / 2;
                }
            for (size_t o = 0; o < channels; o++)
                for (size_t c = 0; c < in.channels; c++)
                    for (int k = 0; k < taps; k++)
                        w[(o * in.channels + c) * taps + k] =
                            weight[(c * channels + o) * 25 + at[k]];
            correlate(out, odd_row, odd_column, 2, in, w, taps, dy, dx);
        }
    free(w);
    return out;
}

static double leaky(double v) { return v < 0 ? v / 8 : v; }

static double clamp(double v, double low, double high) {
    return v < low ? low : v > high ? high : v;
}

/* nearbyint rounds half to even in the default mode, as all of the codec does */
#define ROUND nearbyint

static int quantized;
static char about[1 << 16];  /* JSON */

/* Channels that a layer makes; it must have `in` inputs. */
static size_t shape_of(const char *layer, size_t in, size_t kernel, int transposed) {
    char name[64];
    snprintf(name, sizeof name, "%s.weight", layer);
    Array weight = find(name);
    size_t out = weight.shape[transposed ? 1 : 0];
    if (weight.axes != 4 || weight.shape[transposed ? 0 : 1] != in || out < 1 || out > 4096 ||
        weight.shape[2] != kernel || weight.shape[3] != kernel)
        fail("another shape is expected of ", name);
    return out;
}

/* h_s in double, or, quantized, in the exact integers of docs/bitstream.md. */
static Tensor h_s(Tensor x) {
    static const char *names[] = {"h_s.conv1", "h_s.conv2", "h_s.conv3"};
    for (int k = 0; k < 3; k++) {
        int last = k == 2;
        size_t kernel = last ? 3 : 5, in = x.channels, out = shape_of(names[k], in, kernel, !last);
        double *weight = numbers(names[k], "weight", in * out * kernel * kernel);
        Tensor y = last ? conv(x, weight, out) : deconv(x, weight, out);
        double *bias = numbers(names[k], quantized ? "integer_bias" : "bias", out);
        add_bias(y, bias);
        size_t plane = y.height * y.width;
        double *multiplier = quantized ? numbers(names[k], "multiplier", out) : NULL;
        for (size_t i = 0; i < out * plane; i++) {
            if (!last) y.data[i] = leaky(y.data[i]);
            if (quantized) y.data[i] = ROUND(multiplier[i / plane] * y.data[i]);
            if (quantized && !last) y.data[i] = clamp(y.data[i], -8224, 57311);
        }
        free(weight);
        free(bias);
        free(multiplier);
        free(x.data);
        x = y;
    }
    return x;
}

static void inverse_gdn(Tensor x, const char *name) {
    double pedestal = ldexp(1, -36), *energy = memory(x.width, sizeof *energy);
    double *squares = memory(x.channels * x.width, sizeof *squares);
    double *beta = numbers(name, "beta", x.channels);
    double *gamma = numbers(name, "gamma", x.channels * x.channels);
    for (size_t k = 0; k < x.channels; k++) {
        double b = fmax(beta[k], sqrt(pedestal + 1e-6));
        beta[k] = b * b - pedestal;
    }
    for (size_t k = 0; k < x.channels * x.channels; k++) {
        double g = fmax(gamma[k], ldexp(1, -18));
        gamma[k] = g * g - pedestal;
    }
    size_t plane = x.height * x.width;
    for (size_t i = 0; i < x.height; i++) {  /* a row of all channels at a time */
        for (size_t c = 0; c < x.channels; c++)
            for (size_t j = 0; j < x.width; j++) {
                double v = x.data[c * plane + i * x.width + j];
                squares[c * x.width + j] = v * v;
            }
        for (size_t c = 0; c < x.channels; c++) {
            for (size_t j = 0; j < x.width; j++) energy[j] = beta[c];
            for (size_t d = 0; d < x.channels; d++) {
                double g = gamma[c * x.channels + d];
                for (size_t j = 0; j < x.width; j++) energy[j] += g * squares[d * x.width + j];
            }
            double *row = x.data + c * plane + i * x.width;
            for (size_t j = 0; j < x.width; j++) row[j] *= sqrt(energy[j]);
        }
    }
    free(squares);
    free(energy);
    free(beta);
    free(gamma);
}

/* y_hat with its gains undone -> x_hat - 0.5 */
static Tensor g_s(Tensor x) {
    for (int k = 1; k <= 4; k++) {
        char name[16], quoted[16], gdn[16];
        snprintf(name, sizeof name, "g_s.conv%d", k);
        snprintf(quoted, sizeof quoted, "\"g_s.conv%d\"", k);  /* in quantization.float_inputs */
        snprintf(gdn, sizeof gdn, "g_s.gdn%d", k);
        size_t in = x.channels, out = shape_of(name, in, 5, 1);
        double *weight = numbers(name, "weight", in * out * 25);
        double *bias = numbers(name, "bias", out);
        if (quantized) {
            double *scale = numbers(name, "weight_scale", out);
            for (size_t i = 0; i < in * out * 25; i++) weight[i] *= scale[(i / 25) % out];
            double *s = numbers(name, "input_scale", 1);
            if (k > 1 && !strstr(about, quoted))
                for (size_t i = 0; i < in * x.height * x.width; i++)
                    x.data[i] = *s * clamp(ROUND(x.data[i] / *s), -128, 127);
            free(scale);
            free(s);
        }
        Tensor y = deconv(x, weight, out);
        add_bias(y, bias);
        if (k < 4) inverse_gdn(y, gdn);
        free(weight);
        free(bias);
        free(x.data);
        x = y;
    }
    return x;
}

/* Entropy coding ------------------------------------------------------------------------------ */

/* The symbols of z or y. table[k]: that of symbol k. words, escapes: 4 bytes each. */
static int32_t *symbols(const char *kind, const byte *words, size_t word_count, const byte *escapes,
                        size_t escape_count, const uint16_t *table, size_t count, size_t tables) {
    char name[16];
    snprintf(name, sizeof name, "tables.%s", kind);
    double *sizes = numbers(name, "sizes", tables), *offsets = numbers(name, "offsets", tables);
    size_t total = 0;
    for (size_t t = 0; t < tables; t++) {
        if (sizes[t] < 1 || sizes[t] > 1 << 24) fail("damaged: ", name);
        total += (size_t)sizes[t];
    }
    double *counts = numbers(name, "counts", total);
    int32_t *symbol = memory(count, sizeof *symbol);
    uint64_t *C = memory(total + 1, sizeof *C);  /* of a table: sums of the counts before an entry */
    uint64_t state = 0;
    size_t escapes_used = 0, start = 0;
    if (word_count && !little(words + 4 * (word_count - 1), 4))
        fail("the entropy-coded data ends with a word of 0", "");
    for (int twice = 0; twice < 2 && word_count; twice++)
        state = state << 32 | little(words + 4 * --word_count, 4);
    for (size_t t = 0; t < tables; start += (size_t)sizes[t++]) {
        size_t entries = (size_t)sizes[t];
        for (size_t k = 0; k < entries; k++) {
            double n = counts[start + k];
            if (n < 1 || n > 1 << 24) fail("damaged: ", name);
            C[k + 1] = C[k] + (uint64_t)n;
        }
        if (C[entries] != 1 << 24) fail("the counts of a table do not add up: ", name);
        for (size_t at = 0; at < count; at++) {
            if (table[at] != t) continue;
            uint64_t slot = state & 0xFFFFFF;
            size_t k = 0, above = entries;  /* C[k] <= slot < C[above] */
            while (above - k > 1) {
                size_t middle = (k + above) / 2;
                if (C[middle] <= slot) k = middle;
                else above = middle;
            }
            state = (state >> 24) * (C[k + 1] - C[k]) + slot - C[k];
            if (state >> 32 == 0 && word_count)
                state = state << 32 | little(words + 4 * --word_count, 4);
            double value = offsets[t] + (double)k;
            if (k == entries - 1) {
                if (escapes_used == escape_count) fail("the escaped values run out", "");
                value = (int32_t)little(escapes + 4 * escapes_used++, 4);
            }
            if (fabs(value) >= 1 << 30) fail("a symbol of 2^30 or more", "");
            symbol[at] = (int32_t)value;
        }
    }
    if (state || word_count || escapes_used != escape_count)
        fail("the entropy-coded data does not end where it must", "");
    free(sizes);
    free(offsets);
    free(counts);
    free(C);
    return symbol;
}

/* ---------------------------------------------------------------------------------------------- */

int main(int argc, char **argv) {
    if (argc != 4) fail("usage: decoder codec.npz photo.lic photo.ppm", "");
    size_t name_length = strlen(argv[3]);
    if (name_length < 4 || strcmp(argv[3] + name_length - 4, ".ppm"))
        fail("this writes PPM; end the name in .ppm: ", argv[3]);
    archive = read_file(argv[1], &archive_length);
    size_t length;
    const byte *file = read_file(argv[2], &length);

    /* what the codec is: UTF-32, of which all letters here are ASCII */
    Array json = find("about");
    size_t letters = (size_t)atoi(json.type + 2);
    if (json.type[1] != 'U' || json.count != 1 || letters >= sizeof about) fail("damaged: ", "about");
    for (size_t k = 0; k < letters; k++) about[k] = (char)json.data[4 * k];
    quantized = !strstr(about, "\"quantization\": null");
    const char *known = "\"quantization\": {\"weight_bits\": 8, \"activation_bits\": 8, "
                        "\"h_s\": \"16-bit integers\"", *more = strstr(about, known);
    if (more) more += strlen(known);
    if (quantized && !(more && (*more == '}' || !strncmp(more, ", \"float_inputs\": [", 19))))
        fail("this decoder does not know the quantization of ", argv[1]);
    const char *fingerprint = strstr(about, "\"fingerprint\": \"");
    if (!fingerprint || strlen(fingerprint) < 32) fail("damaged: ", "about");

    /* the header */
    if (length < 47) fail("the file is cut off", "");
    if (memcmp(file, "LIC\x89\x02", 5)) fail("no lic file of version 2", "");
    for (int k = 0; k < 8; k++) {
        char digits[3];
        snprintf(digits, sizeof digits, "%02x", file[15 + k]);
        if (memcmp(digits, fingerprint + 16 + 2 * k, 2)) fail("the file is of another codec", "");
    }
    size_t quality = little(file + 5, 2), H = little(file + 7, 4), W = little(file + 11, 4);
    size_t counts[4], words = 0;  /* words of z and y, escaped values of z and y */
    for (int k = 0; k < 4; k++) words += counts[k] = little(file + 23 + 4 * k, 4);
    if ((length - 47) / 4 != words || length % 4 != 3) fail("the file has another length", "");
    uint32_t crc = crc32(crc32(0, file, 43), file + 47, length - 47);
    if (crc != little(file + 43, 4)) fail("the file is damaged", "");
    size_t h = (H + 63) / 64, w = (W + 63) / 64;
    if (!h || !w || h > 8192 / w) fail("the file declares no pixels, or more than 2^25", "");
    Array gains = find("log_inverse_gain");
    size_t levels = gains.shape[0], M = gains.shape[1], level = quality / 256;
    if (gains.axes != 2 || M < 1 || M > 2048) fail("damaged: ", "log_inverse_gain");
    if (!levels || quality > 256 * (levels - 1)) fail("the codec has no such quality", "");
    const byte *z_words = file + 47, *y_words = z_words + 4 * counts[0];
    const byte *z_escapes = y_words + 4 * counts[1], *y_escapes = z_escapes + 4 * counts[2];
    for (size_t k = 0; k < counts[2] + counts[3]; k++)
        if (fabs((double)(int32_t)little(z_escapes + 4 * k, 4)) >= 1 << 30)
            fail("a symbol of 2^30 or more", "");

    /* z, each channel with its table */
    Array first = find("h_s.conv1.weight"), sizes = find("tables.z.sizes");
    size_t Z = first.shape[0], z_count = Z * h * w, y_count = M * 16 * h * w;
    if (first.axes != 4 || sizes.count != Z || Z < 1 || Z > 4096) fail("damaged: ", "tables.z.sizes");
    uint16_t *table = memory(z_count > y_count ? z_count : y_count, sizeof *table);
    for (size_t k = 0; k < z_count; k++) table[k] = (uint16_t)(k / (h * w));
    int32_t *z = symbols("z", z_words, counts[0], z_escapes, counts[2], table, z_count, Z);

    /* mean and table of each y */
    Tensor z_hat = tensor(Z, h, w);
    for (size_t k = 0; k < z_count; k++) z_hat.data[k] = z[k];
    Tensor out = h_s(z_hat);
    if (out.channels != 2 * M) fail("another shape is expected of ", "h_s.conv3.weight");
    double lowest = log(0.11), step = (log(256) - log(0.11)) / 63;
    for (size_t k = 0; k < y_count; k++) {
        double index = out.data[y_count + k];
        if (!quantized) index = ROUND((index - lowest) / step);
        if (!isfinite(index)) fail("h_s gives no number", "");
        table[k] = (uint16_t)clamp(index, 0, 63);
        if (quantized) out.data[k] /= 4096;
    }

    /* y, and the checksum of all symbols */
    int32_t *y = symbols("y", y_words, counts[1], y_escapes, counts[3], table, y_count, 64);
    crc = crc32(0, file, 39);
    for (size_t k = 0; k < z_count + y_count; k++) {
        uint32_t s = (uint32_t)(k < z_count ? z[k] : y[k - z_count]);
        byte four[4] = {(byte)s, (byte)(s >> 8), (byte)(s >> 16), (byte)(s >> 24)};
        crc = crc32(crc, four, 4);
    }
    if (crc != little(file + 39, 4)) fail("the symbols are not the encoder's", "");

    /* the picture */
    Tensor y_hat = tensor(M, 4 * h, 4 * w);
    double *L = numbers("log_inverse_gain", NULL, levels * M), t = quality / 256.0 - (double)level;
    size_t next = level + 1 < levels ? level + 1 : level, plane = 16 * h * w;
    for (size_t c = 0; c < M; c++) {
        double gain = exp((1 - t) * L[level * M + c] + t * L[next * M + c]);
        for (size_t k = c * plane; k < (c + 1) * plane; k++)
            y_hat.data[k] = (y[k] + out.data[k]) * gain;
    }
    Tensor x_hat = g_s(y_hat);
    if (x_hat.channels != 3) fail("another shape is expected of ", "g_s.conv4.weight");
    byte *picture = memory(H * W, 3);
    for (size_t k = 0; k < H * W * 3; k++) {
        size_t c = k % 3, j = k / 3 % W, i = k / 3 / W;
        double v = x_hat.data[(c * x_hat.height + i) * x_hat.width + j] + 0.5;
        if (!isfinite(v)) fail("g_s gives no number", "");
        picture[k] = (byte)ROUND(255 * clamp(v, 0, 1));
    }
    FILE *ppm = fopen(argv[3], "wb");
    if (!ppm) fail("cannot write ", argv[3]);
    fprintf(ppm, "P6 %zu %zu 255\n", W, H);
    fwrite(picture, 3, H * W, ppm);
    if (ferror(ppm) || fclose(ppm)) fail("cannot write all of ", argv[3]);
    return 0;
}
