"""Parameters spread over processes, and the other processes."""
