// All kernels of one instruction set. Included once per instruction set, after its `Vec`.
#pragma once

#include "codec.h"
#include "nearest.h"
#include "rotate.h"
#include "tile.h"
#include "trellis.h"

namespace pcdvq {
namespace {

const Kernels kKernels = {Vec::kLanes, find_decoder, rotate, accumulate, reduce, nearest, trellis};

}  // namespace
}  // namespace pcdvq
