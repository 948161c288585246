// Rotation of queries and keys, the paged cache, and attention of tokens to the blocks of their sequences.
//
// A block of the cache holds `block_size` tokens, and in this step's own order so that vectors run over keys:
//   keys    [K, words of a head, block_size] words
//   values  [K, words of block_size, head_size] words
// that is as many numbers as [block_size, K, head_size], so that blocks are allocated and copied as those of torch are.
//
// Sums run over the keys of a sequence in order, 16 lanes apart, from a multiple of 16: a token's result depends neither
// on the tokens computed with it nor on the threads.
#pragma once

#include <limits>
#include <vector>

#include "rows.h"

namespace alignlab {

// Rotate the first `rotary` numbers of a head: with halves (a, b), (a cos - b sin, b cos + a sin).
inline void rotate(float* __restrict head, const float* __restrict cosines, const float* __restrict sines, int64_t rotary) {
  const int64_t half = rotary / 2;
  for (int64_t i = 0; i < half; i++) {
    const float a = head[i], b = head[i + half];
    head[i] = a * cosines[i] - b * sines[i];
    head[i + half] = b * cosines[i] + a * sines[i];
  }
}

template <class S>
inline void norm_in_place(float* x, const float* weight, int64_t n, double eps) {
  normed(x, weight, n, eps, [&](int64_t i, __mmask16 lanes, __m512 v) { _mm512_mask_storeu_ps(x + i, lanes, S::rounded(v)); });
}

// Norm and rotate the queries and keys of one token, in place.
template <class S>
inline void prepare_heads(const Model& model, const Layer& layer, float* qkv, int64_t position) {
  const int64_t size = model.head_size, heads = model.heads, kv_heads = model.kv_heads;
  float* keys = qkv + heads * size;
  if (layer.query_norm && layer.norms_all_heads) {
    norm_in_place<S>(qkv, layer.query_norm, heads * size, model.eps);
    norm_in_place<S>(keys, layer.key_norm, kv_heads * size, model.eps);
  }
  for (int64_t h = 0; h < heads + kv_heads; h++) {
    float* head = qkv + h * size;
    if (layer.query_norm && !layer.norms_all_heads)
      norm_in_place<S>(head, h < heads ? layer.query_norm : layer.key_norm, size, model.eps);
    if (layer.cosines) {
      const int64_t at = position * (layer.rotary / 2);
      rotate(head, layer.cosines + at, layer.sines + at, layer.rotary);
    }
  }
}

// Store numbers of a head so that number d is at to[index(d)].
template <class S, class Index>
inline void scatter(const float* head, int64_t size, typename S::Number* to, const Index& index) {
  typename S::Number line[kLanes];
  for (int64_t first = 0; first < size; first += kLanes) {
    const int64_t count = std::min(kLanes, size - first);
    S::store(line, _mm512_maskz_loadu_ps(first_lanes(count), head + first), 0xffff);
    for (int64_t i = 0; i < count; i++) to[index(first + i)] = line[i];
  }
}

// Put the queries of all tokens where `attend` reads them, and keys and values into the cache. Ends with a barrier.
template <class S>
inline void place(const Model& model, const Layer& layer, const Step& step) {
  using Number = typename S::Number;
  constexpr int64_t kPer = S::kPerWord;
  const int64_t size = model.head_size, kv_heads = model.kv_heads, group = model.heads / kv_heads;
  const int64_t words = words_of<S>(size), block_size = model.block_size;
  const int64_t* tables = step.tables + layer.pool * step.num_works * step.width;
#pragma omp for schedule(static)
  for (int64_t token = 0; token < step.num_tokens; token++) {
    float* qkv = step.qkv + token * (model.heads + 2 * kv_heads) * size;
    const int64_t position = step.positions[token], offset = position % block_size;
    const int64_t block = tables[step.works[token] * step.width + position / block_size];
    prepare_heads<S>(model, layer, qkv, position);
    for (int64_t k = 0; k < kv_heads; k++) {
      const int64_t first = (block * kv_heads + k) * block_size * size;
      scatter<S>(qkv + (model.heads + k) * size, size, static_cast<Number*>(layer.keys) + first,
                 [&](int64_t d) { return (d / kPer * block_size + offset) * kPer + d % kPer; });
      scatter<S>(qkv + (model.heads + kv_heads + k) * size, size, static_cast<Number*>(layer.values) + first,
                 [&](int64_t d) { return (offset / kPer * size + d) * kPer + offset % kPer; });
      for (int64_t g = 0; g < group; g++) {
        Word* query = step.queries + ((k * step.num_tokens + token) * group + g) * words;
        scatter<S>(qkv + (k * group + g) * size, size, reinterpret_cast<Number*>(query), [](int64_t d) { return d; });
      }
    }
  }
}

// Up to 12 queries of one sequence that share a kv head: rows `first` to `first + rows` of its tokens x H / K heads.
struct QueryTile {
  int64_t work, first, rows;
};

inline std::vector<QueryTile> query_tiles(const Step& step, int64_t group) {
  std::vector<QueryTile> tiles;
  for (int64_t work = 0; work < step.num_works; work++) {
    const int64_t rows = (step.starts[work + 1] - step.starts[work]) * group, count = (rows + kTileRows - 1) / kTileRows;
    for (int64_t t = 0; t < count; t++)
      tiles.push_back({work, rows * t / count, rows * (t + 1) / count - rows * t / count});
  }
  return tiles;
}

// What a tile reads: keys from `base` on, in blocks `first_block` to `last_block`, of one kv head.
template <class S>
struct TileKeys {
  const Word *keys, *values;
  const int64_t* table;
  int64_t kv_heads, kv_head, block_size, head_size, base, last;

