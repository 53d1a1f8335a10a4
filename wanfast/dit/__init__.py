"""The diffusion transformer: weights as data, and the functions that turn latents into a velocity."""
