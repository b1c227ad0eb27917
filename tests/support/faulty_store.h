// FaultyStore: a decorator that injects faults into another store, to test what callers do about
// them. Thread-safe.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "store/object_store.h"

namespace pewter::testing {

// Which calls fail, counted from 1 over the store's whole life; 0 means never.
struct Faults {
  // This ReadInto fails with `read_error` (once), before a byte is read.
  int64_t fail_read = 0;
  absl::Status read_error = absl::UnavailableError("injected: read failed");
  // This ReadInto finds only half of its bytes: DataLoss.
  int64_t short_read = 0;
  // Appends fail with ResourceExhausted, as on a full disk, once this many bytes were written; < 0
  // means never.
  int64_t disk_bytes = -1;
  // This Commit fails with `commit_error`.
  int64_t fail_commit = 0;
  absl::Status commit_error = absl::DataLossError("injected: fsync failed");
};

class FaultyStore final : public ObjectStore {
 public:
  FaultyStore(std::shared_ptr<ObjectStore> store, Faults faults);

  int64_t reads() const { return reads_; }

  absl::StatusOr<ObjectStat> Stat(absl::string_view key) override;
  absl::Status ReadInto(absl::string_view key, int64_t offset, absl::Span<std::byte> out) override;
  absl::StatusOr<std::vector<ObjectEntry>> List(absl::string_view prefix) override;
  absl::Status Remove(absl::string_view key) override;
  absl::StatusOr<std::unique_ptr<ObjectWriter>> Create(absl::string_view key) override;
  absl::StatusOr<std::unique_ptr<ObjectWriter>> CreateNew(absl::string_view key) override;
  std::string Describe(absl::string_view key) const override;

 private:
  class Writer;

  const std::shared_ptr<ObjectStore> store_;
  const Faults faults_;
  std::atomic<int64_t> reads_ = 0;
  std::atomic<int64_t> commits_ = 0;
  std::atomic<int64_t> written_ = 0;
};

}  // namespace pewter::testing
