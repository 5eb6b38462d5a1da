"""Small real inputs that the rooms' tests share."""

import os

from jobs.run.process import wait_briefly

# Before torch and its friends start their pools: the suite runs on few, shared cores.
wait_briefly(os.environ)
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
