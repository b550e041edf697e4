"""Exported models: one module a format."""
