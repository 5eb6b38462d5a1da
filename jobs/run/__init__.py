"""What jobs share: command-line parsing, progress, configuration, run folders, checkpoints, the log, training."""
