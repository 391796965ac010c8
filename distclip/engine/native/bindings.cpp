#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/variant.h>
#include <nanobind/stl/vector.h>

#include "graph.h"
#include "primitives.h"
#include "reduce.h"
#include "threads.h"

namespace nb = nanobind;
using namespace nb::literals;

// What tells each array apart, its values and its bytes.
static std::vector<std::tuple<std::uintptr_t, size_t, size_t>> ids(const std::vector<mlx::core::array>& arrays) {
  std::vector<std::tuple<std::uintptr_t, size_t, size_t>> all;
  for (const auto& x : arrays)
    all.push_back({x.id(), x.size(), x.nbytes()});
  return all;
}

NB_MODULE(DISTCLIP_MODULE, m) {
  nb::module_::import_("mlx.core"); // whose array and stream types these functions take
  m.attr("instructions") = distclip::loops().name;
  m.attr("threads") = distclip::threads();

  auto measure = [&m](const char* name, distclip::Measure kind) {
    m.def(
        name,
        [kind](const std::vector<mlx::core::array>& leaves, mlx::core::StreamOrDevice stream) {
          return distclip::measure(kind, leaves, stream);
        },
        "leaves"_a,
        "stream"_a = nb::none());
  };
  measure("sum_squares", distclip::Measure::squares);
  measure("sum_abs", distclip::Measure::magnitudes);
  measure("max_abs", distclip::Measure::largest);
  m.def("scale", &distclip::scale, "leaves"_a, "factor"_a, "finite"_a = nb::none(), "stream"_a = nb::none());
  m.def("select", &distclip::select, "condition"_a, "updated"_a, "old"_a, "stream"_a = nb::none());
  m.def("sleep", &distclip::sleep, "x"_a, "seconds"_a, "stream"_a = nb::none());

  nb::class_<distclip::Node>(m, "Node")
      .def_ro("name", &distclip::Node::name)
      .def_ro("stream", &distclip::Node::stream)
      .def_prop_ro("inputs", [](const distclip::Node& node) { return ids(node.inputs); })
      .def_prop_ro("outputs", [](const distclip::Node& node) { return ids(node.outputs); });
  m.def("ids", &ids, "arrays"_a);
  m.def("graph", &distclip::graph, "arrays"_a);
  m.def("depths", &distclip::depths, "arrays"_a);

  nb::class_<distclip::Sums>(m, "Sums")
      .def_ro("measured", &distclip::Sums::measured)
      .def_prop_ro("arriving", [](const distclip::Sums& sums) { return std::vector{sums.measured}; })
      .def("scaled", &distclip::Sums::scaled, "factor"_a, "finite"_a = nb::none());
  m.def("scheduled_all_reduces", &distclip::scheduled_all_reduces);
  m.def(
      "sum_over_ranks",
      [](const std::vector<mlx::core::array>& leaves,
         const mlx::core::distributed::Group& group,
         bool magnitudes,
         float before,
         std::optional<mlx::core::Dtype> wire,
         size_t bucket_bytes,
         mlx::core::StreamOrDevice stream) {
        auto kind = magnitudes ? distclip::Measure::magnitudes : distclip::Measure::squares;
        return distclip::sum_over_ranks(leaves, group, kind, before, wire, bucket_bytes, stream);
      },
      "leaves"_a,
      "group"_a,
      "magnitudes"_a,
      "before"_a,
      "wire"_a.none(),
      "bucket_bytes"_a,
      "stream"_a = nb::none());
}
