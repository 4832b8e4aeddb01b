"""Keywords of a tile: image-text models, keyword lists and the weighted prompts made of them. Sees tiles, no slides."""
