"""Arrays in, arrays out: no file, no slide, no device, no plug-in is known here."""
