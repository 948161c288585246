// A mixture's feed-forward: a router chooses each token's experts, whose rows are computed together.
#pragma once

#include "rows.h"

namespace alignlab {

// down(activation(gate(x)) * up(x)) of rows of words, stored into y or added to it. Ends with a barrier.
template <class S>
inline void feed_forward(
    const Model& model, const FeedForward& mlp, const Word* x, int64_t rows, const RoundedRows& rounded, Word* activated,
    float* y, Output kind) {
  const int64_t inner = mlp.down.words;
  product<S>(x, mlp.gate_up.words, rows, mlp.gate_up, rounded, [&](int64_t row, int64_t panel, __m512 gate, __m512 up) {
    store_activated<S>(mlp.gate_up, activated + row * inner, panel, gate, up, model.activation);
  });
  product_to<S>(activated, inner, rows, mlp.down, rounded, y, kind);
}

inline float score_of(float logit, int64_t scoring) {
  if (scoring == kSigmoid) return 1.f / (1.f + std::exp(-logit));
  return std::sqrt(logit > 20.f ? logit : std::log1p(std::exp(logit)));
}

// Turn one token's logits into scores, in place.
inline void score(float* logits, int64_t count, int64_t scoring) {
  if (scoring != kSoftmax) {
    for (int64_t e = 0; e < count; e++) logits[e] = score_of(logits[e], scoring);
    return;
  }
  const float top = *std::max_element(logits, logits + count);
  float total = 0;
  for (int64_t e = 0; e < count; e++) total += logits[e] = std::exp(logits[e] - top);
  for (int64_t e = 0; e < count; e++) logits[e] /= total;
}

// Choose the experts of the highest scores, ties by number, and their gates.
inline void choose(const Experts& experts, const float* scores, int64_t* chosen, float* gates) {
  float total = 0;
  for (int64_t c = 0; c < experts.num_chosen; c++) {
    int64_t best = -1;
    float highest = 0;
    for (int64_t e = 0; e < experts.num_experts; e++) {
      const float rank = scores[e] + (experts.choice_bias ? experts.choice_bias[e] : 0.f);
      if ((best < 0 || rank > highest) && std::find(chosen, chosen + c, e) == chosen + c) best = e, highest = rank;
    }
    chosen[c] = best;
    total += gates[c] = scores[best];
  }
  for (int64_t c = 0; c < experts.num_chosen; c++)
    gates[c] *= float(experts.factor) / (experts.normalizes ? total : 1.f);
}

// Sort the choices [rows] by expert: places[choice] is a choice's row, and starts[experts + 1] where experts' rows begin.
inline void sort_choices(const int64_t* chosen, int64_t rows, int64_t count, int64_t* places, int64_t* starts) {
  std::fill(starts, starts + count + 1, 0);
  for (int64_t i = 0; i < rows; i++) starts[chosen[i] + 1]++;
  for (int64_t e = 0; e < count; e++) starts[e + 1] += starts[e];
  std::vector<int64_t> next(starts, starts + count);
  for (int64_t i = 0; i < rows; i++) places[i] = next[chosen[i]]++;
}

// The routed experts' products, with their rows beside each other: gathered [choices, hidden] to outputs.
template <class S>
inline void expert_products(const Model& model, const Experts& experts, const Step& step, const int64_t* starts) {
  for (int64_t e = 0; e < experts.num_experts; e++) {
    const int64_t first = starts[e], rows = starts[e + 1] - first;
    if (rows == 0) continue;  // on all threads alike
    const FeedForward& mlp = experts.experts[e];
    feed_forward<S>(
        model, mlp, step.gathered + first * mlp.gate_up.words, rows, step.rounded,
        step.activated + first * mlp.down.words, step.outputs + first * model.hidden, Output::kRounded);
  }
}

// Add the gated outputs of each token's experts, in the order of its choices, to y. Ends with a barrier.
inline void add_chosen(
    const Model& model, const Experts& experts, const Step& step, const int64_t* places, float* y, Output kind) {
#pragma omp for schedule(static)
  for (int64_t token = 0; token < step.num_tokens; token++)
    for (int64_t i = 0; i < model.hidden; i += kLanes) {
      const __mmask16 lanes = first_lanes(model.hidden - i);
      __m512 sum = _mm512_setzero_ps();
      for (int64_t c = token * experts.num_chosen; c < (token + 1) * experts.num_chosen; c++) {
        const __m512 v = _mm512_maskz_loadu_ps(lanes, step.outputs + places[c] * model.hidden + i);
        sum = _mm512_fmadd_ps(_mm512_set1_ps(step.gates[c]), v, sum);
      }
      float* to = y + token * model.hidden + i;
      if (kind == Output::kAdded) sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(lanes, to));
      _mm512_mask_storeu_ps(to, lanes, sum);
    }
}

// Add the output of the shared experts, times the sigmoid of each token's gate where there is one, to y.
template <class S>
inline void add_shared(const Model& model, const Experts& experts, const Step& step, float* y) {
  const int64_t rows = step.num_tokens;
  if (!experts.shared_gate.panels) {
    feed_forward<S>(model, experts.shared, step.normed, rows, step.rounded, step.activated, y, Output::kAdded);
    return;
  }
  product_to<S>(step.normed, experts.shared_gate.words, rows, experts.shared_gate, step.rounded, step.logits,
                Output::kRounded);
  feed_forward<S>(model, experts.shared, step.normed, rows, step.rounded, step.activated, step.outputs, Output::kRounded);
#pragma omp for schedule(static)
  for (int64_t token = 0; token < rows; token++) {
    const float gate = 1.f / (1.f + std::exp(-step.logits[token]));
    for (int64_t i = 0; i < model.hidden; i++) y[token * model.hidden + i] += gate * step.outputs[token * model.hidden + i];
  }
}

// The mixture of one layer, of the words in `normed`, stored into y or added to it. Ends with a barrier.
template <class S>
inline void mixture(const Model& model, const Experts& experts, const Step& step, int64_t sparse, float* y, Output kind) {
  const int64_t rows = step.num_tokens, chosen = experts.num_chosen, words = words_of<S>(model.hidden);
  int64_t *ids = step.orders, *places = ids + rows * chosen, *starts = places + rows * chosen;
  product_to<S>(step.normed, words, rows, experts.router, step.rounded, step.logits,
                experts.exact_logits ? Output::kExact : Output::kRounded);
#pragma omp for schedule(static)
  for (int64_t token = 0; token < rows; token++) {
    float* logits = step.logits + token * experts.num_experts;
    score(logits, experts.num_experts, experts.scoring);
    choose(experts, logits, ids + token * chosen, step.gates + token * chosen);
    for (int64_t c = 0; c < chosen; c++)
      step.choices[(token * step.num_sparse + sparse) * chosen + c] = int16_t(ids[token * chosen + c]);
  }
#pragma omp single
  sort_choices(ids, rows * chosen, experts.num_experts, places, starts);
#pragma omp for schedule(static)
  for (int64_t c = 0; c < rows * chosen; c++)
    std::memcpy(step.gathered + places[c] * words, step.normed + c / chosen * words, words * sizeof(Word));
  expert_products<S>(model, experts, step, starts);
  add_chosen(model, experts, step, places, y, kind);
  if (experts.shared.gate_up.panels) add_shared<S>(model, experts, step, y);
}

}  // namespace alignlab
