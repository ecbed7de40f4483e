"""Models to compile: real ones from registry packages, and small random ones of every architecture."""
