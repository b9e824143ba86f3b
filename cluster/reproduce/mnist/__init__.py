"""Section 4.1 of the BN paper: the MNIST net, and Figure 1."""
