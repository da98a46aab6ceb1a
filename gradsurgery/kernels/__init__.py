"""The two operations that touch anything of size D: `gram` and `combine`."""

from gradsurgery.kernels._dispatch import combine, gram, resolution

__all__ = ["combine", "gram", "resolution"]