  int64_t words_of_block() const { return block_size * head_size / S::kPerWord; }
  const Word* key_block(int64_t block) const { return keys + (table[block] * kv_heads + kv_head) * words_of_block(); }
  const Word* value_block(int64_t block) const { return values + (table[block] * kv_heads + kv_head) * words_of_block(); }
  int64_t end() const { return (last / block_size + 1) * block_size - base; }  // keys of all blocks that are read
};

// Write the products of M queries with P vectors of keys each, those of vectors `vector` on, to scores [M, stride].
// A vector is 16 keys of a block, or the rest of it.
template <class S, int M, int P>
inline void score_vectors(const TileKeys<S>& in, const Word* queries, int64_t vector, float* scores, int64_t stride) {
  const int64_t in_block = (in.block_size + kLanes - 1) / kLanes, words = words_of<S>(in.head_size);
  const Word* columns[P];
  __mmask16 lanes[P];
  int64_t at[P];
  __m512 sum[M][P];
  for (int p = 0; p < P; p++) {
    const int64_t block = in.base / in.block_size + (vector + p) / in_block;
    const int64_t offset = (vector + p) % in_block * kLanes;
    columns[p] = in.key_block(block) + offset;
    lanes[p] = first_lanes(in.block_size - offset);
    at[p] = block * in.block_size + offset - in.base;
    for (int m = 0; m < M; m++) sum[m][p] = _mm512_setzero_ps();
  }
  multiply<S, M, P, true>(queries, words, columns, in.block_size, words, lanes, sum);
  for (int m = 0; m < M; m++)
    for (int p = 0; p < P; p++) _mm512_mask_storeu_ps(scores + m * stride + at[p], lanes[p], sum[m][p]);
}

// Lanes of the 16 keys from j on that lie between `low` and `high`.
inline __mmask16 seen_lanes(int64_t j, int64_t low, int64_t high) {
  if (j >= low && j + kLanes <= high + 1) return 0xffff;
  return first_lanes(high + 1 - j) & ~first_lanes(low - j);
}

// Replace the scores of one query by exp(score - highest), in the type of storage, and 0 outside keys `low` to `high`.
// Returns their sum.
template <class S>
inline float soften(float* scores, int64_t low, int64_t high, int64_t end, const Layer& layer, const float* sink) {
  const float nothing = -std::numeric_limits<float>::infinity();
  const __m512 cap = _mm512_set1_ps(float(layer.softcap)), inner = _mm512_set1_ps(float(layer.scaling / layer.softcap));
  const int64_t start = low / kLanes * kLanes;
  __m512 tops = _mm512_set1_ps(nothing);
  for (int64_t j = start; j <= high; j += kLanes) {
    __m512 s = _mm512_loadu_ps(scores + j);
    if (layer.softcap != 0) {
      s = _mm512_mul_ps(cap, tanh_of(_mm512_mul_ps(s, inner)));
      _mm512_storeu_ps(scores + j, s);
    }
    tops = _mm512_mask_max_ps(tops, seen_lanes(j, low, high), tops, s);
  }
  const float factor = layer.softcap != 0 ? 1.f : float(layer.scaling);
  const float highest = std::max(_mm512_reduce_max_ps(tops) * factor, sink ? *sink : nothing);
  const __m512 scale = _mm512_set1_ps(factor), top = _mm512_set1_ps(highest);
  auto* weights = reinterpret_cast<typename S::Number*>(scores);  // never ahead of the scores that are still read
  __m512 total = _mm512_setzero_ps();
  for (int64_t j = 0; j < end; j += kLanes) {
    __m512 e = _mm512_setzero_ps();
    if (j >= start && j <= high)
      e = _mm512_maskz_mov_ps(seen_lanes(j, low, high), exp_of(_mm512_fmsub_ps(_mm512_loadu_ps(scores + j), scale, top)));
    S::store(weights + j, e, 0xffff);
    total = _mm512_add_ps(total, S::rounded(e));  // so that the weights, as they are stored, sum to 1
  }
  return _mm512_reduce_add_ps(total) + (sink ? std::exp(*sink - highest) : 0.f);
}

// Add up the values of a tile, for P x 16 numbers of the heads from number `first` on, into sum.
template <class S, int M, int P>
inline void mix_values(const TileKeys<S>& in, const Word* weights, int64_t stride, int64_t first, __m512 (&sum)[M][P]) {
  __mmask16 lanes[P];
  for (int p = 0; p < P; p++) {
    lanes[p] = first_lanes(in.head_size - first - p * kLanes);
    for (int m = 0; m < M; m++) sum[m][p] = _mm512_setzero_ps();
  }
  for (int64_t block = in.base / in.block_size; block <= in.last / in.block_size; block++) {
    const int64_t start = block * in.block_size, count = std::min(in.block_size, in.last + 1 - start);
    const Word* columns[P];
    for (int p = 0; p < P; p++) columns[p] = in.value_block(block) + first + (lanes[p] ? p * kLanes : 0);
    multiply<S, M, P, true>(
        weights + (start - in.base) / S::kPerWord, stride, columns, in.head_size, words_of<S>(count), lanes, sum);
  }
}

template <class S, int M>
inline void attend_rows(
    const Model& model, const Layer& layer, const Step& step, const QueryTile& tile, const TileKeys<S>& in, float* scores) {
  constexpr int P = M <= 6 ? 4 : 2;
  const int64_t group = model.heads / model.kv_heads, start = step.starts[tile.work], stride = step.num_keys;
  const int64_t words = words_of<S>(model.head_size), end = in.end();
  const Word* queries = step.queries + ((in.kv_head * step.num_tokens + start) * group + tile.first) * words;
  const int64_t vectors = end / in.block_size * ((in.block_size + kLanes - 1) / kLanes);
  int64_t vector = 0;
  for (; vector + P <= vectors; vector += P) score_vectors<S, M, P>(in, queries, vector, scores, stride);
  for (; vector < vectors; vector++) score_vectors<S, M, 1>(in, queries, vector, scores, stride);

  typename S::Number* outputs[M];
  float scale[M];
  for (int m = 0; m < M; m++) {
    const int64_t token = start + (tile.first + m) / group, head = in.kv_head * group + (tile.first + m) % group;
    const int64_t position = step.positions[token];
    const int64_t low = layer.window ? std::max<int64_t>(0, position - layer.window + 1) : 0;
    const float* sink = layer.sinks ? layer.sinks + head : nullptr;
    scale[m] = 1.f / soften<S>(scores + m * stride, low - in.base, position - in.base, end, layer, sink);
    outputs[m] = reinterpret_cast<typename S::Number*>(step.attended + token * words_of<S>(model.heads * model.head_size)) +
                 head * model.head_size;
  }
  for (int64_t first = 0; first < model.head_size; first += P * kLanes) {
    __m512 sum[M][P];
    mix_values<S, M, P>(in, reinterpret_cast<const Word*>(scores), stride, first, sum);
    for (int m = 0; m < M; m++)
      for (int p = 0; p < P; p++)
        S::store(outputs[m] + first + p * kLanes, _mm512_mul_ps(sum[m][p], _mm512_set1_ps(scale[m])),
                 first_lanes(model.head_size - first - p * kLanes));
  }
}

template <class S>
inline TileKeys<S> keys_of(
    const Model& model, const Layer& layer, const Step& step, const QueryTile& tile, int64_t kv_head) {
  const int64_t group = model.heads / model.kv_heads, start = step.starts[tile.work];
  const int64_t position = step.positions[start + tile.first / group];
  TileKeys<S> in;
  in.keys = static_cast<const Word*>(layer.keys), in.values = static_cast<const Word*>(layer.values);
  in.table = step.tables + (layer.pool * step.num_works + tile.work) * step.width;
  in.kv_heads = model.kv_heads, in.kv_head = kv_head;
  in.block_size = model.block_size, in.head_size = model.head_size;
  in.last = step.positions[start + (tile.first + tile.rows - 1) / group];
  in.base = layer.window ? std::max<int64_t>(0, position - layer.window + 1) / in.block_size * in.block_size : 0;
  while (in.base % kLanes) in.base -= in.block_size;
  return in;
}

// Attention of all tokens of the step, from `queries` and the cache to `attended`. Ends with a barrier.
template <class S>
inline void attend(const Model& model, const Layer& layer, const Step& step, const std::vector<QueryTile>& tiles) {
  float* scores = step.scores + omp_get_thread_num() * kTileRows * step.num_keys;
  const int64_t kv_heads = model.kv_heads, count = (int64_t)tiles.size() * kv_heads;
#pragma omp for schedule(dynamic)
  for (int64_t item = 0; item < count; item++) {
    const QueryTile& tile = tiles[item / kv_heads];
    const TileKeys<S> in = keys_of<S>(model, layer, step, tile, item % kv_heads);
    switch (tile.rows) {
#define ALIGNLAB_CASE(M) \
  case M:                \
    attend_rows<S, M>(model, layer, step, tile, in, scores); \
    break;
      ALIGNLAB_CASE(1) ALIGNLAB_CASE(2) ALIGNLAB_CASE(3) ALIGNLAB_CASE(4) ALIGNLAB_CASE(5) ALIGNLAB_CASE(6)
      ALIGNLAB_CASE(7) ALIGNLAB_CASE(8) ALIGNLAB_CASE(9) ALIGNLAB_CASE(10) ALIGNLAB_CASE(11) ALIGNLAB_CASE(12)
#undef ALIGNLAB_CASE
    }
  }
}

}  // namespace alignlab
