// What fuzzers share: an object in memory, and a check that ends the program.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/string_view.h"
#include "store/object_store.h"

namespace pewter::fuzz {

inline void Require(bool condition) {
  if (!condition) abort();
}

// One object in memory.
class MemoryStore final : public ObjectStore {
 public:
  explicit MemoryStore(absl::string_view content) : content_(content) {}
  absl::StatusOr<ObjectStat> Stat(absl::string_view) override {
    return ObjectStat{.size = static_cast<int64_t>(content_.size())};
  }
  absl::Status ReadInto(absl::string_view, int64_t offset, absl::Span<std::byte> out) override {
    Require(offset >= 0 && offset + out.size() <= content_.size());  // never past the end
    std::memcpy(out.data(), content_.data() + offset, out.size());
    return absl::OkStatus();
  }
  absl::StatusOr<std::vector<ObjectEntry>> List(absl::string_view) override { abort(); }
  absl::Status Remove(absl::string_view) override { abort(); }
  absl::StatusOr<std::unique_ptr<ObjectWriter>> Create(absl::string_view) override { abort(); }
  absl::StatusOr<std::unique_ptr<ObjectWriter>> CreateNew(absl::string_view) override { abort(); }
  std::string Describe(absl::string_view key) const override { return std::string(key); }

 private:
  const absl::string_view content_;
};

}  // namespace pewter::fuzz
