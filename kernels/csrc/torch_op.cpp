// `pcdvq::linear` in torch's dispatcher, with no Python between a call and its kernel. It speaks torch's
// stable C interface (torch/csrc/stable/c/shim.h, inductor/aoti_torch/c/shim.h), whose functions Python
// hands in: building needs neither torch's headers nor its libraries.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <stdexcept>
#include <string>

#include "pcdvq.h"

namespace pcdvq {
namespace {

using Value = uint64_t;  // torch's StableIValue: a number, or a pointer that its receiver owns

// torch's numbers of dtypes, fixed by its serialised formats.
enum ScalarType : int32_t { kUint8 = 0, kInt8 = 1, kFloat16 = 5, kFloat32 = 6, kBfloat16 = 15 };

PcdvqTorch torch_;

void expect(int32_t status) {
  if (status) throw std::runtime_error("pcdvq::linear: a call of torch's C interface failed");
}

// A tensor of the caller's, owned.
class Argument {
 public:
  explicit Argument(Value value) : handle_(reinterpret_cast<void*>(value)) {}
  Argument(const Argument&) = delete;
  ~Argument() {
    if (handle_) torch_.delete_tensor(handle_);
  }

  explicit operator bool() const { return handle_; }

  void* release() {
    void* handle = handle_;
    handle_ = nullptr;
    return handle;
  }

  int32_t dtype() const {
    int32_t result;
    expect(torch_.get_dtype(handle_, &result));
    return result;
  }

  int64_t dim() const {
    int64_t result;
    expect(torch_.get_dim(handle_, &result));
    return result;
  }

  const int64_t* sizes() const {
    int64_t* result;
    expect(torch_.get_sizes(handle_, &result));
    return result;
  }

  bool contiguous() const {
    bool result;
    expect(torch_.is_contiguous(handle_, &result));
    return result;
  }

  template <class T>
  T* data() const {
    void* result;
    expect(torch_.get_data_ptr(handle_, &result));
    return static_cast<T*>(result);
  }

  bool is(int32_t type, int64_t rows) const {
    return dtype() == type && dim() == 1 && sizes()[0] == rows && contiguous();
  }

  bool is(int32_t type, int64_t rows, int64_t columns) const {
    return dtype() == type && dim() == 2 && sizes()[0] == rows && sizes()[1] == columns &&
           contiguous();
  }

  bool is(int32_t type, int64_t a, int64_t b, int64_t c) const {
    return dtype() == type && dim() == 3 && sizes()[0] == a && sizes()[1] == b && sizes()[2] == c &&
           contiguous();
  }

 private:
  void* handle_;
};

// The PcdvqDtype of activations or a bias, or -1.
int32_t float_dtype(int32_t type) {
  return type == kFloat32 ? PCDVQ_F32 : type == kBfloat16 ? PCDVQ_BF16 : type == kFloat16 ? PCDVQ_F16 : -1;
}

// Layouts that Python has found valid, with what follows from them. Entries are never changed, and
// Python adds them under its lock.
constexpr int kMostShapes = 256;
PcdvqLinearShape shapes[kMostShapes];
std::atomic<int> shape_count{0};

const PcdvqLinearShape* find_shape(const PcdvqLayout& layout, int64_t k) {
  for (int i = 0; i < shape_count.load(std::memory_order_acquire); ++i) {
    if (shapes[i].k == k && !std::memcmp(&shapes[i].layout, &layout, sizeof layout)) return &shapes[i];
  }
  return nullptr;
}

constexpr int kLayoutInts = sizeof(PcdvqLayout) / sizeof(int64_t);

// An int[].
struct Ints {
  static constexpr int kMost = 16;
  int64_t values[kMost];
  int count;

  // Takes the list.
  explicit Ints(Value list) {
    void* handle = reinterpret_cast<void*>(list);
    size_t size;
    expect(torch_.list_size(handle, &size));
    count = int(std::min<size_t>(size, kMost));
    for (int i = 0; i < count; ++i) {
      Value value;
      expect(torch_.list_get_item(handle, i, &value));
      values[i] = int64_t(value);
    }
    expect(torch_.delete_list(handle));
  }
};

// Takes the value of a `Tensor?`.
Value take_optional(Value value) {
  if (!value) return 0;
  Value* pointer = reinterpret_cast<Value*>(value);
  const Value tensor = *pointer;
  expect(torch_.delete_value(pointer));
  return tensor;
}

struct Call {
  Argument x, qweight, row_scale, signs_in, codewords, bias;
  Ints layout;

