// Dense linear algebra of the plugin: cuBLAS and cuSOLVER, loaded by name with the first use.
//
// The libraries are column-major, so they see the transpose of every row-major matrix; the comments
// below speak of what they see. Scratch is taken from the stream's memory pool and goes back to it
// in stream order.
#include <cublas_v2.h>
#include <cusolverDn.h>
#include <dlfcn.h>

#include <algorithm>
#include <cstdint>
#include <new>
#include <vector>

#include "kernels/cuda/plugin.h"
#include "kernels/cuda/scratch.h"
#include "kernels/cuda/stream.h"
#include "kernels/ops/float_formats.h"

namespace pewter::kernels::cuda {
namespace {

#define RETURN_IF_LIBRARY_ERROR(call)       \
  do {                                      \
    if ((call) != 0) return kLibraryFailed; \
  } while (false)
#define RETURN_IF_NONZERO(call)                                \
  do {                                                         \
    if (const int error_ = (call); error_ != 0) return error_; \
  } while (false)

// --- Libraries ----------------------------------------------------------------------------------

struct Libraries {
  bool loaded = false;
  decltype(&cublasCreate_v2) blas_create;
  decltype(&cublasDestroy_v2) blas_destroy;
  decltype(&cublasSetStream_v2) blas_set_stream;
  decltype(&cublasDgemm_v2_64) dgemm;
  decltype(&cublasSgemmStridedBatched_64) sgemm;
  decltype(&cublasDgeam_64) dgeam;
  decltype(&cublasDtrsm_v2_64) dtrsm;
  decltype(&cusolverDnCreate) solver_create;
  decltype(&cusolverDnDestroy) solver_destroy;
  decltype(&cusolverDnSetStream) solver_set_stream;
  decltype(&cusolverDnCreateParams) params_create;
  decltype(&cusolverDnDestroyParams) params_destroy;
  decltype(&cusolverDnXsyevd_bufferSize) syevd_size;
  decltype(&cusolverDnXsyevd) syevd;
  decltype(&cusolverDnXgesvd_bufferSize) gesvd_size;
  decltype(&cusolverDnXgesvd) gesvd;
  decltype(&cusolverDnXgeqrf_bufferSize) geqrf_size;
  decltype(&cusolverDnXgeqrf) geqrf;
  decltype(&cusolverDnDorgqr_bufferSize) orgqr_size;
  decltype(&cusolverDnDorgqr) orgqr;
  decltype(&cusolverDnXpotrf_bufferSize) potrf_size;
  decltype(&cusolverDnXpotrf) potrf;
};

void* OpenLibrary(const char* versioned, const char* plain) {
  void* const library = dlopen(versioned, RTLD_NOW | RTLD_LOCAL);
  return library != nullptr ? library : dlopen(plain, RTLD_NOW | RTLD_LOCAL);
}

template <class Function>
bool Find(void* library, const char* name, Function& function) {
  function = reinterpret_cast<Function>(dlsym(library, name));
  return function != nullptr;
}

#define PEWTER_TEXT_OF(x) #x
#define PEWTER_TEXT(x) PEWTER_TEXT_OF(x)

Libraries LoadLibraries() {
  Libraries found = {};
  // The versions that the headers here belong to; they stay loaded.
  void* const blas = OpenLibrary("libcublas.so." PEWTER_TEXT(CUBLAS_VER_MAJOR), "libcublas.so");
  void* const solver =
      OpenLibrary("libcusolver.so." PEWTER_TEXT(CUSOLVER_VER_MAJOR), "libcusolver.so");
  if (blas == nullptr || solver == nullptr) return found;
  found.loaded = Find(blas, "cublasCreate_v2", found.blas_create) &&
                 Find(blas, "cublasDestroy_v2", found.blas_destroy) &&
                 Find(blas, "cublasSetStream_v2", found.blas_set_stream) &&
                 Find(blas, "cublasDgemm_v2_64", found.dgemm) &&
                 Find(blas, "cublasSgemmStridedBatched_64", found.sgemm) &&
                 Find(blas, "cublasDgeam_64", found.dgeam) &&
                 Find(blas, "cublasDtrsm_v2_64", found.dtrsm) &&
                 Find(solver, "cusolverDnCreate", found.solver_create) &&
                 Find(solver, "cusolverDnDestroy", found.solver_destroy) &&
                 Find(solver, "cusolverDnSetStream", found.solver_set_stream) &&
                 Find(solver, "cusolverDnCreateParams", found.params_create) &&
                 Find(solver, "cusolverDnDestroyParams", found.params_destroy) &&
                 Find(solver, "cusolverDnXsyevd_bufferSize", found.syevd_size) &&
                 Find(solver, "cusolverDnXsyevd", found.syevd) &&
                 Find(solver, "cusolverDnXgesvd_bufferSize", found.gesvd_size) &&
                 Find(solver, "cusolverDnXgesvd", found.gesvd) &&
                 Find(solver, "cusolverDnXgeqrf_bufferSize", found.geqrf_size) &&
                 Find(solver, "cusolverDnXgeqrf", found.geqrf) &&
                 Find(solver, "cusolverDnDorgqr_bufferSize", found.orgqr_size) &&
                 Find(solver, "cusolverDnDorgqr", found.orgqr) &&
                 Find(solver, "cusolverDnXpotrf_bufferSize", found.potrf_size) &&
                 Find(solver, "cusolverDnXpotrf", found.potrf);
  return found;
}

const Libraries& TheLibraries() {
  static const Libraries libraries = LoadLibraries();
  return libraries;
}

}  // namespace

struct LinearHandles {
  cublasHandle_t blas = nullptr;
  cusolverDnHandle_t solver = nullptr;
  cusolverDnParams_t params = nullptr;
};

namespace {

// Workspaces of a cuSOLVER call, and its `info`.
struct Workspace {
  explicit Workspace(Stream* stream) : device(stream), info(stream) {}
  int Take(size_t device_bytes, size_t host_bytes) {
    RETURN_IF_NONZERO(device.Take(static_cast<int64_t>(device_bytes)));
    RETURN_IF_NONZERO(info.Take(sizeof(int)));
    host.resize(host_bytes);
    return cudaSuccess;
  }
  int* info_data() const { return static_cast<int*>(info.data()); }
  Scratch device, info;
  std::vector<char> host;
};

int Fetch(Stream* stream, const void* device, void* host, int64_t bytes) {
  RETURN_IF_CUDA_ERROR(
      cudaMemcpyAsync(host, device, bytes, cudaMemcpyDeviceToHost, stream->stream));
  RETURN_IF_CUDA_ERROR(cudaStreamSynchronize(stream->stream));
  return cudaSuccess;
}

// --- Kernels ------------------------------------------------------------------------------------

constexpr int kThreads = 256;

unsigned Blocks(int64_t elements) {
  return static_cast<unsigned>(
      std::clamp<int64_t>((elements + kThreads - 1) / kThreads, 1, 1 << 16));
}

__device__ double WidenElement(const void* data, DType dtype, int64_t at) {
  const auto two_bytes = [&] { return uint32_t{static_cast<const uint16_t*>(data)[at]}; };
  const auto one_byte = [&] { return uint32_t{static_cast<const uint8_t*>(data)[at]}; };
  switch (dtype) {
    case DType::kF64:
      return static_cast<const double*>(data)[at];
    case DType::kF32:
      return static_cast<const float*>(data)[at];
    case DType::kF16:
      return FloatFromF16<float>(two_bytes());
    case DType::kBF16:
      return FloatFromBF16<float>(two_bytes());
    case DType::kF8E4M3:
      return FloatFromF8E4M3<float>(one_byte());
    default:
      return FloatFromF8E5M2<float>(one_byte());
  }
}

// A block of a matrix, rows packed, as double.
__global__ void WidenKernel(MatrixArg m, int64_t row, int64_t column, int64_t rows, int64_t columns,
                            double* out) {
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < rows * columns; i += step) {
    const int64_t at = (row + i / columns) * m.stride + column + i % columns;
    double value = WidenElement(m.data, m.dtype, at);
    if (m.minus != nullptr) value -= WidenElement(m.minus, m.dtype, at);
    out[i] = value;
  }
}

// Copies the lower triangle to the upper one.
__global__ void MirrorKernel(double* data, int64_t n, int64_t stride) {
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < n * n; i += step) {
    const int64_t row = i / n, column = i % n;
    if (row < column) data[row * stride + column] = data[column * stride + row];
  }
}

