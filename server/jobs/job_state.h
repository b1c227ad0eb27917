// The life of a job as one table. Every change of a state, in every store, goes through IsAllowed.
#pragma once

#include "pewter/v1/job.pb.h"

namespace pewter::server {

struct StateChange {
  v1::JobState from;
  v1::JobState to;
};

inline constexpr StateChange kStateChanges[] = {
    // The way of a job that succeeds.
    {v1::JOB_STATE_QUEUED, v1::JOB_STATE_PLANNING},
    {v1::JOB_STATE_PLANNING, v1::JOB_STATE_RUNNING},
    {v1::JOB_STATE_RUNNING, v1::JOB_STATE_PUBLISHING},
    {v1::JOB_STATE_PUBLISHING, v1::JOB_STATE_SUCCEEDED},
    // The attempt was given up and another one follows.
    {v1::JOB_STATE_PLANNING, v1::JOB_STATE_QUEUED},
    {v1::JOB_STATE_RUNNING, v1::JOB_STATE_QUEUED},
    {v1::JOB_STATE_PUBLISHING, v1::JOB_STATE_QUEUED},
    // By a deadline, or in a worker's hands.
    {v1::JOB_STATE_QUEUED, v1::JOB_STATE_FAILED},
    {v1::JOB_STATE_PLANNING, v1::JOB_STATE_FAILED},
    {v1::JOB_STATE_RUNNING, v1::JOB_STATE_FAILED},
    {v1::JOB_STATE_PUBLISHING, v1::JOB_STATE_FAILED},
    // A client wants it no more.
    {v1::JOB_STATE_QUEUED, v1::JOB_STATE_CANCELLED},
    {v1::JOB_STATE_PLANNING, v1::JOB_STATE_CANCELLED},
    {v1::JOB_STATE_RUNNING, v1::JOB_STATE_CANCELLED},
    {v1::JOB_STATE_PUBLISHING, v1::JOB_STATE_CANCELLED},
};

constexpr bool IsAllowed(v1::JobState from, v1::JobState to) {
  for (const StateChange& change : kStateChanges) {
    if (change.from == from && change.to == to) return true;
  }
  return false;
}

// Final states never change.
constexpr bool IsFinal(v1::JobState state) {
  return state == v1::JOB_STATE_SUCCEEDED || state == v1::JOB_STATE_FAILED ||
         state == v1::JOB_STATE_CANCELLED;
}

// States in which a worker holds the job.
constexpr bool IsHeld(v1::JobState state) {
  return state == v1::JOB_STATE_PLANNING || state == v1::JOB_STATE_RUNNING ||
         state == v1::JOB_STATE_PUBLISHING;
}

// The next state on the way of a job that succeeds.
constexpr v1::JobState NextState(v1::JobState state) {
  switch (state) {
    case v1::JOB_STATE_QUEUED:
      return v1::JOB_STATE_PLANNING;
    case v1::JOB_STATE_PLANNING:
      return v1::JOB_STATE_RUNNING;
    case v1::JOB_STATE_RUNNING:
      return v1::JOB_STATE_PUBLISHING;
    case v1::JOB_STATE_PUBLISHING:
      return v1::JOB_STATE_SUCCEEDED;
    default:
      return v1::JOB_STATE_UNSPECIFIED;
  }
}

}  // namespace pewter::server
