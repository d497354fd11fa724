// What every kernel family shares: element types, the grid, error reports.
// Device pointers come in as integers and errors leave as exceptions, so that nothing here knows torch:
// std::invalid_argument (ValueError in Python) for a wrong argument, std::runtime_error for a CUDA error.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "dtype.h"

namespace skyreels_fast {

constexpr int kPackBytes = 16;

inline void check_cuda(cudaError_t status, const char* where) {
  if (status == cudaSuccess) return;
  throw std::runtime_error(std::string(where) + ": " + cudaGetErrorName(status) + ": " + cudaGetErrorString(status));
}

inline void require(bool holds, const std::string& message) {
  if (!holds) throw std::invalid_argument(message);
}

// Calls run(T{}) with the element type that `dtype` names.
template <typename Run>
void with_element_type(int dtype, const char* where, Run run) {
  switch (static_cast<DType>(dtype)) {
    case DType::kFloat32: return run(float{});
    case DType::kFloat16: return run(__half{});
    case DType::kBFloat16: return run(__nv_bfloat16{});
  }
  throw std::invalid_argument(std::string(where) + ": dtype code " + std::to_string(dtype) + " is unknown");
}

template <typename T>
void check_address(Address address, const char* name, const char* where) {
  require(address != 0, std::string(where) + ": " + name + " is null");
  require(address % alignof(T) == 0, std::string(where) + ": " + name + " is not aligned to its element");
}

}  // namespace skyreels_fast
