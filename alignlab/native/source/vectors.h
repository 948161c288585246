// Vectors of 16 numbers, and the two types in which weights and the cache are stored.
//
// Arithmetic is float32 throughout. A Word is 32 bits of storage: one float32, or two neighbouring bfloat16. Products read
// their operands word by word, so that all kernels but the few functions below are the same for both types.
//
// A product takes a word in `kParts` parts, each of which is a vector for a row, the same in all lanes, and one for 16
// columns. Where `Wide` is another type than Word, rows that meet many columns are widened to it first.
#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace alignlab {

using Word = uint32_t;
constexpr int64_t kLanes = 16;

inline int64_t rounded_up(int64_t count, int64_t multiple) { return (count + multiple - 1) / multiple * multiple; }

// Mask of the first `count` lanes.
inline __mmask16 first_lanes(int64_t count) {
  return count >= kLanes ? __mmask16(0xffff) : count <= 0 ? __mmask16(0) : __mmask16((1u << count) - 1);
}

// exp(x) to 1e-7 of itself; 0 under -87, nan of nan. Cephes' polynomial on [-ln 2 / 2, ln 2 / 2].
inline __m512 exp_of(__m512 x) {
  const __mmask16 is_zero = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-87.f), _CMP_LT_OQ);
  x = _mm512_min_ps(_mm512_set1_ps(88.f), x);  // of nan and a number the instruction returns the second
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
  __m512 p = _mm512_set1_ps(1.9875691500e-4f);
  for (float coefficient : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(coefficient));
  p = _mm512_fmadd_ps(_mm512_mul_ps(r, r), p, _mm512_add_ps(r, _mm512_set1_ps(1.f)));
  return _mm512_mask_mov_ps(_mm512_scalef_ps(p, n), is_zero, _mm512_setzero_ps());
}

// tanh(x) to 2e-7; near 0 by its series, where 1 - 2 / (exp(2 x) + 1) would cancel.
inline __m512 tanh_of(__m512 x) {
  const __m512 one = _mm512_set1_ps(1.f), two = _mm512_set1_ps(2.f);
  const __m512 far = _mm512_sub_ps(one, _mm512_div_ps(two, _mm512_add_ps(exp_of(_mm512_mul_ps(two, x)), one)));
  const __m512 square = _mm512_mul_ps(x, x);
  __m512 p = _mm512_set1_ps(62.f / 2835.f);
  for (float coefficient : {-17.f / 315.f, 2.f / 15.f, -1.f / 3.f, 1.f})
    p = _mm512_fmadd_ps(p, square, _mm512_set1_ps(coefficient));
  const __mmask16 is_near = _mm512_cmp_ps_mask(_mm512_abs_ps(x), _mm512_set1_ps(0.25f), _CMP_LT_OQ);
  return _mm512_mask_mov_ps(far, is_near, _mm512_mul_ps(p, x));
}

// 1 / (1 + exp(-x))
inline __m512 sigmoid_of(__m512 x) {
  const __m512 one = _mm512_set1_ps(1.f);
  return _mm512_div_ps(one, _mm512_add_ps(one, exp_of(_mm512_sub_ps(_mm512_setzero_ps(), x))));
}

struct Float32 {
  static __m512 rounded(__m512 values) { return values; }
  using Number = float;
  static constexpr int64_t kPerWord = 1;
  static __m512 load(const Number* from, __mmask16 lanes) { return _mm512_maskz_loadu_ps(lanes, from); }
  static void store(Number* to, __m512 values, __mmask16 lanes) { _mm512_mask_storeu_ps(to, lanes, values); }

  using Wide = Word;
  using Part = __m512;
  static constexpr int kParts = 1;
  template <int kPart> static Part row(const Word* word) { return _mm512_castsi512_ps(_mm512_set1_epi32((int)*word)); }
  template <int kPart> static Part columns(__m512i words) { return _mm512_castsi512_ps(words); }
  static __m512 multiply_add(__m512 sum, Part a, Part b) { return _mm512_fmadd_ps(a, b, sum); }
};

#ifdef __AVX512BF16__
struct BFloat16 {
  // Values as storage has them.
  static __m512 rounded(__m512 values) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(values)), 16));
  }
  using Number = uint16_t;
  static constexpr int64_t kPerWord = 2;
  static __m512 load(const Number* from, __mmask16 lanes) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, from));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
  }
  static void store(Number* to, __m512 values, __mmask16 lanes) {
    _mm256_mask_storeu_epi16(to, lanes, (__m256i)_mm512_cvtneps_pbh(values));
  }

#ifdef ALIGNLAB_PAIRED_PRODUCTS  // both numbers of a word by one instruction; see `processor.has_fast_pairs`
  using Wide = Word;
  using Part = __m512i;
  static constexpr int kParts = 1;
  template <int kPart> static Part row(const Word* word) { return _mm512_set1_epi32((int)*word); }
  template <int kPart> static Part columns(__m512i words) { return words; }
  static __m512 multiply_add(__m512 sum, Part a, Part b) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }
#else  // each as float32
  struct Wide { float parts[2]; };
  using Part = __m512;
  static constexpr int kParts = 2;
  static Wide widened(Word word) {
    const Word parts[2] = {word << 16, word & 0xffff0000u};
    Wide wide;
    std::memcpy(&wide, parts, sizeof(wide));
    return wide;
  }
  template <int kPart> static Part row(const Wide* wide) { return _mm512_set1_ps(wide->parts[kPart]); }
  template <int kPart> static Part row(const Word* word) { return columns<kPart>(_mm512_set1_epi32((int)*word)); }
  template <int kPart> static Part columns(__m512i words) {
    return _mm512_castsi512_ps(
        kPart ? _mm512_and_si512(words, _mm512_set1_epi32((int)0xffff0000u)) : _mm512_slli_epi32(words, 16));
  }
  static __m512 multiply_add(__m512 sum, Part a, Part b) { return _mm512_fmadd_ps(a, b, sum); }
#endif
};
#endif

// Call `use(part, i)` for each part of word i, the part as a constant. The compiler may not keep what it read of the word
// for the next part: there are registers for sums alone, and it would store those instead.
template <class S, class Use>
inline void for_parts(int64_t i, const Use& use) {
  use(std::integral_constant<int, 0>(), i);
  if constexpr (S::kParts == 2) {
    asm volatile("" : "+r"(i));
    use(std::integral_constant<int, 1>(), i);
  }
}

template <class S>
inline int64_t words_of(int64_t count) { return (count + S::kPerWord - 1) / S::kPerWord; }

}  // namespace alignlab
