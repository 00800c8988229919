// C interface of the CPU kernels (FORMAT.md defines the weight). Callers validate: every pointer,
// shape and layout here is trusted, and so are tables of pyramid codes (pcdvq_kernels/pyramid.py);
// the contents of other tensors are not.
#pragma once

#include <cstddef>
#include <cstdint>

#define PCDVQ_API __attribute__((visibility("default")))

extern "C" {

// PCDVQ_I8 is for tables of VPTQ only.
enum PcdvqDtype : int32_t { PCDVQ_F32 = 0, PCDVQ_BF16 = 1, PCDVQ_F16 = 2, PCDVQ_I8 = 3 };

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
  int64_t pattern_bits;
  int64_t magnitude_bits;
  int64_t chain_rows;    // of codec trellis: rows of a segment, else 0
  int64_t activations;   // a PcdvqActivations
  int64_t pyramid_rows;  // of the codewords, where they are tables of pyramid codes, else 0
};

struct PcdvqLinear {
  const void* x;              // x_dtype [m, k]
  const uint8_t* qweight;     // [rows, row_bytes], or what pcdvq_prepack made of it; rows are n, or
                              // of codec trellis n rounded up to whole chains
  const float* row_scale;     // [n]
  const uint8_t* signs_in;    // [k / 8]
  const int8_t* codewords;    // int8 [codewords, vector_dim] (FORMAT.md); trellis: none
  const void* bias;           // bias_dtype [n], or null
  void* out;                  // x_dtype [m, n]
  int64_t m, n, k, row_bytes;
  int64_t packed;             // whether pcdvq_prepack made qweight
  PcdvqLayout layout;
  int32_t x_dtype, bias_dtype, threads, isa;
};

// Codes in the order in which pcdvq_linear reads them: a sequential stream.
struct PcdvqPrepack {
  const uint8_t* qweight;  // as in PcdvqLinear
  uint8_t* out;            // pcdvq_packed_bytes for every 16 rows and 64 columns; of codec trellis for
                           // every 64 rows and 64 columns four times as many
  int64_t n, k, row_bytes;
  PcdvqLayout layout;
  int32_t threads, isa;
};

struct PcdvqEmbedding {
  const int64_t* ids;         // [count]
  const uint8_t* qweight;     // as in PcdvqLinear
  const float* row_scale;     // [n]
  const uint8_t* signs_in;    // [k / 8]
  const int8_t* codewords;    // as in PcdvqLinear
  void* out;                  // dtype [count, k]
  int64_t count, n, k, row_bytes;
  int64_t packed;             // as in PcdvqLinear
  PcdvqLayout layout;
  int32_t dtype, threads, isa;
};

// The same linear layer of every expert; they share input signs.
struct PcdvqExperts {
  const uint8_t* qweight;    // [experts, n, row_bytes]; of codec trellis n must be whole chains
  const float* row_scale;    // [experts, n]
  const uint8_t* signs_in;   // [k / 8]
  int64_t n, k, row_bytes;
  PcdvqLayout layout;
};

