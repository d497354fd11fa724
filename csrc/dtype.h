// The element types of the kernels, as the codes that cross the language border.
#pragma once

#include <cstdint>

namespace skyreels_fast {

using Address = std::uintptr_t;

enum class DType : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

}  // namespace skyreels_fast
