"""Bundles: opened and checked, their manifest, and the safetensors files in them."""
