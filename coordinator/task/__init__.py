"""What an operator asks for, and how it is made of bundles and data."""
