#include "client/output.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_split.h"

namespace pewter::client {

namespace {

void Write(FILE* stream, absl::string_view text) {
  std::fwrite(text.data(), 1, text.size(), stream);
}

std::string Dump(const Json& value) {
  // File names need not be UTF-8: such bytes are replaced, which dump() would throw on.
  return value.dump(2, ' ', false, Json::error_handler_t::replace) + "\n";
}

// The length of "FILE:LINE:COLUMN:" where a message begins with it, else 0.
size_t PlaceBytes(absl::string_view line) {
  const size_t end = line.find(": ");
  if (end == absl::string_view::npos) return 0;
  const std::vector<absl::string_view> parts = absl::StrSplit(line.substr(0, end), ':');
  int number = 0;
  const size_t count = parts.size();
  const bool place = count >= 3 && !parts[0].empty() &&
                     absl::SimpleAtoi(parts[count - 1], &number) &&
                     absl::SimpleAtoi(parts[count - 2], &number);
  return place ? end + 1 : 0;
}

}  // namespace

void Output::Text(absl::string_view text) { Write(stdout, text); }

void Output::Print(const Json& value) { Write(stdout, Dump(value)); }

void Output::Note(absl::string_view message) {
  if (!quiet() && !json()) Write(stderr, absl::StrCat("note: ", message, "\n"));
}

void Output::Warn(absl::string_view message) {
  if (!json()) Write(stderr, absl::StrCat("warning: ", message, "\n"));
}

void Output::Error(const absl::Status& status, int exit_code) {
  // Results that were printed before stand before the error when both streams are one.
  std::fflush(stdout);
  if (json()) {
    Write(stderr, Dump({{"error",
                         {{"code", absl::StatusCodeToString(status.code())},
                          {"message", std::string(status.message())},
                          {"exit_code", exit_code}}}}));
  } else {
    std::string text;
    for (const absl::string_view line : absl::StrSplit(status.message(), '\n')) {
      const size_t place = absl::IsInvalidArgument(status) ? PlaceBytes(line) : 0;
      if (place > 0) {
        absl::StrAppend(&text, line.substr(0, place), " error:", line.substr(place), "\n");
      } else {
        absl::StrAppend(&text, text.empty() ? "error: " : "", line, "\n");
      }
    }
    Write(stderr, text);
  }
}

bool Output::Flush() { return std::fflush(stdout) == 0 && std::ferror(stdout) == 0; }

Table::Table(std::vector<std::string> header) : right_(header.size(), false) {
  rows_.push_back(std::move(header));
}

Table& Table::RightAlign(int column) {
  right_[column] = true;
  return *this;
}

void Table::Add(std::vector<std::string> row) {
  row.resize(right_.size());
  rows_.push_back(std::move(row));
}

std::string Table::ToString() const {
  std::vector<int> widths(right_.size(), 0);
  for (const auto& row : rows_) {
    for (size_t i = 0; i < row.size(); ++i) widths[i] = std::max(widths[i], DisplayWidth(row[i]));
  }
  std::string text;
  for (const auto& row : rows_) {
    std::string line;
    for (size_t i = 0; i < row.size(); ++i) {
      const std::string padding(widths[i] - DisplayWidth(row[i]), ' ');
      if (i > 0) line += "  ";
      line += right_[i] ? padding + row[i] : row[i] + padding;
    }
    line.erase(line.find_last_not_of(' ') + 1);
    text += line + "\n";
  }
  return text;
}

std::string FormatCount(int64_t count) {
  std::string digits = absl::StrCat(count);
  const int first = count < 0 ? 1 : 0;
  for (int at = static_cast<int>(digits.size()) - 3; at > first; at -= 3) digits.insert(at, 1, ',');
  return digits;
}

std::string FormatCount(int64_t count, absl::string_view noun) {
  return absl::StrCat(FormatCount(count), " ", noun, count == 1 ? "" : "s");
}

std::string FormatSeconds(double seconds) {
  if (!(seconds >= 0)) return "?";
  if (seconds < 9.95) return absl::StrFormat("%.1f s", seconds);
  const int64_t whole = std::llround(seconds);
  if (whole < 60) return absl::StrCat(whole, " s");
  if (whole < 3600) return absl::StrFormat("%d:%02d", whole / 60, whole % 60);
  return absl::StrFormat("%d:%02d:%02d", whole / 3600, whole / 60 % 60, whole % 60);
}

std::string FormatRate(double bytes_per_second) {
  if (!(bytes_per_second >= 0)) return "?";
  constexpr const char* kUnits[] = {"B", "kB", "MB", "GB", "TB"};
  size_t unit = 0;
  while (bytes_per_second >= 999.5 && unit + 1 < std::size(kUnits)) {
    bytes_per_second /= 1000;
    ++unit;
  }
  const bool one_digit = unit > 0 && bytes_per_second < 9.95;
  return one_digit ? absl::StrFormat("%.1f %s/s", bytes_per_second, kUnits[unit])
                   : absl::StrFormat("%.0f %s/s", bytes_per_second, kUnits[unit]);
}

int DisplayWidth(absl::string_view text) {
  return static_cast<int>(std::count_if(text.begin(), text.end(), [](char c) {
    return (static_cast<unsigned char>(c) & 0xC0) != 0x80;  // not a continuation byte
  }));
}

std::string Wrap(absl::string_view text, int width, int indent) {
  const std::string margin(indent, ' ');
  std::string result;
  int column = 0;
  for (absl::string_view word : absl::StrSplit(text, ' ', absl::SkipEmpty())) {
    const int length = DisplayWidth(word);
    if (column > 0 && column + 1 + length > width) {
      result += "\n";
      column = 0;
    }
    absl::StrAppend(&result, column == 0 ? margin : " ", word);
    column += (column == 0 ? indent : 1) + length;
  }
  return result + "\n";
}

}  // namespace pewter::client
