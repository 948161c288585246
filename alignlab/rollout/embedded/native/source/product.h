// Products of a few to many rows with a weight that was packed for them.
//
// A packed weight [n, k] is panels of 32 outputs: [n / 32 rounded up][words of k][32 outputs], a word of storage each. The
// product of a row is summed word after word, whatever the rows beside it and the number of threads: results do not
// depend on either.
#pragma once

#include <omp.h>

#include <algorithm>
#include <vector>

#include "rounded_rows.h"

namespace alignlab {

constexpr int64_t kTileRows = 12;    // 12 rows x 2 vectors of sums, 2 of weights and 1 of the row fill 27 of 32 registers
constexpr int64_t kBlockRows = 96;  // rows that pass over all panels together, and stay in the processor's cache

// Add to sum[m][p] the products of row m of `a`, words or wide ones, with the 16 columns of vector p of `b`, over `words`
// words. Vector p of word i is at columns[p] + i * ldb; lanes outside `lanes` are not read, and are 0.
template <class S, int M, int P, bool kMasked, class Row>
inline void multiply(
    const Row* a, int64_t lda, const Word* const (&columns)[P], int64_t ldb, int64_t words,
    const __mmask16 (&lanes)[P], __m512 (&sum)[M][P]) {
  for (int64_t word = 0; word < words; word++) {
    if (!kMasked)
      for (int p = 0; p < P; p++) _mm_prefetch((const char*)(columns[p] + (word + 16) * ldb), _MM_HINT_T0);
    for_parts<S>(word, [&](auto part, int64_t i) {
      typename S::Part right[P];
      for (int p = 0; p < P; p++) {
        const Word* at = columns[p] + i * ldb;
        const __m512i b = kMasked ? _mm512_maskz_loadu_epi32(lanes[p], at) : _mm512_loadu_si512(at);
        right[p] = S::template columns<decltype(part)::value>(b);
      }
      for (int m = 0; m < M; m++) {
        const typename S::Part row = S::template row<decltype(part)::value>(a + m * lda + i);
        for (int p = 0; p < P; p++) sum[m][p] = S::multiply_add(sum[m][p], row, right[p]);
      }
    });
  }
}

// M rows times one panel of a weight in the type of storage, or two neighbouring ones: `finish` gets each row's 32 results.
template <class S>
class StoredTile {
 public:
  StoredTile(const Word* a, int64_t lda, const Weight& weight) : a_(a), lda_(lda), weight_(weight) {}

  // Have rows `first` on as products read them; those of the block before are gone.
  void begin(int64_t first, int64_t rows) {
    first_ = first;
    if constexpr (std::is_same_v<Row, Word>) {
      rows_ = a_ + first * lda_, stride_ = lda_;
    } else {
      thread_local std::vector<Row> wide;
      stride_ = weight_.words;
      wide.resize(std::max<size_t>(wide.size(), rows * stride_));
      for (int64_t row = 0; row < rows; row++)
        for (int64_t i = 0; i < stride_; i++) wide[row * stride_ + i] = S::widened(a_[(first + row) * lda_ + i]);
      rows_ = wide.data();
    }
  }

  template <int M, int kPanels, class Finish>
  void run(int64_t panel, int64_t row, const Finish& finish) const {
    constexpr int P = 2 * kPanels;
    const Word* columns[P];
    for (int p = 0; p < P; p++) columns[p] = weight_.panel(panel + p / 2) + p % 2 * kLanes;
    const __mmask16 unused[P] = {};
    __m512 sum[M][P];
    for (int m = 0; m < M; m++)
      for (int p = 0; p < P; p++) sum[m][p] = _mm512_setzero_ps();
    multiply<S, M, P, false>(rows_ + (row - first_) * stride_, stride_, columns, kPanel, weight_.words, unused, sum);
    for (int m = 0; m < M; m++)
      for (int q = 0; q < kPanels; q++) finish(row + m, panel + q, sum[m][2 * q], sum[m][2 * q + 1]);
  }

