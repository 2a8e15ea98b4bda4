"""SmolLM2 and an ImageNet encoder become a small LLaVA: stage 1 on real pictures, beside one on shuffled pictures."""
