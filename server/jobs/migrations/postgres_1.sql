-- `spec` and `status` are serialised pewter.v1.Job messages that hold what never changes (the
-- request, id, create_time) and what does; appended to each other they are the job. The other
-- columns repeat what is searched for. States are the numbers of pewter.v1.JobState. Texts of
-- clients are BYTEA: they may hold what a database's encoding does not.
CREATE TABLE pewter_jobs (
  number          BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
  id              TEXT NOT NULL UNIQUE,
  request_id      TEXT UNIQUE,
  request_digest  TEXT NOT NULL,
  destination_key TEXT NOT NULL,  -- SHA-256 of it: an index takes no 4 KiB
  priority        BIGINT NOT NULL,
  state           BIGINT NOT NULL,
  server          TEXT NOT NULL DEFAULT '',
  lease_expiry    TIMESTAMPTZ NOT NULL DEFAULT '-infinity',
  not_before      TIMESTAMPTZ NOT NULL DEFAULT '-infinity',
  spec            BYTEA NOT NULL,
  status          BYTEA NOT NULL
);
-- At most one job that is not final writes a destination.
CREATE UNIQUE INDEX pewter_jobs_active_destination ON pewter_jobs (destination_key) WHERE state < 5;
CREATE INDEX pewter_jobs_queue ON pewter_jobs (priority DESC, number) WHERE state = 1;
CREATE INDEX pewter_jobs_held ON pewter_jobs (lease_expiry) WHERE state IN (2, 3, 4);

CREATE TABLE pewter_labels (
  job   BIGINT NOT NULL REFERENCES pewter_jobs (number) ON DELETE CASCADE,
  key   BYTEA NOT NULL,
  value BYTEA NOT NULL,
  PRIMARY KEY (job, key)
);
CREATE INDEX pewter_labels_by_value ON pewter_labels (key, value, job);

CREATE TABLE pewter_events (
  job      BIGINT NOT NULL REFERENCES pewter_jobs (number) ON DELETE CASCADE,
  sequence BIGINT NOT NULL,
  event    BYTEA NOT NULL,
  PRIMARY KEY (job, sequence)
);
