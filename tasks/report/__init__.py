"""The page of a cycle and its charts."""
