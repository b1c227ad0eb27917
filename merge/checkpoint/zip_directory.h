// The directory of a ZIP archive, ZIP64 included: where its entries lie in the file.
//
//   for each entry   local header | bytes
//   directory        a record for each entry
//   [ZIP64 end and its locator] end
//
// https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT (4.3). Strict where readers differ:
// nothing may lie before the archive or after its end, the local headers must say what the
// directory says, and no name may be there twice.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "store/object_store.h"

namespace pewter {

struct ZipEntry {
  std::string name;  // UTF-8 or not, as it is stored
  bool compressed = false;
  int64_t offset = 0;  // of its bytes, from the start of the file
  int64_t bytes = 0;   // as stored; within the file
  uint32_t crc32 = 0;  // of what it unpacks to
};

// In the directory's order. DataLoss for anything malformed, FailedPrecondition for encrypted
// entries and archives of several files.
absl::StatusOr<std::vector<ZipEntry>> ReadZipDirectory(ObjectStore& store, absl::string_view key,
                                                       int64_t file_size);

}  // namespace pewter
