"""Commands around scorers: accuracy, benchmark, contract, conversion."""
