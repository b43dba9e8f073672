"""Work outside training, in parallel workers: `jobs.recluster` clusters a checkpoint, `jobs.remap` rewrites a log."""