// Sets the flag when an element is NaN or infinite; of the lower triangle alone if asked.
__global__ void FiniteKernel(const double* data, int64_t rows, int64_t columns, int64_t stride,
                             bool lower_only, int* flag) {
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < rows * columns; i += step) {
    const int64_t row = i / columns, column = i % columns;
    if (lower_only && column > row) continue;
    if (!isfinite(data[row * stride + column])) *flag = 1;
  }
}

// Swaps row i with row n - 1 - i.
__global__ void ReverseRowsKernel(double* data, int64_t n, int64_t columns, int64_t stride) {
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  const int64_t count = n / 2 * columns;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count; i += step) {
    double& a = data[i / columns * stride + i % columns];
    double& b = data[(n - 1 - i / columns) * stride + i % columns];
    const double kept = a;
    a = b;
    b = kept;
  }
}

// Block v makes the entry of largest magnitude of vector v positive, the first of several, and
// turns row v of `partners` with it. Entries of a vector are `next` apart, vectors `apart`.
__global__ void SignKernel(double* vectors, int64_t length, int64_t next, int64_t apart,
                           double* partners, int64_t partner_length, int64_t partner_stride) {
  __shared__ double value[kThreads];
  __shared__ int64_t place[kThreads];
  double* const vector = vectors + blockIdx.x * apart;
  const int t = threadIdx.x;
  value[t] = -1;
  place[t] = 0;
  for (int64_t i = t; i < length; i += kThreads) {
    const double magnitude = fabs(vector[i * next]);
    if (magnitude > value[t]) {
      value[t] = magnitude;
      place[t] = i;
    }
  }
  __syncthreads();
  for (int half = kThreads / 2; half > 0; half /= 2) {
    if (t < half && (value[t + half] > value[t] ||
                     (value[t + half] == value[t] && place[t + half] < place[t]))) {
      value[t] = value[t + half];
      place[t] = place[t + half];
    }
    __syncthreads();
  }
  const bool turn = vector[place[0] * next] < 0;
  __syncthreads();  // all have looked before one turns it
  if (!turn) return;
  for (int64_t i = t; i < length; i += kThreads) vector[i * next] = -vector[i * next];
  if (partners == nullptr) return;
  double* const partner = partners + blockIdx.x * partner_stride;
  for (int64_t i = t; i < partner_length; i += kThreads) partner[i] = -partner[i];
}

