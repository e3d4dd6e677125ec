"""What a device installs: NumPy, one engine, an HTTP client; never torch."""
