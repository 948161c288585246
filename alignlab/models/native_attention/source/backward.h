// The backward pass: weights are computed again from the scores and the logarithms of their sums.
#pragma once

#include "problem.h"

namespace alignlab {

// The gradients of one tile of queries, and what it adds to those of the keys and values that it sees.
//
// With P the weights and D = sum(dO * O):  dV = P^T dO,  dS = P * (dO V^T - D),  dQ = dS K,  dK = dS^T Q. Scores and their
// gradients are computed transposed, a row a key, so that the sums over queries need no other copy of them.
class BackwardTile {
 public:
  explicit BackwardTile(const Problem& problem)
      : problem_(problem), scores_(kKeys * kQueries), slopes_(kKeys * kQueries), grad_query_(kQueries * problem.size),
        weights_(kKeys * kQueries), grad_scores_(kKeys * kQueries), by_query_(kKeys * kQueries),
        query_numbers_(problem.size * kQueries), query_tokens_(problem.size * kQueries),
        output_numbers_(problem.value_size * kQueries), output_tokens_(problem.value_size * kQueries), delta_(kQueries),
        logsumexp_(kQueries) {}

  // Returns the gradient of the sink.
  float compute(const Packed& keys, const Queries& queries, int64_t head, float* grad_key, float* grad_value) {
    const int64_t kv_head = head / (problem_.num_heads / problem_.num_kv_heads);
    const int64_t token = problem_.starts[queries.segment] + queries.row;
    const int64_t size = problem_.size, value_size = problem_.value_size;
    const int64_t rows = rounded_up(queries.count, kLanes);
    const float grad_sink = prepare(queries, head, token, rows);
    std::fill(grad_query_.begin(), grad_query_.end(), 0.f);
    for_keys(problem_, queries, [&](const Keys& tile) {
      const int64_t key = problem_.starts[tile.segment] + tile.first, columns = rounded_up(tile.count, kLanes);
      multiply<S, false>(
          problem_.key.words(kv_head, key), problem_.key.word_stride(), query_numbers_.data(), kQueries, tile.count, rows,
          size / S::kPerWord, scores_.data(), kQueries);
      multiply<S, false>(
          problem_.value.words(kv_head, key), problem_.value.word_stride(), output_numbers_.data(), kQueries, tile.count,
          rows, value_size / S::kPerWord, slopes_.data(), kQueries);
      for (int64_t j = 0; j < tile.count; j++) weigh(j, tile, queries.count, rows);
      for (int64_t j = tile.count; j < columns; j++) std::fill_n(grad_scores_.data() + j * kQueries, kQueries, Number(0));
      multiply<S, true>(
          (const Word*)weights_.data(), kQueries / S::kPerWord, output_tokens_.data(), value_size, tile.count, value_size,
          rows / S::kPerWord, grad_value + key * value_size, value_size);
      multiply<S, true>(
          (const Word*)grad_scores_.data(), kQueries / S::kPerWord, query_tokens_.data(), size, tile.count, size,
          rows / S::kPerWord, grad_key + key * size, size);
      transpose(columns, rows);
      multiply<S, true>(
          (const Word*)by_query_.data(), kKeys / S::kPerWord, keys.over_tokens(kv_head, tile.segment, tile.first), size,
          queries.count, size, columns / S::kPerWord, grad_query_.data(), size);
    });
    for (int64_t i = 0; i < queries.count; i++)
      for (int64_t d = 0; d < size; d += kLanes) {
        const __m512 grad = _mm512_loadu_ps(grad_query_.data() + i * size + d);
        S::store(problem_.grad_query.at(head, token + i) + d, _mm512_mul_ps(grad, _mm512_set1_ps(problem_.scale)), kAll);
      }
    return grad_sink;
  }

 private:
  float prepare(const Queries& queries, int64_t head, int64_t token, int64_t rows) {
    const Tensor &query = problem_.query, &grad = problem_.grad_output;
    pack_transposed(
        query.words(head, token), query.word_stride(), queries.count, rows, problem_.size / S::kPerWord,
        query_numbers_.data(), kQueries);
    pack_transposed(
        grad.words(head, token), grad.word_stride(), queries.count, rows, problem_.value_size / S::kPerWord,
        output_numbers_.data(), kQueries);
    pack_rows<S>(query.at(head, token), query.token_stride, queries.count, problem_.size, query_tokens_.data());
    pack_rows<S>(grad.at(head, token), grad.token_stride, queries.count, problem_.value_size, output_tokens_.data());
    float grad_sink = 0.f;
    for (int64_t i = 0; i < queries.count; i++) {
      __m512 sum = _mm512_setzero_ps();
      for (int64_t d = 0; d < problem_.value_size; d += kLanes)
        sum = _mm512_fmadd_ps(
            S::load(grad.at(head, token + i) + d, kAll), S::load(problem_.output.at(head, token + i) + d, kAll), sum);
      delta_[i] = _mm512_reduce_add_ps(sum);
      logsumexp_[i] = problem_.logsumexp[head * problem_.num_tokens + token + i];
      if (problem_.sinks) grad_sink -= std::exp(problem_.sinks[head] - logsumexp_[i]) * delta_[i];
    }
    return grad_sink;
  }

