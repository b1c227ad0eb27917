-- Projects take turns (project_policy.h), and jobs have deadlines. Within a project jobs start by
-- `queue_rank`, highest first: QueueRank of job_rules.h. Jobs of earlier versions are of the default
-- project, and rank by priority and number.
ALTER TABLE pewter_jobs
  ADD COLUMN project TEXT NOT NULL DEFAULT 'default',
  ADD COLUMN queue_rank BIGINT NOT NULL DEFAULT 0,
  ADD COLUMN created_ms BIGINT NOT NULL DEFAULT 0,
  ADD COLUMN claimed_ms BIGINT NOT NULL DEFAULT 0,
  -- When the job fails unless it has left its state by then.
  ADD COLUMN deadline_ms BIGINT NOT NULL DEFAULT 9223372036854775807;
UPDATE pewter_jobs SET queue_rank = priority * 60000;
CREATE INDEX pewter_jobs_queue_by_rank ON pewter_jobs (project, queue_rank DESC, number) WHERE state = 1;
CREATE INDEX pewter_jobs_queue_by_priority ON pewter_jobs (project, priority DESC, number) WHERE state = 1;
CREATE INDEX pewter_jobs_held_by_project ON pewter_jobs (project) WHERE state IN (2, 3, 4);
CREATE INDEX pewter_jobs_claimed ON pewter_jobs (project, claimed_ms) WHERE claimed_ms > 0;
CREATE INDEX pewter_jobs_queue_deadline ON pewter_jobs (deadline_ms) WHERE state = 1;
