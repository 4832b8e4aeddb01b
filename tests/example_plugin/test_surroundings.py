from wsi_anomaly_surroundings import Surroundings

from wsi_anomaly.testing import DetectorContract


class TestSurroundings(DetectorContract):
    """Set small, so that it learns within a second or two."""

    detector = Surroundings(training={"max_epochs": 4, "learning_rate": 0.02})
    tile_px = 32
