#include "server/random_token.h"

#include <unistd.h>

#include <cstdlib>

#include "absl/strings/escaping.h"

namespace pewter::server {

std::string RandomHex(int bytes) {
  std::string raw(bytes, '\0');
  // Fails only for more than 256 bytes or on a kernel without getrandom. There is nothing to fall
  // back to.
  if (getentropy(raw.data(), raw.size()) != 0) abort();
  return absl::BytesToHexString(raw);
}

bool SecretsEqual(absl::string_view a, absl::string_view b) {
  if (a.size() != b.size()) return false;
  unsigned char difference = 0;
  for (size_t i = 0; i < a.size(); ++i) difference |= a[i] ^ b[i];
  return difference == 0;
}

}  // namespace pewter::server
