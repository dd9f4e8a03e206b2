"""What keeps a model from training: :func:`check` measures a few passes and says it in plain sentences."""

from fastclip.doctor.checking import check
from fastclip.doctor.diagnosis import Diagnosis, DoctorError, Finding

__all__ = ["Diagnosis", "DoctorError", "Finding", "check"]
