"""Connect a mode to a model: token maps, the scope that holds them, and hooks on decoder layers and linears."""
