"""A study: methods x witness rates x seeds, a run in each cell, and what the cells say together."""

from slam_ags_example.study.execute import run_study
from slam_ags_example.study.grid import Study
from slam_ags_example.study.rows import Row
from slam_ags_example.study.tables import failures, tables

__all__ = ["Row", "Study", "failures", "run_study", "tables"]
