"""`python -m wsi_anomaly`."""
