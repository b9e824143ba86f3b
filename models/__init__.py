"""Networks, batch normalization and the flat buffers that a parameter server deals in.

Import from the modules themselves:

- `models.batchnorm`: the layer (Algorithms 1 and 2); `models.reference`: the paper's own equations.
- `models.moments`: statistics of activations that merge across mini-batches.
- `models.layers`: blocks `g(BN(Wu))`; `models.mlp`: the MNIST network of section 4.1.
- `models.layout`, `models.flat`: a model as one buffer of weights and one of gradients.
- `models.fold`: batch normalization folded into the layer before it, for inference.
- `models.registry`: a model from its name.

Nothing here knows of replicas, servers, data or Ray.
"""
