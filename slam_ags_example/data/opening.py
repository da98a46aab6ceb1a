"""From the text of ``--data`` to a source."""

import difflib
from pathlib import Path

from slam_ags_example.config import InputError
from slam_ags_example.data.embedded import digits_source, synthetic_source
from slam_ags_example.data.folder import folder_source
from slam_ags_example.data.source import PatchSource

__all__ = ["open_source"]

_EMBEDDED = {"synthetic": synthetic_source, "digits": digits_source}


def open_source(data: str) -> PatchSource:
    """Open a source of patches; a folder is listed, and no image is decoded.

    Args:
        data: ``"synthetic"``: marrow smears drawn by ``slam_ags_example.smears``, 200,000 LYT and
            50,000 BLA of seed 0, 30 µm wide at any size in pixels. ``"digits"``: the 1797
            handwritten digits, 8x8, that scikit-learn ships. Otherwise a folder with a subfolder
            for each class, such as Bone Marrow Cytomorphology (DOI 10.7937/TCIA.AXH3-T579) as
            distributed, or the folder above it.

    Raises:
        InputError: no such folder, or no images in it.
    """
    if data in _EMBEDDED:
        return _EMBEDDED[data]()
    if not Path(data).is_dir():
        near = difflib.get_close_matches(data, _EMBEDDED, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise InputError(
            f"--data must be {', '.join(_EMBEDDED)} or a folder that is there, got {data!r}{hint}"
        )
    return folder_source(data)
