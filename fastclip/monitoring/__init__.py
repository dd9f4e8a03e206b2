"""What a monitor is made of: the record of a step, its way to the host, the flags, and the sinks."""

from fastclip.monitoring.flags import FlagRules
from fastclip.monitoring.records import FORMAT, VERSION, StepRecord

__all__ = ["FORMAT", "VERSION", "FlagRules", "StepRecord"]