  explicit Call(const Value* stack)
      : x(stack[0]),
        qweight(stack[1]),
        row_scale(stack[2]),
        signs_in(stack[3]),
        codewords(stack[4]),
        bias(take_optional(stack[5])),
        layout(stack[6]) {}

  // The output, or null where this is not the plain call that a model makes: for Python to judge.
  void* run() const {
    PcdvqLinear p = {};
    p.x_dtype = float_dtype(x.dtype());
    const int64_t dim = x.dim();
    if (layout.count != kLayoutInts || p.x_dtype < 0 || dim < 1 || dim > kMostDims || !x.contiguous()) return nullptr;
    if (row_scale.dim() != 1) return nullptr;
    std::memcpy(&p.layout, layout.values, sizeof p.layout);
    p.k = x.sizes()[dim - 1];
    p.n = row_scale.sizes()[0];
    const PcdvqLinearShape* shape = find_shape(p.layout, p.k);
    if (!shape) return nullptr;
    // Chains are whole: in rows of codes, and in packed tiles of 64 rows.
    const int64_t chain = std::max<int64_t>(1, p.layout.chain_rows), strip = chain > 1 ? 64 : 16;
    const int64_t rows = (p.n + chain - 1) / chain * chain;
    const int64_t strips = (p.n + strip - 1) / strip * strip / 16;
    p.packed = qweight.is(kUint8, strips, (p.k + 63) / 64, shape->block_bytes);
    if (!(p.packed || qweight.is(kUint8, rows, shape->row_bytes)) || !row_scale.is(kFloat32, p.n) ||
        !signs_in.is(kUint8, p.k / 8) ||
        !codewords.is(kInt8, shape->codewords, p.layout.vector_dim)) {
      return nullptr;
    }
    if (bias) {
      p.bias_dtype = float_dtype(bias.dtype());
      if (p.bias_dtype < 0 || !bias.is(bias.dtype(), p.n)) return nullptr;
      p.bias = bias.data<void>();
    }
    int64_t sizes[kMostDims], strides[kMostDims], stride = 1;
    for (int64_t i = dim - 1; i >= 0; --i) {
      sizes[i] = i == dim - 1 ? p.n : x.sizes()[i];
      strides[i] = stride;
      stride *= std::max<int64_t>(1, sizes[i]);
    }
    p.m = 1;
    for (int64_t i = 0; i < dim - 1; ++i) p.m *= sizes[i];
    void* out;
    expect(torch_.empty_strided(dim, sizes, strides, x.dtype(), 0, 0, &out));
    Argument result(reinterpret_cast<Value>(out));
    p.x = x.data<void>();
    p.qweight = qweight.data<uint8_t>();
    p.row_scale = row_scale.data<float>();
    p.signs_in = signs_in.data<uint8_t>();
    p.codewords = codewords.data<int8_t>();
    p.out = result.data<void>();
    p.row_bytes = shape->row_bytes;
    uint32_t threads;
    expect(torch_.get_num_threads(&threads));
    p.threads = int32_t(threads);
    if (pcdvq_linear(&p) != PCDVQ_OK) return nullptr;
    return result.release();
  }

  static constexpr int64_t kMostDims = 8;
};

void linear(Value* stack, uint64_t, uint64_t) {
  Call call(stack);
  void* out = call.run();
  if (!out) {
    void* tensors[] = {call.x.release(),        call.qweight.release(),   call.row_scale.release(),
                       call.signs_in.release(), call.codewords.release(), call.bias.release()};
    char message[2048] = "";
    const Ints& layout = call.layout;
    out = torch_.in_python(tensors, layout.values, layout.count, message, sizeof message);
    if (!out) throw std::runtime_error(message);
  }
  stack[0] = reinterpret_cast<Value>(out);
}

}  // namespace
}  // namespace pcdvq

int32_t pcdvq_torch_register(const PcdvqTorch* torch) {
  pcdvq::torch_ = *torch;
  static void* library;  // as long as the process
  int32_t status = torch->library_init_impl("pcdvq", "CPU", __FILE__, __LINE__, &library);
  constexpr uint64_t kVersion = uint64_t(2) << 56 | uint64_t(13) << 48;  // of the interface
  if (!status) status = torch->library_impl(library, "linear", pcdvq::linear, kVersion);
  return status;
}

void pcdvq_torch_accept(const PcdvqLinearShape* shape) {
  const int count = pcdvq::shape_count.load();
  if (count == pcdvq::kMostShapes || pcdvq::find_shape(shape->layout, shape->k)) return;
  pcdvq::shapes[count] = *shape;
  pcdvq::shape_count.store(count + 1, std::memory_order_release);
}
