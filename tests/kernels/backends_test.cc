// Names of devices and the CPU backend's memory.
#include <fstream>

#include "tests/kernels/under_test.h"

namespace pewter::kernels {
namespace {

TEST(ResolveDeviceTest, TakesTheCpuByName) {
  const absl::StatusOr<Device> device = ResolveDevice("cpu");
  ASSERT_TRUE(device.ok());
  EXPECT_EQ(device->ToString(), "cpu");
  const absl::StatusOr<std::unique_ptr<Backend>> backend = OpenBackend(*device, 2);
  ASSERT_TRUE(backend.ok());
  EXPECT_EQ((*backend)->name(), "cpu");
  EXPECT_THAT((*backend)->description(), testing::HasSubstr("2 threads"));
  EXPECT_TRUE((*backend)->host_memory());
}

TEST(ResolveDeviceTest, RefusesOtherWords) {
  for (const char* text : {"", "gpu", "cuda:", "cuda:x", "cuda:-1", "cuda1", "CPU", "cuda:1:2"}) {
    EXPECT_EQ(ResolveDevice(text).status().code(), absl::StatusCode::kInvalidArgument) << text;
  }
}

TEST(ResolveDeviceTest, AutoIsADeviceThatOpens) {
  const absl::StatusOr<Device> device = ResolveDevice("auto");
  ASSERT_TRUE(device.ok());
  EXPECT_TRUE(OpenBackend(*device, 1).ok());
}

TEST(ResolveDeviceTest, CudaOpensOrSaysWhyNot) {
  const absl::StatusOr<Device> device = ResolveDevice("cuda");
  if (device.ok()) {
    EXPECT_EQ(device->ToString(), "cuda:0");
    EXPECT_EQ(OpenBackend(*device, 1).value()->name(), "cuda:0");
  } else {
    EXPECT_EQ(device.status().code(), absl::StatusCode::kFailedPrecondition);
    EXPECT_THAT(std::string(device.status().message()), testing::StartsWith("device cuda: "));
  }
  EXPECT_EQ(ResolveDevice("cuda:4096").status().code(), absl::StatusCode::kFailedPrecondition);
}

class MemoryTest : public BackendTest {};

TEST_P(MemoryTest, CopiesBothWaysAndWithin) {
  for (int64_t size : {0, 1, 1000, 5'000'000}) {
    std::vector<std::byte> bytes(size);
    for (int64_t i = 0; i < size; ++i) bytes[i] = static_cast<std::byte>(i * 7);
    DeviceBytes a(backend(), bytes), b(backend(), std::vector<std::byte>(size));
    ASSERT_TRUE(backend().Copy(a.data(), b.data(), size).ok());
    EXPECT_EQ(b.Fetch(), bytes);
  }
}

TEST_P(MemoryTest, HostBuffersAreAligned) {
  for (int64_t size : {int64_t{1}, int64_t{100}, int64_t{3} << 20}) {
    const std::unique_ptr<Buffer> buffer = backend().AllocateHost(size).value();
    EXPECT_EQ(reinterpret_cast<uintptr_t>(buffer->data()) % 64, 0u);
    EXPECT_EQ(buffer->bytes(), size);
    std::memset(buffer->data(), 1, size);
  }
}

TEST_P(MemoryTest, TooMuchIsAnError) {
  EXPECT_EQ(backend().Allocate(int64_t{1} << 60).status().code(),
            absl::StatusCode::kResourceExhausted);
}

INSTANTIATE_ON_BACKENDS(MemoryTest);

}  // namespace
}  // namespace pewter::kernels