struct PcdvqMoe {
  const void* x;              // dtype [tokens, hidden]
  const int64_t* ids;         // [tokens, top_k]; those below 0 count for nothing
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

// How well pcdvq_chains searches.
enum PcdvqEffort : int32_t { PCDVQ_EXHAUSTIVE = 0, PCDVQ_QUICK = 1 };

struct PcdvqChains {
  const float* x;           // [rows, columns], in units of levels; rows: a multiple of chain_rows
  const float* row_weight;  // [rows], not negative; 0: the row means nothing
  uint8_t* out;             // [rows, columns / 2]
  int64_t rows, columns;    // columns: even
  // code_bits: 3 to 8; singles: 0 or 1; chain_rows: 16, 32 or 64; effort: a PcdvqEffort
  int32_t code_bits, singles, chain_rows, effort, threads, isa;
};

// What follows from a layout for layers of k columns.
struct PcdvqLinearShape {
  PcdvqLayout layout;
  int64_t k, row_bytes, codewords;
  int64_t block_bytes;  // of a packed weight
};

// Functions of torch's stable C interface, by their names there; all return 0 for success.
struct PcdvqTorch {
  int32_t (*library_init_impl)(const char* library, const char* key, const char* file,
                               uint32_t line, void** result);
  int32_t (*library_impl)(void* library, const char* name,
                          void (*kernel)(uint64_t* stack, uint64_t inputs, uint64_t outputs),
                          uint64_t version);
  int32_t (*delete_tensor)(void* tensor);
  int32_t (*get_dtype)(void* tensor, int32_t* result);
  int32_t (*get_dim)(void* tensor, int64_t* result);
  int32_t (*get_sizes)(void* tensor, int64_t** result);
  int32_t (*is_contiguous)(void* tensor, bool* result);
  int32_t (*get_data_ptr)(void* tensor, void** result);
  int32_t (*empty_strided)(int64_t dim, const int64_t* sizes, const int64_t* strides,
                           int32_t dtype, int32_t device_type, int32_t device_index,
                           void** result);
  int32_t (*list_size)(void* list, size_t* result);
  int32_t (*list_get_item)(void* list, size_t index, uint64_t* result);
  int32_t (*delete_list)(void* list);
  int32_t (*delete_value)(uint64_t* value);
  int32_t (*get_num_threads)(uint32_t* result);
  // Not torch's: the operator in Python, which takes the six tensors (the last may be null) and gives
  // a new one, or null with the reason in `message`.
  void* (*in_python)(void* const* tensors, const int64_t* layout, int32_t layout_size,
                     char* message, size_t message_size);
};

// Columns of a VPTQ weight that share tables. A code is `bits` bits of a row of codes, little-endian:
// the number of a centroid, above it that of a residual.
struct PcdvqVptqSegment {
  const uint8_t* codes;  // [row blocks, row_bytes], 4 bytes or more past the codes of each row
  const void* table;     // [centroids + residuals, vector_len], then 16 elements more
  int64_t columns, row_bytes;
  int64_t vector_len;     // rows of a row block, 1 to 16
  int64_t index_bits;     // 2^index_bits centroids
  int64_t residual_bits;  // 2^residual_bits residuals; 0: none
};

struct PcdvqVptq {
  const void* x;           // x_dtype [m, k]
  const int32_t* columns;  // [k]: column of x of each column of the segments
  const float* scale;      // [k], in the order of the segments
  const float* shift;      // [k], in the order of x
  const PcdvqVptqSegment* segments;
  const void* bias;  // bias_dtype [n], or null
  void* out;         // x_dtype [m, n]
  int64_t m, n, k;
  int64_t skip;  // rows of the first row blocks that are not part of the weight
  int64_t segment_count;
  int32_t x_dtype, table_dtype, bias_dtype, threads, isa;
};

// Bytes of each problem's struct above, from PcdvqLinear on: a caller made for another version of this
// interface must not call it.
PCDVQ_API void pcdvq_struct_bytes(int64_t bytes[8]);

// The best PcdvqIsa of this CPU.
PCDVQ_API int32_t pcdvq_best_isa();

// out = row_scale * (Q @ (H S x)) + bias. Returns a PcdvqStatus.
PCDVQ_API int32_t pcdvq_linear(const PcdvqLinear* problem);

// Bytes of a block of 16 rows and 64 columns of a packed weight; 0 where this layout is not packed.
PCDVQ_API int64_t pcdvq_packed_bytes(const PcdvqPrepack* problem);

// Packs a weight for pcdvq_linear with the same layout and isa. Returns a PcdvqStatus.
PCDVQ_API int32_t pcdvq_prepack(const PcdvqPrepack* problem);

// out[i] = row ids[i] of the dense weight R Q H S. An id outside of [0, n) is PCDVQ_BAD_ID, and
// nothing is written.
PCDVQ_API int32_t pcdvq_embedding(const PcdvqEmbedding* problem);

// out[t] = sum over choices c of weights[t][c] down(silu(gate(x[t])) * up(x[t])) of expert ids[t][c],
// in fp32. An id from `experts` on is PCDVQ_BAD_ID, and nothing is written.
PCDVQ_API int32_t pcdvq_moe(const PcdvqMoe* problem);

// out[i] = argmax over c of x[i] . codewords[c] - bias[c], the lowest c of equals.
PCDVQ_API int32_t pcdvq_nearest(const PcdvqNearest* problem);

// Codes of the computed trellis that make the sum of row_weight * (x - level)^2 of each chain least.
// Returns a PcdvqStatus.
PCDVQ_API int32_t pcdvq_chains(const PcdvqChains* problem);

// Makes pcdvq_linear torch's `pcdvq::linear` for CPU tensors; the operator must be defined. Calls
// that do not fit a shape accepted before go through `in_python`. Returns 0 for success.
PCDVQ_API int32_t pcdvq_torch_register(const PcdvqTorch* torch);

// Adds a layout that Python has found valid.
PCDVQ_API void pcdvq_torch_accept(const PcdvqLinearShape* shape);

// out = W (scale * x) + shift . x + bias, W of centroids plus residuals. A column outside of [0, k) is
// PCDVQ_BAD_ID, and nothing is written.
PCDVQ_API int32_t pcdvq_vptq(const PcdvqVptq* problem);
}
