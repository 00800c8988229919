// All kernels of one instruction set. Included once per instruction set, after its `Vec`.
#pragma once

#include "chain_steps.h"
#include "codec.h"
#include "nearest.h"
#include "quantize.h"
#include "rotate.h"
#include "tile.h"
#include "vptq.h"

namespace pcdvq {
namespace {

const Kernels kKernels = {
    Vec::kLanes, find_decoder, rotate, order_floats, quantize_int8, quantize_int16, to_floats,
    to_int16, accumulate, accumulate_int, reduce, reduce_int, nearest, chain_step, vptq, kBlocks,
};

}  // namespace
}  // namespace pcdvq
