"""What ``slam-ags`` and ``python -m slam_ags_example`` start."""

from slam_ags_example.cli import main

__all__ = ["main"]

if __name__ == "__main__":
    raise SystemExit(main())
