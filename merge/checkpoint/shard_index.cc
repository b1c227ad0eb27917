#include "merge/checkpoint/shard_index.h"

#include <nlohmann/json.hpp>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "merge/checkpoint/json_error.h"
#include "merge/checkpoint/printable.h"

namespace pewter {
namespace {

using Json = nlohmann::json;

// Keeps weight_map alone and skips whatever else the file holds, at any depth.
class IndexHandler final : public nlohmann::json_sax<Json> {
 public:
  explicit IndexHandler(ShardIndex& index) : index_(index) {}
  const absl::Status& status() const { return failure_; }
  bool seen_weight_map() const { return seen_weight_map_; }

  bool start_object(size_t) override {
    if (!Value(depth_ == 0 || (depth_ == 1 && in_weight_map_))) return false;
    ++depth_;
    return true;
  }
  bool end_object() override {
    if (--depth_ == 1) in_weight_map_ = false;
    return true;
  }
  bool key(string_t& key) override {
    if (depth_ == 1) {
      in_weight_map_ = key == "weight_map";
      if (in_weight_map_ && std::exchange(seen_weight_map_, true)) {
        return Fail("duplicate key \"weight_map\"");
      }
    } else if (depth_ == 2 && in_weight_map_) {
      auto [entry, added] = index_.file_of.try_emplace(std::move(key));
      if (!added) return Fail(absl::StrCat("duplicate key ", Printable(entry->first)));
      entry_ = &*entry;
    }
    return true;
  }
  bool string(string_t& value) override {
    if (depth_ != 2 || !in_weight_map_) return Value(false);
    if (value.empty() || absl::StrContains(value, '/') || absl::StrContains(value, '\\') ||
        absl::StrContains(value, absl::string_view("\0", 1)) || value == "." || value == "..") {
      return Fail(absl::StrCat("tensor ", Printable(entry_->first), " is said to lie in ",
                               Printable(value), ", which is not a file of this folder"));
    }
    entry_->second = std::move(value);
    return true;
  }
  bool start_array(size_t) override {
    if (!Value(false)) return false;
    ++depth_;
    return true;
  }
  bool end_array() override {
    --depth_;
    return true;
  }
  bool null() override { return Value(false); }
  bool boolean(bool) override { return Value(false); }
  bool number_integer(number_integer_t) override { return Value(false); }
  bool number_unsigned(number_unsigned_t) override { return Value(false); }
  bool number_float(number_float_t, const string_t&) override { return Value(false); }
  bool binary(binary_t&) override { return Value(false); }
  bool parse_error(size_t position, const std::string&, const Json::exception& error) override {
    return Fail(JsonErrorText(position, error.what()));
  }

 private:
  bool Fail(absl::string_view what) {
    if (failure_.ok()) failure_ = absl::DataLossError(what);
    return false;
  }
  // A value that is not a file name: fine outside weight_map, or where `object_expected`.
  bool Value(bool object_expected) {
    if (object_expected) return true;
    if (depth_ == 0) return Fail("it is not a JSON object");
    if (!in_weight_map_) return true;
    return Fail("weight_map must map tensor names to file names");
  }

  ShardIndex& index_;
  absl::Status failure_;
  int64_t depth_ = 0;
  bool in_weight_map_ = false;
  bool seen_weight_map_ = false;
  std::pair<const std::string, std::string>* entry_ = nullptr;
};

}  // namespace

absl::StatusOr<ShardIndex> ParseShardIndex(absl::string_view json) {
  // The JSON library takes a NUL for the end of the text.
  if (json.find('\0') != absl::string_view::npos) return absl::DataLossError("NUL byte in it");
  ShardIndex index;
  IndexHandler handler(index);
  if (!Json::sax_parse(json.begin(), json.end(), &handler)) return handler.status();
  if (!handler.seen_weight_map()) return absl::DataLossError("it has no weight_map");
  return index;
}

}  // namespace pewter
