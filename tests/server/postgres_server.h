// PostgresServer: a PostgreSQL of its own for a test program. It starts with the first test that
// asks for it and dies with the program.
//
// The programs are those of Debian's postgresql-15, or of $PEWTER_POSTGRES (a folder). Without them
// tests are skipped, and say so.
#pragma once

#include <string>

namespace pewter::server {

class PostgresServer {
 public:
  // Null when there is no server; `why` says what is missing.
  static PostgresServer* Get(std::string& why);

  // Of a new schema that is empty.
  std::string MakeDatabase();
  // Runs statements as the owner; the first column of the first row, if any.
  std::string Run(const std::string& url, const std::string& sql);

  // As `pg_ctl stop -m immediate` does: no connection is ended in order.
  void Stop();
  void Start();

  int port() const { return port_; }

 private:
  PostgresServer() = default;
  std::string programs_;
  std::string data_;
  int port_ = 0;
};

}  // namespace pewter::server
