"""The experiments of AdaMod's paper, at a laptop's size and at the paper's."""
