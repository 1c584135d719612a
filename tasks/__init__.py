"""One reusable Prefect task a module: input and output, resume, progress and artifacts around the libraries."""
