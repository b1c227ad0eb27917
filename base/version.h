// Pewter's version: printed by both binaries, written into manifests.
#pragma once

namespace pewter {

inline constexpr char kVersion[] = "0.1.0";

}  // namespace pewter
