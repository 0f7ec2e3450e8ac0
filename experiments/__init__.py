"""The evidence: the paper's experiments and those that ask what it does not."""
