"""One file per row of the benchmark table: NUMBER, TITLE and `cases(scale)`."""
