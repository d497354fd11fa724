// The Python module skyreels_fast._C: the kernels' checked entries and how they were built.
// Device pointers and streams are integers (torch: tensor.data_ptr(), stream.cuda_stream).

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <sstream>
#include <string>

#include "dtype.h"
#include "qk_norm_rope3d.h"

namespace py = pybind11;
using namespace py::literals;
namespace sf = skyreels_fast;

namespace {

py::dict build_info() {
  py::list archs;
  std::istringstream listed(SKYREELS_FAST_ARCHS);
  for (std::string arch; std::getline(listed, arch, ',');) archs.append(arch);
  return py::dict("version"_a = SKYREELS_FAST_VERSION, "cuda"_a = SKYREELS_FAST_CUDA_VERSION, "archs"_a = archs,
                  "compiler"_a = SKYREELS_FAST_COMPILER, "build_type"_a = SKYREELS_FAST_BUILD_TYPE);
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "CUDA kernels of skyreels_fast; skyreels_fast.ops calls them.";
  module.def("build_info", &build_info, "How this module was built: version, cuda, archs, compiler, build_type.");
  module.attr("FLOAT32") = static_cast<int>(sf::DType::kFloat32);
  module.attr("FLOAT16") = static_cast<int>(sf::DType::kFloat16);
  module.attr("BFLOAT16") = static_cast<int>(sf::DType::kBFloat16);

  // A launch waits where the device's queue is full, and other threads shall go on meanwhile.
  const py::call_guard<py::gil_scoped_release> unlocked;
  module.def("qk_norm", &sf::qk_norm, unlocked, "out = x / sqrt(mean(x^2) + eps) * weight", "out"_a, "x"_a, "weight"_a,
             "shape"_a, "strides"_a, "eps"_a, "dtype"_a, "weight_dtype"_a, "stream"_a);
  module.def("qk_norm_rope3d", &sf::qk_norm_rope3d, unlocked, "qk_norm of q and k, then rotary positions", "q_out"_a,
             "k_out"_a, "q"_a, "k"_a, "q_weight"_a, "k_weight"_a, "table"_a, "shape"_a, "q_out_strides"_a,
             "k_out_strides"_a, "q_strides"_a, "k_strides"_a, "grid"_a, "token_range"_a, "eps"_a, "dtype"_a,
             "weight_dtype"_a, "stream"_a);
}
