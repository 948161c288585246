// What is done to one row of hidden states at a time: norms, activations, conversions.
#pragma once

#include "model.h"

namespace alignlab {

// 1 / sqrt(mean(x^2) + eps) of n numbers.
inline float inverse_rms(const float* x, int64_t n, double eps) {
  __m512 sum = _mm512_setzero_ps();
  for (int64_t i = 0; i < n; i += kLanes) {
    const __m512 v = _mm512_maskz_loadu_ps(first_lanes(n - i), x + i);
    sum = _mm512_fmadd_ps(v, v, sum);
  }
  return 1.f / std::sqrt(_mm512_reduce_add_ps(sum) / float(n) + float(eps));
}

// Call `use(first number, its lanes, 16 values)` for all n numbers of rms_norm(x) * weight; of x itself without a weight.
template <class Use>
inline void normed(const float* x, const float* weight, int64_t n, double eps, const Use& use) {
  const __m512 scale = _mm512_set1_ps(weight ? inverse_rms(x, n, eps) : 1.f);
  for (int64_t i = 0; i < n; i += kLanes) {
    const __mmask16 lanes = first_lanes(n - i);
    __m512 v = _mm512_maskz_loadu_ps(lanes, x + i);
    if (weight) v = _mm512_mul_ps(_mm512_mul_ps(v, scale), _mm512_maskz_loadu_ps(lanes, weight + i));
    use(i, lanes, v);
  }
}

// Norm rows x [rows, n] into words of storage. Ends with a barrier.
template <class S>
inline void norm_rows(const float* x, const float* weight, int64_t rows, int64_t n, double eps, Word* to) {
#pragma omp for schedule(static)
  for (int64_t row = 0; row < rows; row++) {
    auto* out = reinterpret_cast<typename S::Number*>(to + row * words_of<S>(n));
    normed(x + row * n, weight, n, eps, [&](int64_t i, __mmask16 lanes, __m512 v) { S::store(out + i, v, lanes); });
  }
}

// Add the norm of rows y [rows, n] to rows x. Ends with a barrier.
inline void add_normed(float* x, const float* y, const float* weight, int64_t rows, int64_t n, double eps) {
#pragma omp for schedule(static)
  for (int64_t row = 0; row < rows; row++) {
    float* to = x + row * n;
    normed(y + row * n, weight, n, eps, [&](int64_t i, __mmask16 lanes, __m512 v) {
      _mm512_mask_storeu_ps(to + i, lanes, _mm512_add_ps(v, _mm512_maskz_loadu_ps(lanes, to + i)));
    });
  }
}

inline __m512 activated(__m512 x, int64_t activation) {
  if (activation == kSilu) return _mm512_mul_ps(x, sigmoid_of(x));
  if (activation == kRelu) return _mm512_max_ps(_mm512_setzero_ps(), x);  // nan stays nan
  // x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))), Hendrycks and Gimpel (2016), arXiv:1606.08415
  const __m512 cube = _mm512_mul_ps(_mm512_mul_ps(x, x), x);
  const __m512 inner = _mm512_fmadd_ps(_mm512_set1_ps(0.044715f), cube, x);
  const __m512 t = tanh_of(_mm512_mul_ps(_mm512_set1_ps(0.7978845608f), inner));
  return _mm512_mul_ps(_mm512_mul_ps(_mm512_set1_ps(0.5f), x), _mm512_add_ps(_mm512_set1_ps(1.f), t));
}

// activation(gate) * up of one panel of 16 gates and 16 ups, into a row of words of storage.
template <class S>
inline void store_activated(
    const Weight& weight, Word* row, int64_t panel, __m512 gate, __m512 up, int64_t activation) {
  const int64_t at = panel * kLanes;
  const __mmask16 lanes = first_lanes(weight.outputs / 2 - at);
  if (weight.bias) {  // in the order of the panels
    gate = _mm512_add_ps(gate, _mm512_loadu_ps(weight.bias + panel * kPanel));
    up = _mm512_add_ps(up, _mm512_loadu_ps(weight.bias + panel * kPanel + kLanes));
  }
  auto* to = reinterpret_cast<typename S::Number*>(row);
  S::store(to + at, _mm512_mul_ps(activated(gate, activation), up), lanes);
}

}  // namespace alignlab
