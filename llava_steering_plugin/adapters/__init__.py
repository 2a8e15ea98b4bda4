"""Adapters: their settings, their modules on a model, and the folder that they are saved in."""
