"""``so8t train`` with shards on CPU processes, which accelerate leaves unsharded unless it takes them for GPUs."""

from accelerate.state import PartialState
from accelerate.utils import DistributedType
from transformers import Trainer

from so8t_torch.cli import main

real = Trainer.create_accelerator_and_postprocess


def sharded(self):
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    real(self)


if __name__ == "__main__":
    Trainer.create_accelerator_and_postprocess = sharded
    main()
