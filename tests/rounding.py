"""How far apart float32 may put two computations of one number, on any processor: tolerances that follow from a bound.

AVX-512, AVX2 and SSE kernels add in other orders, and so do two batch sizes on one machine; what a test may ask is what
rounding leaves, not what one machine happens to give.
"""

import math

UNIT = 2.0**-24
"""The largest relative error of one float32 operation."""
SURE = 6.0
"""Standard deviations that a tolerance allows for: one comparison in 500 million goes beyond by chance."""


def relative(terms: int) -> float:
    """Standard deviation of the relative rounding error of a mean of `terms` squares, or of another sum of one sign.

    Rounding errors behave as independent random numbers of mean zero (Higham and Mary 2019, doi:10.1137/18M1226312),
    evenly spread over [-u, u] at worst: u / sqrt(3) each. A term passes about log2(terms) additions, for kernels add
    in blocks; difference, square (the difference's error twice) and division add four. The predictions' own errors have
    mixed signs: the mean divides what they do by sqrt(terms).
    """
    return UNIT * math.sqrt((math.log2(terms) + 4) / 3)


def of_errors(error: float, terms: int) -> float:
    """By how much two computations of mean squared errors, each of `terms` elements and at most `error`, may differ."""
    return SURE * math.sqrt(2) * error * relative(terms)


def of_margins(kappa: float, error: float, terms: int, errors: int = 4) -> float:
    """By how much two computations of a margin h = -kappa * D may differ; D is a sum or difference of so many errors.

    The factor kappa is the point: errors of size 1 are known to 1e-7, and kappa 1000 makes that 1e-4 of a logit. A loss
    of slope s = |dloss/dh| differs by s times as much.
    """
    return kappa * math.sqrt(errors) * of_errors(error, terms)


def of_networks(size: float, layers: int, terms: int = 256) -> float:
    """By how much two computations of a network's outputs, at most `size` large, may differ.

    Each of `layers` sums of so many terms adds an error of its own to the one it is given, and neither damps it.
    """
    return SURE * math.sqrt(2 * layers) * size * relative(terms)


def of_cosines(layers: int, width: int) -> float:
    """By how much two computations of a cosine of two embeddings may differ, each from a network of `layers` layers.

    The errors of an embedding point anywhere: of their length the other embedding sees 1 / sqrt(width).
    """
    return of_networks(1.0, 2 * layers) / math.sqrt(width)
