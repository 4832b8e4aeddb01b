"""Which structures a slide of a lymph node can show, and how fine their map is. Knows no cells, no colours."""

from enum import IntEnum

MAP_STEP_PX = 8
"""Level-0 pixels for each pixel of the map."""


class Structure(IntEnum):
    """Kinds of places on a slide."""

    GLASS = 0
    FAT = 1
    CAPSULE = 2
    TRABECULA = 3
    SUBCAPSULAR_SINUS = 4
    TRABECULAR_SINUS = 5
    MEDULLARY_SINUS = 6
    MEDULLARY_CORD = 7
    PARACORTEX = 8
    PRIMARY_FOLLICLE = 9
    MANTLE_ZONE = 10
    GERMINAL_CENTRE = 11
    VESSEL_WALL = 12
    BLOOD = 13
    HIGH_ENDOTHELIAL_VENULE = 14
    TUMOUR_NEST = 15
    TUMOUR_GLAND = 16
    GLAND_LUMEN = 17
    TUMOUR_STROMA = 18
    CLEFT = 19
    LONE_TUMOUR_CELLS = 20
    NECROSIS = 21
    NUCLEAR_DUST = 22
    FIBROSIS = 23
    MUCIN = 24

    @property
    def is_abnormal(self) -> bool:
        """Whether no normal slide has it."""
        return self >= Structure.TUMOUR_NEST
