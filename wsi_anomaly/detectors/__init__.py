"""Detectors: plug-ins that learn normal tiles and score others. They see tiles, never slides, folders or each other."""
