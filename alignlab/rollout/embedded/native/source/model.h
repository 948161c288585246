// What the kernels are told of a model and of a step. Fields are 8 bytes each, in the order of `binding`'s structures.
#pragma once

#include "product.h"

namespace alignlab {

enum Activation : int64_t { kSilu = 0, kGeluTanh = 1, kRelu = 2 };
enum Scoring : int64_t { kSoftmax = 0, kSigmoid = 1, kSqrtSoftplus = 2 };

struct FeedForward {
  Weight gate_up;  // panels of 16 gates and 16 that they multiply; `outputs` counts both
  Weight down;
};

struct Experts {
  int64_t num_experts;  // 0 in a dense layer
  int64_t num_chosen;
  Weight router;
  const float* choice_bias;  // [experts], added to the scores that choose, or null
  int64_t scoring;
  int64_t normalizes;  // gates of a token's experts sum to 1
  double factor;       // of the gates
  int64_t exact_logits;  // the router's are not rounded
  const FeedForward* experts;
  FeedForward shared;  // `gate_up.panels` is null without shared experts
  Weight shared_gate;  // of one output; null panels without
};

struct Layer {
  Weight qkv, out;
  FeedForward mlp;
  Experts sparse;
  const float *before_attention, *after_attention, *before_mlp, *after_mlp;  // weights of norms, null without
  const float *query_norm, *key_norm, *sinks;
  int64_t norms_all_heads;
  const float *cosines, *sines;  // [positions, rotary / 2]; null in a layer without positions
  int64_t rotary;                // leading numbers of a head that are rotated
  double scaling, softcap;       // softcap 0 without
  int64_t window;                // tokens that are seen; 0 for all
  int64_t pool;                  // of the window, whose tables the layer reads
  void *keys, *values;           // of the cache; see `attention.h`
};

struct Model {
  const Layer* layers;
  int64_t num_layers, hidden, heads, kv_heads, head_size, inner, activation;
  double eps;
  const void* embeddings;
  double multiplier;  // of the embeddings
  const float* final_norm;
  int64_t block_size;
};

struct Step {
  const int64_t *tokens, *positions, *works;  // [tokens]: ids, positions, and the sequence that each belongs to
  const int64_t* starts;                      // [works + 1], where each sequence's tokens begin
  const int64_t* tables;                      // [pools, works, width], blocks
  const int64_t* logit_tokens;
  int64_t num_tokens, num_works, width, num_logits, num_threads, num_keys;
  // Memory of the step. "Words" are rows in the type of storage, filled up with zeros to whole words.
  float* residual;     // [tokens, hidden]
  Word* normed;        // [tokens, hidden] words
  float* qkv;          // [tokens, (H + 2 K) head_size]
  Word* queries;       // [K, tokens, H / K, head_size] words
  Word* attended;      // [tokens, H head_size] words
  Word* activated;     // [tokens or choices, inner] words
  float* outputs;      // [tokens or choices, hidden]
  float* scores;       // [threads, 12, num_keys]
  Word* gathered;      // [choices, hidden] words
  float* gates;        // [choices]
  float* logits;       // [tokens, experts]
  int64_t* orders;     // [2 choices + experts + 1]
  int16_t* choices;    // [tokens, sparse layers, chosen]
  int64_t num_sparse;
  RoundedRows rounded;  // of a product with rounded weights: [tokens or choices] rows of the most words and groups
  void* hidden;        // [num_logits, hidden], the final hidden states, in the type of storage
};

}  // namespace alignlab
