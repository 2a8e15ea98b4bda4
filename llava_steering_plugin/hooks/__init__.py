"""Where the maths of a mode meets a model: token maps, the scope they live in, and hooks on layers and linears."""
