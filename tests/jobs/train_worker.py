"""Trains in a process of its own, which the tests kill: config.json, run folder, new or resume."""

import sys
from pathlib import Path

from jobs.pretrain import pretrain
from jobs.run.config import load_config

if __name__ == "__main__":
    config, run, how = sys.argv[1:]
    overwrite = how == "new" and (Path(run) / "config.json").is_file()
    pretrain(load_config(Path(config)), Path(run), resume=how == "resume", overwrite=overwrite)
