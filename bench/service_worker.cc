// What bench/service.py has pewterd start for each job (--worker-program): it hands the job over to
// the load client, whose thread then speaks the worker's protocol, and lives until that is done. So
// the server starts, watches and reaps a process for each job, but no merge takes the cores.
//
// Of pewterd's arguments it reads `--job ID --server ADDRESS`.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

int main(int argc, char** argv) {
  const char* job = nullptr;
  const char* server = nullptr;
  for (int i = 1; i + 1 < argc; ++i) {
    if (strcmp(argv[i], "--job") == 0) job = argv[i + 1];
    if (strcmp(argv[i], "--server") == 0) server = argv[i + 1];
  }
  const char* const token = getenv("PEWTER_JOB_TOKEN");
  const char* const path = getenv("PEWTER_LOAD_SOCKET");
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  if (job == nullptr || server == nullptr || token == nullptr || path == nullptr ||
      strlen(path) >= sizeof address.sun_path) {
    fprintf(stderr, "%s: started by bench/service.py, not by hand\n", argv[0]);
    return 2;
  }
  strcpy(address.sun_path, path);
  const int load = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
  if (connect(load, reinterpret_cast<sockaddr*>(&address), sizeof address) != 0) {
    perror("no load client");
    return 1;
  }
  char message[512];
  const int size = snprintf(message, sizeof message, "%s %s %s\n", job, token, server);
  if (size >= static_cast<int>(sizeof message) || write(load, message, size) != size) return 1;
  char end;
  return read(load, &end, 1) == 0 ? 0 : 1;
}
