"""The Large Reconstruction Model (arXiv 2311.04400): loader, model, trainer. Never imports bpy or ray."""