 private:
  using Row = typename S::Wide;
  const Word* a_;
  int64_t lda_;
  const Weight& weight_;
  const Row* rows_ = nullptr;
  int64_t first_ = 0, stride_ = 0;
};

template <int kPanels, class Tile, class Finish>
inline void tile_of(const Tile& tile, int64_t rows, int64_t panel, int64_t row, const Finish& finish) {
  switch (rows) {
#define ALIGNLAB_CASE(M) \
  case M:                \
    return tile.template run<M, kPanels>(panel, row, finish);
    ALIGNLAB_CASE(1) ALIGNLAB_CASE(2) ALIGNLAB_CASE(3)
  }
  if constexpr (kPanels == 1) {
    switch (rows) {
      ALIGNLAB_CASE(4) ALIGNLAB_CASE(5) ALIGNLAB_CASE(6) ALIGNLAB_CASE(7) ALIGNLAB_CASE(8)
      ALIGNLAB_CASE(9) ALIGNLAB_CASE(10) ALIGNLAB_CASE(11) ALIGNLAB_CASE(12)
#undef ALIGNLAB_CASE
    }
  }
}

// Multiply rows with the panels from `first` to `last`; rows are cut into tiles of equal height, to within one.
template <class Tile, class Finish>
inline void panels_of(
    const Tile& tile, int64_t row, int64_t rows, int64_t first, int64_t last, const Finish& finish) {
  int64_t panel = first;
  if (rows <= kFewRows)
    for (; panel + 1 < last; panel += 2) tile_of<2>(tile, rows, panel, row, finish);
  const int64_t tiles = (rows + kTileRows - 1) / kTileRows;
  for (; panel < last; panel++)
    for (int64_t t = 0; t < tiles; t++) {
      const int64_t start = row + rows * t / tiles, end = row + rows * (t + 1) / tiles;
      tile_of<1>(tile, end - start, panel, start, finish);
    }
}

// Multiply all rows, shared out among the threads of the parallel region. Ends with a barrier.
template <class Tile, class Finish>
inline void all_panels(Tile tile, int64_t rows, const Weight& weight, const Finish& finish) {
  const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads(), panels = weight.num_panels();
  const int64_t first = panels * thread / threads, last = panels * (thread + 1) / threads;
  for (int64_t row = 0; row < rows; row += kBlockRows) {
    const int64_t count = std::min(kBlockRows, rows - row);
    tile.begin(row, count);
    panels_of(tile, row, count, first, last, finish);
  }
#pragma omp barrier
}

// Multiply rows [rows, words] (a word stride of lda) with a weight, shared out among the threads of the parallel region.
// `finish(row, panel, low, high)` gets the first and the last 16 of 32 outputs. Ends with a barrier.
template <class S, class Finish>
inline void product(
    const Word* a, int64_t lda, int64_t rows, const Weight& weight, const RoundedRows& rounded, const Finish& finish) {
  switch (weight.format) {
    case kStored:
      return all_panels(StoredTile<S>(a, lda, weight), rows, weight, finish);
#ifdef __AVX512VNNI__
    case kInt8:
      round_rows<S, Int8>(a, lda, rows, weight, rounded);
      return all_panels(RoundedTile<S, Int8>{weight, rounded}, rows, weight, finish);
    case kInt4:
      round_rows<S, Int4>(a, lda, rows, weight, rounded);
      return all_panels(RoundedTile<S, Int4>{weight, rounded}, rows, weight, finish);
    case kInt8Dynamic:
      round_rows<S, Int8Dynamic>(a, lda, rows, weight, rounded);
      return all_panels(RoundedTile<S, Int8Dynamic>{weight, rounded}, rows, weight, finish);
#endif
  }
}

// How the outputs of a product are stored, as float32.
enum class Output {
  kRounded,  // to the type of storage, where the model's own layers round
  kExact,
  kAdded,    // to what is there, without rounding: the residual stream
};

// Store 32 outputs of a row, with the weight's bias.
template <class S>
inline void store_outputs(const Weight& weight, float* row, int64_t panel, __m512 low, __m512 high, Output kind) {
  for (int64_t half = 0; half < 2; half++) {
    const int64_t at = panel * kPanel + half * kLanes;
    const __mmask16 lanes = first_lanes(weight.outputs - at);
    __m512 values = half ? high : low;
    if (weight.bias) values = _mm512_add_ps(values, _mm512_maskz_loadu_ps(lanes, weight.bias + at));
    if (kind == Output::kRounded) values = S::rounded(values);
    if (kind == Output::kAdded) values = _mm512_add_ps(values, _mm512_maskz_loadu_ps(lanes, row + at));
    _mm512_mask_storeu_ps(row + at, lanes, values);
  }
}

// y [rows, outputs] from a W^T + bias. Ends with a barrier.
template <class S>
inline void product_to(
    const Word* a, int64_t lda, int64_t rows, const Weight& weight, const RoundedRows& rounded, float* y, Output kind) {
  product<S>(a, lda, rows, weight, rounded, [&](int64_t row, int64_t panel, __m512 low, __m512 high) {
    store_outputs<S>(weight, y + row * weight.outputs, panel, low, high, kind);
  });
}

// Write rows [n, k] of a weight to panels: row j to lane `lane + (first + j) % per_panel` of panel
// `(first + j) / per_panel`. Panels hold 32 rows in order, or 16 of a gate and then 16 of what it multiplies.
template <class S>
inline void pack(
    const typename S::Number* weight, int64_t n, int64_t k, Word* panels, int64_t first, int64_t per_panel, int64_t lane,
    int threads) {
  const int64_t words = words_of<S>(k);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t j = 0; j < n; j++) {
    Word* to = panels + (first + j) / per_panel * words * kPanel + lane + (first + j) % per_panel;
    for (int64_t i = 0; i < words; i++) {
      Word word = 0;
      const int64_t count = std::min(S::kPerWord, k - i * S::kPerWord);
      std::memcpy(&word, weight + j * k + i * S::kPerWord, count * sizeof(typename S::Number));
      to[i * kPanel] = word;
    }
  }
}

}  // namespace alignlab
