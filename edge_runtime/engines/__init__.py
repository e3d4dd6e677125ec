"""The engines of this package: `registry` lists them, `program` says what each has."""
