// Secret: text that must not reach a log, an error, a recipe or a manifest. It has no operator<<
// and converts to nothing, so that showing it takes a call whose name stands out in a review.
#pragma once

#include <string>
#include <utility>

namespace pewter {

class Secret {
 public:
  Secret() = default;
  explicit Secret(std::string text) : text_(std::move(text)) {}
  bool empty() const { return text_.empty(); }
  const std::string& Reveal() const { return text_; }
  friend bool operator==(const Secret& a, const Secret& b) { return a.text_ == b.text_; }

 private:
  std::string text_;
};

}  // namespace pewter
