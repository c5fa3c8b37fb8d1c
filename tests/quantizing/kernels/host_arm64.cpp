// Reads cases from a file, quantizes them, reads what is expected, and prints what differs. A case is
// six numbers (type, rows, columns, bytes of a row, bytes of a block, how values are stored), the bytes
// of importance and of the codebook's places, codes and entries, and then these arrays, the rows, the
// expected bytes, which rows are odd, and the values that the expected bytes stand for.
#include <stdio.h>
#include <stdlib.h>

#include "cpu.cpp"

static FILE *cases;

template <class T> static T *next(i64 n_bytes) {
    void *bytes = malloc(n_bytes + 1);
    if ((i64)fread(bytes, 1, n_bytes, cases) != n_bytes) exit(2);
    return (T *)bytes;
}

int main(int, char **arguments) {
    i64 head[10], n_cases = 0, n_wrong = 0, n_flagged = 0, n_values = 0;
    cases = fopen(arguments[1], "rb");
    for (; fread(head, sizeof head, 1, cases) == 1; n_cases++) {
        const i64 type = head[0], n = head[1], columns = head[2], width = head[3], block = head[4];
        const int stored_as = (int)head[5];
        const float *importance = next<float>(head[6]);
        const u8 *places = next<u8>(head[7]), *codes = next<u8>(head[8]);
        const void *tables[2] = {places, codes};
        const u8 *entries = next<u8>(head[9]);
        const u8 *rows = next<u8>((stored_as == AS_BF16 ? 2 : 4) * n * columns);
        const u8 *wanted = next<u8>(n * width), *odd = next<u8>(n);
        const float *values = next<float>(4 * n * columns);
        u8 *found = (u8 *)calloc(n, width), *is_odd = (u8 *)calloc(n, 1);
        float *read = (float *)calloc(n * columns, 4);
        reap_quantize((int)type, stored_as, rows, n, columns, head[6] ? importance : 0,
                      head[7] ? tables : 0, found, is_odd);
        reap_dequantize((int)type, wanted, n * width / block, entries, read);
        for (i64 row = 0; row < n; row++) {
            n_flagged += is_odd[row] != odd[row];
            if (!is_odd[row]) n_wrong += memcmp(found + row * width, wanted + row * width, width) != 0;
        }
        for (i64 i = 0; i < n * columns; i++)
            n_values += memcmp(read + i, values + i, 4) && (read[i] == read[i] || values[i] == values[i]);
    }
    printf("%lld cases: %lld rows differ, %lld are odd elsewhere, %lld values differ\n", n_cases,
           n_wrong, n_flagged, n_values);
}
