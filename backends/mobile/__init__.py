"""Packages for phones: a program, its parameters, and what an app needs to build against them."""
