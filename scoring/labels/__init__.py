"""From scores to labels: expressions of scorers, pairing rules, soft labels."""
