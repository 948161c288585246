// Products with weights that were rounded to 8 or 4 bits, which `alignlab/models/weight_rounding.py` defines.
//
// Activations are integers too, so that a processor multiplies them as they are: of 16 bits with a scale a row where the
// weights alone are rounded, of 8 bits where the activations are meant to be. Sums of products are exact integers within
// a block of inputs; blocks are added up in float32, in order.
#pragma once

#include "weight.h"

namespace alignlab {

// Rows of activations in integers, written by all threads before a product.
struct RoundedRows {  // the layout is `binding.RoundedRowsStruct`'s
  Word* codes;        // [rows, words]
  float* scales;      // [rows]
  int32_t* sums;      // [rows, groups] of the codes that meet a group of 4-bit weights
};

#ifdef __AVX512VNNI__

// Codes of a weight are in units: those that one vector reads of 16 outputs. The vectors of a unit are multiplied with as
// many neighbouring words of a row.
struct Int8 {  // 16-bit rows
  static constexpr int64_t kVectors = 1, kUnitBytes = 32, kLargest = 32767;
  static constexpr int64_t kBlockWords = 256;  // 512 products of 127 x 32767 fit 32 bits
  static constexpr bool kGrouped = false;
  static void load(const uint8_t* unit, __m512i (&b)[kVectors]) {
    b[0] = _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)unit));
  }
  static __m512i multiply_add(__m512i sum, __m512i row, __m512i b) { return _mm512_dpwssd_epi32(sum, row, b); }
};

struct Int4 {  // 16-bit rows; a byte holds code + 8 of an input, and of the second after it
  static constexpr int64_t kVectors = 2, kUnitBytes = 32, kLargest = 32767;
  static constexpr bool kGrouped = true;
  static void load(const uint8_t* unit, __m512i (&b)[kVectors]) {
    const __m512i both = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)unit));
    b[0] = _mm512_and_si512(both, _mm512_set1_epi16(15));
    b[1] = _mm512_srli_epi16(both, 4);
  }
  static __m512i multiply_add(__m512i sum, __m512i row, __m512i b) { return _mm512_dpwssd_epi32(sum, row, b); }
};

struct Int8Dynamic {  // 8-bit rows, as code + 128
  static constexpr int64_t kVectors = 1, kUnitBytes = 64, kLargest = 127;
  static constexpr int64_t kBlockWords = INT64_MAX;  // over 60,000 products of 255 x 127 fit 32 bits
  static constexpr bool kGrouped = false;
  static void load(const uint8_t* unit, __m512i (&b)[kVectors]) { b[0] = _mm512_loadu_si512(unit); }
  static __m512i multiply_add(__m512i sum, __m512i row, __m512i b) { return _mm512_dpbusd_epi32(sum, row, b); }
};

// The largest of n absolute values; nan where one is not finite.
template <class S>
inline float largest_of(const typename S::Number* x, int64_t n) {
  __m512 largest = _mm512_setzero_ps(), wrong = _mm512_setzero_ps();
  for (int64_t i = 0; i < n; i += kLanes) {
    const __m512 v = S::load(x + i, first_lanes(n - i));
    largest = _mm512_max_ps(largest, _mm512_abs_ps(v));
    wrong = _mm512_fmadd_ps(v, _mm512_setzero_ps(), wrong);  // 0, but nan of nan and of infinity
  }
  return _mm512_reduce_max_ps(largest) + _mm512_reduce_add_ps(wrong);
}

// Round one row of n numbers: scale = max |x| / largest, code = round(x / scale). A row of zeros has codes of 0; a
// number that is not finite makes the scale nan, and with it every result.
template <class S, class F>
inline void round_row(const typename S::Number* x, int64_t n, Word* codes, float& scale, int32_t* sums, int64_t group) {
  const float peak = largest_of<S>(x, n);
  scale = peak / float(F::kLargest);
  const __m512 unit = _mm512_set1_ps(peak > 0 ? scale : 1.f);
  int32_t sum = 0;
  for (int64_t i = 0; i < n; i += kLanes) {
    const __mmask16 lanes = first_lanes(n - i);
    const __m512i code = _mm512_cvtps_epi32(_mm512_div_ps(S::load(x + i, lanes), unit));
    if constexpr (F::kLargest == 127) {
      const __m512i shifted = _mm512_add_epi32(code, _mm512_set1_epi32(128));
      _mm_mask_storeu_epi8(reinterpret_cast<uint8_t*>(codes) + i, lanes, _mm512_cvtepi32_epi8(shifted));
    } else {
      _mm256_mask_storeu_epi16(reinterpret_cast<int16_t*>(codes) + i, lanes, _mm512_cvtepi32_epi16(code));
    }
    if constexpr (F::kGrouped) {  // groups are whole vectors
      sum += _mm512_reduce_add_epi32(code);
      if ((i + kLanes) % group == 0) sums[i / group] = sum, sum = 0;
    }
  }
}

