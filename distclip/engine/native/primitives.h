// The lazy operations on lists of arrays, on a CPU stream: measure, scale and select.

#pragma once

#include <functional>
#include <optional>
#include <vector>

#include "loops.h"
#include "mlx/array.h"
#include "mlx/primitives.h"
#include "mlx/utils.h"

namespace distclip {

namespace mx = mlx::core;

// float64 (leaves, 2): the measure of each leaf, and how many of its values are not finite, real and imaginary parts
// apart. One graph node. Leaves of any type and strides; integers are measured as float32.
mx::array measure(Measure kind, std::vector<mx::array> leaves, mx::StreamOrDevice stream);

// Each leaf times a factor, in its own type, integers as float32; zeros where `finite`, a bool scalar, is given and
// false. The factor is float32, a scalar or one for each leaf. A leaf's buffer is written in place when nothing else
// holds it, and not at all when the factor is 1 besides.
std::vector<mx::array> scale(
    const std::vector<mx::array>& leaves,
    const mx::array& factor,
    const std::optional<mx::array>& finite,
    mx::StreamOrDevice stream);

// Each updated array where a bool scalar is true, else the old one of the same place, bit for bit. The updated array's
// buffer serves when nothing else holds it, and nothing is read or written then while the condition is true.
std::vector<mx::array> select(
    const mx::array& condition,
    const std::vector<mx::array>& updated,
    const std::vector<mx::array>& old,
    mx::StreamOrDevice stream);

// An array, some seconds after its stream has come to it: a device that works without taking time from the cores, for
// measurements of what can be hidden behind its work.
mx::array sleep(const mx::array& x, double seconds, mx::StreamOrDevice stream);

// Integers as float32.
mx::array inexact(const mx::array& leaf, mx::Stream stream);

// Throws std::invalid_argument unless the factor is a scalar or has one value for each leaf.
void check_factor(const mx::array& factor, size_t leaves);

// Where the factor of a leaf lies, once the factor is evaluated.
inline const float* factor_of(const mx::array& factor, size_t leaf) {
  return factor.data<float>() + (factor.ndim() == 0 ? 0 : static_cast<int64_t>(leaf) * factor.strides()[0]);
}

// The work of scale() on one leaf, which is all there is to do where the sum over the ranks has put it in its place.
struct View;
void scale_values(const View& from, char* to, bool in_place, float factor, bool finite);

// Whether a leaf's buffer is its own: not a large one of which the leaf is the last small part.
bool fits(const mx::array& x);

// A primitive that MLX's transformations (vjp, jvp, vmap) transform by the MLX operations that compute the same.
class Transformable : public mx::Primitive {
 public:
  using Primitive::Primitive;

  using Arrays = std::vector<mx::array>;

  virtual Arrays operations(const Arrays& inputs) = 0;

  void eval_gpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override;
  std::vector<mx::array> jvp(
      const std::vector<mx::array>& primals,
      const std::vector<mx::array>& tangents,
      const std::vector<int>& argnums) override;
  std::vector<mx::array> vjp(
      const std::vector<mx::array>& primals,
      const std::vector<mx::array>& cotangents,
      const std::vector<int>& argnums,
      const std::vector<mx::array>& outputs) override;
  std::pair<std::vector<mx::array>, std::vector<int>> vmap(
      const std::vector<mx::array>& inputs,
      const std::vector<int>& axes) override;

 private:
  std::function<Arrays(const Arrays&)> as_function() {
    return [this](const Arrays& inputs) { return operations(inputs); };
  }
};

class MeasureAll : public Transformable {
 public:
  // Leaves that are evaluated already are constants: MLX need not walk over thousands of them in each evaluation.
  MeasureAll(mx::Stream stream, Measure kind, Arrays constants)
      : Transformable(stream), kind_(kind), constants_(std::move(constants)) {}

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override;
  std::vector<mx::array> operations(const std::vector<mx::array>& inputs) override;
  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>& inputs) override {
    return {{static_cast<mx::ShapeElem>(leaves(inputs).size()), 2}};
  }
  bool is_equivalent(const Primitive& other) const override {
    const auto& same = static_cast<const MeasureAll&>(other);
    return kind_ == same.kind_ && constants_.empty() && same.constants_.empty();
  }
  DEFINE_NAME(DistclipMeasure)

 private:
  const Arrays& leaves(const Arrays& inputs) const { return constants_.empty() ? inputs : constants_; }

  Measure kind_;
  Arrays constants_; // instead of inputs
};

class Scale : public Transformable {
 public:
  Scale(mx::Stream stream, size_t index) : Transformable(stream), index_(index) {}

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override;
  std::vector<mx::array> operations(const std::vector<mx::array>& inputs) override;
  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>& inputs) override { return {inputs[0].shape()}; }
  bool is_equivalent(const Primitive& other) const override {
    return index_ == static_cast<const Scale&>(other).index_;
  }
  DEFINE_NAME(DistclipScale)

 private:
  size_t index_; // of the factor; 0 for a scalar
};

class Select : public Transformable {
 public:
  using Transformable::Transformable;

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override;
  std::vector<mx::array> operations(const std::vector<mx::array>& inputs) override;
  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>& inputs) override { return {inputs[0].shape()}; }
  DEFINE_NAME(DistclipSelect)
  DEFINE_DEFAULT_IS_EQUIVALENT()
};

} // namespace distclip
