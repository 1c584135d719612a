"""Bytes and rows, for everybody: pictures, tables, prompt sets, labels, preference shards. Imports nothing of ours."""
