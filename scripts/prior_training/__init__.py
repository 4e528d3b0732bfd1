"""Training of the embedded prior: networks, data pool and the three training stages (autoencoder, denoiser, probe)."""
