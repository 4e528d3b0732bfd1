"""Training of the embedded prior: networks, data pool and the training stages (autoencoder, denoiser, probe)."""