// r, row-major, from the factored matrix that the library holds in columns of `rows` elements.
__global__ void UpperTriangleKernel(const double* factored, int64_t rows, MatrixArg r) {
  auto* const out = static_cast<double*>(r.data);
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < r.rows * r.columns;
       i += step) {
    const int64_t row = i / r.columns, column = i % r.columns;
    out[row * r.stride + column] = row <= column ? factored[column * rows + row] : 0;
  }
}

int CheckFinite(Stream* stream, const MatrixArg& m, bool lower_only) {
  Scratch flag(stream);
  RETURN_IF_NONZERO(flag.Take(sizeof(int)));
  RETURN_IF_CUDA_ERROR(cudaMemsetAsync(flag.data(), 0, sizeof(int), stream->stream));
  FiniteKernel<<<Blocks(m.rows * m.columns), kThreads, 0, stream->stream>>>(
      static_cast<const double*>(m.data), m.rows, m.columns, m.stride, lower_only,
      static_cast<int*>(flag.data()));
  RETURN_IF_CUDA_ERROR(cudaGetLastError());
  int found = 0;
  RETURN_IF_NONZERO(Fetch(stream, flag.data(), &found, sizeof(int)));
  return found != 0 ? kNotFinite : 0;
}

// The library's `info` after a call: 0 when all is well.
int FetchInfo(Stream* stream, const Workspace& workspace, int failure) {
  int info = 0;
  RETURN_IF_NONZERO(Fetch(stream, workspace.info.data(), &info, sizeof(int)));
  return info == 0 ? 0 : info < 0 ? static_cast<int>(kLibraryFailed) : failure;
}

