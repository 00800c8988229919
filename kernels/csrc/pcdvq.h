// C interface of the CPU kernels (FORMAT.md defines the weight). Callers validate: every pointer,
// shape and layout here is trusted, and so are tables of pyramid codes (pcdvq_kernels/pyramid.py);
// the contents of other tensors are not.
#pragma once

#include <cstdint>

#define PCDVQ_API __attribute__((visibility("default")))

extern "C" {

enum PcdvqDtype : int32_t { PCDVQ_F32 = 0, PCDVQ_BF16 = 1, PCDVQ_F16 = 2 };

enum PcdvqIsa : int32_t {
  PCDVQ_ISA_AUTO = 0,
  PCDVQ_ISA_SCALAR = 1,
  PCDVQ_ISA_AVX2 = 2,
  PCDVQ_ISA_AVX512 = 3
};

enum PcdvqStatus : int32_t {
  PCDVQ_OK = 0,
  PCDVQ_NO_MEMORY = 1,
  PCDVQ_NO_ISA = 2,
  PCDVQ_BAD_ID = 3
};

// What pcdvq_linear multiplies levels with: the rotated activations rounded to integers, a scale
// for each 64 columns, or as they are.
enum PcdvqActivations : int64_t { PCDVQ_INT8 = 0, PCDVQ_INT16 = 1, PCDVQ_FLOAT = 2 };

struct PcdvqLayout {
  int64_t hadamard_block;
  int64_t vector_dim;
  int64_t sign_bits;
  int64_t parity;
  int64_t pattern_bits;
  int64_t magnitude_bits;
  int64_t rotation_bits;
  int64_t state_bits;
  int64_t activations;   // a PcdvqActivations
  int64_t pyramid_rows;  // of the codewords, where they are tables of pyramid codes, else 0
};

struct PcdvqLinear {
  const void* x;              // x_dtype [m, k]
  const uint8_t* qweight;     // [n, row_bytes]
  const float* row_scale;     // [n]
  const uint8_t* signs_in;    // [k / 8]
  const int8_t* codewords;    // int8 [codewords, vector_dim] (FORMAT.md)
  const void* bias;           // bias_dtype [n], or null
  void* out;                  // x_dtype [m, n]
  int64_t m, n, k, row_bytes;
  PcdvqLayout layout;
  int32_t x_dtype, bias_dtype, threads, isa;
};

struct PcdvqEmbedding {
  const int64_t* ids;         // [count]
  const uint8_t* qweight;     // [n, row_bytes]
  const float* row_scale;     // [n]
  const uint8_t* signs_in;    // [k / 8]
  const int8_t* codewords;    // as in PcdvqLinear
  void* out;                  // dtype [count, k]
  int64_t count, n, k, row_bytes;
  PcdvqLayout layout;
  int32_t dtype, threads, isa;
};

// The same linear layer of every expert; they share input signs.
struct PcdvqExperts {
  const uint8_t* qweight;    // [experts, n, row_bytes]
  const float* row_scale;    // [experts, n]
  const uint8_t* signs_in;   // [k / 8]
  int64_t n, k, row_bytes;
  PcdvqLayout layout;
};

struct PcdvqMoe {
  const void* x;              // dtype [tokens, hidden]
  const int32_t* ids;         // [tokens, top_k]; those outside of [0, experts) count for nothing
  const float* weights;       // [tokens, top_k]
  const int8_t* codewords;    // as in PcdvqLinear
  void* out;                  // dtype [tokens, hidden]
  int64_t tokens, top_k, experts;
  PcdvqExperts gate_up;       // n: 2 inner, gate before up; k: hidden
  PcdvqExperts down;          // n: hidden; k: inner
  int32_t dtype, threads, isa;
};

struct PcdvqNearest {
  const float* x;          // [groups, dim]
  const float* codewords;  // [count, dim]
  const float* bias;       // [count]
  int32_t* out;            // [groups]
  int64_t groups, count;
  int32_t dim, threads, isa;  // dim: 2, 4 or 8
};

struct PcdvqTrellis {
  const float* x;           // [rows, groups, dim]
  const float* row_weight;  // [rows]
  const float* codewords;   // [2^(state_bits + field_bits + parity), dim]
  const float* bias;        // [2^(state_bits + field_bits + parity)], half of |codeword|^2
  int32_t* out;             // [rows, groups]
  int64_t rows, groups;
  int32_t dim, parity, field_bits, state_bits, threads, isa;  // dim: 2, 4 or 8
};

// Bytes of each problem's struct above, from PcdvqLinear on: a caller made for another version of this
// interface must not call it.
PCDVQ_API void pcdvq_struct_bytes(int64_t bytes[5]);

// The best PcdvqIsa of this CPU.
PCDVQ_API int32_t pcdvq_best_isa();

// out = row_scale * (Q @ (H S x)) + bias. Returns a PcdvqStatus.
PCDVQ_API int32_t pcdvq_linear(const PcdvqLinear* problem);

// out[i] = row ids[i] of the dense weight R Q H S. An id outside of [0, n) is PCDVQ_BAD_ID, and
// nothing is written.
PCDVQ_API int32_t pcdvq_embedding(const PcdvqEmbedding* problem);

// out[t] = sum over choices c of weights[t][c] down(silu(gate(x[t])) * up(x[t])) of expert ids[t][c],
// in fp32. Returns a PcdvqStatus.
PCDVQ_API int32_t pcdvq_moe(const PcdvqMoe* problem);

// out[i] = argmax over c of x[i] . codewords[c] - bias[c], the lowest c of equals.
PCDVQ_API int32_t pcdvq_nearest(const PcdvqNearest* problem);

// Codes of the trellis codec that minimise the weighted squared error of each segment's paths.
PCDVQ_API int32_t pcdvq_trellis(const PcdvqTrellis* problem);
}
