// The CUDA backend: weights, states and sampling on one GPU, the bits of the scalar backend.
//
// Free of CUDA headers, so that the wiring and the tests can include it; only programs built with
// MMFREE_HAVE_CUDA link it.
#ifndef MMFREE_SERVER_BACKENDS_CUDA_CUDA_BACKEND_H_
#define MMFREE_SERVER_BACKENDS_CUDA_CUDA_BACKEND_H_

#include <cstdint>
#include <memory>

#include "absl/status/statusor.h"
#include "server/backends/backend.h"
#include "server/model/model.h"

namespace mmfree {

struct CudaBackendOptions {
  // Ordinal of the device among those the driver shows.
  int32_t device = 0;
  // Sessions whose state is resident; num_layers * hidden_size * 4 bytes each.
  int32_t num_slots = 256;
  // Further states that rest on the device (BackendInfo::resident_slots).
  int32_t resident_slots = 0;
  // Tokens a step can carry, summed over its rows; sizes the activation buffers.
  int32_t max_step_tokens = 2048;
  // Replays steps in which every row has one token as CUDA graphs. Off: every kernel is launched.
  bool use_graphs = true;
  // Which kernels multiply. Every choice gives the same bits; kAuto picks by batch and device.
  enum class Kernels : uint8_t {
    kAuto,
    kGeneric,     // what every supported device can run, whatever the batch: mma.sync, norms apart
    kWide,        // the tuned products for many tokens whatever the batch (wgmma, compute 9.0)
    kDecode,      // norms fused with mma.sync products whenever the step is small enough
    kPersistent,  // the same, all of them in one kernel where the device holds it
    kCluster,     // all layers of single tokens in one kernel of independent clusters (compute 9.0)
  };
  Kernels kernels = Kernels::kAuto;
};

// Uploads the model to a device and allocates its states and buffers; keeps no hold of it. Errors:
// NOT_FOUND without a driver or such a device; FAILED_PRECONDITION for a device or driver that is
// too old; RESOURCE_EXHAUSTED when memory does not suffice (the message says what was needed and
// free, and what to lower); INVALID_ARGUMENT for options out of range; UNIMPLEMENTED for a model
// whose rows do not fit the kernels' shared memory.
absl::StatusOr<std::unique_ptr<Backend>> CreateCudaBackend(const Model& model,
                                                           const CudaBackendOptions& options);

// OK when `device` can run this backend; otherwise why not, as CreateCudaBackend would say it.
absl::Status CheckCudaDevice(int32_t device);

}  // namespace mmfree

#endif  // MMFREE_SERVER_BACKENDS_CUDA_CUDA_BACKEND_H_
