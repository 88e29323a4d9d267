"""Packed weights: fitting them, putting them into models, keeping them on disk."""
