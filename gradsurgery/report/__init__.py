"""What a surgery saw and did, once (SurgeryReport) and over a run (History)."""

from gradsurgery.report.history import History
from gradsurgery.report.summary import SurgeryReport

__all__ = ["History", "SurgeryReport"]
