-- `spec` and `status` are serialised pewter.v1.Job messages that hold what never changes
-- (the request, id, create_time) and what does; appended to each other they are the job. The other
-- columns repeat what is searched for. States are the numbers of pewter.v1.JobState.
CREATE TABLE jobs (
  number          INTEGER PRIMARY KEY AUTOINCREMENT,
  id              TEXT NOT NULL UNIQUE,
  request_id      TEXT UNIQUE,
  request_digest  TEXT NOT NULL,
  destination_key TEXT NOT NULL,
  priority        INTEGER NOT NULL,
  state           INTEGER NOT NULL,
  lease_expiry_ms INTEGER NOT NULL DEFAULT 0,
  spec            BLOB NOT NULL,
  status          BLOB NOT NULL
);
-- At most one job that is not final writes a destination.
CREATE UNIQUE INDEX jobs_active_destination ON jobs (destination_key) WHERE state < 5;
CREATE INDEX jobs_active ON jobs (state, priority DESC, number) WHERE state < 5;

CREATE TABLE labels (
  job   INTEGER NOT NULL REFERENCES jobs (number) ON DELETE CASCADE,
  key   TEXT NOT NULL,
  value TEXT NOT NULL,
  PRIMARY KEY (job, key)
) WITHOUT ROWID;
CREATE INDEX labels_by_value ON labels (key, value, job);

CREATE TABLE events (
  job      INTEGER NOT NULL REFERENCES jobs (number) ON DELETE CASCADE,
  sequence INTEGER NOT NULL,
  event    BLOB NOT NULL,
  PRIMARY KEY (job, sequence)
) WITHOUT ROWID;
