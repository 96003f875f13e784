"""The tables of the F-SAM and Eigen-SAM papers, run again: ``python -m benchmarks.papers --list``."""
