"""What the package ships to be tried on without a network: scenes, a small ViT, planted artifacts."""
