#include "tests/support/faulty_store.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "base/status.h"

namespace pewter::testing {

class FaultyStore::Writer final : public ObjectWriter {
 public:
  Writer(FaultyStore& store, std::string name, std::unique_ptr<ObjectWriter> writer)
      : store_(store), name_(std::move(name)), writer_(std::move(writer)) {}

  absl::Status Append(absl::Span<const std::byte> bytes) override {
    const int64_t size = static_cast<int64_t>(bytes.size());
    const int64_t limit = store_.faults_.disk_bytes;
    if (limit >= 0 && (store_.written_ += size) > limit) {
      return absl::ResourceExhaustedError(
          absl::StrCat("cannot write ", name_, ": injected: the disk is full"));
    }
    return writer_->Append(bytes);
  }

  absl::Status Commit() override {
    if (++store_.commits_ == store_.faults_.fail_commit) {
      return Annotate(store_.faults_.commit_error, name_);
    }
    return writer_->Commit();
  }

 private:
  FaultyStore& store_;
  const std::string name_;
  const std::unique_ptr<ObjectWriter> writer_;
};

FaultyStore::FaultyStore(std::shared_ptr<ObjectStore> store, Faults faults)
    : store_(std::move(store)), faults_(std::move(faults)) {}

absl::StatusOr<ObjectStat> FaultyStore::Stat(absl::string_view key) { return store_->Stat(key); }

absl::Status FaultyStore::ReadInto(absl::string_view key, int64_t offset,
                                   absl::Span<std::byte> out) {
  const int64_t read = ++reads_;
  if (read == faults_.fail_read) return Annotate(faults_.read_error, Describe(key));
  if (read == faults_.short_read) {
    RETURN_IF_ERROR(store_->ReadInto(key, offset, out.subspan(0, out.size() / 2)));
    return absl::DataLossError(absl::StrCat(Describe(key), ": injected: ends too early"));
  }
  return store_->ReadInto(key, offset, out);
}

absl::StatusOr<std::vector<ObjectEntry>> FaultyStore::List(absl::string_view prefix) {
  return store_->List(prefix);
}

absl::Status FaultyStore::Remove(absl::string_view key) { return store_->Remove(key); }

absl::StatusOr<std::unique_ptr<ObjectWriter>> FaultyStore::Create(absl::string_view key) {
  ASSIGN_OR_RETURN(std::unique_ptr<ObjectWriter> writer, store_->Create(key));
  return std::make_unique<Writer>(*this, Describe(key), std::move(writer));
}

absl::StatusOr<std::unique_ptr<ObjectWriter>> FaultyStore::CreateNew(absl::string_view key) {
  ASSIGN_OR_RETURN(std::unique_ptr<ObjectWriter> writer, store_->CreateNew(key));
  return std::make_unique<Writer>(*this, Describe(key), std::move(writer));
}

std::string FaultyStore::Describe(absl::string_view key) const { return store_->Describe(key); }

}  // namespace pewter::testing