// to [columns, rows] = from^T for `from` [rows, columns], both row-major.
int TransposeInto(Stream* stream, const double* from, int64_t rows, int64_t columns,
                  int64_t from_stride, double* to, int64_t to_stride) {
  const double one = 1, zero = 0;
  RETURN_IF_LIBRARY_ERROR(TheLibraries().dgeam(stream->linear->blas, CUBLAS_OP_T, CUBLAS_OP_N, rows,
                                               columns, &one, from, from_stride, &zero, to,
                                               to_stride, to, to_stride));
  return 0;
}

}  // namespace

// --- The functions of the table -----------------------------------------------------------------

const char* DescribeLinearAlgebra(int error) {
  switch (error) {
    case kLibrariesMissing:
      return "cuBLAS or cuSOLVER cannot be loaded (libcublas, libcusolver); --device cpu runs "
             "without";
    case kNotFinite:
      return "a matrix that is to be factored has values not finite";
    case kNotConverged:
      return "the iteration did not converge";
    case kNotPositiveDefinite:
      return "the matrix is not positive definite";
    default:
      return "cuBLAS or cuSOLVER failed";
  }
}

void CloseLinearAlgebra(Stream* stream) {
  LinearHandles* const handles = stream->linear;
  if (handles == nullptr) return;
  const Libraries& libraries = TheLibraries();
  if (handles->params != nullptr) libraries.params_destroy(handles->params);
  if (handles->solver != nullptr) libraries.solver_destroy(handles->solver);
  if (handles->blas != nullptr) libraries.blas_destroy(handles->blas);
  delete handles;
  stream->linear = nullptr;
}

int OpenLinearAlgebra(Stream* stream) {
  if (stream->linear != nullptr) return 0;
  const Libraries& libraries = TheLibraries();
  if (!libraries.loaded) return kLibrariesMissing;
  RETURN_IF_CUDA_ERROR(cudaSetDevice(stream->ordinal));
  stream->linear = new (std::nothrow) LinearHandles;
  if (stream->linear == nullptr) return cudaErrorMemoryAllocation;
  LinearHandles& handles = *stream->linear;
  const bool open =
      libraries.blas_create(&handles.blas) == CUBLAS_STATUS_SUCCESS &&
      libraries.blas_set_stream(handles.blas, stream->stream) == CUBLAS_STATUS_SUCCESS &&
      libraries.solver_create(&handles.solver) == CUSOLVER_STATUS_SUCCESS &&
      libraries.solver_set_stream(handles.solver, stream->stream) == CUSOLVER_STATUS_SUCCESS &&
      libraries.params_create(&handles.params) == CUSOLVER_STATUS_SUCCESS;
  if (open) return 0;
  CloseLinearAlgebra(stream);
  return kLibraryFailed;
}

