// Tokens drawn from logits without truncation, as `alignlab.rollout.embedded.sampling` draws them: the same random numbers
// and the same race, over chunks of the vocabulary and then within one. Rates differ from torch's by rounding alone.
#pragma once

#include <limits>
#include <vector>

#include "vectors.h"

namespace alignlab {

constexpr int64_t kChunk = 256;

// SplitMix64's number `index` of a key's stream; Steele, Lea, Flood (2014).
inline uint64_t random_bits(uint64_t key, uint64_t index) {
  uint64_t state = key + (index + 1) * 0x9E3779B97F4A7C15ull;
  state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9ull;
  state = (state ^ (state >> 27)) * 0x94D049BB133111EBull;
  return state ^ (state >> 31);
}

// An exponentially distributed number.
inline double exponential(uint64_t key, uint64_t index) {
  return -std::log1p(-(((double)(random_bits(key, index) >> 12) + 0.5) * 0x1p-52));
}

struct Highest {
  float value;
  int64_t index;     // the first that has it
  bool is_finite;    // no logit is nan or +inf
};

inline Highest highest_of(const float* logits, int64_t count) {
  const float infinity = std::numeric_limits<float>::infinity();
  __m512 tops = _mm512_set1_ps(-infinity);
  __mmask16 wrong = 0;
  for (int64_t i = 0; i < count; i += kLanes) {
    const __m512 v = _mm512_mask_loadu_ps(tops, first_lanes(count - i), logits + i);
    wrong |= _mm512_cmp_ps_mask(v, _mm512_set1_ps(infinity), _CMP_NLT_UQ);
    tops = _mm512_max_ps(tops, v);
  }
  const float top = _mm512_reduce_max_ps(tops);
  int64_t index = 0;
  while (index < count - 1 && logits[index] != top) index++;
  return {top, index, wrong == 0 && top > -infinity};
}

// The weights exp((logit - highest) / temperature) of one row.
struct Weights {
  const float* logits;
  int64_t count;
  float temperature, top;  // the highest logit over the temperature

  __m512 at(int64_t i, __mmask16 lanes) const {
    __m512 v = _mm512_maskz_loadu_ps(lanes, logits + i);
    if (temperature != 1.f) v = _mm512_div_ps(v, _mm512_set1_ps(temperature));
    return _mm512_maskz_mov_ps(lanes, exp_of(_mm512_sub_ps(v, _mm512_set1_ps(top))));
  }
  float sum(int64_t first, int64_t last) const {
    __m512 total = _mm512_setzero_ps();
    for (int64_t i = first; i < last; i += kLanes) total = _mm512_add_ps(total, at(i, first_lanes(last - i)));
    return _mm512_reduce_add_ps(total);
  }
};

struct Drawn {
  int64_t token;
  double weight, total;
};

// The token that arrives first if arrival times are exponential, with the weights as rates.
inline Drawn race(const Weights& weights, uint64_t key) {
  const int64_t chunks = (weights.count + kChunk - 1) / kChunk;
  double total = 0, best = -1;
  int64_t chunk = 0;
  for (int64_t c = 0; c < chunks; c++) {
    const double rate = weights.sum(c * kChunk, std::min(weights.count, (c + 1) * kChunk));
    total += rate;
    const double speed = rate / exponential(key, c);
    if (speed > best) best = speed, chunk = c;
  }
  alignas(64) float inside[kChunk];
  const int64_t first = chunk * kChunk, size = std::min(kChunk, weights.count - first);
  for (int64_t i = 0; i < size; i += kLanes) _mm512_store_ps(inside + i, weights.at(first + i, first_lanes(size - i)));
  int64_t token = 0;
  best = -1;
  for (int64_t i = 0; i < size; i++) {
    const double speed = inside[i] / exponential(key, chunks + i);
    if (speed > best) best = speed, token = i;
  }
  return {first + token, inside[token], total};
}

// Draw a token for each row of logits [rows, count]. Greedy rows (temperature 0) take the first of the highest logits.
// `raw` gets the token's log-prob at temperature 1, nan where a logit is nan or +inf.
inline void draw_rows(
    const float* logits, int64_t rows, int64_t count, const int64_t* keys, const int64_t* positions,
    const float* temperatures, int64_t* tokens, float* logprobs, float* raw, int threads) {
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (int64_t row = 0; row < rows; row++) {
    const float* x = logits + row * count;
    const Highest highest = highest_of(x, count);
    const bool is_greedy = temperatures[row] == 0;
    const float temperature = is_greedy ? 1.f : temperatures[row];
    const Weights plain{x, count, 1.f, highest.value};
    Drawn drawn{highest.index, 1, 1};
    if (!is_greedy) {
      const uint64_t key = random_bits((uint64_t)keys[row], (uint64_t)positions[row]);
      drawn = race({x, count, temperature, highest.value / temperature}, key);
    }
    double normalizer = drawn.total;
    if (is_greedy || temperature != 1.f) {
      normalizer = 0;
      for (int64_t i = 0; i < count; i += kChunk) normalizer += plain.sum(i, std::min(count, i + kChunk));
    }
    tokens[row] = drawn.token;
    logprobs[row] = is_greedy ? 0.f : float(std::log(drawn.weight / drawn.total));
    raw[row] = highest.is_finite ? float((double)(x[drawn.token] - highest.value) - std::log(normalizer))
                                 : std::numeric_limits<float>::quiet_NaN();
  }
}

}  // namespace alignlab
