"""Integer-only programs: the proof that no float is left in them and that nothing in them overflows."""
