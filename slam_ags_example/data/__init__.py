"""Where patches come from: sources, the decoded images of a manifest, and batches of them."""

from slam_ags_example.data.batching import batches
from slam_ags_example.data.check import check_images
from slam_ags_example.data.images import ImageSet, open_images
from slam_ags_example.data.opening import open_source
from slam_ags_example.data.source import PatchSource

__all__ = [
    "ImageSet",
    "PatchSource",
    "batches",
    "check_images",
    "open_images",
    "open_source",
]
