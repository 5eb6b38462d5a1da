"""What ends a run that did nothing wrong in its command line."""


class TrainingFailedError(RuntimeError):
    """Training cannot go on; the message says why, at which step or where, and what to go on from. Exit code 1."""


class RankLostError(TrainingFailedError):
    """Another process of the job is gone, for a reason that it knows better."""
