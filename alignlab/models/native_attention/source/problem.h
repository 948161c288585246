// What is attended to: the tensors, the tiles that they are cut into, and keys and values packed for products.
#pragma once

#include <omp.h>

#include <algorithm>
#include <vector>

#include "tiles.h"

namespace alignlab {

using S = ALIGNLAB_STORAGE;
using Number = S::Number;
constexpr int64_t kQueries = 64;
constexpr int64_t kKeys = 256;
constexpr __mmask16 kAll = 0xffff;

struct Tensor {  // [heads, tokens, size], the numbers of a token side by side; strides count numbers
  Number* data;
  int64_t head_stride, token_stride;

  Number* at(int64_t head, int64_t token) const { return data + head * head_stride + token * token_stride; }
  const Word* words(int64_t head, int64_t token) const { return (const Word*)at(head, token); }
  int64_t word_stride() const { return token_stride / S::kPerWord; }
};

struct Problem {  // the layout is `binding.ProblemStruct`'s
  Tensor query, key, value, output;
  Tensor grad_output, grad_query, grad_key, grad_value;  // of the backward pass alone
  float* logsumexp;                                      // [heads, tokens], of the scores and the sink
  const float* sinks;                                    // [heads], or null
  float* grad_sinks;                                     // [heads], of the backward pass, or null
  const int64_t *starts, *lengths, *prefixes;            // [segments]; prefix -1 without a prompt
  int64_t num_segments, num_tokens, num_heads, num_kv_heads, size, value_size;
  int64_t window;  // tokens that a token sees, itself included
  int64_t num_threads;
  float scale;
  float softcap;  // 0 is none
};

struct Queries {  // a tile of a segment
  int64_t segment, row, count;
};

struct Keys {  // a tile of a segment; query i sees key j of the tiles if 0 <= distance + i - j < window
  int64_t segment, first, count, distance;
};

std::vector<Queries> query_tiles(const Problem& problem) {
  std::vector<Queries> tiles;
  for (int64_t s = 0; s < problem.num_segments; s++)
    for (int64_t row = 0; row < problem.lengths[s]; row += kQueries)
      tiles.push_back({s, row, std::min(kQueries, problem.lengths[s] - row)});
  return tiles;
}

// Call visit(keys) for each tile of keys of which the queries see any: the prompt's first, then their own segment's.
template <class Visit>
void for_keys(const Problem& problem, const Queries& queries, const Visit& visit) {
  const int64_t prefix = problem.prefixes[queries.segment];
  for (int64_t segment : {prefix, queries.segment}) {
    if (segment < 0) continue;
    const bool own = segment == queries.segment;
    const int64_t distance = queries.row + (own ? 0 : problem.lengths[prefix]);  // of the first query and the first key
    const int64_t end = own ? queries.row + queries.count : problem.lengths[prefix];
    const int64_t nearest = std::max<int64_t>(0, distance - problem.window + 1) / kLanes * kLanes;
    for (int64_t first = nearest; first < end; first += kKeys)
      visit(Keys{segment, first, std::min(kKeys, end - first), distance - first});
  }
}

// Keys or values of all segments as right matrices of products; each segment begins at a multiple of 16.
class Packed {
 public:
  Packed(const Problem& problem, const Tensor& from, int64_t size)
      : problem_(problem), from_(from), size_(size), words_(size / S::kPerWord) {
    for (int64_t s = 0; s < problem.num_segments; s++) {
      places_.push_back(total_);
      total_ += rounded_up(problem.lengths[s], kLanes);
    }
  }

  // For sums over the numbers of a token: `over_numbers(head, segment, first)` with a stride of `total()`.
  void pack_over_numbers() {
    numbers_.resize(problem_.num_kv_heads * words_ * total_);
    for_segments([&](int64_t head, int64_t s) {
      pack_transposed(
          from_.words(head, problem_.starts[s]), from_.word_stride(), problem_.lengths[s],
          rounded_up(problem_.lengths[s], kLanes), words_, (Word*)over_numbers(head, s, 0), total_);
    });
  }

  // For sums over tokens: `over_tokens(head, segment, first)` with a stride of `size`; `first` is a multiple of 16.
  void pack_over_tokens() {
    tokens_.resize(problem_.num_kv_heads * total_ / S::kPerWord * size_);
    for_segments([&](int64_t head, int64_t s) {
      pack_rows<S>(
          from_.at(head, problem_.starts[s]), from_.token_stride, problem_.lengths[s], size_,
          (Word*)over_tokens(head, s, 0));
    });
  }

  const Word* over_numbers(int64_t head, int64_t s, int64_t first) const {
    return numbers_.data() + head * words_ * total_ + places_[s] + first;
  }
  const Word* over_tokens(int64_t head, int64_t s, int64_t first) const {
    return tokens_.data() + (head * total_ + places_[s] + first) / S::kPerWord * size_;
  }
  int64_t total() const { return total_; }

 private:
  template <class Do>
  void for_segments(const Do& act) {
#pragma omp parallel for collapse(2) num_threads((int)problem_.num_threads) schedule(dynamic)
    for (int64_t head = 0; head < problem_.num_kv_heads; head++)
      for (int64_t s = 0; s < problem_.num_segments; s++) act(head, s);
  }

  const Problem& problem_;
  const Tensor& from_;
  const int64_t size_, words_;
  int64_t total_ = 0;
  std::vector<int64_t> places_;
  std::vector<Word> numbers_, tokens_;
};

// Scaled and capped scores. `slope` is the cap's derivative, for the backward pass.
inline __m512 finished(const Problem& problem, __m512 scores, __m512* slope = nullptr) {
  scores = _mm512_mul_ps(scores, _mm512_set1_ps(problem.scale));
  if (problem.softcap == 0.f) return scores;
  const __m512 tanh = tanh_of(_mm512_mul_ps(scores, _mm512_set1_ps(1.f / problem.softcap)));
  if (slope) *slope = _mm512_fnmadd_ps(tanh, tanh, _mm512_set1_ps(1.f));
  return _mm512_mul_ps(tanh, _mm512_set1_ps(problem.softcap));
}

inline __mmask16 lanes_between(int64_t first, int64_t end) { return first_lanes(end) & ~first_lanes(first); }

}  // namespace alignlab
