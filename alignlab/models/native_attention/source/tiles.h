// Products of small matrices that lie in the cache.
//
// The left one is rows of words. The right one is packed word by word: [words][columns], where a word holds the numbers
// of a column that follow each other along the sum. Sums are float32, in one order whatever the sizes.
#pragma once

#include "vectors.h"

namespace alignlab {

constexpr int kTileRows = 6;     // 6 rows x 4 vectors of sums, 4 of the right matrix and 1 of the row fill 29 registers
constexpr int kTileVectors = 4;

template <class S, int M, int P, bool kAdd>
inline void tile(const Word* a, int64_t lda, const Word* b, int64_t ldb, int64_t words, float* c, int64_t ldc) {
  __m512 sum[M][P];
  for (int m = 0; m < M; m++)
    for (int p = 0; p < P; p++) sum[m][p] = kAdd ? _mm512_loadu_ps(c + m * ldc + p * kLanes) : _mm512_setzero_ps();
  for (int64_t word = 0; word < words; word++)
    for_parts<S>(word, [&](auto part, int64_t i) {
      typename S::Part right[P];
      for (int p = 0; p < P; p++)
        right[p] = S::template columns<decltype(part)::value>(_mm512_loadu_si512(b + i * ldb + p * kLanes));
      for (int m = 0; m < M; m++) {
        const typename S::Part row = S::template row<decltype(part)::value>(a + m * lda + i);
        for (int p = 0; p < P; p++) sum[m][p] = S::multiply_add(sum[m][p], row, right[p]);
      }
    });
  for (int m = 0; m < M; m++)
    for (int p = 0; p < P; p++) _mm512_storeu_ps(c + m * ldc + p * kLanes, sum[m][p]);
}

template <class S, int P, bool kAdd>
inline void column_of_tiles(
    const Word* a, int64_t lda, const Word* b, int64_t ldb, int64_t rows, int64_t words, float* c, int64_t ldc) {
  int64_t row = 0;
  for (; row + kTileRows <= rows; row += kTileRows)
    tile<S, kTileRows, P, kAdd>(a + row * lda, lda, b, ldb, words, c + row * ldc, ldc);
  for (; row < rows; row++) tile<S, 1, P, kAdd>(a + row * lda, lda, b, ldb, words, c + row * ldc, ldc);
}

// c [rows, columns] = a [rows, words] b [words, columns], or added to c. Columns come in 16s; all strides count what is
// pointed at: words of a and b, numbers of c.
template <class S, bool kAdd>
inline void multiply(
    const Word* a, int64_t lda, const Word* b, int64_t ldb, int64_t rows, int64_t columns, int64_t words, float* c,
    int64_t ldc) {
  int64_t column = 0;
  for (; column + kTileVectors * kLanes <= columns; column += kTileVectors * kLanes)
    column_of_tiles<S, kTileVectors, kAdd>(a, lda, b + column, ldb, rows, words, c + column, ldc);
  for (; column < columns; column += kLanes)
    column_of_tiles<S, 1, kAdd>(a, lda, b + column, ldb, rows, words, c + column, ldc);
}

// Rows [rows, words] as the right matrix of a product over their numbers: to[i * ldt + r], zero for r up to `columns`.
inline void pack_transposed(
    const Word* from, int64_t ld, int64_t rows, int64_t columns, int64_t words, Word* to, int64_t ldt) {
  for (int64_t first = 0; first < columns; first += kLanes)
    for (int64_t i = 0; i < words; i++)
      for (int64_t r = first; r < first + kLanes; r++) to[i * ldt + r] = r < rows ? from[r * ld + i] : 0;
}

// Rows [rows, size] as the right matrix of a product over rows: to[row / per word * size + number], zero past the last.
template <class S>
inline void pack_rows(const typename S::Number* from, int64_t ld, int64_t rows, int64_t size, Word* to) {
  using Number = typename S::Number;
  Number* numbers = (Number*)to;
  for (int64_t first = 0; first < rounded_up(rows, kLanes); first += S::kPerWord)
    for (int64_t d = 0; d < size; d++)
      for (int64_t part = 0; part < S::kPerWord; part++)
        numbers[first * size + d * S::kPerWord + part] = first + part < rows ? from[(first + part) * ld + d] : Number(0);
}

}  // namespace alignlab
