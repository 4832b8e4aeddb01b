"""`python -m wsi_anomaly`."""

from wsi_anomaly.cli import main

if __name__ == "__main__":
    main()
