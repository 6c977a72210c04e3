"""Section 4.2 of the paper: the Inception network and its batch-normalized variants."""
