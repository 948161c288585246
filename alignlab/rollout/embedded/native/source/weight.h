// A packed weight, in the type of storage or rounded.
#pragma once

#include "vectors.h"

namespace alignlab {

constexpr int64_t kPanel = 32;
constexpr int64_t kFewRows = 3;  // so few rows take two panels at once, to have enough sums in flight

// Of a weight. Rounded weights are multiplied with rounded rows; see `rounded_rows.h`.
enum Format : int64_t { kStored = 0, kInt8 = 1, kInt4 = 2, kInt8Dynamic = 3 };

struct Weight {  // the layout is `binding.WeightStruct`'s
  const Word* panels;
  const float* bias;  // [n] or null
  int64_t outputs;
  int64_t words;   // of an input row in the type of storage
  int64_t format;
  // Of a rounded weight; its panels hold codes.
  int64_t inputs;
  int64_t groups;         // of inputs with a scale each, in 4 bits; else 0
  const void* scales;     // [panels, groups or 1, 32] in the type of storage
  const int32_t* shifts;  // [panels, 32]: -128 times the sum of an output's codes, for 8-bit rows

  int64_t num_panels() const { return (outputs + kPanel - 1) / kPanel; }
  const Word* panel(int64_t index) const { return panels + index * words * kPanel; }
  const uint8_t* codes(int64_t index, int64_t panel_bytes) const {
    return reinterpret_cast<const uint8_t*>(panels) + index * panel_bytes;
  }
  int64_t code_words() const { return format == kInt8Dynamic ? (inputs + 3) / 4 : (inputs + 1) / 2; }
};

}  // namespace alignlab
