"""The two operations that touch anything of size D: `gram` and `combine`."""

from gradsurgery.kernels._dispatch import combine, gram, relative_error

__all__ = ["combine", "gram", "relative_error"]
