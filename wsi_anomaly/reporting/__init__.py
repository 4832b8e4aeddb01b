"""What people and other programs look at: pictures and QuPath files, made from arrays."""
