"""What happens around the steps: measuring, planning, saving, showing."""

from seqzoo.train.callbacks.checkpointing import Checkpointing as Checkpointing
from seqzoo.train.callbacks.metering import Metering as Metering
from seqzoo.train.callbacks.planning import StepsFromMinutes as StepsFromMinutes
from seqzoo.train.callbacks.progress import ProgressDisplay as ProgressDisplay
