"""Imports of checkpoints of other programs, exports for diffusers, and latents of autoencoders."""
