"""What lies on disk: where it lies, what it means, and that it is whole."""
