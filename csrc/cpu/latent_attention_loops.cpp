// Compiled once for each level of instruction set; see hamming_loops.cpp.
#include "latent_attention.h"
#include "softmax.h"

namespace embedding_kernels {
namespace {

// ---- softmax in groups ----

template <Dtype dtype>
void softmax(const void* scores, int64_t groups, int64_t size, float* scratch, void* out) {
  for (int64_t g = 0; g < groups; ++g) {
    softmax_group<dtype>(at<dtype>(scores, g * size), size, scratch, at<dtype>(out, g * size));
  }
}

template <Dtype dtype>
void softmax_backward(const void* grad, const void* probabilities, int64_t groups, int64_t size, void* out) {
  for (int64_t g = 0; g < groups; ++g) {
    softmax_group_backward<dtype>(at<dtype>(grad, g * size), at<dtype>(probabilities, g * size), size,
                                  at<dtype>(out, g * size));
  }
}

// ---- the gated linear unit ----

// Less one half, the normal distribution function of x, by a rational function whose error is 1e-8 up to `furthest`.
inline Floats centred_normal(Floats x) {
  constexpr float furthest = 5.6f;
  const Floats square = x * x;
  Floats above = broadcast(2.214506052177114e-8f), below = broadcast(1.1801981566346467e-6f);
  above = multiply_add(above, square, broadcast(6.356447788931147e-6f));
  below = multiply_add(below, square, broadcast(7.510075216161341e-5f));
  above = multiply_add(above, square, broadcast(1.7384822994137922e-4f));
  below = multiply_add(below, square, broadcast(1.9129647968202112e-3f));
  above = multiply_add(above, square, broadcast(4.7072442547005005e-3f));
  below = multiply_add(below, square, broadcast(2.8939978602596363e-2f));
  above = multiply_add(above, square, broadcast(3.437593832778361e-2f));
  below = multiply_add(below, square, broadcast(2.528334124834521e-1f));
  above = multiply_add(above, square, broadcast(3.989422215921081e-1f));
  below = multiply_add(below, square, broadcast(1.0f));
  const Floats near = x * above / below;
  const Floats upper = choose(less(broadcast(furthest), x), broadcast(0.5f), near);
  return choose(less(x, broadcast(-furthest)), broadcast(-0.5f), upper);
}

inline Floats gelu(Floats x) { return x * (0.5f + centred_normal(x)); }

// The derivative of gelu: the distribution function and x times the density.
inline Floats gelu_slope(Floats x, Floats distribution) {
  constexpr float inverse_root = 0.398942280401432678f;
  const Floats density = inverse_root * exp2<6>(x * x * (-0.5f * kLog2E));
  return multiply_add(x, density, distribution);
}

struct Gated {
  Floats value, gate;
};

template <Dtype dtype, bool partial>
inline Gated load_gated(const GatedRow& row, int64_t column, int64_t part) {
  Gated loaded = {load_at<dtype, partial>(row.value, column, part), load_at<dtype, partial>(row.gate, column, part)};
  if (row.value_bias != nullptr) {
    loaded.value += load_at<kFloat32, partial>(row.value_bias, column, part);
    loaded.gate += load_at<kFloat32, partial>(row.gate_bias, column, part);
  }
  return loaded;
}

// Kahan's sum: a mean over thousands of rows of one sign keeps its last places.
template <bool partial>
inline void add_to(const Compensated& total, Floats term, int64_t column, int64_t part) {
  const Floats sum = load_at<kFloat32, partial>(total.sum, column, part);
  const Floats mended = term - load_at<kFloat32, partial>(total.lost, column, part);
  const Floats next = sum + mended;
  // inf - inf: an infinite sum has lost nothing and stays infinite
  store_at<kFloat32, partial>(zero_if_nan((next - sum) - mended), total.lost, column, part);
  store_at<kFloat32, partial>(next, total.sum, column, part);
}

template <Dtype dtype>
void add_gated(const GatedRow& row, float weight, int64_t columns, const Compensated& total) {
  const Floats factor = broadcast(weight);
  for_vectors(columns, [&]<bool partial>(int64_t column, int64_t part) {
    const Gated x = load_gated<dtype, partial>(row, column, part);
    add_to<partial>(total, x.value * gelu(x.gate) * factor, column, part);
  });
}

template <Dtype dtype>
float gated_backward(const GatedRow& row, const float* grad, float weight, int64_t columns, void* grad_value,
                     void* grad_gate, const Compensated* value_total, const Compensated* gate_total) {
  const Floats factor = broadcast(weight);
  Parts products;
  for_vectors(columns, [&]<bool partial>(int64_t column, int64_t part) {
    const Gated x = load_gated<dtype, partial>(row, column, part);
    const Floats g = load_at<kFloat32, partial>(grad, column, part);
    const Floats distribution = 0.5f + centred_normal(x.gate);
    const Floats activated = x.gate * distribution;
    products.add(column, keep_part<partial>(g * x.value * activated, part, 0.0f));
    const Floats weighted = g * factor;
    const Floats of_value = weighted * activated;
    const Floats of_gate = weighted * x.value * gelu_slope(x.gate, distribution);
    store_at<dtype, partial>(of_value, grad_value, column, part);
    store_at<dtype, partial>(of_gate, grad_gate, column, part);
    if (value_total != nullptr) {
      add_to<partial>(*value_total, of_value, column, part);
      add_to<partial>(*gate_total, of_gate, column, part);
    }
  });
  return products.total();
}

}  // namespace

extern const LatentAttentionLoops EK_LEVEL_NAME(latent_attention_loops) = {
    {softmax<kFloat32>, softmax<kBFloat16>, softmax<kFloat16>},
    {softmax_backward<kFloat32>, softmax_backward<kBFloat16>, softmax_backward<kFloat16>},
    {add_gated<kFloat32>, add_gated<kBFloat16>, add_gated<kFloat16>},
    {gated_backward<kFloat32>, gated_backward<kBFloat16>, gated_backward<kFloat16>},
};

}  // namespace embedding_kernels