int MultiplyFloats(Stream* stream, const FloatProduct& product) {
  RETURN_IF_CUDA_ERROR(cudaSetDevice(stream->ordinal));
  // c^T = op(b)^T op(a)^T.
  RETURN_IF_LIBRARY_ERROR(TheLibraries().sgemm(
      stream->linear->blas, product.transpose_b ? CUBLAS_OP_T : CUBLAS_OP_N,
      product.transpose_a ? CUBLAS_OP_T : CUBLAS_OP_N, product.columns, product.rows, product.inner,
      &product.alpha, product.b, product.b_stride, product.b_next, product.a, product.a_stride,
      product.a_next, &product.beta, product.c, product.c_stride, product.c_next, product.batch));
  return 0;
}

int Multiply(Stream* stream, const MultiplyCall* call) {
  RETURN_IF_CUDA_ERROR(cudaSetDevice(stream->ordinal));
  const MatrixArg &a = call->a, &b = call->b, &c = call->c;
  const int64_t inner = call->transpose_a ? a.rows : a.columns;
  if (inner == 0) {
    if (call->beta == 1) return 0;
    if (call->beta != 0) {
      // cuBLAS scales as well when it has nothing to add.
      const double zero = 0;
      const auto* const data = static_cast<const double*>(c.data);
      RETURN_IF_LIBRARY_ERROR(TheLibraries().dgeam(
          stream->linear->blas, CUBLAS_OP_N, CUBLAS_OP_N, c.columns, c.rows, &call->beta, data,
          c.stride, &zero, data, c.stride, static_cast<double*>(c.data), c.stride));
      return 0;
    }
    RETURN_IF_CUDA_ERROR(cudaMemset2DAsync(c.data, c.stride * sizeof(double), 0,
                                           c.columns * sizeof(double), c.rows, stream->stream));
    return 0;
  }
  // Operands that are not plain doubles are widened in slabs of the sum, at most so many elements.
  constexpr int64_t kSlabElements = int64_t{1} << 24;
  const auto plain = [](const MatrixArg& m) {
    return m.dtype == DType::kF64 && m.minus == nullptr;
  };
  const int64_t widest =
      std::max({int64_t{1}, plain(a) ? int64_t{0} : c.rows, plain(b) ? int64_t{0} : c.columns});
  const int64_t depth =
      plain(a) && plain(b) ? inner : std::min(inner, std::max<int64_t>(64, kSlabElements / widest));
  Scratch scratch_a(stream), scratch_b(stream);
  if (!plain(a)) RETURN_IF_NONZERO(scratch_a.Take(depth * c.rows * sizeof(double)));
  if (!plain(b)) RETURN_IF_NONZERO(scratch_b.Take(depth * c.columns * sizeof(double)));
  // Slab [k, k + size) of an operand whose summed axis is its rows or its columns.
  const auto slab = [&](const MatrixArg& m, bool by_rows, int64_t k, int64_t size, double* scratch,
                        const double** data, int64_t* stride) -> int {
    if (plain(m)) {
      *data = static_cast<const double*>(m.data) + (by_rows ? k * m.stride : k);
      *stride = m.stride;
      return 0;
    }
    const int64_t rows = by_rows ? size : m.rows, columns = by_rows ? m.columns : size;
    WidenKernel<<<Blocks(rows * columns), kThreads, 0, stream->stream>>>(
        m, by_rows ? k : 0, by_rows ? 0 : k, rows, columns, scratch);
    RETURN_IF_CUDA_ERROR(cudaGetLastError());
    *data = scratch;
    *stride = columns;
    return 0;
  };
  for (int64_t k = 0; k < inner; k += depth) {
    const int64_t size = std::min(depth, inner - k);
    const double *left = nullptr, *right = nullptr;
    int64_t left_stride = 0, right_stride = 0;
    RETURN_IF_NONZERO(
        slab(a, call->transpose_a, k, size, scratch_a.doubles(), &left, &left_stride));
    RETURN_IF_NONZERO(
        slab(b, !call->transpose_b, k, size, scratch_b.doubles(), &right, &right_stride));
    const double beta = k == 0 ? call->beta : 1;
    // c^T = op(b)^T op(a)^T.
    RETURN_IF_LIBRARY_ERROR(TheLibraries().dgemm(
        stream->linear->blas, call->transpose_b ? CUBLAS_OP_T : CUBLAS_OP_N,
        call->transpose_a ? CUBLAS_OP_T : CUBLAS_OP_N, c.columns, c.rows, size, &call->alpha, right,
        right_stride, left, left_stride, &beta, static_cast<double*>(c.data), c.stride));
  }
  if (call->mirror) {
    MirrorKernel<<<Blocks(c.rows * c.rows), kThreads, 0, stream->stream>>>(
        static_cast<double*>(c.data), c.rows, c.stride);
    RETURN_IF_CUDA_ERROR(cudaGetLastError());
  }
  return 0;
}

