"""Section 4.2.2 of the BN paper: Inception and its variants, Figures 2 and 3."""
