"""The command line: parse and print, decide nothing."""

from wsi_anomaly.cli.app import main

__all__ = ["main"]
