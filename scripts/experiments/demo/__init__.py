"""Break the colours of a small LLaVA's camera, and teach it the new colours with MoReS."""
