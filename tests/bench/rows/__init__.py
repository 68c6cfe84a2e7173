"""One file per row of the benchmark table; the threads of peers are set here, before any of them is imported."""
