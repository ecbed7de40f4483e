"""What targets for GPUs share: threads for loops, source in the GPU's language, a plan of launches, and who follows it."""
