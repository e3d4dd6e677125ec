"""The engines of this package: `registry` lists them, `protocol` says what each has."""
