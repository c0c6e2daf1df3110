#include "server/backends/cuda/gpu_monitor.h"

#include <cuda_runtime.h>
#include <dlfcn.h>

#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "server/backends/cuda/cuda_raii.h"
#include "server/base/status_macros.h"

namespace mmfree {
namespace {

// The part of NVML's C interface that is used, as its reference manual documents it: the header is
// not part of every toolkit installation.
using NvmlReturn = int;
using NvmlDevice = void*;
constexpr NvmlReturn kNvmlSuccess = 0;
struct NvmlMemory {
  unsigned long long total;
  unsigned long long free;
  unsigned long long used;
};
struct NvmlUtilization {
  unsigned int gpu;  // percent
  unsigned int memory;
};

// Loaded and initialised once, kept to the end of the process.
class Nvml {
 public:
  static const absl::StatusOr<const Nvml*>& Get() {
    static const absl::StatusOr<const Nvml*>* const nvml =
        new absl::StatusOr<const Nvml*>([]() -> absl::StatusOr<const Nvml*> {
          auto loaded = std::make_unique<Nvml>();
          MMFREE_RETURN_IF_ERROR(loaded->Load());
          return loaded.release();
        }());
    return *nvml;
  }

  const char* (*error_string)(NvmlReturn) = nullptr;
  NvmlReturn (*init)() = nullptr;
  NvmlReturn (*handle_by_pci_bus_id)(const char*, NvmlDevice*) = nullptr;
  NvmlReturn (*memory_info)(NvmlDevice, NvmlMemory*) = nullptr;
  NvmlReturn (*utilization_rates)(NvmlDevice, NvmlUtilization*) = nullptr;
  NvmlReturn (*power_usage)(NvmlDevice, unsigned int*) = nullptr;                     // milliwatts
  NvmlReturn (*total_energy_consumption)(NvmlDevice, unsigned long long*) = nullptr;  // millijoules

 private:
  absl::Status Load() {
    void* const library = dlopen("libnvidia-ml.so.1", RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) return absl::NotFoundError(absl::StrCat("no NVML: ", dlerror()));
    MMFREE_RETURN_IF_ERROR(Find(library, "nvmlErrorString", &error_string));
    MMFREE_RETURN_IF_ERROR(Find(library, "nvmlInit_v2", &init));
    MMFREE_RETURN_IF_ERROR(
        Find(library, "nvmlDeviceGetHandleByPciBusId_v2", &handle_by_pci_bus_id));
    MMFREE_RETURN_IF_ERROR(Find(library, "nvmlDeviceGetMemoryInfo", &memory_info));
    MMFREE_RETURN_IF_ERROR(Find(library, "nvmlDeviceGetUtilizationRates", &utilization_rates));
    MMFREE_RETURN_IF_ERROR(Find(library, "nvmlDeviceGetPowerUsage", &power_usage));
    MMFREE_RETURN_IF_ERROR(
        Find(library, "nvmlDeviceGetTotalEnergyConsumption", &total_energy_consumption));
    if (const NvmlReturn result = init(); result != kNvmlSuccess) {
      return absl::InternalError(absl::StrCat("NVML: nvmlInit_v2: ", error_string(result)));
    }
    return absl::OkStatus();
  }

  template <typename Function>
  static absl::Status Find(void* library, const char* name, Function* function) {
    *function = reinterpret_cast<Function>(dlsym(library, name));
    if (*function != nullptr) return absl::OkStatus();
    return absl::NotFoundError(absl::StrCat("NVML has no ", name, ": the driver is too old"));
  }
};

class NvmlMonitor final : public GpuMonitor {
 public:
  NvmlMonitor(const Nvml* nvml, NvmlDevice device, std::string name)
      : nvml_(nvml), device_(device), name_(std::move(name)) {}

  const std::string& name() const override { return name_; }

  GpuReading Read() const override {
    GpuReading reading;
    NvmlMemory memory = {};
    if (nvml_->memory_info(device_, &memory) == kNvmlSuccess) {
      reading.memory_used_bytes = static_cast<double>(memory.used);
      reading.memory_total_bytes = static_cast<double>(memory.total);
    }
    NvmlUtilization utilization = {};
    if (nvml_->utilization_rates(device_, &utilization) == kNvmlSuccess) {
      reading.utilization = utilization.gpu * 0.01;
    }
    unsigned int milliwatts = 0;
    if (nvml_->power_usage(device_, &milliwatts) == kNvmlSuccess) {
      reading.power_watts = milliwatts * 1e-3;
    }
    unsigned long long millijoules = 0;
    if (nvml_->total_energy_consumption(device_, &millijoules) == kNvmlSuccess) {
      reading.energy_joules = static_cast<double>(millijoules) * 1e-3;
    }
    return reading;
  }

 private:
  const Nvml* const nvml_;
  const NvmlDevice device_;
  const std::string name_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<GpuMonitor>> GpuMonitor::Open(int32_t device) {
  // Ordinals of CUDA and NVML differ (CUDA_VISIBLE_DEVICES, order); bus ids do not.
  char bus_id[32] = {};
  MMFREE_CUDA_RETURN_IF_ERROR(cudaDeviceGetPCIBusId(bus_id, sizeof(bus_id), device));
  cudaDeviceProp properties;
  MMFREE_CUDA_RETURN_IF_ERROR(cudaGetDeviceProperties(&properties, device));
  MMFREE_ASSIGN_OR_RETURN(const Nvml* const nvml, Nvml::Get());
  NvmlDevice handle = nullptr;
  if (const NvmlReturn result = nvml->handle_by_pci_bus_id(bus_id, &handle);
      result != kNvmlSuccess) {
    return absl::InternalError(
        absl::StrCat("NVML: device at PCI ", bus_id, ": ", nvml->error_string(result)));
  }
  return std::make_unique<NvmlMonitor>(nvml, handle, properties.name);
}

}  // namespace mmfree
