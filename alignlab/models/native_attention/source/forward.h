// The forward pass: a softmax over the keys of a tile of queries, merged tile by tile.
#pragma once

#include "problem.h"

namespace alignlab {

// The softmax of one tile of queries, merged tile of keys by tile of keys.
class ForwardTile {
 public:
  explicit ForwardTile(const Problem& problem)
      : problem_(problem), scores_(kQueries * kKeys), output_(kQueries * problem.value_size), weights_(kQueries * kKeys),
        top_(kQueries), mass_(kQueries) {}

  void compute(const Packed& keys, const Packed& values, const Queries& queries, int64_t head) {
    const int64_t kv_head = head / (problem_.num_heads / problem_.num_kv_heads), size = problem_.value_size;
    const int64_t token = problem_.starts[queries.segment] + queries.row;
    std::fill(output_.begin(), output_.end(), 0.f);
    std::fill(top_.begin(), top_.end(), -INFINITY);
    std::fill(mass_.begin(), mass_.end(), 0.f);
    for_keys(problem_, queries, [&](const Keys& tile) {
      const int64_t columns = rounded_up(tile.count, kLanes);
      multiply<S, false>(
          problem_.query.words(head, token), problem_.query.word_stride(),
          keys.over_numbers(kv_head, tile.segment, tile.first), keys.total(), queries.count, columns,
          problem_.size / S::kPerWord, scores_.data(), kKeys);
      for (int64_t i = 0; i < queries.count; i++) weigh(i, tile, columns);
      multiply<S, true>(
          (const Word*)weights_.data(), kKeys / S::kPerWord, values.over_tokens(kv_head, tile.segment, tile.first), size,
          queries.count, size, columns / S::kPerWord, output_.data(), size);
    });
    for (int64_t i = 0; i < queries.count; i++) finish(head, token + i, i);
  }

 private:
  // Turn the scores of query i into weights relative to the largest score so far.
  void weigh(int64_t i, const Keys& tile, int64_t columns) {
    const int64_t end = std::min(tile.count, tile.distance + i + 1);
    const int64_t first = std::max<int64_t>(0, tile.distance + i + 1 - problem_.window);
    float* scores = scores_.data() + i * kKeys;
    Number* weights = weights_.data() + i * kKeys;
    __m512 peaks = _mm512_set1_ps(-INFINITY), masses = _mm512_setzero_ps();
    for (int64_t c = first / kLanes * kLanes; c < end; c += kLanes) {
      const __m512 score = finished(problem_, _mm512_loadu_ps(scores + c));
      _mm512_storeu_ps(scores + c, score);
      peaks = _mm512_mask_max_ps(peaks, lanes_between(first - c, end - c), peaks, score);
    }
    raise(i, _mm512_reduce_max_ps(peaks));
    const __m512 top = _mm512_set1_ps(top_[i]);
    for (int64_t c = 0; c < columns; c += kLanes) {
      const __mmask16 lanes = end <= first ? 0 : lanes_between(first - c, end - c);
      const __m512 weight =
          lanes ? _mm512_maskz_mov_ps(lanes, exp_of(_mm512_sub_ps(_mm512_loadu_ps(scores + c), top))) : _mm512_setzero_ps();
      masses = _mm512_add_ps(masses, weight);
      S::store(weights + c, weight, kAll);
    }
    mass_[i] += _mm512_reduce_add_ps(masses);
  }

  // Make weights relative to a larger score.
  void raise(int64_t i, float peak) {
    if (!(peak > top_[i])) return;
    const float factor = std::exp(top_[i] - peak);  // 0 at first
    top_[i] = peak;
    mass_[i] *= factor;
    float* output = output_.data() + i * problem_.value_size;
    for (int64_t d = 0; d < problem_.value_size; d += kLanes)
      _mm512_storeu_ps(output + d, _mm512_mul_ps(_mm512_set1_ps(factor), _mm512_loadu_ps(output + d)));
  }

  void finish(int64_t head, int64_t token, int64_t i) {
    float mass = mass_[i];
    if (problem_.sinks) {  // one more key, whose value is 0
      raise(i, problem_.sinks[head]);
      mass = mass_[i] + std::exp(problem_.sinks[head] - top_[i]);
    }
    const __m512 factor = _mm512_set1_ps(1.f / mass);
    for (int64_t d = 0; d < problem_.value_size; d += kLanes) {
      const __m512 output = _mm512_loadu_ps(output_.data() + i * problem_.value_size + d);
      S::store(problem_.output.at(head, token) + d, _mm512_mul_ps(factor, output), kAll);
    }
    problem_.logsumexp[head * problem_.num_tokens + token] = top_[i] + std::log(mass);
  }

  const Problem& problem_;
  std::vector<float> scores_, output_;
  std::vector<Number> weights_;
  std::vector<float> top_, mass_;
};

void forward(const Problem& problem) {
  Packed keys(problem, problem.key, problem.size), values(problem, problem.value, problem.value_size);
  keys.pack_over_numbers();
  values.pack_over_tokens();
  const std::vector<Queries> tiles = query_tiles(problem);
  const int64_t count = tiles.size();
#pragma omp parallel num_threads((int)problem.num_threads)
  {
    ForwardTile tile(problem);
#pragma omp for schedule(dynamic)
    for (int64_t work = 0; work < problem.num_heads * count; work++)
      tile.compute(keys, values, tiles[count - 1 - work % count], work / count);  // those with most keys first
  }
}

}  // namespace alignlab
