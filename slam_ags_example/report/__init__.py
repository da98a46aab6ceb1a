"""The report of a finished run: one self-contained HTML file."""

from slam_ags_example.report.page import write_report

__all__ = ["write_report"]
