"""What the diffusion detectors share. Parts that know no network come first: schedule, samplers, noise."""
