"""What targets for GPUs share: threads for loops, source in its language, a plan of launches, and who follows it."""
