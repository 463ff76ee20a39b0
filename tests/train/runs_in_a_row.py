"""Several runs, one after another, in the processes of one launch: ``runs_in_a_row.py train CONFIG CONFIG …``."""

import sys

from so8t_torch.core.config import load_config
from so8t_torch.train.config import TrainConfig
from so8t_torch.train.run import run_training

if __name__ == "__main__":
    for path in sys.argv[2:]:
        run_training(load_config(TrainConfig, path))
