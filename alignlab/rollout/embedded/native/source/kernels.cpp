// The decoder's layers over the tokens of one step, and the C interface that `binding` calls.
//
// Compiled once for each type of storage: -DALIGNLAB_STORAGE=Float32 or BFloat16.
#include "attention.h"
#include "experts.h"
#include "sampling.h"

namespace alignlab {

using Storage = ALIGNLAB_STORAGE;
using Number = Storage::Number;

// The rows of the tokens in the embedding table, times the multiplier, to the residual stream. Ends with a barrier.
void embed(const Model& model, const Step& step) {
#pragma omp for schedule(static)
  for (int64_t token = 0; token < step.num_tokens; token++) {
    const Number* row = static_cast<const Number*>(model.embeddings) + step.tokens[token] * model.hidden;
    float* to = step.residual + token * model.hidden;
    for (int64_t i = 0; i < model.hidden; i += kLanes) {
      const __mmask16 lanes = first_lanes(model.hidden - i);
      const __m512 v = _mm512_mul_ps(Storage::load(row + i, lanes), _mm512_set1_ps(float(model.multiplier)));
      _mm512_mask_storeu_ps(to + i, lanes, Storage::rounded(v));
    }
  }
}

Output output_to(const Step& step, const float* to) { return to == step.residual ? Output::kAdded : Output::kRounded; }

// One layer. The residual stream stays in float32: a sublayer's output is added where it is computed, or after its norm.
void run_layer(
    const Model& model, const Layer& layer, const Step& step, const std::vector<QueryTile>& tiles, int64_t sparse) {
  const int64_t rows = step.num_tokens, hidden = model.hidden;
  norm_rows<Storage>(step.residual, layer.before_attention, rows, hidden, model.eps, step.normed);
  product_to<Storage>(step.normed, layer.qkv.words, rows, layer.qkv, step.rounded, step.qkv, Output::kRounded);
  place<Storage>(model, layer, step);
  attend<Storage>(model, layer, step, tiles);
  float* to = layer.after_attention ? step.outputs : step.residual;
  product_to<Storage>(step.attended, layer.out.words, rows, layer.out, step.rounded, to, output_to(step, to));
  if (layer.after_attention) add_normed(step.residual, to, layer.after_attention, rows, hidden, model.eps);

  norm_rows<Storage>(step.residual, layer.before_mlp, rows, hidden, model.eps, step.normed);
  to = layer.after_mlp ? step.qkv : step.residual;
  if (layer.sparse.num_experts)
    mixture<Storage>(model, layer.sparse, step, sparse, to, output_to(step, to));
  else
    feed_forward<Storage>(model, layer.mlp, step.normed, rows, step.rounded, step.activated, to, output_to(step, to));
  if (layer.after_mlp) add_normed(step.residual, to, layer.after_mlp, rows, hidden, model.eps);
}

// The final norm of the tokens that get logits.
void final_states(const Model& model, const Step& step) {
#pragma omp for schedule(static)
  for (int64_t row = 0; row < step.num_logits; row++) {
    Number* to = static_cast<Number*>(step.hidden) + row * model.hidden;
    normed(step.residual + step.logit_tokens[row] * model.hidden, model.final_norm, model.hidden, model.eps,
           [&](int64_t i, __mmask16 lanes, __m512 v) { Storage::store(to + i, v, lanes); });
  }
}

void run(const Model& model, const Step& step) {
  const std::vector<QueryTile> tiles = query_tiles(step, model.heads / model.kv_heads);
#pragma omp parallel num_threads((int)step.num_threads)
  {
    embed(model, step);
    int64_t sparse = 0;
    for (int64_t l = 0; l < model.num_layers; l++) {
      const Layer& layer = model.layers[l];
      run_layer(model, layer, step, tiles, sparse);
      sparse += layer.sparse.num_experts > 0;
    }
    final_states(model, step);
  }
}

}  // namespace alignlab

using namespace alignlab;

extern "C" {

// Sizes of the structures, which the caller compares with its own.
void alignlab_sizes(int64_t* sizes) {
  sizes[0] = sizeof(Weight), sizes[1] = sizeof(Layer), sizes[2] = sizeof(Model), sizes[3] = sizeof(Step);
}

void alignlab_pack(
    const void* weight, int64_t n, int64_t k, void* panels, int64_t first, int64_t per_panel, int64_t lane, int64_t threads) {
  pack<Storage>(static_cast<const Number*>(weight), n, k, static_cast<Word*>(panels), first, per_panel, lane, (int)threads);
}

void alignlab_step(const Model* model, const Step* step) { run(*model, *step); }

// y [rows, outputs] float32 = a [rows, words] W^T + bias
void alignlab_product(
    const void* a, int64_t rows, const Weight* weight, const RoundedRows* rounded, float* y, int64_t threads) {
#pragma omp parallel num_threads((int)threads)
  product_to<Storage>(static_cast<const Word*>(a), weight->words, rows, *weight, *rounded, y, Output::kExact);
}

void alignlab_draw(
    const float* logits, int64_t rows, int64_t count, const int64_t* keys, const int64_t* positions,
    const float* temperatures, int64_t* tokens, float* logprobs, float* raw, int64_t threads) {
  draw_rows(logits, rows, count, keys, positions, temperatures, tokens, logprobs, raw, (int)threads);
}
}
