"""What jobs share: command line, terminal, configuration, data, run folders, checkpoints, metrics, processes."""
