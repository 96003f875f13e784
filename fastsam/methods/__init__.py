"""One method a file: its mathematics in the docstring, its recipe underneath."""
