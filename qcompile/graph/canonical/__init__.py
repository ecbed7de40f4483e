"""Recognisers of spelled-out operators. Each module rewrites one family to one spelling."""
