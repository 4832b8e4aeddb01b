"""One file a step. A stage reads named outputs and writes one; it never imports another stage."""
