"""Logits of training steps on disk: captured from the chunked loss, written in the background, read back and drawn."""

from so8t_torch.train.logits.record import LogitsRecord
from so8t_torch.train.logits.recorder import LogitsRecorder

__all__ = ["LogitsRecord", "LogitsRecorder"]
