"""One transformer block at a time: cut out, run, differentiated and learned."""
