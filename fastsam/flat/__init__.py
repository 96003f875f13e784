"""One flat index space over many parameters, and memory that is flat itself."""
