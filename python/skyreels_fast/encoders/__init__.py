"""What the transformer is told: prompts through UMT5, images through CLIP."""
