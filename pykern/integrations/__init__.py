"""Adapters to other packages. They register with them and never patch them; each imports its package on its own."""