// Round rows [rows, words] (a word stride of lda) to what a weight of format F multiplies. Ends with a barrier.
template <class S, class F>
inline void round_rows(const Word* a, int64_t lda, int64_t rows, const Weight& weight, const RoundedRows& to) {
  const int64_t words = weight.code_words(), n = weight.inputs;
#pragma omp for schedule(static)
  for (int64_t row = 0; row < rows; row++) {
    Word* codes = to.codes + row * words;
    codes[words - 1] = 0;  // which may be filled in part
    round_row<S, F>(reinterpret_cast<const typename S::Number*>(a + row * lda), n, codes, to.scales[row],
                    to.sums + row * weight.groups, weight.groups ? n / weight.groups : 0);
  }
}

// M rounded rows times one panel of a rounded weight, or two neighbouring ones; as `StoredTile`.
template <class S, class F>
struct RoundedTile {
  const Weight& weight;
  const RoundedRows& rows;

  void begin(int64_t, int64_t) {}  // rows are rounded by all threads together

  template <int M, int kPanels, class Finish>
  void run(int64_t panel, int64_t row, const Finish& finish) const {
    constexpr int P = 2 * kPanels;
    const int64_t words = weight.code_words();
    const int64_t block = F::kGrouped ? words / weight.groups : block_words();
    __m512 total[M][P];
    for (int m = 0; m < M; m++)
      for (int p = 0; p < P; p++) total[m][p] = _mm512_setzero_ps();
    for (int64_t start = 0, group = 0; start < words; start += block, group++) {
      __m512i sum[M][P];
      begin(panel, row, group, sum);
      multiply(panel, row, start, std::min(start + block, words), sum);
      for (int p = 0; p < P; p++) {
        const __m512 scale = F::kGrouped ? scales(panel + p / 2, p % 2, group) : _mm512_set1_ps(1.f);
        for (int m = 0; m < M; m++) total[m][p] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[m][p]), scale, total[m][p]);
      }
    }
    for (int m = 0; m < M; m++)
      for (int q = 0; q < kPanels; q++)
        finish(row + m, panel + q, scaled(total[m][2 * q], panel + q, 0, row + m),
               scaled(total[m][2 * q + 1], panel + q, 1, row + m));
  }

 private:
  static constexpr int64_t block_words() {
    if constexpr (F::kGrouped) return 0;
    else return F::kBlockWords;
  }

  __m512 scales(int64_t panel, int64_t half, int64_t group) const {
    const int64_t groups = F::kGrouped ? weight.groups : 1;
    const auto* at = static_cast<const typename S::Number*>(weight.scales) + (panel * groups + group) * kPanel;
    return S::load(at + half * kLanes, __mmask16(0xffff));
  }

  // The sums before the first product: what the shift of unsigned codes adds, taken off.
  template <int M, int P>
  void begin(int64_t panel, int64_t row, int64_t group, __m512i (&sum)[M][P]) const {
    for (int m = 0; m < M; m++)
      for (int p = 0; p < P; p++) {
        if constexpr (F::kGrouped)
          sum[m][p] = _mm512_set1_epi32(-8 * rows.sums[(row + m) * weight.groups + group]);
        else if constexpr (F::kLargest == 127)
          sum[m][p] = _mm512_loadu_si512(weight.shifts + (panel + p / 2) * kPanel + p % 2 * kLanes);
        else
          sum[m][p] = _mm512_setzero_si512();
      }
  }

  // Add the products of the words from `start` to `end`.
  template <int M, int P>
  void multiply(int64_t panel, int64_t row, int64_t start, int64_t end, __m512i (&sum)[M][P]) const {
    const int64_t words = weight.code_words(), stride = 2 * F::kUnitBytes;
    const Word* a = rows.codes + row * words;
    const uint8_t* columns[P];
    for (int p = 0; p < P; p++)
      columns[p] = weight.codes(panel + p / 2, words / F::kVectors * stride) + p % 2 * F::kUnitBytes;
    for (int64_t i = start; i < end; i += F::kVectors) {
      __m512i b[P][F::kVectors];
      for (int p = 0; p < P; p++) {
        const uint8_t* at = columns[p] + i / F::kVectors * stride;
        F::load(at, b[p]);
        _mm_prefetch((const char*)(at + 16 * stride), _MM_HINT_T0);
      }
      for (int m = 0; m < M; m++)
        for (int v = 0; v < F::kVectors; v++) {
          const __m512i word = _mm512_set1_epi32((int)a[m * words + i + v]);
          for (int p = 0; p < P; p++) sum[m][p] = F::multiply_add(sum[m][p], word, b[p][v]);
        }
    }
  }

  __m512 scaled(__m512 total, int64_t panel, int64_t half, int64_t row) const {
    if constexpr (!F::kGrouped) total = _mm512_mul_ps(total, scales(panel, half, 0));
    return _mm512_mul_ps(total, _mm512_set1_ps(rows.scales[row]));
  }
};

#endif  // without these instructions `coverage` refuses rounded weights

}  // namespace alignlab
