"""The embedded world: coloured shapes, an exact oracle, and the tiny models that are trained on them."""
