"""The mathematics: differences, denoising, selection, sparse optimisation. Needs torch and safetensors only."""