int Eigen(Stream* stream, const EigenCall* call) {
  RETURN_IF_CUDA_ERROR(cudaSetDevice(stream->ordinal));
  const MatrixArg& a = call->a;
  RETURN_IF_NONZERO(CheckFinite(stream, a, /*lower_only=*/true));
  const Libraries& libraries = TheLibraries();
  const LinearHandles& handles = *stream->linear;
  Scratch values(stream);
  RETURN_IF_NONZERO(values.Take(a.rows * sizeof(double)));
  size_t device_bytes = 0, host_bytes = 0;
  RETURN_IF_LIBRARY_ERROR(
      libraries.syevd_size(handles.solver, handles.params, CUSOLVER_EIG_MODE_VECTOR,
                           CUBLAS_FILL_MODE_UPPER, a.rows, CUDA_R_64F, a.data, a.stride, CUDA_R_64F,
                           values.data(), CUDA_R_64F, &device_bytes, &host_bytes));
  Workspace workspace(stream);
  RETURN_IF_NONZERO(workspace.Take(device_bytes, host_bytes));
  RETURN_IF_LIBRARY_ERROR(libraries.syevd(
      handles.solver, handles.params, CUSOLVER_EIG_MODE_VECTOR, CUBLAS_FILL_MODE_UPPER, a.rows,
      CUDA_R_64F, a.data, a.stride, CUDA_R_64F, values.data(), CUDA_R_64F, workspace.device.data(),
      device_bytes, workspace.host.data(), host_bytes, workspace.info_data()));
  RETURN_IF_NONZERO(FetchInfo(stream, workspace, kNotConverged));
  // Vector i is column i for the library, which is row i: the last is that of the largest value.
  auto* const data = static_cast<double*>(a.data);
  ReverseRowsKernel<<<Blocks(a.rows / 2 * a.rows), kThreads, 0, stream->stream>>>(data, a.rows,
                                                                                  a.rows, a.stride);
  RETURN_IF_CUDA_ERROR(cudaGetLastError());
  SignKernel<<<static_cast<unsigned>(a.rows), kThreads, 0, stream->stream>>>(
      data, a.rows, 1, a.stride, nullptr, 0, 0);
  RETURN_IF_CUDA_ERROR(cudaGetLastError());
  return Fetch(stream, values.data(), call->values, a.rows * sizeof(double));
}

