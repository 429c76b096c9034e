"""Imports of checkpoints, exports for diffusers and the hub, and latents of autoencoders."""
