// The checked entries of residual_reuse.cu, which states their contract.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace skyreels_fast {

constexpr int kMaxPartials = 2048;
constexpr std::int64_t kRelativeL1WorkspaceBytes = std::int64_t{kMaxPartials} * 8;

void residual_add(Address out, Address x, Address residual, std::int64_t count, int dtype, Address stream);
void residual_save(Address out, Address after, Address before, std::int64_t count, int dtype, Address stream);
void relative_l1(Address out, Address workspace, Address next, Address old, std::int64_t count, int dtype,
                 Address stream);

}  // namespace skyreels_fast
