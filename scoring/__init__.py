"""Images and captions in, numbers out: scorers, pairing rules and the statistics of an evaluation.

Knows nothing of files it did not get a path to, of orchestration, or of the model being trained. Importing
this package or any of its modules loads numpy at most; torch, transformers and open_clip are loaded by the
scorer that needs them.
"""
