-- Which server holds a job, and until when a job that lost its worker waits.
ALTER TABLE jobs ADD COLUMN server TEXT NOT NULL DEFAULT '';
ALTER TABLE jobs ADD COLUMN not_before_ms INTEGER NOT NULL DEFAULT 0;
