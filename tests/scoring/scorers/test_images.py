"""How pictures reach a scorer: grouped by size, as arrays."""

import numpy as np
import torch

from scoring.scorers.images import as_arrays, by_size


def test_images_are_grouped_by_size_and_keep_their_rows(images: list[np.ndarray]) -> None:
    mixed = [images[0], images[1], images[0][::-1], images[2]]
    groups = by_size(mixed)
    assert [rows for rows, _ in groups] == [[0, 2], [1], [3]]
    for rows, batch in groups:
        np.testing.assert_array_equal(as_arrays(batch), [mixed[row] for row in rows])
    tensor = torch.zeros(3, 3, 4, 5, dtype=torch.uint8)
    assert [(rows, batch is tensor) for rows, batch in by_size(tensor)] == [([0, 1, 2], True)]
