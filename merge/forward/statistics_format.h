// The names in a statistics file (statistics.h), for its reader and its writer.
#pragma once

#include <string>

#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"

namespace pewter {

inline constexpr char kStatisticsFormat[] = "pewter-statistics-1";
inline constexpr char kStatisticsFormatKey[] = "format";
inline constexpr char kStatisticsModelsKey[] = "models";
inline constexpr char kStatisticsSitesKey[] = "sites";
inline constexpr char kStatisticsDataKey[] = "data";

inline std::string CountName(absl::string_view site) { return absl::StrCat(site, ".count"); }
inline std::string SumName(absl::string_view site, int i) { return absl::StrCat(site, ".sum.", i); }
inline std::string SquareName(absl::string_view site, int i) {
  return absl::StrCat(site, ".square.", i);
}
inline std::string GramName(absl::string_view site, int i, int j) {
  return absl::StrCat(site, ".gram.", i, ".", j);
}

}  // namespace pewter
