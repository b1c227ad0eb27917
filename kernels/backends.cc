#include "kernels/backends.h"

#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "base/status.h"
#include "kernels/cpu/cpu_backend.h"
#include "kernels/cuda/cuda_backend.h"

namespace pewter::kernels {

std::string Device::ToString() const { return cuda ? absl::StrCat("cuda:", ordinal) : "cpu"; }

absl::StatusOr<Device> ResolveDevice(absl::string_view text) {
  if (text == "cpu") return Device{};
  if (text == "auto") {
    const absl::StatusOr<int> devices = cuda::DeviceCount();
    return Device{.cuda = devices.ok() && *devices > 0};
  }
  absl::string_view rest = text;
  Device device = {.cuda = true};
  if (!absl::ConsumePrefix(&rest, "cuda") ||
      (!rest.empty() && (!absl::ConsumePrefix(&rest, ":") ||
                         !absl::SimpleAtoi(rest, &device.ordinal) || device.ordinal < 0))) {
    return absl::InvalidArgumentError(
        absl::StrCat("device `", text, "`: want auto, cpu, cuda or cuda:N"));
  }
  const absl::StatusOr<int> devices = cuda::DeviceCount();
  if (!devices.ok()) return Annotate(devices.status(), absl::StrCat("device ", text));
  if (device.ordinal >= *devices) {
    return absl::FailedPreconditionError(absl::StrCat("device ", text, ": this machine has ",
                                                      *devices, *devices == 1 ? " GPU" : " GPUs",
                                                      "; --device cpu runs without"));
  }
  return device;
}

absl::StatusOr<std::unique_ptr<Backend>> OpenBackend(const Device& device, int threads) {
  if (device.cuda) return cuda::OpenBackend(device.ordinal);
  return cpu::MakeBackend(*cpu::Tables()[0], threads);
}
absl::StatusOr<std::unique_ptr<Backend>> OpenBackend(const Device& device,
                                                     std::shared_ptr<ThreadPool> pool) {
  if (device.cuda) return cuda::OpenBackend(device.ordinal);
  return cpu::MakeBackend(*cpu::Tables()[0], std::move(pool));
}

}  // namespace pewter::kernels