int Svd(Stream* stream, const SvdCall* call) {
  RETURN_IF_CUDA_ERROR(cudaSetDevice(stream->ordinal));
  const MatrixArg &a = call->a, &u = call->u, &vt = call->vt;
  RETURN_IF_NONZERO(CheckFinite(stream, a, /*lower_only=*/false));
  const Libraries& libraries = TheLibraries();
  const LinearHandles& handles = *stream->linear;
  // The library wants at least as many rows as columns. A wide row-major matrix is a tall one for
  // it, whose left vectors are vt and whose right ones are u; a tall one is transposed first.
  const bool tall = a.rows > a.columns;
  const int64_t k = tall ? a.columns : a.rows, length = tall ? a.rows : a.columns;
  Scratch turned(stream), left(stream), right(stream), values(stream);
  RETURN_IF_NONZERO(values.Take(k * sizeof(double)));
  double* matrix = static_cast<double*>(a.data);
  int64_t stride = a.stride;
  double *left_data = static_cast<double*>(vt.data), *right_data = static_cast<double*>(u.data);
  int64_t left_stride = vt.stride, right_stride = u.stride;
  if (tall) {
    RETURN_IF_NONZERO(turned.Take(k * length * sizeof(double)));
    RETURN_IF_NONZERO(left.Take(k * length * sizeof(double)));
    RETURN_IF_NONZERO(right.Take(k * k * sizeof(double)));
    RETURN_IF_NONZERO(
        TransposeInto(stream, matrix, a.rows, a.columns, stride, turned.doubles(), length));
    matrix = turned.doubles();
    stride = left_stride = length;
    left_data = left.doubles();
    right_data = right.doubles();
    right_stride = k;
  }
  size_t device_bytes = 0, host_bytes = 0;
  RETURN_IF_LIBRARY_ERROR(libraries.gesvd_size(
      handles.solver, handles.params, 'S', 'S', length, k, CUDA_R_64F, matrix, stride, CUDA_R_64F,
      values.data(), CUDA_R_64F, left_data, left_stride, CUDA_R_64F, right_data, right_stride,
      CUDA_R_64F, &device_bytes, &host_bytes));
  Workspace workspace(stream);
  RETURN_IF_NONZERO(workspace.Take(device_bytes, host_bytes));
  RETURN_IF_LIBRARY_ERROR(
      libraries.gesvd(handles.solver, handles.params, 'S', 'S', length, k, CUDA_R_64F, matrix,
                      stride, CUDA_R_64F, values.data(), CUDA_R_64F, left_data, left_stride,
                      CUDA_R_64F, right_data, right_stride, CUDA_R_64F, workspace.device.data(),
                      device_bytes, workspace.host.data(), host_bytes, workspace.info_data()));
  RETURN_IF_NONZERO(FetchInfo(stream, workspace, kNotConverged));
  if (tall) {
    // Row-major, `left` is [k, length] = u^T and `right` [k, k] = vt^T.
    RETURN_IF_NONZERO(TransposeInto(stream, left.doubles(), k, length, length,
                                    static_cast<double*>(u.data), u.stride));
    RETURN_IF_NONZERO(
        TransposeInto(stream, right.doubles(), k, k, k, static_cast<double*>(vt.data), vt.stride));
  }
  SignKernel<<<static_cast<unsigned>(k), kThreads, 0, stream->stream>>>(
      static_cast<double*>(u.data), u.rows, u.stride, 1, static_cast<double*>(vt.data), vt.columns,
      vt.stride);
  RETURN_IF_CUDA_ERROR(cudaGetLastError());
  return Fetch(stream, values.data(), call->values, k * sizeof(double));
}

