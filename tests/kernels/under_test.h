// The backends that kernel tests run on: the CPU with each instruction set that this machine has,
// the CPU with threads, and CUDA. A test that needs a GPU is skipped with the reason where there is
// none; with PEWTER_REQUIRE_CUDA=1 it fails instead.
#pragma once

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "kernels/backends.h"
#include "kernels/cpu/cpu_backend.h"

namespace pewter::kernels {

inline std::vector<std::string> BackendNames() {
  std::vector<std::string> names;
  for (const cpu::KernelTable* table : cpu::Tables()) names.push_back(table->isa);
  names.push_back("threads");
  names.push_back("cuda");
  return names;
}

// Parameterized by BackendNames(); backend() is open in each test.
class BackendTest : public testing::TestWithParam<std::string> {
 protected:
  void SetUp() override {
    if (GetParam() == "cuda") {
      const absl::StatusOr<Device> device = ResolveDevice("cuda");
      if (!device.ok()) {
        const char* required = std::getenv("PEWTER_REQUIRE_CUDA");
        if (required != nullptr && std::strcmp(required, "1") == 0) {
          FAIL() << "PEWTER_REQUIRE_CUDA=1, but " << device.status();
        }
        GTEST_SKIP() << device.status();
      }
      absl::StatusOr<std::unique_ptr<Backend>> backend = OpenBackend(*device, 1);
      ASSERT_TRUE(backend.ok()) << backend.status();
      backend_ = *std::move(backend);
    } else if (GetParam() == "threads") {
      backend_ = cpu::MakeBackend(*cpu::Tables()[0], 3);
    } else {
      for (const cpu::KernelTable* table : cpu::Tables()) {
        if (GetParam() == table->isa) backend_ = cpu::MakeBackend(*table, 1);
      }
    }
    ASSERT_NE(backend_, nullptr);
  }

  Backend& backend() { return *backend_; }

 private:
  std::unique_ptr<Backend> backend_;
};

#define INSTANTIATE_ON_BACKENDS(Suite)                                             \
  INSTANTIATE_TEST_SUITE_P(Backends, Suite,                                        \
                           ::testing::ValuesIn(::pewter::kernels::BackendNames()), \
                           [](const auto& info) { return info.param; })

// Bytes in a backend's memory, filled from and compared with host bytes.
class DeviceBytes {
 public:
  DeviceBytes(Backend& backend, const std::vector<std::byte>& host) : backend_(backend) {
    absl::StatusOr<std::unique_ptr<Buffer>> buffer =
        backend.Allocate(static_cast<int64_t>(host.size()));
    EXPECT_TRUE(buffer.ok()) << buffer.status();
    if (!buffer.ok()) return;
    buffer_ = *std::move(buffer);
    const absl::Status status =
        backend.Upload(host.data(), buffer_->data(), static_cast<int64_t>(host.size()));
    EXPECT_TRUE(status.ok()) << status;
    EXPECT_TRUE(backend.Synchronize().ok());
  }

  std::byte* data() { return static_cast<std::byte*>(buffer_->data()); }
  std::vector<std::byte> Fetch() {
    std::vector<std::byte> host(buffer_->bytes());
    absl::Status status = backend_.Synchronize();
    if (status.ok()) status = backend_.Download(data(), host.data(), buffer_->bytes());
    if (status.ok()) status = backend_.Synchronize();
    EXPECT_TRUE(status.ok()) << status;
    return host;
  }

 private:
  Backend& backend_;
  std::unique_ptr<Buffer> buffer_;
};

}  // namespace pewter::kernels
