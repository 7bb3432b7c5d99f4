"""The BraTS vocabulary every part of the system agrees on: modalities, labels, regions, codings.

Inside the system a segmentation always holds 0 background, 1 NCR/NET, 2 ED, 3 ET. What a file on
disk uses for the same things (its *coding*) differs between BraTS years and is translated on
reading (`sites.volumes`) and on writing.
"""

from __future__ import annotations

MODALITIES = ("t1", "t1ce", "t2", "flair")
"""Channel order of every image tensor; a federation may use a subset, in this order."""

BACKGROUND, NCR, ED, ET = 0, 1, 2, 3
N_CLASSES = 4

STRUCTURES: dict[str, tuple[int, ...]] = {
    "ET": (ET,),
    "ED": (ED,),
    "NCR": (NCR,),
    "TC": (NCR, ET),
    "WT": (NCR, ED, ET),
}
"""What metrics are reported for: the labels ET/ED/NCR and the BraTS regions TC and WT.
As a label and as a region, ET is the same set of voxels."""

CODINGS: dict[str, dict[int, int]] = {
    "brats": {0: BACKGROUND, 1: NCR, 2: ED, 4: ET},  # 2017 to 2021
    "brats2023": {0: BACKGROUND, 1: NCR, 2: ED, 3: ET},  # 2023 onwards
    "brats2013": {0: BACKGROUND, 1: NCR, 2: ED, 3: NCR, 4: ET},  # 3 is NET; must be declared
    "msd": {0: BACKGROUND, 1: ED, 2: NCR, 3: ET},  # Medical Segmentation Decathlon Task01
}
"""File label -> system label. `auto` chooses between the first two from the labels present
(3 and 4 in one file are ambiguous); the others cannot be told from the data and are declared."""