int Qr(Stream* stream, const QrCall* call) {
  RETURN_IF_CUDA_ERROR(cudaSetDevice(stream->ordinal));
  const MatrixArg &a = call->a, &r = call->r;
  RETURN_IF_NONZERO(CheckFinite(stream, a, /*lower_only=*/false));
  const Libraries& libraries = TheLibraries();
  const LinearHandles& handles = *stream->linear;
  const int64_t m = a.rows, n = a.columns, k = r.rows;
  Scratch turned(stream), tau(stream);
  RETURN_IF_NONZERO(turned.Take(m * n * sizeof(double)));
  RETURN_IF_NONZERO(tau.Take(k * sizeof(double)));
  RETURN_IF_NONZERO(TransposeInto(stream, static_cast<const double*>(a.data), m, n, a.stride,
                                  turned.doubles(), m));
  size_t device_bytes = 0, host_bytes = 0;
  RETURN_IF_LIBRARY_ERROR(libraries.geqrf_size(handles.solver, handles.params, m, n, CUDA_R_64F,
                                               turned.data(), m, CUDA_R_64F, tau.data(), CUDA_R_64F,
                                               &device_bytes, &host_bytes));
  Workspace workspace(stream);
  RETURN_IF_NONZERO(workspace.Take(device_bytes, host_bytes));
  RETURN_IF_LIBRARY_ERROR(
      libraries.geqrf(handles.solver, handles.params, m, n, CUDA_R_64F, turned.data(), m,
                      CUDA_R_64F, tau.data(), CUDA_R_64F, workspace.device.data(), device_bytes,
                      workspace.host.data(), host_bytes, workspace.info_data()));
  RETURN_IF_NONZERO(FetchInfo(stream, workspace, kNotConverged));
  UpperTriangleKernel<<<Blocks(k * n), kThreads, 0, stream->stream>>>(turned.doubles(), m, r);
  RETURN_IF_CUDA_ERROR(cudaGetLastError());

  // Extents are at most kMaxExtent, so these fit.
  const int rows = static_cast<int>(m), columns = static_cast<int>(k);
  int elements = 0;
  RETURN_IF_LIBRARY_ERROR(libraries.orgqr_size(handles.solver, rows, columns, columns,
                                               turned.doubles(), rows, tau.doubles(), &elements));
  Workspace generate(stream);
  RETURN_IF_NONZERO(generate.Take(elements * sizeof(double), 0));
  RETURN_IF_LIBRARY_ERROR(libraries.orgqr(handles.solver, rows, columns, columns, turned.doubles(),
                                          rows, tau.doubles(), generate.device.doubles(), elements,
                                          generate.info_data()));
  RETURN_IF_NONZERO(FetchInfo(stream, generate, kNotConverged));
  return TransposeInto(stream, turned.doubles(), k, m, m, static_cast<double*>(a.data), a.stride);
}

int SolvePosDef(Stream* stream, const SolveCall* call) {
  RETURN_IF_CUDA_ERROR(cudaSetDevice(stream->ordinal));
  const MatrixArg &a = call->a, &b = call->b;
  RETURN_IF_NONZERO(CheckFinite(stream, a, /*lower_only=*/true));
  const Libraries& libraries = TheLibraries();
  const LinearHandles& handles = *stream->linear;
  size_t device_bytes = 0, host_bytes = 0;
  RETURN_IF_LIBRARY_ERROR(libraries.potrf_size(handles.solver, handles.params,
                                               CUBLAS_FILL_MODE_UPPER, a.rows, CUDA_R_64F, a.data,
                                               a.stride, CUDA_R_64F, &device_bytes, &host_bytes));
  Workspace workspace(stream);
  RETURN_IF_NONZERO(workspace.Take(device_bytes, host_bytes));
  RETURN_IF_LIBRARY_ERROR(
      libraries.potrf(handles.solver, handles.params, CUBLAS_FILL_MODE_UPPER, a.rows, CUDA_R_64F,
                      a.data, a.stride, CUDA_R_64F, workspace.device.data(), device_bytes,
                      workspace.host.data(), host_bytes, workspace.info_data()));
  RETURN_IF_NONZERO(FetchInfo(stream, workspace, kNotPositiveDefinite));
  // With a = R^T R, R upper for the library: b^T R^-1 R^-T.
  const double one = 1;
  for (const cublasOperation_t operation : {CUBLAS_OP_N, CUBLAS_OP_T}) {
    RETURN_IF_LIBRARY_ERROR(libraries.dtrsm(handles.blas, CUBLAS_SIDE_RIGHT, CUBLAS_FILL_MODE_UPPER,
                                            operation, CUBLAS_DIAG_NON_UNIT, b.columns, b.rows,
                                            &one, static_cast<const double*>(a.data), a.stride,
                                            static_cast<double*>(b.data), b.stride));
  }
  return 0;
}

}  // namespace pewter::kernels::cuda
