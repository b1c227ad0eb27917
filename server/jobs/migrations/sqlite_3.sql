-- Projects take turns (project_policy.h), and jobs have deadlines. Within a project jobs start by
-- `queue_rank`, highest first: QueueRank of job_rules.h. Jobs of earlier versions are of the default
-- project, and rank by priority and number.
ALTER TABLE jobs ADD COLUMN project TEXT NOT NULL DEFAULT 'default';
ALTER TABLE jobs ADD COLUMN queue_rank INTEGER NOT NULL DEFAULT 0;
ALTER TABLE jobs ADD COLUMN created_ms INTEGER NOT NULL DEFAULT 0;
ALTER TABLE jobs ADD COLUMN claimed_ms INTEGER NOT NULL DEFAULT 0;
-- When the job fails unless it has left its state by then.
ALTER TABLE jobs ADD COLUMN deadline_ms INTEGER NOT NULL DEFAULT 9223372036854775807;
UPDATE jobs SET queue_rank = priority * 60000;
CREATE INDEX jobs_queue_by_rank ON jobs (project, queue_rank DESC, number) WHERE state = 1;
CREATE INDEX jobs_queue_by_priority ON jobs (project, priority DESC, number) WHERE state = 1;
CREATE INDEX jobs_held ON jobs (project) WHERE state IN (2, 3, 4);
CREATE INDEX jobs_claimed ON jobs (project, claimed_ms) WHERE claimed_ms > 0;
CREATE INDEX jobs_queue_deadline ON jobs (deadline_ms) WHERE state = 1;