  // Turn the scores and slopes of key j into weights and gradients of scores.
  void weigh(int64_t j, const Keys& tile, int64_t count, int64_t rows) {
    const int64_t first = std::max<int64_t>(0, j - tile.distance);
    const int64_t end = std::min(count, j - tile.distance + problem_.window);
    for (int64_t c = 0; c < rows; c += kLanes) {
      const int64_t at = j * kQueries + c;
      const __mmask16 lanes = end <= first ? 0 : lanes_between(first - c, end - c);
      __m512 weight = _mm512_setzero_ps(), grad = weight, slope = _mm512_set1_ps(1.f);
      if (lanes) {
        const __m512 score = finished(problem_, _mm512_loadu_ps(scores_.data() + at), &slope);
        weight = _mm512_maskz_mov_ps(lanes, exp_of(_mm512_sub_ps(score, _mm512_loadu_ps(logsumexp_.data() + c))));
        grad = _mm512_sub_ps(_mm512_loadu_ps(slopes_.data() + at), _mm512_loadu_ps(delta_.data() + c));
        grad = _mm512_maskz_mul_ps(lanes, _mm512_mul_ps(weight, grad), slope);
      }
      S::store(weights_.data() + at, weight, kAll);
      S::store(grad_scores_.data() + at, grad, kAll);
    }
  }

  void transpose(int64_t columns, int64_t rows) {
    for (int64_t block = 0; block < rows; block += kLanes)
      for (int64_t j = 0; j < columns; j++)
        for (int64_t i = block; i < block + kLanes; i++) by_query_[i * kKeys + j] = grad_scores_[j * kQueries + i];
  }

  const Problem& problem_;
  std::vector<float> scores_, slopes_, grad_query_;
  std::vector<Number> weights_, grad_scores_, by_query_;
  std::vector<Word> query_numbers_, query_tokens_, output_numbers_, output_tokens_;
  std::vector<float> delta_, logsumexp_;
};

// Add up the gradients [tokens, size] of the query heads that share a key, and store them.
void add_up(const Problem& problem, const std::vector<float>& grads, int64_t size, float scale, const Tensor& to) {
  const int64_t group = problem.num_heads / problem.num_kv_heads;
#pragma omp parallel for collapse(2) num_threads((int)problem.num_threads) schedule(static)
  for (int64_t head = 0; head < problem.num_kv_heads; head++)
    for (int64_t token = 0; token < problem.num_tokens; token++)
      for (int64_t d = 0; d < size; d += kLanes) {
        __m512 sum = _mm512_setzero_ps();
        for (int64_t g = 0; g < group; g++)
          sum = _mm512_add_ps(
              sum, _mm512_loadu_ps(grads.data() + ((head * group + g) * problem.num_tokens + token) * size + d));
        S::store(to.at(head, token) + d, _mm512_mul_ps(sum, _mm512_set1_ps(scale)), kAll);
      }
}

void backward(const Problem& problem) {
  Packed keys(problem, problem.key, problem.size);
  keys.pack_over_tokens();
  const std::vector<Queries> tiles = query_tiles(problem);
  std::vector<float> grad_key(problem.num_heads * problem.num_tokens * problem.size);
  std::vector<float> grad_value(problem.num_heads * problem.num_tokens * problem.value_size);
#pragma omp parallel num_threads((int)problem.num_threads)
  {
    BackwardTile tile(problem);
#pragma omp for schedule(dynamic)
    for (int64_t head = 0; head < problem.num_heads; head++) {  // one thread adds up a head's gradients, in order
      float grad_sink = 0.f;
      for (const Queries& queries : tiles)
        grad_sink += tile.compute(
            keys, queries, head, grad_key.data() + head * problem.num_tokens * problem.size,
            grad_value.data() + head * problem.num_tokens * problem.value_size);
      if (problem.grad_sinks) problem.grad_sinks[head] = grad_sink;
    }
  }
  add_up(problem, grad_key, problem.size, problem.scale, problem.grad_key);
  add_up(problem, grad_value, problem.value_size, 1.f, problem.grad_value);
}

}  // namespace alignlab
