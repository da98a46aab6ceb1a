"""What each kind of cell looks like, in micrometres and amounts of stain, and its variation."""

from dataclasses import dataclass

__all__ = ["BYSTANDERS", "CLASSES", "Kind", "Range"]

Range = tuple[float, float]


@dataclass(frozen=True)
class Kind:
    """One kind of nucleated cell; a pair is the range that a cell's own value is drawn from.

    Attributes:
        diameter_um: of the cell.
        skew: shapes a and b of the beta distribution over ``diameter_um``.
        nc_ratio: nucleus to cytoplasm by area, a to 1: the nucleus has sqrt(a / (a + 1)) of the
            cell's diameter.
        lobes: lobes of the nucleus, 1 for a round one.
        indent: depth of the dent in a round nucleus, in parts of its radius.
        chromatin: amount of purple stain in the nucleus.
        clumping: contrast of coarse chromatin.
        grain: contrast of fine chromatin.
        nucleoli: number of them, from and to.
        blue: amount of blue stain (RNA) in the cytoplasm.
        pink: amount of eosin in the cytoplasm.
        granules: amount of purple stain in fine granules.
        halo: how far the blue fades beside the nucleus, 0 to 1.
        ragged: waviness of the outline.
    """

    diameter_um: Range
    skew: Range
    nc_ratio: Range
    lobes: tuple[int, int] = (1, 1)
    indent: Range = (0.0, 0.2)
    chromatin: Range = (0.9, 1.15)
    clumping: Range = (0.2, 0.4)
    grain: Range = (0.03, 0.1)
    nucleoli: tuple[int, int] = (0, 0)
    blue: Range = (0.6, 1.1)
    pink: Range = (0.0, 0.1)
    granules: Range = (0.0, 0.0)
    halo: Range = (0.0, 0.0)
    ragged: Range = (0.25, 0.6)


_SMALL_LYMPHOCYTE = Kind(
    diameter_um=(7, 10),
    skew=(3, 1.5),
    nc_ratio=(2, 5),
    indent=(0.0, 0.1),
    chromatin=(0.95, 1.3),
    clumping=(0.2, 0.38),
    blue=(0.55, 1.2),
    halo=(0.0, 0.3),
)
_LARGE_LYMPHOCYTE = Kind(
    diameter_um=(9, 15),
    skew=(2.6, 1.5),
    nc_ratio=(1.1, 3.0),
    indent=(0.0, 0.3),
    chromatin=(0.85, 1.15),
    clumping=(0.16, 0.34),
    blue=(0.3, 0.9),
    halo=(0.0, 0.3),
    ragged=(0.4, 1.0),
)
_BLAST = Kind(
    diameter_um=(12, 20),
    skew=(1.2, 3.2),
    nc_ratio=(6, 7),
    indent=(0.0, 0.3),
    chromatin=(0.72, 1.1),
    clumping=(0.02, 0.08),
    grain=(0.06, 0.13),
    nucleoli=(2, 6),
    blue=(1.2, 2.1),
    halo=(0.5, 0.9),
    ragged=(0.2, 0.6),
)
# The specification gives no morphology for the kinds below: they follow common atlas knowledge
# and stand beside the labelled cells only, alike for every class.
_SEGMENTED = Kind(
    diameter_um=(11, 15),
    skew=(2, 2),
    nc_ratio=(0.75, 1.2),
    lobes=(3, 4),
    chromatin=(1.1, 1.4),
    clumping=(0.2, 0.4),
    blue=(0.05, 0.2),
    pink=(0.3, 0.7),
    granules=(0.08, 0.25),
)
_MYELOCYTE = Kind(
    diameter_um=(13, 18),
    skew=(2, 2),
    nc_ratio=(0.9, 1.6),
    indent=(0.0, 0.6),
    chromatin=(0.85, 1.1),
    clumping=(0.12, 0.28),
    grain=(0.05, 0.12),
    blue=(0.2, 0.7),
    pink=(0.25, 0.6),
    granules=(0.12, 0.45),
)
_ERYTHROBLAST = Kind(
    diameter_um=(8, 12),
    skew=(2, 2),
    nc_ratio=(0.8, 1.6),
    indent=(0.0, 0.05),
    chromatin=(1.2, 1.5),
    clumping=(0.15, 0.4),
    blue=(0.3, 1.0),
    pink=(0.2, 0.6),
)

CLASSES: dict[str, tuple[tuple[float, Kind], ...]] = {
    "LYT": ((0.35, _SMALL_LYMPHOCYTE), (0.65, _LARGE_LYMPHOCYTE)),
    "BLA": ((1.0, _BLAST),),
}
BYSTANDERS: tuple[tuple[float, Kind], ...] = (
    (0.28, _SEGMENTED),
    (0.32, _MYELOCYTE),
    (0.22, _ERYTHROBLAST),
    (0.06, _SMALL_LYMPHOCYTE),
    (0.12, _LARGE_LYMPHOCYTE),
)
